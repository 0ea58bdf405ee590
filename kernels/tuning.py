"""Tiles, warps and stages: data that was looked at, not found at run time.

"Compiled" rows were chosen by what the compiler makes of them: no spills, enough programs for each multiprocessor.
Rows that were timed name the file under `benchmarks/results/` that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
import triton

from fastldm.kernels.launch import Unsupported, power_of_two


def capability() -> int:
    """The compute capability of the chip at hand; without one, an H200's."""
    try:
        return int(triton.runtime.driver.active.get_current_target().arch)
    except (RuntimeError, ValueError):  # no GPU, or one whose name is no number
        return 90


# Bytes of shared memory that a program may have, by compute capability.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def shared_limit() -> int:
    """Of the chip at hand."""
    return SHARED_LIMIT.get(capability(), SHARED_LIMIT[90])


_tma: ContextVar[bool | None] = ContextVar("fastldm.kernels.tma", default=None)


@contextmanager
def tma(wanted: bool) -> Iterator[None]:
    """In this context tiles are read by TMA wherever they can be, or nowhere: to test and to time both forms."""
    token = _tma.set(wanted)
    try:
        yield
    finally:
        _tma.reset(token)


def by_tma(tile: Product | Convolution) -> bool:
    """Whether a kernel reads its tiles by TMA, where TMA can address the tensors."""
    wanted = _tma.get()
    return 90 <= capability() < 120 and (tile.tma if wanted is None else wanted)


@dataclass(frozen=True)
class Rows:
    """For kernels that keep whole rows in registers: up to `columns` of them."""

    columns: int
    block_rows: int
    warps: int


# Layer norm. Whole rows of 320, 640 or 1280 half-precision numbers; 8 rows to a program keep the loads of
# w and b, which all rows share, from counting. Compiled, sm_90: no spills up to 2048 columns.
LAYER_NORM = (Rows(512, 8, 4), Rows(1024, 4, 4), Rows(2048, 4, 8), Rows(4096, 2, 8), Rows(8192, 1, 8))


def layer_norm(columns: int) -> Rows:
    for row in LAYER_NORM:
        if columns <= row.columns:
            return row
    raise Unsupported(f"{columns} columns do not fit into registers")


# -------------------------------------------------------------------------------------------------- linear and geglu


