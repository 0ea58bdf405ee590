"""Kernels that are wrong on purpose. Each must be caught by the cases that its row names."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

KERNELS = Path(__file__).resolve().parent.parent.parent / "kernels"


@dataclass(frozen=True)
class Mutant:
    """why: what is wrong. old, new: text of kernels/<op>.py, where `old` stands once. case: one of the op's."""

    op: str
    why: str
    old: str
    new: str
    case: str
    dtype: torch.dtype = torch.float32
    whole: bool = False  # group norm in one launch


MUTANTS = (
    Mutant("layer_norm", "the tail counts into the variance", "tl.where((c < C)[None, :], s - mean[:, None], 0.0)",
           "s - mean[:, None]", "no multiple of any tile"),
    Mutant("layer_norm", "the variance is E[x²] − E[x]²", "tl.sum(centred * centred, axis=1) / C",
           "tl.sum(s * s, axis=1) / C - mean * mean", "a mean of 1000 with unit variance"),
    Mutant("layer_norm", "the last row is left out", "(r < rows)", "(r < rows - 1)", "one row"),
    Mutant("layer_norm", "rows are counted in 32 bits", ".to(tl.int64)", ".to(tl.int32)", "offsets past 2³¹",
           torch.float16),
    Mutant("layer_norm", "rows lie side by side", "r[:, None] * x_stride", "r[:, None] * C",
           "rows of a packed projection"),
    Mutant("linear", "the last row is read as the one before", "tl.minimum(m, M - 1)", "tl.minimum(m, M - 2)",
           "no multiple of any tile"),
    Mutant("linear", "K's tail is not masked", "WHOLE=tile.splits * steps * tile.depth == k",
           "WHOLE=True", "K in parts with a tail"),
    Mutant("linear", "the second accumulator begins a column too early", "+ BLOCK_N + tl.arange(0, SIDE)",
           "+ BLOCK_N - 1 + tl.arange(0, SIDE)", "several tiles of rows and columns, in groups"),
    Mutant("linear", "the last group of tiles is as high as the others",
           "tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)", "GROUP", "several tiles of rows and columns, in groups"),
    Mutant("linear", "the parts of K overlap", "part * (steps * BLOCK_K)", "part * BLOCK_K", "K in parts"),
    Mutant("linear", "the last part is not added", "range(splits)", "range(splits - 1)",
           "K in parts"),
    Mutant("linear", "gelu is the one by tanh", "0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))",
           "x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))", "gelu"),
    Mutant("linear", "quick_gelu has gelu's slope at 0", "1.702 * x", "1.5957691216057308 * x", "quick_gelu"),
    Mutant("linear", "rows are counted in 32 bits", "row.to(tl.int64) * BLOCK_M", "row * BLOCK_M",
           "offsets past 2³¹", torch.float16),
    Mutant("linear", "the side's tile by TMA is the others'", "[column * (BLOCK_N + SIDE) + BLOCK_N, first_k + at]",
           "[column * (BLOCK_N + SIDE), first_k + at]", "several tiles of rows and columns, in groups, by TMA",
           torch.float16),
    Mutant("linear", "every part by TMA reads the first one's columns of x", "x.load([row * BLOCK_M, first_k + at])",
           "x.load([row * BLOCK_M, at])", "K in parts, by TMA", torch.float16),
    Mutant("linear", "rows lie side by side to TMA", "[rows, k], [stride, 1]", "[rows, k], [k, 1]",
           "rows of a packed projection, by TMA", torch.float16),
    Mutant("linear", "TMA reads on past the end of a row", "[rows, k], [stride", "[rows, k + 16], [stride",
           "several tiles, tails everywhere, by TMA", torch.float16),
    Mutant("geglu", "the gate's rows come first", "column % 2 * F", "(column + 1) % 2 * F", "one row"),
    Mutant("geglu", "the last row is left out", "(m < M)", "(m < M - 1)", "one row"),
    Mutant("geglu", "K's tail is not masked", "WHOLE=steps * tile.depth == k",
           "WHOLE=True", "several tiles, tails everywhere"),
    Mutant("geglu", "the side's columns are stored over the others", "column + BLOCK_N, M", "column, M",
           "several tiles of rows and columns, in groups"),
    Mutant("geglu", "the side has no bias", " + tl.load(b + side_rows).to(tl.float32)[None, :]", "",
           "several tiles of rows and columns, in groups"),
    Mutant("geglu", "rows are counted in 32 bits", "row.to(tl.int64) * BLOCK_M", "row * BLOCK_M", "offsets past 2³¹",
           torch.float16),
    Mutant("geglu", "w holds value and gate side by side", "[k, n // 2 * k, 1]", "[2 * k, k, 1]", "one row, by TMA",
           torch.float16),
    Mutant("geglu", "a tile of pairs begins at its column", "w.load([column // 2, 0, k])", "w.load([column, 0, k])",
           "several tiles of rows and columns, in groups, by TMA", torch.float16),
    Mutant("geglu", "the side has the others' weights", "_pairs(w_side, column + BLOCK_N, at)",
           "_pairs(w_side, column, at)", "several tiles of rows and columns, in groups, by TMA", torch.float16),
    Mutant("geglu", "rows lie side by side", "[x_stride, 1]", "[k, 1]", "rows of a packed projection, by TMA",
           torch.float16),
    Mutant("conv2d", "a pixel left of the map is the last of the row above", "(i >= 0) & (i < height) & (j >= 0)",
           "(i >= 0) & (i < height)", "no multiple of any tile"),
    Mutant("conv2d", "the taps of the last row are inside", "(i < height) & ", "(i <= height) & ",
           "stride 2, padded at the end"),
    Mutant("conv2d", "a tap is counted down columns", "moved = tap // TAPS * tl.cast(in_width, tl.int64) + tap % TAPS\n"
           "                    x_tile = x_rows", "moved = tap % TAPS * tl.cast(in_width, tl.int64) + tap // TAPS\n"
           "                    x_tile = x_rows", "two inputs"),
    Mutant("conv2d", "the second input begins with the first's last block", "c - first_blocks * BLOCK_K",
           "c - (first_blocks - 1) * BLOCK_K", "1×1, two inputs"),
    Mutant("conv2d", "the second input reads the first's weights", "tl.where(second, w_step + C, w_step)", "w_step",
           "two inputs"),
    Mutant("conv2d", "channels past the last are not masked", "(c + k < channels)[None, :]",
           "(c + k < channels + BLOCK_K)[None, :]", "1×1, two inputs with tails"),
    Mutant("conv2d", "phases of columns and rows are exchanged", "+ phase // 2\n", "+ phase % 2\n",
           "enlarged in phases"),
    Mutant("conv2d", "an enlarged row is halved upwards", "((top + tap // TAPS) >> 1)",
           "((top + tap // TAPS + 1) >> 1)", "enlarged to 2n − 1"),
    Mutant("conv2d", "every split sums the same steps", "start = tl.program_id(1) * steps", "start = 0", "split"),
    Mutant("conv2d", "a split takes a step too few", "tl.minimum(start + steps, all_steps)",
           "tl.minimum(start + steps - 1, all_steps)", "split"),
    Mutant("conv2d", "one shift for all samples",
           "shift_row = None if shift is None else shift + sample * shift_stride\n        y =",
           "shift_row = shift\n        y =", "no multiple of any tile"),
    Mutant("conv2d", "the variance within tiles only", "tl.sum(m2s + apart * apart * counts[:, None], axis=0)",
           "tl.sum(m2s, axis=0)", "no multiple of any tile"),
    Mutant("conv2d", "a last tile counts as a whole one",
           "tl.minimum(grid_width - t % tiles % across * TILE_WIDTH, TILE_WIDTH)", "(t * 0 + TILE_WIDTH)",
           "no multiple of any tile"),
    Mutant("conv2d", "the variance is not about the mean", "y - mean[None, :], 0.0)", "y, 0.0)",
           "a mean of 1000 with unit variance"),
    Mutant("conv2d", "pixels are counted in 32 bits", "sample = (row_tile // (tiles * PHASES)).to(tl.int64)",
           "sample = row_tile // (tiles * PHASES)", "offsets past 2³¹", torch.float16),
    Mutant("conv2d_tma", "boxes are counted as wide as high", "tile // across * (BLOCK_M // BLOCK_W)",
           "tile // across * BLOCK_W", "no multiple of any box", torch.float16),
    Mutant("conv2d_tma", "boxes beside each other overlap", "tile % across * BLOCK_W",
           "tile % across * (BLOCK_W - 1)", "no multiple of any box", torch.float16),
    Mutant("conv2d_tma", "taps are counted down columns", "top + tap // TAPS, left + tap % TAPS",
           "top + tap % TAPS, left + tap // TAPS", "split", torch.float16),
    Mutant("conv2d_tma", "the second input reads the first's weights", "x2, w, sample, top, left, first, C, channels",
           "x2, w, sample, top, left, first, 0, channels", "two inputs", torch.float16),
    Mutant("conv2d_tma", "a split of both inputs leaves out the second's first step", "tl.maximum(start, middle)",
           "tl.maximum(start, middle + 1)", "two inputs, split", torch.float16),
    Mutant("conv2d_tma", "pixels lie side by side", "width * stride, stride, 1]", "width * stride, channels, 1]",
           "channels of a larger map", torch.float16),
    Mutant("group_norm", "what is beyond the pixels counts", "apart = tl.where(inside, d - mean, 0.0)",
           "apart = d - mean", "more pixels than a tile and than a stretch"),
    Mutant("group_norm", "all lanes count alike", "tl.cdiv(tl.maximum(size - lane, 0), BLOCK_P)",
           "tl.cdiv(size + lane * 0, BLOCK_P)", "more pixels than a tile and than a stretch"),
    Mutant("group_norm", "a stretch's mean is without its pivot", "tl.store(to, pivot + whole_mean, ",
           "tl.store(to, whole_mean, ", "one group"),
    Mutant("group_norm", "the second input's squares are of other channels", "partial2, mean, n, c - C,",
           "partial2, mean, n, c,", "a group that holds channels of both"),
    Mutant("group_norm", "eps is left out", "tl.sqrt(m2 / count + eps)",
           "tl.sqrt(m2 / count)", "all equal"),
    Mutant("group_norm", "SiLU is quick_gelu's", "-1.4426950408889634",
           "-2.4554669595930156", "groups of 10, those of 320 channels"),
    Mutant("group_norm", "pixels are counted in 32 bits", "(n * pixels + p)[:, None], before + c",
           "(n * pixels + p).to(tl.int32)[:, None], before + c", "offsets past 2³¹", torch.float16),
    Mutant("group_norm", "all lanes of the one launch count alike", "tl.cdiv(tl.maximum(pixels - lane, 0), BLOCK_P)",
           "tl.cdiv(pixels + lane * 0, BLOCK_P)", "more pixels than a tile and than a stretch", whole=True),
    Mutant("group_norm", "a group is as wide as its block", "/ (pixels * SIZE) + eps",
           "/ (pixels * BLOCK_J) + eps", "groups of 10, those of 320 channels", whole=True),
    Mutant("conv2d", "the first split is added for each", "here += split_stride", "here += 0", "split"),
    Mutant("conv2d", "the first split is left out", "tl.range(0, splits, loop_unroll_factor=2)",
           "tl.range(1, splits, loop_unroll_factor=2)", "split"),
    Mutant("timestep_embedding", "the shift is left out", "(HALF - SHIFT)",
           "HALF", "sines first, shifted"),
    Mutant("timestep_embedding", "cosines are always first", "tl.store(to + (HALF if FLIP else 0)",
           "tl.store(to + HALF", "sines first, shifted"),
    Mutant("timestep_embedding", "the last of an odd width is not written", "if DIM % 2 == 1",
           "if DIM % 2 == 2", "an odd width ends in a zero"),
    Mutant("timestep_embedding", "the last timestep is left out", "mask=(r < rows)[:, None] & (o < O)",
           "mask=(r < rows - 1)[:, None] & (o < O)", "no multiple of any tile"),
    Mutant("timestep_embedding", "cosines have the sines' weights", "columns + (0 if FLIP else HALF)",
           "columns + HALF", "SD 1.5, a part of the layer", torch.float16),
    Mutant("begin_row", "the scale is that of the first row", "tl.load(in_scale + r)",
           "tl.load(in_scale)", "text to image"),
    Mutant("begin_row", "the last branch is left out", "tl.static_range(G)",
           "tl.static_range(G - 1)", "inpainting"),
    Mutant("begin_row", "pixels lie side by side", "(pixel * C_INPUT + c)",
           "(pixel * C + c)", "inpainting"),
    Mutant("begin_row", "the samples do not take turns", "((block - of_state) * batch + tl.program_id(1))",
           "(block - of_state)", "several programs"),
    Mutant("begin_row", "rows of mods are counted in 32 bits", "mods + r * mods_stride",
           "mods + r.to(tl.int32) * mods_stride", "offsets past 2³¹", torch.float16),
    Mutant("end_row", "the tickets are left in the counter", "1 - (programs << 32)",
           "1", "several programs for each sample"),
    Mutant("end_row", "the ratio is squared",
           "tl.sqrt(_deviations(mean_last, m2_last, count, size) / _deviations(mean, m2, count, size))",
           "_deviations(mean_last, m2_last, count, size) / _deviations(mean, m2, count, size)", "rescaled"),
    Mutant("end_row", "all lanes count alike", "tl.cdiv(tl.maximum(size - lane, 0), BLOCK)",
           "tl.cdiv(size + lane * 0, BLOCK)", "rescaled, more than is summed at a time"),
    Mutant("end_row", "x0 is not clamped from below", "tl.maximum(x0, -bound)",
           "x0", "a clamped x0"),
    Mutant("end_row", "a is transposed", "a + entry * K + j",
           "a + (r * K + j) * K + k", "six slots, as many as a plan has"),
    Mutant("end_row", "all samples have the first one's mask", "mask + n * pixels + i % pixels",
           "mask + i % pixels", "two branches"),
    Mutant("end_row", "slots are counted in 32 bits", "tl.cast(slot_stride, tl.int64)",
           "tl.cast(slot_stride, tl.int32)", "offsets past 2³¹"),
    Mutant("attention", "keys beyond the last weigh as much as 0",
           's = tl.where((n < keys)[None, :], s, -float("inf"))', "s += 0.0", "blocks and a tail of keys, head dim 80"),
    Mutant("attention", "the last whole block of keys is left out", "range(lk // BLOCK_N)",
           "range((lk - 1) // BLOCK_N)", "whole blocks, head dim 160", torch.float16),
    Mutant("attention", "the output of former blocks keeps its scale", "acc2 = tl.dot(p, v2, acc2 * shrink[:, None]",
           "acc2 = tl.dot(p, v2, acc2", "blocks and a tail of keys, head dim 40"),
    Mutant("attention", "the sum of former blocks keeps its scale", "total * shrink", "total",
           "one block and one key, head dim 64"),
    Mutant("attention", "powers of two in place of e", "max(scale, LEAST_SCALE) * math.log2(math.e)",
           "max(scale, LEAST_SCALE)", "odd sizes, head dim 7"),
    Mutant("attention", "powers of two of the mask in place of e", "more.to(tl.float32) * LOG2_E",
           "more.to(tl.float32)", "a mask for each head and query"),
    Mutant("attention", "a block that is hidden whole leaves NaN",
           'top = tl.where(top == -float("inf"), 0.0, top)', "top += 0.0", "a mask that hides the first block"),
    Mutant("attention", "every head has the first one's mask", "mask += b * mask_b + h.to(tl.int64) * mask_h + row",
           "mask += b * mask_b + row", "a mask of each head, over blocks and a tail"),
    Mutant("attention", "both parts of the values are stored as the first", "+ h) * D + column", "+ h) * D",
           "the autoencoder's 512, in two parts", torch.float16),
    Mutant("attention", "a program leaves out its last block of queries", "tl.minimum(walk, lq - begin)",
           "tl.minimum(walk - BLOCK_M, lq - begin)", "77 keys, head dim 160, several blocks of queries to a program",
           torch.float16),
    Mutant("attention", "queries are counted in 32 bits", "row = first.to(tl.int64)", "row = first", "rows past 2³¹",
           torch.float16),
    Mutant("attention", "the columns of the last read are left out", "range(0, D, DEPTH)",
           "range(0, D - DEPTH, DEPTH)", "blocks and a tail of keys, head dim 40"),
    Mutant("attention", "each read of columns replaces the one before", "tl.trans(k1), s, input_precision",
           "tl.trans(k1), input_precision", "blocks and a tail of keys, head dim 40"),
    Mutant("attention", "keys read by columns lie as far apart as queries", "n[:, None] * k_row + columns",
           "n[:, None] * q_row + columns", "views of all layers' keys"),
    Mutant("attention", "batches are counted in 32 bits",
           ".to(tl.int64)\n    h = tl.program_id(1) % heads\n    q += b",
           "\n    h = tl.program_id(1) % heads\n    q += b", "batches past 2³¹", torch.float16),
)  # fmt: skip


def mutated(mutant: Mutant, folder: Path) -> ModuleType:
    """The kernel's module with the change, from a file of its own: Triton reads sources."""
    source = (KERNELS / f"{mutant.op}.py").read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.why}: {mutant.old!r} stands {source.count(mutant.old)} times"
    file = folder / f"{mutant.op}_mutant.py"
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"mutant_{mutant.op}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks its annotations up
    spec.loader.exec_module(module)
    return module
