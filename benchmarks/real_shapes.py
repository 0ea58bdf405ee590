"""What each op is asked for by the models that people run: the shapes that are compiled, tested on a GPU and timed.

    for shape in REAL["layer_norm"]:
        arguments, options = shape.make("cuda", torch.float16)

Batch 2 is one image with guidance. Where an op has an input of the largest or most frequent kind, it stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastldm.ops import RowTables, phase_weights

VAE_SIDES = {"VAE 512²": 64, "VAE 768²": 96, "VAE 1024²": 128}  # of the latents
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Maker = Callable[[str, torch.dtype], Arguments]


@dataclass(frozen=True)
class Shape:
    """model: "SD 1.5 512²" and such. what: the arguments, in short. make: (device, dtype) -> (arguments, options)."""

    model: str
    what: str
    make: Maker


def filled(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    if device == "meta":
        return torch.empty(shape, device=device, dtype=dtype)
    return torch.randn(shape, device=device, dtype=dtype) * scale


def image(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W), channels_last."""
    n, c, height, width = shape
    return filled(n, height, width, c, device=device, dtype=dtype).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------- attention


def _self_attention(
    batch: int, tokens: int, heads: int, dim: int, causal: bool, device: str, dtype: torch.dtype
) -> Arguments:
    """Views of one projection, as in `SelfAttention`; the mask as in the text encoders."""
    packed = filled(batch, tokens, 3 * heads * dim, device=device, dtype=dtype)
    mask = torch.full((tokens, tokens), -torch.inf, device=device, dtype=dtype).triu(1) if causal else None
    return packed.unflatten(-1, (3, heads, dim)).unbind(-3), {"mask": mask}


def _cross_attention(
    tokens: int, keys: int, heads: int, dim: int, columns: int, device: str, dtype: torch.dtype
) -> Arguments:
    """columns: of the keys and values of all layers, side by side, as in `UNet.split_context`."""
    q, packed = (filled(2, *shape, device=device, dtype=dtype) for shape in ((tokens, heads * dim), (keys, columns)))
    k, v = packed[..., : 2 * heads * dim].split(heads * dim, dim=-1)
    return tuple(t.unflatten(-1, (heads, dim)) for t in (q, k, v)), {}


def _self_of(model: str, batch: int, *rows: tuple[int, int, int], causal: bool = False) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            model,
            f"{batch}×{tokens}×{heads}×{dim}, {'causal' if causal else 'self'}",
            partial(_self_attention, batch, tokens, heads, dim, causal),
        )
        for tokens, heads, dim in rows
    )


def _cross_of(model: str, columns: int, keys: int, *rows: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            model,
            f"2×{tokens}×{heads}×{dim}, {keys} keys",
            partial(_cross_attention, tokens, keys, heads, dim, columns),
        )
        for tokens, heads, dim in rows
    )


ATTENTION_LEVELS = {  # columns of all layers' keys and values; tokens, heads and head dim at each level
    "SD 1.5 512²": (24960, ((4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160))),
    "SD 2.1 768²": (24960, ((9216, 5, 64), (2304, 10, 64), (576, 20, 64), (144, 20, 64))),
    "SDXL 1024²": (166400, ((4096, 10, 64), (1024, 20, 64))),
}
ATTENTION = (
    *(
        shape
        for model, (columns, levels) in ATTENTION_LEVELS.items()
        for shape in (*_self_of(model, 2, *levels), *_cross_of(model, columns, 77, *levels))
    ),
    *_self_of("SD 1.5 488×536", 2, (4087, 8, 40)),
    *_cross_of("SD 1.5 512², a long prompt", 24960, 154, (4096, 8, 40), (64, 8, 160)),
    *(shape for model, side in VAE_SIDES.items() for shape in _self_of(model, 1, (side**2, 1, 512))),
    *_self_of("CLIP-L", 2, (77, 12, 64), causal=True),
    *_self_of("CLIP-H", 2, (77, 16, 64), causal=True),
    *_self_of("CLIP-G", 2, (77, 20, 64), causal=True),
)

# ---------------------------------------------------------------------------------------------------------- layer norm


def _layer_norm(tokens: int, columns: int, residual: bool, device: str, dtype: torch.dtype) -> Arguments:
    new = partial(filled, device=device, dtype=dtype)
    x, w, b = new(2, tokens, columns), new(columns), new(columns)
    return (x, w, b, 1e-5), {"residual": new(2, tokens, columns)} if residual else {}


