"""What programs written for diffusers touch of a pipeline's parts: `pipe.unet`, `.vae`, `.text_encoder`, `.tokenizer`.

A view looks at what its pipeline runs at that moment, and keeps nothing itself: many threads may use one, and after
`pipe.to(...)` it shows the moved network. Calls are those of diffusers' and transformers' classes, without gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastldm import drop_in
from fastldm.arguments import FLOATS, flag, integer, is_plain, scalar, texts, wrong
from fastldm.errors import ArgumentError, NonFiniteError, brief
from fastldm.hub_config import TEXT_KEYS, UNET_KEYS, VAE_KEYS, Config
from fastldm.prompt import WORD_END, Tokenizer
from fastldm.runtime.build import hub_json
from fastldm.runtime.engine import Engine
from fastldm.runtime.place import destination
from fastldm.sampling import noise

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
MAX_TOKENS = 1 << 16  # that one text is cut or filled to
MAX_TEXTS = 1 << 16  # of one call of a tokenizer
_LAYERS = 8  # of wrappers around one view


# --------------------------------------------------------------------------------------------------------- networks


def _keep(view: object, name: str, value: object) -> None:
    """Sets what a view itself needs. All else would be gone with the view: `pipe.vae` makes a new one each time."""
    if not name.startswith("_"):
        raise drop_in.refused(name, f"{name} cannot be assigned: {view!r} keeps nothing that is set")
    object.__setattr__(view, name, value)


class View:
    """A network of a pipeline. engine: gives the one that the pipeline runs now."""

    component: str
    keys: Mapping[str, Any]

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine

    @property
    def network(self) -> nn.Module:
        """The network itself, of fastldm.model."""
        return self._of(self._engine())

    @property
    def config(self) -> Config:
        network: Any = self.network
        sizes = {"sample_size": network.config.sample_size} if "sample_size" in self.keys else {}
        return Config({**self.keys, **hub_json(network), **sizes})

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def parameters(self) -> Iterator[Tensor]:
        """The weights, as they lie in memory: several of the hub's tensors may be one."""
        return (parameter.detach() for parameter in self.network.parameters())

    def eval(self) -> View:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> View:
        if flag("requires_grad", requires_grad):
            raise wrong("requires_grad", True, "there are no gradients here")
        return self

    def to(self, *args: Any, **kwargs: Any) -> View:
        """Nothing, where it says what is so. A device or dtype of one network alone is refused."""
        device, dtype = destination(*args, **kwargs)
        for name, value, present in (("device", device, self.device), ("dtype", dtype, self.dtype)):
            if value not in (None, present):
                reason = f"the {self.component} is in {present}, and moves with its pipeline alone: pipe.to(...)"
                raise wrong(name, value, reason)
        return self

    def __getattr__(self, name: str) -> Any:
        """What diffusers' pipelines hand on to their networks and is needless here: it does nothing, and says so."""
        row = drop_in.ATTRIBUTES.get(name)
        if row is not None and row.kind == "no-op":
            return drop_in.attribute(name)
        raise AttributeError(f"the view of the {self.component} has no {brief(name)}", name=name)

    def __setattr__(self, name: str, value: object) -> None:
        _keep(self, name, value)

    def __repr__(self) -> str:
        return f"<the {self.component} of a fastldm.Pipeline, {self.dtype} on {self.device}>"

    def _of(self, engine: Engine) -> nn.Module:
        engine.check_process()
        network: nn.Module = getattr(engine, self.component)
        return network


class Prediction(NamedTuple):
    sample: Tensor


