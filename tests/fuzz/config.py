"""The readers of the configurations, on any bytes: an `Error`, or a model that is built at once.

The first byte chooses the reader, the rest is the file.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastldm.config import MAX_BLOCKS, TextConfig, UNetConfig, VAEConfig, text_config, unet_config, vae_config
from fastldm.errors import ArgumentError, ConfigError, FileError
from fastldm.model.clip import TextEncoder
from fastldm.model.unet import UNet
from fastldm.model.vae import AutoencoderKL
from fastldm.sampling import SchedulerConfig, sampler_table, scheduler_config
from fastldm.sampling.config import CLASSES
from fastldm.weights.files import JSON_DEPTH
from fastldm.weights.strict import strict_json
from tests.fuzz.json_changes import changed, parsed, written
from tests.model import full_size

READERS: tuple[Callable[..., Any], ...] = (unet_config, vae_config, text_config, scheduler_config)
WHERE = "c.json"
SMALL_UNET = {
    **full_size.SD15_UNET,
    "block_out_channels": [8, 16],
    "attention_head_dim": [2, 4],
    "layers_per_block": [1, 2],
    "transformer_layers_per_block": [1, 2],
    "norm_num_groups": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL_VAE = {
    **full_size.SD15_VAE,
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "norm_num_groups": 4,
    "shift_factor": 0.1,
    "use_quant_conv": False,
    "latents_mean": None,
}
SMALL_TEXT = {**full_size.OPENCLIP_BIGG, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def seeds() -> list[bytes]:
    """The published configurations, a small one of each kind, and every scheduler's defaults."""
    schedulers = [{"_class_name": name, **defaults} for name, (_, defaults) in CLASSES.items()]
    unets = [full_size.SD15_INPAINTING_UNET, full_size.SD21_UNET, full_size.SDXL_UNET, SMALL_UNET]
    vaes = [full_size.SD15_VAE, full_size.SDXL_VAE, SMALL_VAE]
    texts = [full_size.CLIP_L, full_size.OPENCLIP_H, full_size.OPENCLIP_BIGG, SMALL_TEXT]
    groups = enumerate((unets, vaes, texts, schedulers))
    return [bytes([i]) + _text(data) for i, group in groups for data in group]


def _text(data: dict[str, Any]) -> bytes:
    """As JSON, without the infinity that is the default of a scheduler's key."""
    return json.dumps({key: value for key, value in data.items() if value != -float("inf")}).encode()


WORDS = sorted({v for seed in seeds() for v in seed.decode().split('"')[1::2]})


def mutated(data: bytes, rng: random.Random) -> bytes | None:
    """A few changes in the JSON; None where it is none."""
    try:
        value = parsed(data[1:].decode())
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            value = changed(value, rng, WORDS)
        return data[:1] + written(value).encode()
    except (ValueError, RecursionError, OverflowError):
        return None


def one_input(data: bytes) -> bool:
    """Whether the configuration was accepted. Asserts what must hold for it."""
    read = READERS[data[0] % len(READERS)] if data else READERS[0]
    start = time.thread_time()
    config, message = _read(read, data[1:])
    seconds = time.thread_time() - start
    assert seconds < 0.1 or len(data) > 1 << 16, f"{len(data)} bytes take {seconds} s"
    if config is None:
        assert message.startswith(WHERE), message
        assert message.isprintable(), message
        assert len(message) < 1000, message
        return False
    assert _read(read, data[1:])[0] == config
    _check_together(config)
    _check_built(config)
    return True


def _read(read: Callable[..., Any], data: bytes) -> tuple[Any, str]:
    try:
        return read(strict_json(data, WHERE, JSON_DEPTH), WHERE), ""
    except (ConfigError, FileError) as error:
        return None, str(error)


def _check_together(config: UNetConfig | VAEConfig | TextConfig | SchedulerConfig) -> None:
    """The numbers that have to fit each other do."""
    if isinstance(config, UNetConfig):
        levels = (*config.down, *config.up)
        assert len(config.down) == len(config.up), config
        assert not any(level.channels % level.heads or level.channels % config.groups for level in levels), config
        assert sum(level.layers * max(level.depth, 1) for level in levels) <= MAX_BLOCKS, config
    elif isinstance(config, VAEConfig):
        assert not any(c % config.groups for c in config.channels), config
        assert 0 < config.scaling_factor < float("inf"), config
    elif isinstance(config, TextConfig):
        assert config.width % config.heads == 0, config


def _check_built(config: UNetConfig | VAEConfig | TextConfig | SchedulerConfig) -> None:
    """What was accepted can be built, in bounded time and without memory."""
    start = time.thread_time()
    if isinstance(config, SchedulerConfig):
        _check_table(config)
    else:
        build = {UNetConfig: UNet, VAEConfig: AutoencoderKL, TextConfig: TextEncoder}[type(config)]
        with torch.device("meta"):
            build(config)  # type: ignore[arg-type]
    assert time.thread_time() - start < 3.0, config


def _check_table(config: SchedulerConfig) -> None:
    try:
        with np.errstate(all="ignore"):
            table = sampler_table(config, 3)
    except (ArgumentError, ConfigError):
        return
    for name, value in vars(table).items():
        if isinstance(value, np.ndarray) and name != "limit":
            assert np.isfinite(value).all(), (name, config)
    assert np.isfinite((*table.start, *table.start_from_image)).all(), config
    assert (table.limit > 0).all(), config