LAYER_NORM = tuple(
    Shape(model, f"2×{tokens}×{columns}{', residual' * residual}", partial(_layer_norm, tokens, columns, residual))
    for model, levels in {
        "SD 1.5 512²": ((4096, 320), (1024, 640), (256, 1280), (64, 1280), (77, 768)),
        "SD 2.1 768²": ((9216, 320), (2304, 640), (576, 1280), (144, 1280), (77, 1024)),
        "SDXL 1024²": ((4096, 640), (1024, 1280)),
    }.items()
    for tokens, columns in levels
    for residual in (False, True)
)

# ---------------------------------------------------------------------------------------------------- linear and geglu


def _linear(shape: tuple[int, int, int], end: str, device: str, dtype: torch.dtype) -> Arguments:
    new = partial(filled, device=device, dtype=dtype)
    m, n, k = shape
    residual = {"residual": new(m, n)} if end == "residual" else {}
    act = {"act": end} if end in ("silu", "gelu", "quick_gelu") else {}
    return (new(m, k), new(n, k, scale=k**-0.5), None if end == "no bias" else new(n)), residual | act


def _linear_of(model: str, end: str, *shapes: tuple[int, int, int]) -> tuple[Shape, ...]:
    return tuple(
        Shape(model, f"{m}×{k} by {n}×{k}{end and ', ' + end}", partial(_linear, (m, n, k), end)) for m, n, k in shapes
    )


LEVELS = {  # rows and channels of the transformers at each level, batch 2
    "SD 1.5 512²": ((8192, 320), (2048, 640), (512, 1280), (128, 1280)),
    "SD 2.1 768²": ((18432, 320), (4608, 640), (1152, 1280), (288, 1280)),
    "SDXL 1024²": ((2048, 1280), (8192, 640)),
}
LINEAR = (
    *(
        shape
        for model, levels in LEVELS.items()
        for m, c in levels
        for shape in (
            *_linear_of(model, "no bias", (m, 3 * c, c), (m, c, c)),
            *_linear_of(model, "residual", (m, c, c), (m, c, 4 * c)),
            *(_linear_of(model, "", (m, c, c)) if model != "SD 1.5 512²" else ()),
        )
    ),
    *(
        shape
        for model, width, levels in (
            ("SD 1.5 512²", 768, (320, 640, 1280)),
            ("SD 2.1 768²", 1024, (320, 640, 1280)),
            ("SDXL 1024²", 2048, (640, 1280)),
        )
        for c in levels
        for shape in _linear_of(model, "no bias", (154, 2 * c, width))
    ),
    *_linear_of("time embedding", "silu", (50, 1280, 320), (50, 1280, 1280)),
    *_linear_of("time embedding", "", (50, 320, 1280), (50, 640, 1280)),
    *(
        shape
        for model, c, act in (("CLIP-L", 768, "quick_gelu"), ("CLIP-H", 1024, "gelu"), ("CLIP-G", 1280, "gelu"))
        for shape in (
            *_linear_of(model, "", (154, 3 * c, c)),
            *_linear_of(model, act, (154, 4 * c, c)),
            *_linear_of(model, "residual", (154, c, c), (154, c, 4 * c)),
        )
    ),
    *_linear_of("CLIP-G", "no bias", (2, 1280, 1280)),
    *(
        shape
        for model, side in VAE_SIDES.items()
        for shape in (
            *_linear_of(model, "", (side**2, 1536, 512)),
            *_linear_of(model, "residual", (side**2, 512, 512)),
        )
    ),
)


def _geglu(m: int, f: int, k: int, device: str, dtype: torch.dtype) -> Arguments:
    new = partial(filled, device=device, dtype=dtype)
    return (new(m, k), new(2 * f, k, scale=k**-0.5), new(2 * f)), {}


GEGLU = tuple(
    Shape(model, f"{m}×{c} by {8 * c}×{c}", partial(_geglu, m, 4 * c, c))
    for model, levels in LEVELS.items()
    for m, c in levels
)

# ---------------------------------------------------------------------------------------------------------- group norm


def _group_norm(
    n: int, side: int, widths: tuple[int, ...], act: str | None, known: bool, device: str, dtype: torch.dtype
) -> Arguments:
    channels = sum(widths)
    maps = [image(n, width, side, side, device=device, dtype=dtype) for width in widths]
    w, b = (filled(channels, device=device, dtype=dtype) for _ in "wb")
    stats = [filled(n, width, 2, device=device, dtype=torch.float32).abs() if known else None for width in widths]
    second = {"x2": maps[1], "stats": tuple(stats)} if len(maps) == 2 else {"stats": stats[0]}
    return (maps[0], w, b, 32, 1e-5), {"act": act, **second}


