"""What a model is: frozen dataclasses, presets as diffs, and the hub's JSON translated once, a range per key.

The hub's names stop at this border. Inside, a name says what it holds: the hub's `attention_head_dim` holds the
number of heads of a U-Net (https://github.com/huggingface/diffusers/issues/2011), here it is `heads`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastldm.errors import ConfigError, brief

MAX_CHANNELS = 8192
MAX_LAYERS = 16
MAX_BLOCKS = 512  # of a whole U-Net; SDXL has 65 and a middle of 10
UNSET: Any = object()


class Reader:
    """Reads one JSON object key by key, each against its range, and refuses what nobody asked for.

    `where` is the file's name in messages. Every method returns the checked value, or `default` where the key is
    absent, and raises `ConfigError` otherwise.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a JSON object, found {type(data).__name__}", field=where)
        self.data, self.where = data, where
        self.seen: set[str] = set()

    def fail(self, key: str, reason: str) -> ConfigError:
        value = f" = {brief(self.data[key])}" if key in self.data else ""
        name = key if key.isidentifier() and len(key) <= 80 else brief(key)  # a stranger's, where it is unknown
        return ConfigError(f"{self.where}: {name}{value}: {reason}", field=f"{self.where}: {key}")

    def raw(self, key: str, default: Any = UNSET) -> Any:
        self.seen.add(key)
        if key in self.data:
            return self.data[key]
        if default is UNSET:
            raise self.fail(key, "is missing")
        return default

    def integer(self, key: str, low: int, high: int, default: Any = UNSET) -> Any:
        value = self.raw(key, default)
        return value if value is default else self._integer(key, value, low, high)

    def number(self, key: str, low: float, high: float, default: Any = UNSET) -> Any:
        value = self.raw(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is not
            raise self.fail(key, f"must be a finite number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: Any = UNSET) -> Any:
        value = self.raw(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def choice(self, key: str, options: Sequence[Any], default: Any = UNSET) -> Any:
        value = self.raw(key, default)
        if value is not default and not any(value == o and type(value) is type(o) for o in options):
            raise self.fail(key, f"is not supported; supported: {', '.join(map(brief, options))}")
        return value

    def fixed(self, **allowed: tuple[Any, ...]) -> None:
        """Keys of features that this project does not have: each may be absent or have a value that means "off"."""
        for key, values in allowed.items():
            value = self.raw(key, values[0])
            if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
                raise self.fail(key, f"is not supported; supported: {', '.join(map(brief, values))}")

    def integers(self, key: str, low: int, high: int, length: int | None = None, default: Any = UNSET) -> Any:
        """A list of integers; where `length` is given, one integer stands for that many."""
        value = self.raw(key, default)
        if value is default:
            return value
        if length is not None and not isinstance(value, list | tuple):
            value = [value] * length
        return tuple(self._integer(key, v, low, high) for v in self._list(key, value, length))

    def choices(self, key: str, options: Sequence[str], length: int | None = None, default: Any = UNSET) -> Any:
        value = self.raw(key, default)
        if value is default:
            return value
        values = self._list(key, value, length)
        for v in values:
            if v not in options:
                raise self.fail(key, f"{brief(v)} is not supported; supported: {', '.join(options)}")
        return tuple(values)

    def done(self) -> None:
        """Raises for a key that was never read and whose value says more than "off"."""
        for key, value in self.data.items():
            if key in self.seen or key.startswith("_") or value is None or value is False or value in ([], {}, ""):
                continue
            raise self.fail(key, "is a key that fastldm does not know")

    def _integer(self, key: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer from {low} to {high}")
        if not low <= value <= high:
            raise self.fail(key, f"must be from {low} to {high}")
        return value

    def _list(self, key: str, value: Any, length: int | None) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise self.fail(key, "must be a list")
        if length is not None and len(value) != length:
            raise self.fail(key, f"must have {length} entries, one for each block, not {len(value)}")
        if not 1 <= len(value) <= MAX_LAYERS:
            raise self.fail(key, f"must have 1 to {MAX_LAYERS} entries, not {len(value)}")
        return value


# ---------------------------------------------------------------------------------------------------------- U-Net


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net, on the way down or up."""

    channels: int
    layers: int  # residual blocks
    depth: int  # transformer blocks behind each residual block; 0: no attention at this level
    heads: int


@dataclass(frozen=True)
class AddedConfig:
    """SDXL's added conditions: a pooled text embedding and numbers (sizes, crop), each number as a sinusoid."""

    number_dim: int  # width of one number's sinusoid
    total_dim: int  # pooled text embedding and all numbers side by side


@dataclass(frozen=True)
class UNetConfig:
    """The conditional U-Net of Stable Diffusion 1.x, 2.x and SDXL (Rombach et al., arXiv 2112.10752; 2307.01952)."""

    in_channels: int
    out_channels: int
    down: tuple[Level, ...]  # from the finest resolution to the coarsest
    up: tuple[Level, ...]  # from the coarsest to the finest
    mid_depth: int | None  # transformer blocks in the middle; None: no middle block at all
    context_dim: int
    groups: int
    eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    sample_size: int  # default latent height and width
    added: AddedConfig | None

    @property
    def time_dim(self) -> int:
        return 4 * self.down[0].channels


UNET_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UNET_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


def unet_config(data: Mapping[str, Any], where: str = "unet/config.json") -> UNetConfig:
    """The hub's `unet/config.json` as a `UNetConfig`. Raises `ConfigError` naming the key, its value and its range."""
    r = Reader(data, where)
    r.choice("_class_name", ["UNet2DConditionModel"], "UNet2DConditionModel")
    channels = r.integers("block_out_channels", 1, MAX_CHANNELS, default=(320, 640, 1280, 1280))
    n = len(channels)
    down_types = r.choices("down_block_types", list(UNET_DOWN), n, ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up_types = r.choices("up_block_types", list(UNET_UP), n, ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    if not len(down_types) == len(up_types) == n:
        raise r.fail("block_out_channels", f"has {n} entries, the block types have {len(down_types)}, {len(up_types)}")
    layers = r.integers("layers_per_block", 1, MAX_LAYERS, n, (2,) * n)
    depths = r.integers("transformer_layers_per_block", 1, 64, n, (1,) * n)
    heads = r.integers("attention_head_dim", 1, MAX_CHANNELS, n, (8,) * n)
    _check_heads(r, channels, heads)
    groups = r.integer("norm_num_groups", 1, MAX_CHANNELS, 32)
    _check_groups(r, channels, groups)
    if r.raw("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        r.choice("mid_block_type", ["UNetMidBlock2DCrossAttn"], "UNetMidBlock2DCrossAttn")
    has_mid = data.get("mid_block_type", "") is not None
    config = UNetConfig(
        in_channels=r.integer("in_channels", 1, 64, 4),
        out_channels=r.integer("out_channels", 1, 64, 4),
        down=tuple(
            Level(c, k, d if UNET_DOWN[t] else 0, h)
            for c, k, d, h, t in zip(channels, layers, depths, heads, down_types, strict=True)
        ),
        up=tuple(
            Level(c, k + 1, d if UNET_UP[t] else 0, h)
            for c, k, d, h, t in zip(channels[::-1], layers[::-1], depths[::-1], heads[::-1], up_types, strict=True)
        ),
        mid_depth=depths[-1] if has_mid else None,
        context_dim=r.integers("cross_attention_dim", 1, MAX_CHANNELS, 1, (1280,))[0],
        groups=groups,
        eps=r.number("norm_eps", 1e-12, 1.0, 1e-5),
        flip_sin_to_cos=r.flag("flip_sin_to_cos", True),
        freq_shift=r.number("freq_shift", 0, 1, 0.0),
        sample_size=_sample_size(r, 1, 1024, 64),
        added=_added_config(r),
    )
    blocks = sum(level.layers * max(level.depth, 1) for level in (*config.down, *config.up))
    if blocks > MAX_BLOCKS:
        raise r.fail("transformer_layers_per_block", f"makes {blocks} blocks, over {MAX_BLOCKS}")
    if config.freq_shift == channels[0] // 2:
        raise r.fail("freq_shift", f"must not be half of {channels[0]} channels: the sinusoids would divide by zero")
    if config.added is not None and config.added.total_dim <= config.added.number_dim:
        raise r.fail("projection_class_embeddings_input_dim", "must exceed addition_time_embed_dim")
    r.flag("use_linear_projection", False)  # 1x1 convolutions are linear layers here: the weights tell
    _unet_features_we_lack(r, n)
    r.done()
    return config


def _unet_features_we_lack(r: Reader, n: int) -> None:
    r.fixed(
        time_cond_proj_dim=(None,),
        act_fn=("silu", "swish"),
        only_cross_attention=(False, [False] * n, (False,) * n),
        mid_block_only_cross_attention=(None, False),
        downsample_padding=(1,),
        mid_block_scale_factor=(1,),
        dropout=(0.0,),
        center_input_sample=(False,),
        dual_cross_attention=(False,),
        num_attention_heads=(None,),
        reverse_transformer_layers_per_block=(None,),
        encoder_hid_dim=(None,),
        encoder_hid_dim_type=(None,),
        class_embed_type=(None,),
        num_class_embeds=(None,),
        resnet_time_scale_shift=("default",),
        resnet_skip_time_act=(False,),
        resnet_out_scale_factor=(1.0,),
        time_embedding_type=("positional",),
        time_embedding_dim=(None,),
        time_embedding_act_fn=(None,),
        timestep_post_act=(None,),
        conv_in_kernel=(3,),
        conv_out_kernel=(3,),
        attention_type=("default",),
        class_embeddings_concat=(False,),
        cross_attention_norm=(None,),
    )
    if r.raw("upcast_attention", None) is not None:  # null in SDXL's own file
        r.flag("upcast_attention")  # the softmax is float32 here whatever the input
    r.raw("addition_embed_type_num_heads", 64)  # only read by types that are refused


def _added_config(r: Reader) -> AddedConfig | None:
    kind = r.choice("addition_embed_type", ["text_time"], None) if r.raw("addition_embed_type", None) else None
    if kind is None:
        r.raw("addition_time_embed_dim", None)
        r.raw("projection_class_embeddings_input_dim", None)
        return None
    return AddedConfig(
        number_dim=r.integer("addition_time_embed_dim", 1, MAX_CHANNELS),
        total_dim=r.integer("projection_class_embeddings_input_dim", 1, 65536),
    )


def _check_heads(r: Reader, channels: Sequence[int], heads: Sequence[int]) -> None:
    for c, h in zip(channels, heads, strict=True):
        if c % h:
            raise r.fail("attention_head_dim", f"{h} heads do not divide {c} channels")


def _check_groups(r: Reader, channels: Sequence[int], groups: int) -> None:
    for c in channels:
        if c % groups:
            raise r.fail("norm_num_groups", f"must divide the channels {', '.join(map(str, channels))}")


def _sample_size(r: Reader, low: int, high: int, default: int) -> int:
    """The hub allows one number or a pair; a pair must be square."""
    value = r.raw("sample_size", default)
    if isinstance(value, list | tuple):
        pair = r.integers("sample_size", low, high, 2)
        if pair[0] != pair[1]:
            raise r.fail("sample_size", "must be square")
        return int(pair[0])
    return default if value is None else int(r.integer("sample_size", low, high, default))


# ---------------------------------------------------------------------------------------------------- autoencoder


@dataclass(frozen=True)
class VAEConfig:
    """The KL-regularised autoencoder of latent diffusion (arXiv 2112.10752, appendix G)."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]  # from the finest resolution to the coarsest
    layers: int  # residual blocks of an encoder level; a decoder level has one more
    groups: int
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool
    scaling_factor: float  # latents = (z - shift_factor) * scaling_factor
    shift_factor: float
    sample_size: int  # pixels: the tile of a tiled decode
    force_upcast: bool  # the decoder overflows float16

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return int(2 ** (len(self.channels) - 1))


def vae_config(data: Mapping[str, Any], where: str = "vae/config.json") -> VAEConfig:
    """The hub's `vae/config.json` as a `VAEConfig`. Raises `ConfigError` naming the key, its value and its range."""
    r = Reader(data, where)
    r.choice("_class_name", ["AutoencoderKL"], "AutoencoderKL")
    channels = r.integers("block_out_channels", 1, MAX_CHANNELS, default=(64,))
    n = len(channels)
    r.choices("down_block_types", ["DownEncoderBlock2D"], n, ("DownEncoderBlock2D",))
    r.choices("up_block_types", ["UpDecoderBlock2D"], n, ("UpDecoderBlock2D",))
    groups = r.integer("norm_num_groups", 1, MAX_CHANNELS, 32)
    _check_groups(r, channels, groups)
    config = VAEConfig(
        in_channels=r.integer("in_channels", 1, 64, 3),
        out_channels=r.integer("out_channels", 1, 64, 3),
        latent_channels=r.integer("latent_channels", 1, 64, 4),
        channels=channels,
        layers=r.integer("layers_per_block", 1, MAX_LAYERS, 1),
        groups=groups,
        mid_attention=r.flag("mid_block_add_attention", True),
        quant_conv=r.flag("use_quant_conv", True),
        post_quant_conv=r.flag("use_post_quant_conv", True),
        scaling_factor=r.number("scaling_factor", 1e-4, 1e4, 0.18215),
        shift_factor=r.number("shift_factor", -1e4, 1e4, 0.0) if data.get("shift_factor") is not None else 0.0,
        sample_size=_sample_size(r, 1, 8192, 32),
        force_upcast=bool(r.flag("force_upcast", True)),
    )
    if config.factor > config.sample_size:
        raise r.fail("sample_size", f"must be at least the factor {config.factor} of {n} levels")
    r.fixed(
        shift_factor=(None, data.get("shift_factor")),
        act_fn=("silu", "swish"),
        latents_mean=(None,),
        latents_std=(None,),
    )
    r.done()
    return config


# --------------------------------------------------------------------------------------------------- text encoder


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text transformer (arXiv 2103.00020): ViT-L/14 and OpenCLIP's ViT-H/14 and bigG/14."""

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    positions: int
    eps: float
    act: str  # "quick_gelu" or "gelu"
    eos_token_id: int  # 2 is the hub's old error: then the end is where the largest id stands
    projection_dim: int | None  # width of the pooled, projected output; None: no projection


TEXT_CLASSES = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}


def text_config(data: Mapping[str, Any], where: str = "text_encoder/config.json") -> TextConfig:
    """The hub's CLIP `config.json` as a `TextConfig`. Raises `ConfigError` naming the key, its value and its range."""
    r = Reader(data, where)
    r.fixed(model_type=("clip_text_model", "clip"))
    names = r.choices("architectures", list(TEXT_CLASSES), 1, ("CLIPTextModel",))
    config = TextConfig(
        vocab_size=r.integer("vocab_size", 1, 1 << 24, 49408),
        width=r.integer("hidden_size", 1, MAX_CHANNELS, 512),
        mlp_width=r.integer("intermediate_size", 1, 8 * MAX_CHANNELS, 2048),
        layers=r.integer("num_hidden_layers", 1, 128, 12),
        heads=r.integer("num_attention_heads", 1, MAX_CHANNELS, 8),
        positions=r.integer("max_position_embeddings", 1, 8192, 77),
        eps=r.number("layer_norm_eps", 1e-12, 1.0, 1e-5),
        act=r.choice("hidden_act", ["quick_gelu", "gelu"], "quick_gelu"),
        eos_token_id=r.integer("eos_token_id", 0, 1 << 24, 49407),
        projection_dim=r.integer("projection_dim", 1, MAX_CHANNELS, 512) if TEXT_CLASSES[names[0]] else None,
    )
    if config.width % config.heads:
        raise r.fail("num_attention_heads", f"must divide hidden_size = {config.width}")
    # No r.done(): transformers writes training and generation settings beside the model; the encoder has none of them.
    return config


# -------------------------------------------------------------------------------------------------------- presets

_SD1_DOWN = (Level(320, 2, 1, 8), Level(640, 2, 1, 8), Level(1280, 2, 1, 8), Level(1280, 2, 0, 8))
_SD2_DOWN = (Level(320, 2, 1, 5), Level(640, 2, 1, 10), Level(1280, 2, 1, 20), Level(1280, 2, 0, 20))
_SDXL_DOWN = (Level(320, 2, 0, 5), Level(640, 2, 2, 10), Level(1280, 2, 10, 20))


def mirrored(down: Sequence[Level]) -> tuple[Level, ...]:
    """The way up that belongs to a way down: the same levels in reverse, each with one more residual block."""
    return tuple(replace(level, layers=level.layers + 1) for level in reversed(down))


SD15_UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    down=_SD1_DOWN,
    up=mirrored(_SD1_DOWN),
    mid_depth=1,
    context_dim=768,
    groups=32,
    eps=1e-5,
    flip_sin_to_cos=True,
    freq_shift=0.0,
    sample_size=64,
    added=None,
)
SD21_UNET = replace(SD15_UNET, down=_SD2_DOWN, up=mirrored(_SD2_DOWN), context_dim=1024, sample_size=96)
SDXL_UNET = replace(
    SD15_UNET,
    down=_SDXL_DOWN,
    up=mirrored(_SDXL_DOWN),
    mid_depth=10,
    context_dim=2048,
    sample_size=128,
    added=AddedConfig(number_dim=256, total_dim=2816),
)

SD_VAE = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    channels=(128, 256, 512, 512),
    layers=2,
    groups=32,
    mid_attention=True,
    quant_conv=True,
    post_quant_conv=True,
    scaling_factor=0.18215,
    shift_factor=0.0,
    sample_size=512,
    force_upcast=True,
)
SDXL_VAE = replace(SD_VAE, scaling_factor=0.13025, sample_size=1024)

CLIP_L = TextConfig(
    vocab_size=49408,
    width=768,
    mlp_width=3072,
    layers=12,
    heads=12,
    positions=77,
    eps=1e-5,
    act="quick_gelu",
    eos_token_id=49407,
    projection_dim=None,
)
OPENCLIP_H = replace(CLIP_L, width=1024, mlp_width=4096, layers=23, heads=16, act="gelu")
OPENCLIP_BIGG = replace(CLIP_L, width=1280, mlp_width=5120, layers=32, heads=20, act="gelu", projection_dim=1280)