@dataclass(frozen=True)
class Product:
    """A tile of a matrix product: rows × (columns + side), `side` columns in an accumulator of their own.

    depth: how much of K is in a step. group: tiles of rows that share w in L2. splits: parts that K is cut into.
    tma: read by TMA where the chip has it.
    """

    rows: int
    columns: int
    side: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    splits: int = 1
    tma: bool = False

    def programs(self, m: int, n: int) -> int:
        return -(-m // self.rows) * -(-n // (self.columns + self.side))


# Through pointers, linear and geglu. Compiled, sm_90, 128 × 160: in 640 cycles of the tensor cores a step issues
# instructions in 184, by TMA in 248; at 128 × 256 in 168 and 178 of 1024. TMA saves registers, 106 for 128, but two
# programs fit into a multiprocessor either way.
LINEAR_160 = (Product(128, 128, 32, 64, 8, 3), Product(64, 128, 32, 64, 4, 3), Product(64, 64, 0, 64, 4, 4))
LINEAR_128 = (Product(128, 128, 0, 64, 8, 3), Product(64, 128, 0, 64, 4, 3), Product(64, 64, 0, 64, 4, 4))
LINEAR_FLOAT32 = Product(64, 64, 0, 16, 4, 2)
SPLITS = (1, 2, 4, 8)
STEPS = 4  # a part has at least so many
PROCESSORS, RATE, L2 = 132, 700e12, 5.5e12  # of an H200: FLOP/s of its tensor cores, bytes/s from its L2 cache
LAUNCH = 2e-6  # seconds that adding up parts takes at least
SUM_ROWS, SUM_COLUMNS = 8, 128


def linear(m: int, n: int, k: int, dtype: torch.dtype) -> Product:
    """The tile and the number of parts that should take the least time."""
    tiles = (LINEAR_FLOAT32,) if dtype == torch.float32 else LINEAR_128 if n % 160 else LINEAR_160
    cut = (replace(tile, splits=s) for tile in tiles for s in SPLITS if s == 1 or k // (tile.depth * s) >= STEPS)
    return min(cut, key=lambda tile: _predicted(tile, m, n, k))


def _predicted(tile: Product, m: int, n: int, k: int) -> float:
    """Seconds: waves of programs, each as long as its products or what it reads of L2; then the sum of the parts."""
    columns, depth = tile.columns + tile.side, -(-k // tile.splits)
    products, reads = 2 * tile.rows * columns * depth, 2 * (tile.rows + columns) * depth
    waves = -(-tile.programs(m, n) * tile.splits // PROCESSORS)
    adding = LAUNCH + 8 * tile.splits * m * n / L2 if tile.splits > 1 else 0.0
    return waves * PROCESSORS * max(products / RATE, reads / L2) + adding


# The columns are those of the product, value and gate.
GEGLU = (Product(128, 256, 0, 64, 8, 3), Product(128, 128, 32, 64, 8, 3), Product(64, 128, 0, 64, 4, 3))
GEGLU_FLOAT32 = Product(64, 64, 0, 16, 4, 2)
GEGLU_ENOUGH = (500, 120, 0)  # programs of each


def geglu(m: int, n: int, dtype: torch.dtype) -> Product:
    if dtype == torch.float32:
        return GEGLU_FLOAT32
    return next(tile for tile, least in zip(GEGLU, GEGLU_ENOUGH, strict=True) if tile.programs(m, n) >= least)


@dataclass(frozen=True)
class Groups:
    """Group norm. block_rows: pixels of a group at a time. block_stretches: partial moments at a time."""

    block_rows: int
    block_stretches: int
    warps: int


GROUP_NORM_TILE = 8192
GROUP_NORM_WHOLE = 32768  # elements of a group, up to which one program takes it whole: 64 KB of half precision, in L1
GROUP_NORM_PROGRAMS = 512  # of a sample, that take moments: about 4 for each of 132 multiprocessors
GROUP_NORM_PARTIALS = 1024  # partial moments at a time. Compiled: of 2048, groups of 60 channels spill on sm_89
GROUP_NORM_MOMENTS = Rows(64, 64, 4)
GROUP_NORM_APPLY = Rows(64, 64, 4)


def group_norm(size: int) -> Groups:
    """size: channels of a group."""
    width = power_of_two(size)
    if width > GROUP_NORM_TILE:
        raise Unsupported(f"groups of {size} channels do not fit into registers")
    return Groups(GROUP_NORM_TILE // width, max(1, GROUP_NORM_PARTIALS // width), 8)


def group_norm_stretch(pixels: int, columns: int) -> int:
    """How many pixels a program takes, in whole tiles. The batch does not count: a sample is the same alone and not."""
    block = GROUP_NORM_MOMENTS.block_rows
    stretches = max(1, GROUP_NORM_PROGRAMS // max(1, columns))
    return max(1, -(-pixels // (stretches * block))) * block


@dataclass(frozen=True)
class Attention:
    """block_m: queries, block_n: keys of a step. d1 + d2: the pieces of a head, d2 = 0 where there is one.

    parts: of v's columns, each a program's. short: all keys at once, for several blocks of queries.
    depth: columns of q and k that are read at a time in each step; 0: q stays in registers.
    """

    d1: int
    d2: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    parts: int = 1
    short: bool = False
    depth: int = 0


# Attention: by the columns that are held, d1 + d2 (queries, keys, warps, stages). Compiled, no spills in half
# precision; sm_90: at most 126 registers up to 80 columns, so two programs to a multiprocessor. 64 queries in place of
# 128 would read K and V twice as often from L2.
ATTENTION = {
    64: (128, 64, 8, 3),
    96: (128, 64, 8, 3),
    128: (128, 64, 8, 2),
    160: (64, 64, 4, 2),
    256: (64, 32, 4, 2),
    512: (64, 32, 4, 2),
}
ATTENTION_100 = ATTENTION | {512: (64, 32, 8, 2)}
# The others, sm_120 too, hold queries in registers.
ATTENTION_80 = ATTENTION | {160: (64, 32, 8, 2), 256: (32, 32, 8, 2), 512: (16, 32, 8, 1)}
ATTENTION_SHORT = (64, 4, 1)  # queries, warps, stages. sm_90: 138 to 172 registers; 252 at 160 columns
SHORT_COLUMNS, SHORT_COLUMNS_80 = 160, 128
# Float32, without tensor cores: what a thread multiplies is in its registers, and whole rows of q and k would spill.
# Compiled, sm_80 to sm_100: 110 to 243 registers, no spills; 64 keys spill at 96 columns with a mask.
ATTENTION_FLOAT, ATTENTION_FLOAT_WIDE, FLOAT_COLUMNS, FLOAT_DEPTH = (64, 64, 8, 1), (64, 32, 8, 1), 64, 16
SHORT_KEYS = 128
MOST_ROWS = 128  # of any tile
WALKERS = 264  # programs from which on each may go over more queries: 2 for each of 132 multiprocessors


def attention(dim: int, keys: int, full: bool) -> Attention:
    """full: float32."""
    d1, d2 = _pieces(dim)
    chip = capability()
    hopper, blackwell = 90 <= chip < 100, 100 <= chip < 120
    tiles = ATTENTION if hopper else ATTENTION_100 if blackwell else ATTENTION_80
    held = next((w for w in tiles if w >= d1 + d2), 0)
    if not held or (held == 512 and dim != 512):
        raise Unsupported(f"head dim {dim}: there are 1 to 256, and 512")
    parts = 2 if held == 512 else 1
    if full:
        tile = ATTENTION_FLOAT if held <= FLOAT_COLUMNS else ATTENTION_FLOAT_WIDE
        return Attention(d1, d2, *tile, parts=parts, depth=FLOAT_DEPTH)
    if keys <= SHORT_KEYS and held <= (SHORT_COLUMNS if hopper or blackwell else SHORT_COLUMNS_80):
        block_m, warps, stages = ATTENTION_SHORT
        return Attention(d1, d2, block_m, SHORT_KEYS, warps, stages, short=True)
    return Attention(d1, d2, *tiles[held], parts=parts)


def _pieces(dim: int) -> tuple[int, int]:
    """Powers of two, at least 16, that hold `dim` columns with the fewest to spare; one where two hold no fewer."""
    one = max(16, 1 << (dim - 1).bit_length())
    rest = dim - one // 2
    two = max(16, 1 << (rest - 1).bit_length())
    return (one // 2, two) if one // 2 >= 16 and one // 2 + two < one else (one, 0)


def attention_walk(blocks: int, heads: int) -> int:
    """How many blocks of queries a program goes over."""
    return max(1, min(blocks, blocks * heads // WALKERS, 8))


# ---------------------------------------------------------------------------------------------------- convolution


@dataclass(frozen=True)
class Convolution:
    """block_m pixels of one sample × (block_n + more_n channels, an accumulator each); block_k channels in a step.

    splits: how many programs share a tile's sum. block_w: of the box of pixels that TMA reads; 0: there is none.
    tma: read by it where the chip has it.
    """

    block_m: int
    block_n: int
    more_n: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1
    block_w: int = 0
    tma: bool = False


def conv2d(maps: int, pixels: int, depths: tuple[int, ...], taps: int, c_out: int, dtype: torch.dtype) -> Convolution:
    """maps: samples, or four times those where phases are convolved; pixels: of each.

    depths: channels of the inputs; of few channels those of all taps, which are then as one.
    """
    block_m = 64 if 5 * 64 * -(-pixels // 64) < 4 * 128 * -(-pixels // 128) else 128
    tile = _conv2d_tile(block_m, min(depth for depth in depths if depth), c_out, dtype)
    programs = maps * -(-pixels // tile.block_m) * -(-c_out // (tile.block_n + tile.more_n))
    return replace(tile, splits=_conv2d_splits(programs, pixels, depths, taps, tile.block_k))


def conv2d_tma(
    maps: int, grid: tuple[int, int], depths: tuple[int, ...], taps: int, c_out: int, dtype: torch.dtype
) -> Convolution | None:
    """The tile for maps that TMA can address. grid: their height and width.

    None in float32, where the channels are few or no multiple of 64, and where boxes do not fit the map.
    """
    if dtype == torch.float32 or c_out % 64 or min(depth for depth in depths if depth) < CONV2D_TMA_DEPTH:
        return None
    pixels = grid[0] * grid[1]
    for tile, least in zip(CONV2D_TMA if c_out % 128 == 0 else CONV2D_TMA_64, CONV2D_TMA_ENOUGH, strict=True):
        tile = tile if taps > 1 else replace(tile, block_w=tile.block_m)
        height, width = grid if taps > 1 else (1, pixels)
        boxes = -(-height * tile.block_w // tile.block_m) * -(-width // tile.block_w)
        programs = maps * boxes * c_out // tile.block_n
        if programs >= least and boxes * tile.block_m <= CONV2D_TMA_LARGER * pixels:
            splits = _conv2d_splits(programs, pixels, depths, taps, tile.block_k)
            return replace(tile, splits=splits, tma=c_out % 160 != 0)
    return None


def _conv2d_splits(programs: int, pixels: int, depths: tuple[int, ...], taps: int, block_k: int) -> int:
    steps = sum(-(-depth // block_k) for depth in depths) * taps
    most = min(CONV2D_ENOUGH // programs, steps // CONV2D_STEPS) if pixels <= CONV2D_SMALL else 1
    return max(1, most)


CONV2D_ENOUGH = 160  # programs that a sum is split into: an H200 has 132 multiprocessors
CONV2D_SMALL = 1024  # pixels: of larger maps no sum is split, as what adds the parts up is one program per 16 channels
CONV2D_FINISH = (256, 16)  # pixels and channels at a time of what adds the parts up
CONV2D_MERGE = (128, 8)  # tiles and channels at a time of what merges their moments
# By TMA. Compiled, sm_90: of the tensor cores' cycles 21 % issue instructions at 256 pixels × 128 channels (231
# registers), 41 % at 128 × 128 (112), and 50 % through pointers at 128 × 128. Multiples of 160 channels stay with the
# pointers' 128 × 160, 44 %: of those tiles there are as many as multiprocessors, or a little fewer, where it matters.
CONV2D_TMA = (Convolution(256, 128, 0, 64, 8, 3, block_w=16), Convolution(128, 128, 0, 64, 8, 3, block_w=16))
CONV2D_TMA_64 = (Convolution(256, 64, 0, 64, 4, 3, block_w=16), Convolution(128, 64, 0, 64, 4, 4, block_w=16))
CONV2D_TMA_ENOUGH = (200, 0)  # programs of each
CONV2D_TMA_DEPTH = 64  # channels of each input, at least
CONV2D_TMA_LARGER = 1.25  # times the map that boxes may cover
CONV2D_STEPS = 8  # a split has at least so many, or filling the pipeline costs more than it saves


def _conv2d_tile(block_m: int, depth: int, c_out: int, dtype: torch.dtype) -> Convolution:
    """By channels: 160 divide those of the U-Nets. Compiled, sm_90: up to 198 registers, no spills."""
    block_k = 64 if depth > 32 else 32 if depth > 16 else 16
    block_k = 16 if depth % 16 else block_k  # what is loaded number by number takes registers for each address
    if dtype == torch.float32:
        return Convolution(64, 64 if c_out > 16 else 16, 0, min(block_k, 32), 4, 2)
    whole = c_out % 160 == 0 and not 100 <= capability() < 120  # where 128 × 160 spills
    block_n, more_n = (128, 32) if whole else (128, 0) if c_out > 64 else (64, 0) if c_out > 16 else (16, 0)
    stage = (block_m + block_n + more_n) * block_k * 2
    warps = 8 if block_m == block_n == 128 else 4
    return Convolution(block_m, block_n, more_n, block_k, warps, min(4, max(3, shared_limit() // stage)))


@dataclass(frozen=True)
class Embedding:
    """block_m: timesteps. block_o: outputs. block_i: frequencies at a time."""

    block_m: int
    block_o: int
    block_i: int
    warps: int


# 20 to 50 timesteps by 1280 outputs are 80 to 160 programs. Compiled.
TIMESTEP_EMBEDDING = Embedding(16, 32, 32, 4)

# begin_row and end_row: 4 numbers to a thread, so that 64×64 latents are 32 programs for each sample. Compiled.
ROW_BLOCK, ROW_WARPS = 512, 4
END_ROW_STD = 2048  # of a sample at a time, where guidance is rescaled

# to_uint8: 8 numbers to a thread, so that half precision is read 16 bytes at a time. Compiled.
TO_UINT8_BLOCK, TO_UINT8_WARPS = 1024, 4