def _group_norms(
    model: str, n: int, rows: tuple[tuple[int, tuple[int, ...]], ...], *, known: bool
) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            model,
            f"{n}×{'+'.join(map(str, widths))}×{side}×{side}, SiLU{', statistics' * known}",
            partial(_group_norm, n, side, widths, "silu", known),
        )
        for side, widths in rows
    )


# Levels of a U-Net, each half as large as the one before, and the channels of what is normalised there: on the way
# down, then on the way up, the skip's second.
UNET_LEVELS = (
    (0, (320,)), (1, (320,)), (1, (640,)), (2, (640,)), (2, (1280,)), (3, (1280,)),
    (3, (1280, 1280)), (2, (1280, 1280)), (2, (1280, 640)), (1, (1280, 640)), (1, (640, 640)), (1, (640, 320)),
    (0, (640, 320)), (0, (320, 320)),
)  # fmt: skip


def _unet_maps(side: int, levels: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((side >> level, widths) for level, widths in UNET_LEVELS if level < levels)


# Times the latents' side, channels.
VAE_MAPS = ((1, (512,)), (2, (512,)), (4, (512,)), (4, (256,)), (8, (256,)), (8, (128,)))
GROUP_NORM = (
    *_group_norms("SD 1.5 512²", 2, _unet_maps(64, 4), known=False),
    *_group_norms("SD 1.5 512²", 2, ((64, (320,)), (64, (320, 320)), (32, (1280, 640))), known=True),
    *_group_norms("SD 2.1 768²", 2, _unet_maps(96, 4), known=False),
    *_group_norms("SDXL 1024²", 2, _unet_maps(128, 3), known=False),
    *_group_norms("SDXL 1024²", 2, ((128, (320,)), (128, (640, 320))), known=True),
    *(
        shape
        for model, side in VAE_SIDES.items()
        for shape in _group_norms(model, 1, tuple((side * n, c) for n, c in VAE_MAPS), known=False)
    ),
    *_group_norms("VAE 512²", 1, ((512, (128,)),), known=True),
    Shape("SD 1.5 512²", "2×320×64×64, before attention", partial(_group_norm, 2, 64, (320,), None, False)),
)

# --------------------------------------------------------------------------------------------------------- convolution


def _conv2d(
    n: int, side: int, widths: tuple[int, ...], c_out: int, taps: int, how: str, device: str, dtype: torch.dtype
) -> Arguments:
    new = partial(image, device=device, dtype=dtype)
    x, *second = (new(n, width, side, side) for width in widths)
    w = new(c_out, sum(widths), taps, taps) * (sum(widths) * taps**2) ** -0.5
    options: dict[str, Any] = {"x2": second[0]} if second else {}
    if how == "shift":  # some columns of a table for all layers
        options["shift"] = filled(1, 2 * c_out, device=device, dtype=dtype)[:, c_out:]
    if how == "residual":
        options["residual"] = new(n, c_out, side, side)
    if how.startswith("stride 2"):
        options |= {"stride": 2, "pad": "end" if how.endswith("end") else "same"}
    if how.startswith("enlarged"):
        options["upsample"] = (2 * side, 2 * side)
    if how == "enlarged in phases":
        options["w_phases"] = phase_weights(w)
    return (x, w, filled(c_out, device=device, dtype=dtype)), {**options, "want_stats": True}


def _convolutions(model: str, n: int, rows: Iterable[tuple[int, tuple[int, ...], int, int, str]]) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            model,
            f"{n}×{'+'.join(map(str, widths))}×{side}×{side} to {c_out}, {taps}×{taps}{how and ', ' + how}",
            partial(_conv2d, n, side, widths, c_out, taps, how),
        )
        for side, widths, c_out, taps, how in rows
    )


