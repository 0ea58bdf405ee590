"""What programs written for diffusers find on a pipeline, beside the call. Which names there are: `drop_in.py`."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from io import StringIO
from itertools import count
from threading import RLock
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
from torch import Tensor
from tqdm import tqdm

from fastldm import arguments, drop_in, request, text
from fastldm.arguments import Arguments, wrong
from fastldm.components import Decoding, TextEncoderView, TokenizerView, UNetView, VAEView, View, unwrapped
from fastldm.errors import ArgumentError, brief
from fastldm.hub_config import Config
from fastldm.image import numpy_to_pil
from fastldm.prompt import Tokenizer
from fastldm.request import Geometry
from fastldm.runtime.build import moved
from fastldm.runtime.engine import Engine
from fastldm.runtime.place import asked_device, destination
from fastldm.sampling import SchedulerConfig
from fastldm.sampling.choice import chosen
from fastldm.weights.families import SD1, TASKS


class Surface:
    """A pipeline without its call. Nothing of a call is kept here."""

    _engine: Engine
    _tokenizer: Tokenizer
    _scheduler: SchedulerConfig
    _decoding: Decoding
    _bar: dict[str, Any]
    _name: str | None

    # -------------------------------------------------------------------------------------------------- what it is

    @property
    def scheduler(self) -> SchedulerConfig:
        """The sampler and its numbers; `.config` is what diffusers' `X.from_config` takes.

        Assign a name of `fastldm.samplers()`, which keeps the model's betas and prediction type, a scheduler object of
        diffusers, or (its class, a configuration). It holds for the calls that follow.
        """
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: object) -> None:
        self._scheduler = chosen(value, self._scheduler)

    @property
    def unet(self) -> UNetView:
        return UNetView(lambda: self._engine)

    @property
    def vae(self) -> VAEView:
        return VAEView(lambda: self._engine, self._decoding)

    @property
    def text_encoder(self) -> TextEncoderView:
        return TextEncoderView(lambda: self._engine)

    @property
    def tokenizer(self) -> TokenizerView:
        return TokenizerView(self._tokenizer)

    safety_checker = feature_extractor = image_encoder = None
    requires_safety_checker = False

    @property
    def components(self) -> dict[str, Any]:
        """By name: `Pipeline(**pipe.components)` is another pipeline of the same weights."""
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", *_ABSENT)
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> Config:
        """As model_index.json has it."""
        unet = self._engine.unet.config
        task = TASKS[{0: 0, unet.out_channels: 4}.get(unet.in_channels - unet.out_channels, 5)]
        return Config(
            _class_name=SD1.classes[task],
            _name_or_path=self._name,
            vae=("diffusers", "AutoencoderKL"),
            text_encoder=("transformers", "CLIPTextModel"),
            tokenizer=("transformers", "CLIPTokenizer"),
            unet=("diffusers", "UNet2DConditionModel"),
            scheduler=("diffusers", self._scheduler.config["_class_name"]),
            **dict.fromkeys(_ABSENT, (None, None)),
            requires_safety_checker=False,
        )

    @property
    def name_or_path(self) -> str | None:
        """What was loaded; None where it was made of components."""
        return self._name

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and activations."""
        return self._engine.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a latent pixel, along one side."""
        return self._engine.vae.config.factor

    # -------------------------------------------------------------------------------------------------- where it is

    def to(self, *args: Any, **options: Any) -> Self:
        """Moves the model to a device, into a dtype, or both. A call that is under way goes on as it began.

        Raises `ArgumentError`, and `WeightsError` naming a tensor that is too large for the dtype.
        """
        device, dtype = destination(*args, **options)
        self._engine = moved(self._engine, dtype, device)
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **others: Any,
    ) -> None:
        """A new folder in diffusers' layout, of what runs now, whole or not at all; see `fastldm.save.save`."""
        from fastldm import save  # which brings all that converting models needs

        names = ("safe_serialization", "variant", "max_shard_size", "push_to_hub")
        drop_in.check_options({}, others, known=("save_directory", *names))
        save.save(
            self._engine,
            self._tokenizer,
            self._scheduler,
            save_directory,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            push_to_hub=push_to_hub,
        )

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Nothing is offloaded: the whole model goes to the GPU, if there is one."""
        self._whole_on_a_gpu("enable_model_cpu_offload", gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """As `enable_model_cpu_offload`."""
        self._whole_on_a_gpu("enable_sequential_cpu_offload", gpu_id, device)

    def enable_group_offload(self, onload_device: Any, **_: Any) -> None:
        """As `enable_model_cpu_offload`."""
        self._whole_on_a_gpu("enable_group_offload", None, onload_device)

    def _whole_on_a_gpu(self, name: str, gpu_id: int | None, device: Any) -> None:
        drop_in.tell(name)
        if torch.cuda.is_available():
            self.to(f"cuda:{gpu_id or 0}" if device is None or str(device) == "cuda" else device)

    def enable_vae_slicing(self, enabled: bool = True) -> None:
        """Decode one image of a batch at a time, with the memory of one. This is the default."""
        self._decoding.slicing = arguments.flag("enabled", enabled)

    def enable_vae_tiling(self, enabled: bool = True) -> None:
        """Decode large images in overlapping tiles of the autoencoder's size: little memory, slightly other pixels."""
        self._decoding.tiling = arguments.flag("enabled", enabled)

    def disable_vae_slicing(self) -> None:
        self.enable_vae_slicing(False)

    def disable_vae_tiling(self) -> None:
        self.enable_vae_tiling(False)

    # ----------------------------------------------------------------------------------------------- parts of a call

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings that a call makes of the same arguments: of the prompts, and of the negative ones.

        -> (prompts · num_images_per_prompt, tokens, width) each, on `device`; without do_classifier_free_guidance the
        second is what was given for it. Raises `ArgumentError` naming the argument.
        """
        if lora_scale not in (None, False):
            raise ArgumentError("lora_scale: there are no LoRAs", field="lora_scale")
        guided = arguments.flag("do_classifier_free_guidance", do_classifier_free_guidance)
        given = Arguments(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
        )
        engine, tokenizer = self._engine, self._tokenizer
        engine.check_process()
        prescribed = geometry(engine, tokenizer)
        words = request.checked_words(prescribed, given)
        request.check_lengths(prescribed, words, guided=guided)
        where = asked_device(device) or engine.device
        positive, negative = text.encoded(engine, tokenizer, words, guided=guided)
        return positive.to(where), negative_prompt_embeds if negative is None else negative.to(where)

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """tqdm's bar, on terminals alone, with what `set_progress_bar_config` says."""
        on_a_terminal = sys.stderr is not None and sys.stderr.isatty()
        return _Bar(iterable, **{"total": total, "disable": not on_a_terminal, "leave": False, **self._bar})

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm, such as disable=True, for the calls that follow. Raises `ArgumentError` naming one."""
        unknown = {name: value for name, value in options.items() if name not in _BAR}
        drop_in.check_options({}, unknown, known=_BAR)
        if not isinstance(options.get("disable"), bool | None):
            raise wrong("disable", options["disable"], "must be True, False or None")
        if not callable(getattr(options.get("file") or StringIO(), "write", None)):
            raise wrong("file", options["file"], "must be a file to write to")
        try:
            _Bar([], **{**options, "file": StringIO(), "disable": False}).close()
        except Exception as error:
            raise ArgumentError(f"set_progress_bar_config: {brief(options)}: {error}", field="options") from error
        self._bar = options

    numpy_to_pil = staticmethod(numpy_to_pil)

    # ---------------------------------------------------------------------------------------------------- other names

    def __setattr__(self, name: str, value: Any) -> None:
        """What would change nothing is refused; see docs/drop-in.md."""
        inner = unwrapped(value)
        if isinstance(inner, View) and name == inner.component and inner.network is getattr(self, name).network:
            if inner is not value:
                drop_in.tell(f"torch.compile of the {name}", "it runs as it is")
        elif not drop_in.drops(name, value):
            ours = type(self).__module__.startswith("fastldm.")  # a subclass may have more
            if ours and not name.startswith("_") and not hasattr(type(self), name):
                drop_in.attribute(name, known=dir(type(self)))  # raises
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """What else diffusers' pipelines have: it does nothing and says so, or is refused; see docs/drop-in.md."""
        return drop_in.attribute(name, known=dir(type(self)))


