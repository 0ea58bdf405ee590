"""The yaml file of an original model (`v1-inference.yaml`): what it says that tensors do not show.

Read as data alone: no tags, no anchors, nothing is imported, whatever its `target`s say. Its `image_size` is not taken:
it is 16 for instruct-pix2pix and the same for both of SD 2, whose images are of other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastldm.config import MAX_CHANNELS, Reader
from fastldm.errors import ConfigError, FileError, brief
from fastldm.weights.families import REFINER, SD1, SD2, SDXL, Family

MAX_YAML = 1 << 16  # bytes; the published ones have 4 KiB, the parser takes seconds for 1 MiB
REFINER_NUMBERS = 2560  # the width of what the refiner reads beside the text
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}  # the original's names -> the hub's


@dataclass(frozen=True)
class Original:
    """where: the file's name. The others hold what it says, in the hub's keys; `shown` is checked, not taken."""

    where: str
    family: Family | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    heads: int | None = None
    head_dim: int | None = None
    scaling_factor: float | None = None
    shown: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, component: str, data: dict[str, Any]) -> dict[str, Any]:
        """`data`, told from tensors, with what the file says. Raises `ConfigError` where it contradicts a tensor."""
        data = dict(data)
        if component == "unet":
            for key, value in self.shown.items():
                if data[key] != value:
                    reason = f"the tensors say {data[key]}"
                    raise ConfigError(f"{self.where}: {key} = {value}: {reason}", field=f"{self.where}: {key}")
            if self.heads is not None or self.head_dim is not None:
                data["attention_head_dim"] = [self._heads(c) for c in data["block_out_channels"]]
        elif component == "vae" and self.scaling_factor is not None:
            data["scaling_factor"] = self.scaling_factor
        return data

    def _heads(self, channels: int) -> int:
        if self.heads is not None:
            return self.heads
        assert self.head_dim is not None
        return max(channels // self.head_dim, 1)


def original_config(raw: bytes, where: str) -> Original:
    """Raises `FileError` for what is no yaml, `ConfigError` naming the key for a value out of range."""
    from fastldm.weights.strict_yaml import strict_yaml

    if len(raw) > MAX_YAML:
        raise FileError(f"{where}: has {len(raw)} bytes; at most {MAX_YAML} are allowed")
    model = _child(Reader(strict_yaml(raw, where), where), "model")
    params = _child(model, "params")
    unet_key = "unet_config" if "unet_config" in params.data else "network_config"
    unet = _child(_child(params, unet_key), "params")
    unet.fixed(
        use_scale_shift_norm=(False,),
        resblock_updown=(False,),
        conv_resample=(True,),
        dims=(2,),
        use_spatial_transformer=(True, False),
    )
    heads = unet.integer("num_heads", -1, MAX_CHANNELS, -1)
    head_dim = unet.integer("num_head_channels", -1, MAX_CHANNELS, -1)
    return Original(
        where,
        family=_family(params),
        scheduler=_scheduler(params),
        heads=heads if heads > 0 and head_dim <= 0 else None,
        head_dim=head_dim if head_dim > 0 else None,
        scaling_factor=params.number("scale_factor", 1e-4, 1e4, None),
        shown=_shown(unet),
    )


def _child(parent: Reader, key: str) -> Reader:
    value = parent.raw(key)
    name = f"{parent.where}: {key}"
    if not isinstance(value, dict):
        raise ConfigError(f"{name} = {brief(value)}: must be a mapping", field=name)
    return Reader(value, name)


def _shown(unet: Reader) -> dict[str, Any]:
    """What the tensors show, too."""
    said: dict[str, Any] = {
        "in_channels": unet.integer("in_channels", 1, 64, None),
        "out_channels": unet.integer("out_channels", 1, 64, None),
        "cross_attention_dim": _context_dim(unet),
    }
    channels = unet.integer("model_channels", 1, MAX_CHANNELS, None)
    mult = unet.integers("channel_mult", 1, 64, default=None)
    if channels is not None and mult is not None:
        said["block_out_channels"] = [channels * m for m in mult]
    return {key: value for key, value in said.items() if value is not None}


def _context_dim(unet: Reader) -> int | None:
    """One number, or as in the refiner's file the same one for each transformer."""
    dims = unet.integers("context_dim", 1, MAX_CHANNELS, default=None) if _is_list(unet, "context_dim") else None
    if dims is None:
        value = unet.integer("context_dim", 1, MAX_CHANNELS, None)
        return None if value is None else int(value)
    if len(set(dims)) > 1:
        raise unet.fail("context_dim", "must be the same for each transformer")
    return int(dims[0])


def _is_list(reader: Reader, key: str) -> bool:
    return isinstance(reader.raw(key, None), list)


def _scheduler(params: Reader) -> dict[str, Any]:
    said = {
        "beta_start": params.number("linear_start", 1e-8, 0.999, None),
        "beta_end": params.number("linear_end", 1e-8, 0.999, None),
        "num_train_timesteps": params.integer("timesteps", 1, 10_000, None),
        "beta_schedule": BETA_SCHEDULES.get(params.choice("beta_schedule", tuple(BETA_SCHEDULES), None) or ""),
        "prediction_type": _prediction_type(params),
    }
    return {key: value for key, value in said.items() if value is not None}


def _prediction_type(params: Reader) -> str | None:
    words = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if "parameterization" in params.data:
        return words[params.choice("parameterization", tuple(words))]
    if "unet_config" in params.data:
        return "epsilon"  # the default of the definition: v2-inference.yaml has no word of it
    if params.raw("denoiser_config", None) is None:
        return None
    config = _child(_child(params, "denoiser_config"), "params")
    target = str(_child(config, "scaling_config").raw("target"))
    scalings = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}
    if target.rpartition(".")[2] not in scalings:
        raise config.fail("scaling_config", f"{brief(target)} is not supported; supported: {', '.join(scalings)}")
    return scalings[target.rpartition(".")[2]]


def _family(params: Reader) -> Family | None:
    if "conditioner_config" in params.data:
        network = _child(_child(params, "network_config"), "params")
        return REFINER if network.raw("adm_in_channels", None) == REFINER_NUMBERS else SDXL
    encoder = params.raw("cond_stage_config", None)
    target = encoder.get("target") if isinstance(encoder, dict) else None
    classes = {"FrozenCLIPEmbedder": SD1, "FrozenOpenCLIPEmbedder": SD2}
    if not isinstance(target, str) or target.rpartition(".")[2] not in classes:
        return None
    family = classes[target.rpartition(".")[2]]
    _check_layer(_child(params, "cond_stage_config"), family)
    return family


def _check_layer(encoder: Reader, family: Family) -> None:
    """SD 1 reads the last layer of its text encoder, SD 2 the last but one; another would paint other images."""
    said = encoder.raw("params", None)
    layer = said.get("layer") if isinstance(said, dict) else None
    usual = "penultimate" if family is SD2 else "last"
    if layer not in (None, usual):
        raise encoder.fail("params", f"layer = {brief(layer)} is not supported, {usual!r} is")