# Level of the U-Net, channels, output channels, taps on a side, and what is special; the most frequent first.
UNET_CONVOLUTIONS = (
    (0, (320,), 320, 3, "residual"), (1, (640,), 640, 3, "residual"), (2, (1280,), 1280, 3, "residual"),
    (3, (1280,), 1280, 3, "residual"), (3, (1280,), 1280, 3, "shift"), (3, (2560,), 1280, 3, "shift"),
    (3, (1280, 1280), 1280, 1, ""), (2, (1280,), 1280, 3, "shift"), (2, (2560,), 1280, 3, "shift"),
    (2, (1280, 1280), 1280, 1, ""), (0, (320,), 320, 3, "shift"), (0, (640,), 320, 3, "shift"),
    (0, (320, 320), 320, 1, ""), (2, (1280,), 1280, 3, "enlarged in phases"), (1, (640,), 640, 3, "enlarged in phases"),
    (3, (1280,), 1280, 3, "enlarged in phases"), (0, (320,), 320, 3, "stride 2"), (1, (640,), 640, 3, "stride 2"),
    (2, (1280,), 1280, 3, "stride 2"), (0, (4,), 320, 3, ""), (0, (320,), 4, 3, ""), (1, (320,), 640, 3, "shift"),
    (1, (640,), 640, 3, "shift"), (2, (640,), 1280, 3, "shift"), (2, (1920,), 1280, 3, "shift"),
    (1, (1920,), 640, 3, "shift"), (1, (1280,), 640, 3, "shift"), (1, (960,), 640, 3, "shift"),
    (0, (960,), 320, 3, "shift"), (1, (320,), 640, 1, ""), (2, (640,), 1280, 1, ""), (2, (1280, 640), 1280, 1, ""),
    (1, (1280, 640), 640, 1, ""), (1, (640, 640), 640, 1, ""), (1, (640, 320), 640, 1, ""),
    (0, (640, 320), 320, 1, ""),
)  # fmt: skip


def _unet_convolutions(model: str, side: int, levels: int) -> tuple[Shape, ...]:
    rows = (
        (side >> level, widths, c_out, taps, how)
        for level, widths, c_out, taps, how in UNET_CONVOLUTIONS
        if level < levels and (level < levels - 1 or "stride" not in how)
    )
    return _convolutions(model, 2, rows)


# Times the latents' side, then as above.
VAE_CONVOLUTIONS = (
    (1, (512,), 512, 3, "residual"), (1, (512,), 512, 3, ""), (2, (512,), 512, 3, "residual"), (2, (512,), 512, 3, ""),
    (4, (256,), 256, 3, "residual"), (4, (256,), 256, 3, ""), (8, (128,), 128, 3, "residual"), (8, (128,), 128, 3, ""),
    (1, (512,), 512, 3, "enlarged in phases"), (2, (512,), 512, 3, "enlarged in phases"),
    (4, (256,), 256, 3, "enlarged in phases"), (4, (512,), 256, 3, ""), (8, (256,), 128, 3, ""),
    (4, (512,), 256, 1, ""), (8, (256,), 128, 1, ""), (8, (128,), 3, 3, ""), (1, (4,), 512, 3, ""), (1, (4,), 4, 1, ""),
)  # fmt: skip


def _vae_convolutions(model: str) -> tuple[Shape, ...]:
    side = VAE_SIDES[model]
    rows = ((side * n, widths, c_out, taps, how) for n, widths, c_out, taps, how in VAE_CONVOLUTIONS)
    return _convolutions(model, 1, rows)


CONV2D = (
    *_unet_convolutions("SD 1.5 512²", 64, 4),
    *_vae_convolutions("VAE 512²"),
    *_unet_convolutions("SDXL 1024²", 128, 3),
    *_unet_convolutions("SD 2.1 768²", 96, 4),
    *_vae_convolutions("VAE 768²"),
    *_vae_convolutions("VAE 1024²"),
    *_convolutions("VAE encoder 512²", 1, ((512, (128,), 128, 3, "stride 2, padded at the end"),)),
    *_convolutions("SD 1.5 inpainting", 2, ((64, (9,), 320, 3, ""),)),
    *_convolutions("SD 1.5, no phases", 2, ((32, (640,), 640, 3, "enlarged"),)),
)

# ------------------------------------------------------------------------------------------------- timestep embedding


def _timestep_embedding(times: tuple[int, ...], dim: int, outputs: int, device: str, dtype: torch.dtype) -> Arguments:
    t = filled(*times, device=device, dtype=torch.float32).abs() * 500
    new = partial(filled, device=device, dtype=dtype)
    layer = {"w": new(outputs, dim, scale=dim**-0.5), "b": new(outputs), "act": "silu"} if outputs else {}
    return (t, dim), {"flip": True, "shift": 0.0, **layer}


TIMESTEP_EMBEDDING = (
    *(
        Shape("every U-Net", f"{steps} steps, {dim} to 1280, SiLU", partial(_timestep_embedding, (steps,), dim, 1280))
        for steps, dim in ((50, 320), (20, 320))
    ),
    *(
        Shape("SDXL 1024²", f"{rows}×6 numbers, {dim} waves", partial(_timestep_embedding, (rows, 6), dim, 0))
        for rows, dim in ((2, 256), (8, 256))
    ),
)