class UNetView(View):
    component, keys = "unet", UNET_KEYS

    @torch.no_grad()
    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **others: None,
    ) -> Prediction:
        """sample: (B, in_channels, H, W). timestep: one number, or B. encoder_hidden_states: (B, L, width), the prompt.

        -> one tensor like `sample`, in the network's dtype: what the model predicts at that timestep.
        """
        _refuse(others)
        flag("return_dict", return_dict)
        engine = self._engine()
        unet = engine.unet
        weight = unet.conv_in.weight
        x = _maps("sample", sample, unet.config.in_channels, weight)
        states = _floats("encoder_hidden_states", encoder_hidden_states, weight)
        if states.ndim != 3 or states.shape[::2] != (len(x), unet.config.context_dim) or not states.shape[1]:
            needed = f"({len(x)}, tokens, {unet.config.context_dim})"
            reason = f"has shape {tuple(states.shape)}, must have {needed}"
            raise ArgumentError(f"encoder_hidden_states: {reason}", field="encoder_hidden_states")
        t = _timesteps(timestep, len(x), weight.device)
        engine.check_process()
        with engine.using():
            modulation = unet.modulation(t)[:, 0]
            return Prediction(unet(x, modulation, unet.context(states)).contiguous())


class TextOutput(NamedTuple):
    last_hidden_state: Tensor
    pooler_output: Tensor


class ProjectedText(NamedTuple):
    """Of an encoder with a projection."""

    text_embeds: Tensor
    last_hidden_state: Tensor


class TextEncoderView(View):
    component, keys = "text_encoder", TEXT_KEYS

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: None = None, *, return_dict: bool = True, **others: None
    ) -> TextOutput | ProjectedText:
        """input_ids: (B, L), L at most `config.max_position_embeddings`."""
        _refuse({"attention_mask": attention_mask, **others})
        flag("return_dict", return_dict)
        engine = self._engine()
        engine.check_process()
        encoder = engine.text_encoder
        config = encoder.config
        ids = _ids(input_ids, config.positions, config.vocab_size).to(engine.device, torch.int64)
        with engine.using():
            found = encoder(ids)
        if config.projection_dim is None:
            return TextOutput(found.states, found.pooled)
        return ProjectedText(found.pooled, found.states)


@dataclass
class Decoding:
    """How a pipeline's autoencoder saves memory."""

    slicing: bool = True
    tiling: bool = False


@dataclass(frozen=True)
class LatentDistribution:
    """A Gaussian for each number of z, (B, latent_channels, H, W), not scaled."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: noise.Generator = None) -> Tensor:
        drawn = noise.draw(self.mean.shape, generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * drawn

    def mode(self) -> Tensor:
        return self.mean


class Encoded(NamedTuple):
    latent_dist: LatentDistribution


class VAEView(View):
    """decoding: the pipeline's, which `enable_tiling` and its like set for the calls that follow."""

    component, keys = "vae", VAE_KEYS

    def __init__(self, engine: Callable[[], Engine], decoding: Decoding) -> None:
        super().__init__(engine)
        self._decoding = decoding

    @torch.no_grad()
    def encode(self, x: Tensor, return_dict: bool = True) -> Encoded:
        """x: (B, 3, H, W) in −1..1, H and W multiples of the pixels of a latent."""
        flag("return_dict", return_dict)
        engine, how = self._engine(), self._decoding
        config = engine.vae.config
        image = _maps("x", x, config.in_channels, engine.vae.encoder.conv_in.weight)
        if image.shape[2] % config.factor or image.shape[3] % config.factor:
            reason = f"has the size {image.shape[3]}×{image.shape[2]}, must be in multiples of {config.factor}"
            raise ArgumentError(f"x: {reason}", field="x")
        posterior = engine.encode_image(image, slicing=how.slicing, tiling=how.tiling)
        return Encoded(LatentDistribution(posterior.mean.contiguous(), posterior.std.contiguous()))

    @torch.no_grad()
    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Prediction:
        """z: (B, latent_channels, H, W), latents / scaling_factor -> pixels, about −1..1."""
        flag("return_dict", return_dict)
        engine, how = self._engine(), self._decoding
        engine.check_process()
        vae = engine.vae
        found = _maps("z", z, vae.config.latent_channels, vae.decoder.conv_in.weight)
        with engine.using():
            pixels = vae.decode(found, slicing=how.slicing, tiling=how.tiling)
        if not bool(torch.isfinite(pixels).all()):
            raise NonFiniteError(f"the decoded image is not finite in {pixels.dtype}; try a wider dtype", field="image")
        return Prediction(pixels.contiguous())

    def enable_slicing(self) -> None:
        self._decoding.slicing = True

    def disable_slicing(self) -> None:
        self._decoding.slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        self._decoding.tiling = flag("use_tiling", use_tiling)

    def disable_tiling(self) -> None:
        self._decoding.tiling = False


