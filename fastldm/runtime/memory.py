"""What a call takes at its peak, and what there is: a call that cannot fit is refused before any work.

The peak is that of the largest stage: the source encoded, the sampling, the decoding, the images handed over. Each is
followed as `model/` and `ops/reference.py` run it, adding up what is alive at every moment that may be the largest. It
is arithmetic on the configuration: no tensor is made.

n counts pixels (or tokens) of all rows of a batch, c channels; results are bytes. A function of a block says what it
needs on top of its inputs, its result included.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastldm.config import UNetConfig, VAEConfig
from fastldm.errors import ArgumentError
from fastldm.model.vae import OVERLAP
from fastldm.ops import compute_dtype, reference
from fastldm.runtime.engine import Engine
from fastldm.runtime.plan import ROWS, SLOTS

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
KEPT = (
    150_000_000  # what the heap and the libraries keep on a CPU, at most as much again as the call: see `needed_bytes`
)


@dataclass(frozen=True)
class Call:
    """What the memory of a call depends on.

    height, width: pixels. slicing, tiling: of the autoencoder. encodes: images that are encoded. tokens: of a prompt.
    plans: 2 where a callback may change what a plan is made for. alone: rows evaluate the last branch alone, too.
    output_type: as the call has it.
    """

    batch: int
    branches: int
    height: int
    width: int
    steps: int
    slicing: bool
    tiling: bool
    encodes: int = 0
    tokens: int = 77
    plans: int = 1
    alone: bool = False
    output_type: str = "pil"


def check(engine: Engine, call: Call) -> None:
    """Raises `ArgumentError` if the call takes more than is available, before it takes it.

    The field is "num_images_per_prompt" where fewer images would fit as they are, else "height".
    """
    needed = needed_bytes(engine, call)
    available = available_bytes(engine.device, enough=needed)
    if available is not None and needed > available and len(engine.pool):
        engine.pool.clear()
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()  # what graphs have left is nobody's before
        available = available_bytes(engine.device, enough=needed)
    if available is None or needed <= available:
        return
    fewer = _most(engine, call, available)
    options = [_images(fewer)] if fewer else []
    for name, change in (
        ("slicing", replace(call, slicing=True)),
        ("tiling", replace(call, slicing=True, tiling=True)),
    ):
        if change != call and (most := _most(engine, change, available)) > fewer:
            options.append(f"{_images(most)} with pipe.enable_vae_{name}()")
    what = f"{_images(call.batch)} of {call.width}×{call.height} pixels"
    raise ArgumentError(
        f"{what}: would take {_gigabytes(needed)} of memory beyond the model, {_gigabytes(available)} are available on "
        f"{engine.device}; what would fit: {', '.join([*options, 'a smaller size'])}",
        field="num_images_per_prompt" if fewer else "height",
    )


def _most(engine: Engine, call: Call, available: int) -> int:
    """How many images of the call fit, 0 where not even one does."""
    needed = [replace(call, batch=n, encodes=min(call.encodes, n)) for n in range(1, call.batch + 1)]
    return bisect_right(needed, available, key=lambda fewer: needed_bytes(engine, fewer))


def _images(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


# ---------------------------------------------------------------------------------------------------- what there is


def available_bytes(device: torch.device, *, enough: int | None = None) -> int | None:
    """What can be allocated on a device now, without swapping; None where nothing tells.

    enough: where a first look finds as much, there is no second. On a GPU what is free, and what PyTorch keeps for
    itself outside the pools of graphs, which takes a while to find out. Elsewhere the machine's free memory and what it
    can take back from its cache of files, within the limits of every control group (versions 1 and 2) that the process
    is in.
    """
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free if enough is not None and free >= enough else free + _kept_by_torch(device)
    machine = [1024 * kib for name, kib in _numbers(PROC / "meminfo").items() if name == "MemAvailable:"]
    return min([*machine, *_left_in_groups()], default=None)


def _kept_by_torch(device: torch.device) -> int:
    """Bytes of its segments that hold nothing, and may; those of a graph's own pool hold what only the graph uses."""
    return sum(
        segment["total_size"] - segment["active_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == (device.index or 0) and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
    )


def _left_in_groups() -> Iterator[int]:
    """What each control group of the process leaves, from its own to the outermost that can be seen."""
    for line in _lines(PROC / "self" / "cgroup"):
        number, kinds, path = line.split(":", 2)
        if number == "0" and not kinds:
            root, names = CGROUPS, ("memory.max", "memory.current", "")
        elif "memory" in kinds.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        own = root / path.lstrip("/")  # in a container the path may be the host's: then its root is the group
        for group in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
            limit, used = (next(iter(_lines(group / name)), "") for name in names[:2])
            if limit.isdecimal() and used.isdecimal():
                cached = _numbers(group / "memory.stat")
                files = sum(cached.get(f"{names[2]}{kind}_file", 0) for kind in ("active", "inactive"))
                yield max(int(limit) - int(used) + files, 0)


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file, none where it cannot be read."""
    words = (line.split() for line in _lines(path))
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------------- what it takes


def needed_bytes(engine: Engine, call: Call) -> int:
    """By how much the memory of the process grows at most, beyond the weights: on a CPU also by what is not given back.

    The C library keeps freed pieces under 32 MB for later, and code is read in at its first use. With the full-size
    Stable Diffusion 1.5 the resident set grew by 16 to 185 MB more than the tensors took (256×256 and 512×512, float32
    and bfloat16, one thread, glibc), with the heap's limit set to 1 MB by about 30. A whole call at 256×256 in float32:
    345 MB, estimated 352.
    """
    peak = peak_bytes(engine, call)
    return peak if engine.device.type == "cuda" else peak + min(peak, KEPT)


def peak_bytes(engine: Engine, call: Call) -> int:
    """What the tensors of a call take at its peak, beyond the weights and the caller's images.

    Within 1 % of what PyTorch's allocator held on a CPU (torch 2.13, AVX-512 without AMX) for the networks of Stable
    Diffusion 1.5 at 64×64 to 512×512, in float32, bfloat16 and float64, and for whole calls of tiny models. On a GPU it
    was not measured: the workspaces of cuDNN are not in it.
    """
    stages = [_sampling(engine, call)]
    if call.encodes:
        stages.append(_encoding(engine, call))
    if call.output_type != "latent":
        kept = _plan(engine, call) if engine.pool.limit else 0
        stages += [kept + _decoding(engine, call), kept + _handing_over(engine, call)]
    return max(stages)


def _plan(engine: Engine, call: Call) -> int:
    """A plan's buffers."""
    unet, b = engine.unet, Blocks.like(engine.unet.conv_in.weight)
    factor, config = engine.vae.config.factor, unet.config
    pixels = (call.height // factor) * (call.width // factor)
    shifts, context = len(unet.time_projections.weight), len(unet.context_projections.weight)
    size = b.stats * (SLOTS + 3) * call.batch * config.out_channels * pixels
    for samples in (call.branches * call.batch, *([call.batch] if call.alone else [])):
        size += b.work * (samples * (config.in_channels * pixels + call.tokens * context) + ROWS * shifts)
    return size


def _sampling(engine: Engine, call: Call) -> int:
    """A plan's buffers and what the job keeps, with the denoiser, or with the prompt's keys and values made twice."""
    unet, b = engine.unet, Blocks.like(engine.unet.conv_in.weight)
    factor, config = engine.vae.config.factor, unet.config
    height, width, rows = call.height // factor, call.width // factor, call.branches * call.batch
    pixels, tokens = height * width, rows * call.tokens
    latents = b.stats * call.batch * config.out_channels * pixels
    shifts, context = len(unet.time_projections.weight), len(unet.context_projections.weight)
    held = _plan(engine, call) + 2 * latents  # x and the noise that it was made of
    held += b.work * (call.steps * shifts + tokens * config.context_dim)
    end_row = (2 * SLOTS + 2) * latents
    return held * call.plans + max(
        *_unet(b, config, rows, height, width), b.linear(tokens, config.context_dim, context), end_row
    )


def _encoding(engine: Engine, call: Call) -> int:
    """One source at once or all, or a tile of them, with two copies of all."""
    config, b = engine.vae.config, Blocks.like(engine.vae.encoder.conv_in.weight)
    height, width, at_once = call.height, call.width, 1 if call.slicing else call.encodes
    if call.tiling and max(height, width) > config.sample_size:
        height, width = min(height, config.sample_size), min(width, config.sample_size)
    sources = 8 * call.encodes * call.height * call.width * config.in_channels
    return sources + max(_encoder(b, config, at_once * height * width))


def _decoding(engine: Engine, call: Call) -> int:
    """One image on top of those before it, or all; then the pixels joined to a batch."""
    config, b = engine.vae.config, Blocks.like(engine.vae.decoder.conv_in.weight)
    height, width = call.height // config.factor, call.width // config.factor
    at_once = 1 if call.slicing else call.batch
    pixels = b.work * config.out_channels * call.height * call.width
    tile = config.sample_size // config.factor
    if call.tiling and max(height, width) > tile:
        one = _tiles(b, config, at_once, height, width, tile)
    else:
        one = max(_decoder(b, config, at_once * height * width))
    return max((call.batch - at_once) * pixels + one, 2 * call.batch * pixels)


def _tiles(b: Blocks, config: VAEConfig, rows: int, height: int, width: int, tile: int) -> int:
    """The image row by row, two rows of whole tiles, and one tile on its way; then the rows joined."""
    step = int(tile * (1 - OVERLAP))
    across = sum(min(tile, width - left) for left in range(0, width, step))
    down = min(tile, height)
    pixels = b.work * config.out_channels * config.factor**2 * rows
    decoder = max(_decoder(b, config, rows * down * min(tile, width)))
    return max(pixels * (height * width + (1 + (height > step)) * down * across) + decoder, 2 * pixels * height * width)


def _handing_over(engine: Engine, call: Call) -> int:
    """From −1..1 to 0..1, then as float32 on the host; for PIL multiplied and rounded where it was decoded."""
    config, weight = engine.vae.config, engine.vae.decoder.conv_in.weight
    work = weight.itemsize
    numbers = max(3 * work, work + 6)
    if weight.device.type != "cuda":
        array = 0 if weight.dtype == torch.float32 else 4
        numbers = max(numbers, 2 * work + array + 8 * (call.output_type == "pil"))
    return numbers * call.batch * config.out_channels * call.height * call.width


# ---------------------------------------------------------------------------------------------------------- the blocks


@dataclass(frozen=True)
class Blocks:
    """The ops and blocks of a network. work, product, stats: bytes of a number as stored, multiplied, averaged."""

    work: int
    product: int
    stats: int
    on_cpu: bool

    @classmethod
    def like(cls, weight: Tensor) -> Blocks:
        product, stats = reference.product_dtype(weight), compute_dtype(weight.dtype)
        return cls(weight.itemsize, product.itemsize, stats.itemsize, on_cpu=weight.device.type == "cpu")

    @property
    def casts(self) -> bool:
        """Whether inputs and weights of products are copied in a wider dtype."""
        return self.product != self.work

    def group_norm(self, n: int, c: int, *, joined: bool = False) -> int:
        """The joined input, the input less its pivot, the norm of that."""
        return n * c * (joined * self.work + 2 * self.stats)

    def linear(self, n: int, c_in: int, c_out: int) -> int:
        y = self.product * n * c_out
        return self.product * c_in * (n + c_out) + y if self.casts else y

    def geglu(self, n: int, c: int) -> int:
        """From c to 4c: value and gate side by side, then the gate's activation."""
        y = self.product * n * 8 * c
        if not self.casts:
            return y + y // 2
        return max(self.product * c * (n + 8 * c) + y, y + y // 2 + self.work * n * 4 * c)

    def conv(self, n: int, c_in: int, c_out: int, *, kernel: int = 3, n_in: int = 0, copied: bool = False) -> int:
        """n: pixels of the output, and of what is read where n_in is 0. copied: joined, enlarged or padded for it.

        On a CPU oneDNN rearranges the weights in every call; where there are fewer pixels than output channels the
        input is unfolded instead, and always in float64, for which oneDNN has no convolution.
        """
        x, y, weights = (n_in or n) * c_in, self.product * n * c_out, self.product * c_in * c_out * kernel**2
        work = weights if self.on_cpu else 0
        if self.on_cpu and self.product == 8:
            work = self.product * n * c_in * kernel**2 * (kernel > 1)
        elif self.on_cpu and self.product == 4 and n_in in (0, n) and n < c_out:
            work = self.product * n * c_in * (kernel**2 + 1)
        if not self.casts:
            return copied * self.work * x + y + work
        cast = self.product * x
        return max(copied * self.work * x + cast, cast + weights + work + y, cast + y + self.work * n * c_out)

    def res_block(self, n: int, c_in: int, c_out: int, *, skip: int = 0) -> int:
        """skip: channels of the second input, 0 without one."""
        c, unit = c_in + skip, self.work * n
        shortcut = c_out if c != c_out else 0
        return max(
            self.group_norm(n, c, joined=skip > 0),
            unit * c + self.conv(n, c, c_out),
            unit * c_out + (self.conv(n, c, c_out, kernel=1, copied=skip > 0) if shortcut else 0),
            unit * (c_out + shortcut) + self.group_norm(n, c_out),
            unit * (2 * c_out + shortcut) + self.conv(n, c_out, c_out),
        )

    def self_attention(self, n: int, c: int) -> int:
        """From the normed input on; q, k and v outlive the attention. No path makes the scores of all pairs."""
        unit = self.work * n * c
        return unit + max(self.linear(n, c, 3 * c), 4 * unit + self.linear(n, c, c))

    def transformer(self, n: int, c: int) -> int:
        """The largest moments of a block hold its input, what attention made of it, and the norm of that."""
        unit = self.work * n * c
        return max(
            self.group_norm(n, c),
            unit + self.linear(n, c, c),
            unit + self.self_attention(n, c),
            3 * unit + self.geglu(n, c),
            7 * unit + self.linear(n, 4 * c, c),
        )


# -------------------------------------------------------------------------------------------------------- the networks


def _unet(b: Blocks, config: UNetConfig, rows: int, height: int, width: int) -> Iterator[int]:
    """The moments of `UNet.forward`. The skip connections are held until the way up takes them."""
    pixels = [rows * math.ceil(height / 2**i) * math.ceil(width / 2**i) for i in range(len(config.down))]
    c = config.down[0].channels
    skips = [(pixels[0], c)]

    def held() -> int:
        return b.work * sum(n * channels for n, channels in skips)

    for i, level in enumerate(config.down):
        n = pixels[i]
        for _ in range(level.layers):
            yield held() + b.res_block(n, c, level.channels)
            c = level.channels
            if level.depth:
                yield held() + b.work * n * c + b.transformer(n, c)
            skips.append((n, c))
        if i + 1 < len(config.down):
            yield held() + b.conv(pixels[i + 1], c, c, n_in=n)
            skips.append((pixels[i + 1], c))
    if config.mid_depth is not None:
        yield held() + b.work * pixels[-1] * c + max(b.transformer(pixels[-1], c), b.res_block(pixels[-1], c, c))
    for i, level in reversed(list(enumerate(reversed(config.up)))):
        n = pixels[i]
        entered = b.work * n * c  # what came into the block is held until its end
        for layer in range(level.layers):
            current = b.work * n * c if layer else 0
            yield held() + entered + current + b.res_block(n, c, level.channels, skip=skips[-1][1])
            c = level.channels
            skips.pop()
            if level.depth:
                yield held() + entered + b.work * n * c + b.transformer(n, c)
        if i:
            yield held() + entered + b.work * n * c + b.conv(pixels[i - 1], c, c, n_in=pixels[i - 1], copied=True)
    yield b.work * pixels[0] * c + b.group_norm(pixels[0], c)
    yield 2 * b.work * pixels[0] * c + b.conv(pixels[0], c, config.out_channels)


def _middle(b: Blocks, config: VAEConfig, n: int) -> int:
    c = config.channels[-1]
    unit = b.work * n * c
    attention = 2 * unit + b.self_attention(n, c) if config.mid_attention else 0
    return max(2 * unit + b.res_block(n, c, c), attention)


def _decoder(b: Blocks, config: VAEConfig, n: int) -> Iterator[int]:
    """The moments of `AutoencoderKL._image` for n latent pixels. What comes into a stage is held until its end."""
    yield _middle(b, config, n)
    c = config.channels[-1]
    for i, c_out in reversed(list(enumerate(config.channels))):
        entered, current = b.work * n * c, b.work * n * c_out
        yield entered + max(b.res_block(n, c, c_out), current + b.res_block(n, c_out, c_out))
        c = c_out
        if i:
            yield entered + current + b.conv(4 * n, c, c, n_in=4 * n, copied=True)
            n *= 4
    yield b.work * n * c + b.group_norm(n, c)
    yield 2 * b.work * n * c + b.conv(n, c, config.out_channels)


def _encoder(b: Blocks, config: VAEConfig, n: int) -> Iterator[int]:
    """The moments of `AutoencoderKL._moments` for n pixels."""
    c = config.channels[0]
    for i, c_out in enumerate(config.channels):
        entered, current = b.work * n * c, b.work * n * c_out
        yield entered + max(b.res_block(n, c, c_out), current + b.res_block(n, c_out, c_out))
        c = c_out
        if i + 1 < len(config.channels):
            yield entered + current + b.conv(n // 4, c, c, n_in=n, copied=True)
            n //= 4
    yield _middle(b, config, n)