# --------------------------------------------------------------------------------------------- a row of the sampler

TABLE_ROWS = 128  # more than an `end_row` that is timed goes through
SAMPLED = (  # side of the latents, width of the modulation, whether it differs per sample
    ("SD 1.5 512²", 64, 20160, False),
    ("SD 2.1 768²", 96, 20160, False),
    ("SDXL 1024²", 128, 13760, True),
)


def _tables(slots: int, rescale: float, device: str) -> RowTables:
    new = partial(filled, device=device, dtype=torch.float32, scale=0.1)  # a state that does not grow
    shapes: dict[str, tuple[int, ...]] = {"a": (TABLE_ROWS, slots, slots), "guidance": (TABLE_ROWS, 2)}
    shapes |= dict.fromkeys("bcd", (TABLE_ROWS, slots))
    made = {column.name: new(*shapes.get(column.name, (TABLE_ROWS,))) for column in fields(RowTables)}
    return RowTables(**made | {"limit": made["limit"].abs(), "rescale": torch.full_like(made["rescale"], rescale)})


def _begin_row(
    batch: int, channels: int, side: int, width: int, own: bool, device: str, dtype: torch.dtype
) -> Arguments:
    state = filled(1, batch, 4, side, side, device=device, dtype=torch.float32)
    mods = filled(1, 2 * batch if own else 1, width, device=device, dtype=dtype)
    row = torch.zeros(1, device=device, dtype=torch.int64)
    outputs = {"model_input": image(2 * batch, channels, side, side, device=device, dtype=dtype)}
    return (state, mods, _tables(1, 0.0, device), row), {**outputs, "modulation": torch.empty_like(mods[0])}


def _end_row(batch: int, slots: int, side: int, rescale: float, device: str, dtype: torch.dtype) -> Arguments:
    new = partial(filled, device=device, dtype=torch.float32)
    e = image(2 * batch, 4, side, side, device=device, dtype=dtype)
    row = torch.zeros(1, device=device, dtype=torch.int64)
    others = {name: new(batch, 4, side, side) for name in ("noise", "z0", "n0")}
    mask = torch.ones(batch, 1, side, side, device=device)
    return (new(slots, batch, 4, side, side), e, _tables(slots, rescale, device), row), {**others, "mask": mask}


BEGIN_ROW = (
    *(
        Shape(model, f"{batch}×4×{side}×{side}", partial(_begin_row, batch, 4, side, width, own))
        for model, side, width, own in SAMPLED
        for batch in (1, 4)
    ),
    Shape("SD 1.5 inpainting", "1×4×64×64 of 9 channels", partial(_begin_row, 1, 9, 64, 20160, False)),
)
END_ROW = (
    *(
        Shape(model, f"{batch}×4×{side}×{side}, {slots} slots", partial(_end_row, batch, slots, side, 0.0))
        for slots in (6, 1, 3)  # a plan has 6
        for model, side, *_ in SAMPLED
        for batch in (1, 4)
    ),
    Shape("SDXL 1024²", "1×4×128×128, 6 slots, rescaled", partial(_end_row, 1, 6, 128, 0.7)),
)

# ---------------------------------------------------------------------------------------------------------- a picture


def _to_uint8(batch: int, side: int, tiled: bool, device: str, dtype: torch.dtype) -> Arguments:
    new = filled if tiled else image
    return (new(batch, 3, side, side, device=device, dtype=dtype),), {}


TO_UINT8 = (
    *(
        Shape(model, f"{batch}×3×{8 * side}×{8 * side}", partial(_to_uint8, batch, 8 * side, False))
        for batch in (1, 4)
        for model, side in VAE_SIDES.items()
    ),
    Shape("VAE 1024²", "1×3×1024×1024, channels apart", partial(_to_uint8, 1, 1024, True)),
)

REAL: Mapping[str, tuple[Shape, ...]] = {
    "attention": ATTENTION,
    "layer_norm": LAYER_NORM,
    "group_norm": GROUP_NORM,
    "linear": LINEAR,
    "geglu": GEGLU,
    "conv2d": CONV2D,
    "timestep_embedding": TIMESTEP_EMBEDDING,
    "begin_row": BEGIN_ROW,
    "end_row": END_ROW,
    "to_uint8": TO_UINT8,
}