class _Bar(tqdm):  # type: ignore[misc]
    """
    With locks and a list of bars of its own. tqdm has one of each for the process: a Ctrl-C or a failing write leaves
    its lock held and would stop later calls, and its list must not be walked while a bar begins in another thread.
    """

    monitor_interval = 0  # no thread that would wait for the lock
    _lock = RLock()  # of the list
    _instances: ClassVar[WeakSet[tqdm]] = WeakSet()

    def __init__(self, *args: Any, **options: Any) -> None:
        self._lock = RLock()  # of what this bar writes
        with type(self)._lock:
            super().__init__(*args, **options)

    @classmethod
    def _get_free_pos(cls, instance: tqdm | None = None) -> int:
        """The first line free of our bars below the caller's own."""
        with cls._lock:
            taken = {abs(bar.pos) for bar in cls._instances if bar is not instance and hasattr(bar, "pos")}
            return next(line for line in count(len(tqdm._instances)) if line not in taken)


_BAR = tuple(sorted(set(inspect.signature(tqdm.__init__).parameters) - {"self", "iterable", "total", "kwargs"}))
_ABSENT = ("safety_checker", "feature_extractor", "image_encoder")


def geometry(engine: Engine, tokenizer: Tokenizer) -> Geometry:
    """What a model prescribes for its calls."""
    factor, unet, encoder = engine.vae.config.factor, engine.unet.config, engine.text_encoder.config
    return Geometry(
        channels=unet.out_channels,
        extra_channels=unet.in_channels - unet.out_channels,
        factor=factor,
        side=unet.sample_size * factor,
        window=tokenizer.length,
        width=encoder.width,
        text_layers=encoder.layers,
        device=engine.device,
    )