def unwrapped(value: Any) -> Any:
    """What `torch.compile` has wrapped, a view or a module; anything else as it is."""
    for _ in range(_LAYERS):
        if isinstance(value, nn.Module):
            inner = value._modules.get("_orig_mod")
        elif inspect.isfunction(value):
            inner = getattr(value, "_torchdynamo_orig_callable", None) or getattr(value, "__wrapped__", None)
        else:
            return value
        if inner is None:
            return value
        value = inner
    return value


# -------------------------------------------------------------------------------------------------------- tokenizer


class Tokens(dict[str, Any]):
    """input_ids, and attention_mask: 1 for the text's own; as keys and as attributes."""

    @property
    def input_ids(self) -> Any:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        return self["attention_mask"]

    def to(self, device: Any) -> Tokens:
        where = destination(device)[0]
        return Tokens({name: v.to(where) if isinstance(v, Tensor) else v for name, v in self.items()})


class TokenizerView:
    """A pipeline's tokenizer. tokenizer: what runs."""

    def __setattr__(self, name: str, value: object) -> None:
        _keep(self, name, value)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def model_max_length(self) -> int:
        return self.tokenizer.length

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.bpe.get_vocab_size(with_added_tokens=False))

    @property
    def bos_token_id(self) -> int:
        return int(self.tokenizer.bpe.encode("").ids[0])

    @property
    def eos_token_id(self) -> int:
        return self.tokenizer.eos

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad

    def __len__(self) -> int:
        return int(self.tokenizer.bpe.get_vocab_size())

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **others: None,
    ) -> Tokens:
        """padding: "max_length", or True for the longest of the texts. truncation: True cuts to `max_length`.

        return_tensors: "pt", or None for lists.
        """
        _refuse(others)
        _choice("padding", padding, (False, True, "longest", "max_length", "do_not_pad"))
        _choice("truncation", truncation, (None, False, True, "longest_first", "do_not_truncate"))
        _choice("return_tensors", return_tensors, (None, "pt"))
        length = self.model_max_length if max_length is None else integer("max_length", max_length, 2, MAX_TOKENS)
        cut = truncation in (True, "longest_first")
        cut = cut or (truncation is None and max_length is not None and padding in (False, "do_not_pad"))
        special = flag("add_special_tokens", add_special_tokens)
        rows = [self._ids(one, special, length if cut else None) for one in texts("text", text, MAX_TEXTS)]
        width = {"max_length": length, True: max(map(len, rows)), "longest": max(map(len, rows))}.get(padding, 0)
        fills = [max(width - len(row), 0) for row in rows]
        ids: Any = [row + [self.pad_token_id] * fill for row, fill in zip(rows, fills, strict=True)]
        mask: Any = [[1] * len(row) + [0] * fill for row, fill in zip(rows, fills, strict=True)]
        if return_tensors is None:
            one = isinstance(text, str)
            return Tokens(input_ids=ids[0] if one else ids, attention_mask=mask[0] if one else mask)
        if len({len(row) for row in ids}) > 1:
            raise wrong("padding", padding, "the texts have different lengths: pass True to fill the shorter ones")
        return Tokens(input_ids=torch.tensor(ids, dtype=torch.int64), attention_mask=torch.tensor(mask))

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **others: None) -> str:
        """token_ids: a number, a list or a tensor of them."""
        _refuse(others)
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) and is_plain(token_ids) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        if not isinstance(ids, list | tuple) or not all(type(i) is int and 0 <= i < 1 << 32 for i in ids):
            raise wrong("token_ids", token_ids, "must be a list or a tensor of token ids")
        special = flag("skip_special_tokens", skip_special_tokens)
        text: str = self.tokenizer.bpe.decode(list(ids), skip_special_tokens=special)
        return text.replace(WORD_END, " ").strip()

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **others: None) -> list[str]:
        if not isinstance(sequences, list | tuple | Tensor) or (isinstance(sequences, Tensor) and not sequences.ndim):
            raise wrong("sequences", sequences, "must be a list of lists of token ids, or a tensor")
        return [self.decode(ids, skip_special_tokens, **others) for ids in sequences]

    def __repr__(self) -> str:
        return f"<the tokenizer of a fastldm.Pipeline, {len(self)} tokens>"

    def _ids(self, text: str, special: bool, length: int | None) -> list[int]:
        ids: list[int] = self.tokenizer.bpe.encode(text, add_special_tokens=special).ids
        if length is None or len(ids) <= length:
            return ids
        return [*ids[: length - 1], self.eos_token_id] if special else ids[:length]


# -------------------------------------------------------------------------------------------------------- arguments


def _refuse(others: Mapping[str, object]) -> None:
    """What diffusers' and transformers' classes take beside, and says nothing."""
    for name, value in others.items():
        if value is not None and value is not False:
            raise ArgumentError(f"{name} = {brief(value)}: is not supported here", field=name)


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is c or (isinstance(c, str) and isinstance(value, str) and value == c) for c in choices):
        raise wrong(name, value, f"must be one of {', '.join(map(repr, choices))}")


def _dense(name: str, value: object, dtypes: tuple[torch.dtype, ...], kind: str) -> Tensor:
    if not isinstance(value, Tensor) or not is_plain(value) or value.dtype not in dtypes:
        found = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"{name}: must be a dense tensor of {kind}, not {found}", field=name)
    return value


def _floats(name: str, value: object, weight: Tensor) -> Tensor:
    """In the dtype of the weight, on whose device it must be."""
    found = _dense(name, value, FLOATS, "floats")
    if found.device != weight.device:
        raise ArgumentError(f"{name}: is on {found.device}, the network on {weight.device}", field=name)
    return found.to(weight.dtype)


def _maps(name: str, value: object, channels: int, weight: Tensor) -> Tensor:
    """(B, channels, H, W), channels_last."""
    found = _floats(name, value, weight)
    if found.ndim != 4 or found.shape[1] != channels or not found.numel():
        reason = f"has shape {tuple(found.shape)}, must have (batch, {channels}, height, width)"
        raise ArgumentError(f"{name}: {reason}", field=name)
    return found.contiguous(memory_format=torch.channels_last)


def _timesteps(value: object, batch: int, device: torch.device) -> Tensor:
    """One number, or one for each sample: (1,) or (B,), float32."""
    if isinstance(value, Tensor) and value.ndim:
        found = _dense("timestep", value, (*FLOATS, *INTEGERS), "numbers")
        if tuple(found.shape) not in ((1,), (batch,)):
            reason = f"has shape {tuple(found.shape)}, must have (), (1,) or ({batch},)"
            raise ArgumentError(f"timestep: {reason}", field="timestep")
        return found.to(device, torch.float32)
    number = scalar(value)
    if number is None or not abs(number) <= 1e6:
        raise wrong("timestep", value, "must be a number, or a tensor of one for each sample")
    return torch.tensor([number], dtype=torch.float32, device=device)


def _ids(value: object, positions: int, vocab_size: int) -> Tensor:
    found = _dense("input_ids", value, INTEGERS, "token ids")
    if found.ndim != 2 or not found.numel() or found.shape[1] > positions:
        reason = f"has shape {tuple(found.shape)}, must have (batch, tokens), at most {positions} tokens"
        raise ArgumentError(f"input_ids: {reason}", field="input_ids")
    low, high = (int(bound) for bound in found.aminmax())
    if low < 0 or high >= vocab_size:
        reason = f"holds ids from {low} to {high}, the text encoder has 0 to {vocab_size - 1}"
        raise ArgumentError(f"input_ids: {reason}", field="input_ids")
    return found
