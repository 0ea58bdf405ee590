"""The bad files of `faults.py`, as data: what is damaged, how, what would be right, and the words of a clear error.

F01 to F44 number the faults; the tests of the same numbers (`test_f25_...`) show each of them for fastldm alone.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.damage import (
    CHECKPOINT,
    CKPT,
    FIRST_SHARD,
    FOLDER,
    INDEX,
    SCHEDULER,
    SECOND_SHARD,
    SNAPSHOT,
    STEM,
    TEXT,
    TEXT_JSON,
    UNET,
    UNET_JSON,
    VAE,
    VAE_JSON,
    VOCABULARY,
    Change,
    Evaluated,
    Gadget,
    added,
    appended,
    archive,
    beside,
    bin_in_place_of_safetensors,
    content,
    cut,
    dropped,
    each,
    edited,
    entry,
    half_a_storage,
    header,
    high_rank,
    hole,
    hub_cache,
    in_both_shards,
    in_pickle,
    index,
    index_twice,
    linked_outside,
    literal,
    many_tensors,
    moved,
    noise,
    nothing,
    other_kind,
    overlapping,
    pickled_dict,
    poisoned,
    put,
    python_files,
    removed,
    second_program,
    shard_called,
    shards,
    sparse,
    special,
    swapped,
    twice,
    zip_bomb,
)
from tests.weights import pickled
from tests.weights.other_kinds import KINDS


@dataclass(frozen=True)
class Case:
    """change: damages `file`, in a fresh copy of the good files. opens: what is then loaded.

    right: "refuse", "same" (the image of the undamaged model), or "either". names, says: an error is clear if it has
    one word of each, in any case of letters; without `names`, one of the file's in `NAMES`. later: a change of `file`
    between loading and painting.
    """

    fault: str
    name: str
    file: str
    change: Change
    says: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    right: str = "refuse"
    opens: str = FOLDER
    later: Change | None = None

    @property
    def called(self) -> tuple[str, ...]:
        return self.names or NAMES[self.file]


# ------------------------------------------------------------------------------------------------------------ the words
# What an error may call the damaged thing, and the words of which one must say what is wrong: any engine's, generously.

NAMES: Mapping[str, tuple[str, ...]] = {
    UNET: ("unet",),
    VAE: ("vae", "autoencoderkl"),
    TEXT: ("text_encoder", "cliptext"),
    INDEX: ("model_index.json",),
    SCHEDULER: ("scheduler",),
    UNET_JSON: ("unet",),
    VAE_JSON: ("vae", "autoencoderkl"),
    TEXT_JSON: ("text_encoder", "cliptext"),
    VOCABULARY: ("tokenizer",),
    CHECKPOINT: ("checkpoint",),
    CKPT: ("checkpoint",),
    FOLDER: ("model_index.json", "unet"),
}


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


CUT = words(
    "truncat, incomplete, cut, bytes, too small, too short, not fully covered, end of file, eof, unexpected end, "
    "header, directory, corrupt, damaged"
)
HEADER = words("header")
BYTES = words("bytes, trailing, not fully covered, incomplete, offset, hole, gap, overlap")
TWICE = words("duplicate, twice, more than once, repeated")
SHAPE = words("shape, size, dimension, mismatch")
NUMBER = words("integer, number, shape, usize, invalid value, invalid type")
DTYPE = words("dtype, data type, unknown variant, float, int8, int64, bool")
NESTED = words("nest, deep, depth, recursion, levels")
JSON = words("json, utf-8, decode")
MISSING = words(
    "missing, not found, no such, no file named, does not exist, has no, not contain, without, "
    "lack, not appear to have, there is no"
)
EXTRA = words("not belong, unexpected, unknown, extra, not used, unused, superfluous")
FINITE = words("nan, finite, infinit")
VALUE = words(
    "must, range, invalid, positive, negative, finite, at most, at least, larger, smaller, zero, between, expected, "
    "support, divisible, greater, less than, not implemented, not found, should, one of"
)
OUTSIDE = words("plain, outside, out of, traversal, not allowed, escape, relative, absolute, unsafe, invalid")
LINK = words("link, outside, out of, escape")
REGULAR = words("no file named, regular, fifo, pipe, socket, device, directory, folder, not a file, link")
LARGE = words("large, at most, big, limit, exceed")
CODE = words(
    "not supported, custom, code, module, not allowed, trust, unknown, not found, does not exist, has no attribute, "
    "no component, cannot"
)
FORBIDDEN = words("mkdir, eval")
PICKLE = words("pickle, opcode, setitem, weights_only, unsupported, not allowed")
SIZES = words("storage, bytes, size, stride, bounds, larger, view")


# ------------------------------------------------------------------------------------------------------------ the cases


def config_cases(fault: str, file: str, **values: Any) -> list[Case]:
    """One bad value each; an error may name the key, the component, or a value that is a word."""
    part = Path(file).parent.name
    return [
        Case(fault, f"{part}: {key} = {value}", file, edited(**{key: value}), VALUE, (key, *NAMES[file], *_word(value)))
        for key, value in values.items()
    ]


def _word(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and len(value) > 2 else ()


def single(fault: str, name: str, change: Change, says: tuple[str, ...] = (), **more: Any) -> Case:
    """A case of the single safetensors file."""
    return Case(fault, f"single file: {name}", CHECKPOINT, change, says, opens=CHECKPOINT, **more)


def ckpt(fault: str, name: str, change: Change, says: tuple[str, ...] = (), **more: Any) -> Case:
    return Case(fault, f".ckpt: {name}", CKPT, change, says, opens=CKPT, **more)


def kind_case(name: str, *words: str) -> Case:
    says = (KINDS[name].says.lower(), *words)
    return Case("F21", f"single file: {name}", CHECKPOINT, other_kind(name), says, opens=CHECKPOINT)


IN = "model.diffusion_model.input_blocks.0.0.weight"
BIAS = "decoder.conv_out.bias"
EMBEDDINGS = "embeddings.token_embedding.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2260024\n"
HTML = "<!DOCTYPE html>\n<html><head><title>503 Service Unavailable</title></head><body></body></html>\n"
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"

WEIGHTS = [
    Case("F01", "U-Net cut in its header", UNET, cut(500), CUT),
    Case("F01", "U-Net cut in the middle", UNET, cut(0.5), CUT),
    Case("F01", "U-Net without its last byte", UNET, cut(-1), CUT),
    Case("F01", "VAE cut in the middle", VAE, cut(0.5), CUT),
    Case("F01", "text encoder cut in the middle", TEXT, cut(0.5), CUT),
    single("F01", "cut in the middle", cut(0.5), CUT),
    ckpt("F01", "cut in the middle", cut(0.5), CUT),
    Case("F01", "U-Net's config.json cut", UNET_JSON, cut(0.5), JSON),
    Case("F01", "model_index.json cut", INDEX, cut(0.5), JSON),
    Case("F01", "tokenizer.json cut", VOCABULARY, cut(0.5), JSON),
    Case("F02", "U-Net of 0 bytes", UNET, cut(0), (*CUT, "empty")),
    Case("F02", "VAE of 7 bytes", VAE, cut(7), CUT),
    single("F02", "of 0 bytes", cut(0), (*CUT, "empty")),
    Case("F02", "scheduler's JSON of 0 bytes", SCHEDULER, cut(0), (*JSON, "empty")),
    Case("F03", "a header of 2⁶⁴ − 1 bytes", UNET, swapped(rb"\A(?s:.{8})", b"\xff" * 8), HEADER),
    Case("F03", "a header of 2⁶³ bytes", UNET, swapped(rb"\A(?s:.{8})", bytes(7) + b"\x80"), HEADER),
    single("F03", "a header longer than the file", swapped(rb"\A(?s:.{8})", b"\xff\xff\xff" + bytes(5)), CUT),
    Case("F03", "a header of 0 bytes", VAE, swapped(rb"\A(?s:.{8})", bytes(8)), HEADER),
    Case(
        "F04", "a header of 99 MB with 1.6 million empty tensors", VAE, many_tensors, (*HEADER, "too many", "more than")
    ),
    Case("F05", "tensors that overlap", UNET, header(overlapping), (*BYTES, "invalid offset")),
    single("F05", "tensors that overlap", header(overlapping), (*BYTES, "invalid offset")),
    Case("F06", "a hole between tensors", VAE, header(hole), BYTES),
    single("F06", "bytes behind the last tensor", appended(bytes(8)), BYTES),
    Case("F07", "a zip archive behind the last tensor", UNET, appended(pickled.archive(b"N.")), BYTES),
    single("F07", "a zip archive behind the last tensor", appended(pickled.archive(b"N.")), BYTES),
    Case("F08", "a tensor twice in the header", UNET, twice(False), TWICE),
    Case("F08", "a key twice in unet/config.json", UNET_JSON, swapped(rb"\{", b'{"sample_size": 8,'), TWICE),
    Case("F08", "a key twice in the VAE's config.json", VAE_JSON, swapped(rb"\{", b'{"scaling_factor": 9,'), TWICE),
    Case("F09", "a tensor twice, for two places", UNET, twice(True), TWICE),
    Case("F10", "an empty tensor", UNET, added(empty=torch.zeros(0)), (*EXTRA, "empty", "zero size")),
    single("F10", "an empty tensor", added(empty=torch.zeros(0)), (*EXTRA, "empty", "zero size")),
    Case("F11", "a shape whose product overflows", UNET, entry(shape=[1 << 31, 1 << 31, 4]), (*SHAPE, "overflow")),
    Case("F12", "a negative size", UNET, entry(shape=[-1]), NUMBER),
    Case("F12", "a size of 1e30", VAE, entry(shape=[1e30]), NUMBER),
    single("F12", "a size that is a string", entry(shape=["16"]), NUMBER),
    Case("F13", "dtype F5", UNET, entry(dtype="F5"), DTYPE),
    Case("F13", "dtype F8_E8M0", VAE, entry(dtype="F8_E8M0"), DTYPE),
    single("F13", "dtype F4", entry(dtype="F4"), DTYPE),
    Case(
        "F14", "a space before the header", UNET, header(lambda s, d: (" " + json.dumps(s), d)), HEADER, right="either"
    ),
    Case(
        "F14",
        "a BOM before the header",
        VAE,
        header(lambda s, d: ("\ufeff" + json.dumps(s), d)),
        HEADER,
        right="either",
    ),
    Case("F15", "a tensor of rank 10,000", UNET, header(high_rank), (*EXTRA, *SHAPE, "rank")),
    Case("F16", "a header nested 100,000 deep", UNET, header(lambda s, d: (DEEP, d)), (*NESTED, "header")),
    Case("F17", "a tensor called ../../x", UNET, added(**{"../../x": torch.zeros(1)}), EXTRA),
    Case("F17", "a tensor with a line break in its name", TEXT, added(**{"a\nb": torch.zeros(1)}), EXTRA),
    Case("F18", "U-Net cut after loading", UNET, nothing, right="same", later=cut(0)),
    Case("F18", "VAE cut after loading", VAE, nothing, right="same", later=cut(0)),
    Case("F18", "text encoder cut after loading", TEXT, nothing, right="same", later=cut(0)),
    single("F18", "cut after loading", nothing, right="same", later=cut(0)),
    ckpt("F18", "cut after loading", nothing, right="same", later=cut(0)),
    Case("F19", "U-Net rewritten after loading", UNET, nothing, right="same", later=noise),
    Case("F19", "text encoder rewritten after loading", TEXT, nothing, right="same", later=noise),
    single("F19", "rewritten after loading", nothing, right="same", later=noise),
    Case("F19", "U-Net removed after loading", UNET, nothing, right="same", later=removed),
    Case(
        "F20", "U-Net is a web page", UNET, content(HTML), ("web page", "html", "not a safetensors", "no safetensors")
    ),
    single("F20", "a web page", content(HTML), ("web page", "html", "not a safetensors", "no safetensors")),
    Case("F20", "U-Net is a Git LFS pointer", UNET, content(LFS), ("lfs",)),
    single("F20", "a Git LFS pointer", content(LFS), ("lfs",)),
    single("F20", "a text file", content("Not the weights. " * 99), ("text", "not a safetensors", "no safetensors")),
    single("F20", "a GGUF file", content(b"GGUF\x03" + bytes(999)), ("gguf", "not a safetensors", "no safetensors")),
    Case(
        "F20", "U-Net is a pickle that runs code", UNET, content(pickled.saved({"a": Gadget()})), (*FORBIDDEN, *PICKLE)
    ),
    single("F20", "a pickle that runs code", content(pickled.saved({"a": Gadget()})), (*FORBIDDEN, *PICKLE)),
    Case("F20", "named .SAFETENSORS", CHECKPOINT, moved("x.SAFETENSORS"), right="same", opens="x.SAFETENSORS"),
    Case("F20", "safetensors named .ckpt", CHECKPOINT, moved("x.ckpt"), right="same", opens="x.ckpt"),
    Case("F21", "U-Net without conv_in.weight", UNET, dropped(r"conv_in\.weight"), MISSING, ("conv_in.weight",)),
    Case("F21", "U-Net without its way up", UNET, dropped(r"up_blocks\..*"), MISSING, ("up_blocks",)),
    Case("F21", "VAE without a bias", VAE, dropped(r"decoder\.conv_out\.bias"), MISSING, (BIAS,)),
    Case(
        "F21",
        "text encoder without its embeddings",
        TEXT,
        dropped(r"embeddings\.token.*"),
        MISSING,
        ("token_embedding",),
    ),
    Case("F21", "text encoder without one layer", TEXT, dropped(r"encoder\.layers\.1\..*"), MISSING, ("layers.1.",)),
    single("F21", "without one tensor", dropped(re.escape(IN)), MISSING, names=(IN, "conv_in.weight")),
    single(
        "F21",
        "without its U-Net",
        dropped(r"model\.diff.*"),
        (*MISSING, "no u-net", "nothing"),
        names=("checkpoint", "unet"),
    ),
    single(
        "F21",
        "without its VAE",
        dropped(r"first_stage.*"),
        (*MISSING, "no vae"),
        names=("checkpoint", "vae", "Autoenc"),
    ),
    single(
        "F21",
        "without its text encoder",
        dropped(r"cond_stage.*"),
        MISSING,
        names=("checkpoint", "text_enc", "text enc"),
    ),
    Case("F22", "U-Net with a foreign tensor", UNET, added(control=torch.zeros(4)), EXTRA, ("control",)),
    Case("F22", "VAE with a foreign tensor", VAE, added(**{"encoder.x.weight": torch.zeros(4)}), EXTRA, ("encoder.x",)),
    Case("F22", "text encoder with a foreign tensor", TEXT, added(lora=torch.zeros(4)), EXTRA, ("lora",)),
    single("F22", "with a foreign tensor", added(control=torch.zeros(4)), EXTRA, names=("control",)),
    Case(
        "F22",
        "text encoder with position_ids",
        TEXT,
        added(**{"embeddings.position_ids": torch.arange(77)[None]}),
        right="same",
    ),
    single(
        "F22",
        "with what training leaves",
        added(betas=torch.ones(9), **{"model_ema.decay": torch.ones(())}),
        right="same",
    ),
    Case(
        "F23",
        "U-Net: a weight transposed",
        UNET,
        put("conv_in.weight", lambda t: t.transpose(0, 1)),
        SHAPE,
        ("conv_in",),
    ),
    Case("F23", "VAE: a bias one longer", VAE, put(BIAS, lambda t: torch.zeros(4)), SHAPE, (BIAS,)),
    Case("F23", "text encoder: fewer tokens", TEXT, put(EMBEDDINGS, lambda t: t[:500]), SHAPE, ("token_embedding",)),
    single("F23", "a weight flat", put(IN, lambda t: t.flatten()), SHAPE, names=(IN, "conv_in.weight")),
    Case(
        "F24",
        "U-Net: a weight of int8",
        UNET,
        put("conv_in.weight", lambda t: t.to(torch.int8)),
        DTYPE,
        ("conv_in.weight",),
    ),
    Case("F24", "VAE: a bias of bool", VAE, put(BIAS, lambda t: t.bool()), DTYPE, (BIAS,)),
    Case(
        "F24", "text encoder: a weight of int64", TEXT, put(EMBEDDINGS, lambda t: t.long()), DTYPE, ("token_embedding",)
    ),
    single("F24", "a weight of int8", put(IN, lambda t: t.to(torch.int8)), DTYPE, names=(IN, "conv_in.weight")),
    Case("F24", "U-Net: float64, the same values", UNET, put("conv_in.weight", lambda t: t.double()), right="same"),
    Case("F25", "U-Net: a NaN", UNET, put("conv_out.weight", poisoned(torch.nan)), FINITE, ("conv_out.weight",)),
    Case("F25", "U-Net: an infinity", UNET, put("conv_in.bias", poisoned(torch.inf)), FINITE, ("conv_in.bias",)),
    Case(
        "F25",
        "VAE: a NaN",
        VAE,
        put("decoder.conv_in.weight", poisoned(torch.nan)),
        FINITE,
        ("decoder.conv_in.weight",),
    ),
    Case(
        "F25",
        "VAE: a NaN in the encoder",
        VAE,
        put("encoder.conv_in.weight", poisoned(torch.nan)),
        FINITE,
        ("encoder.conv_in",),
    ),
    Case("F25", "text encoder: a NaN", TEXT, put(EMBEDDINGS, poisoned(torch.nan)), FINITE, ("token_embedding",)),
    single("F25", "a NaN", put(IN, poisoned(torch.nan)), FINITE, names=(IN, "conv_in.weight")),
    Case("F26", "a NaN in the bias of one colour", VAE, put(BIAS, poisoned(torch.nan)), FINITE, (BIAS,)),
    single(
        "F26",
        "a NaN in the bias of one colour",
        put(f"first_stage_model.{BIAS}", poisoned(torch.nan)),
        FINITE,
        names=(BIAS,),
    ),
]

CONFIGS = [
    *config_cases("F27", VAE_JSON, scaling_factor=0, norm_num_groups=0, latent_channels=-4),
    Case(
        "F27", "vae: scaling_factor = NaN", VAE_JSON, literal("scaling_factor", "NaN"), VALUE, ("scaling_factor", "vae")
    ),
    *config_cases("F27", SCHEDULER, beta_start=-1, beta_end=2, num_train_timesteps=0, steps_offset=10**6),
    Case(
        "F27",
        "scheduler: beta_start = NaN",
        SCHEDULER,
        literal("beta_start", "NaN"),
        VALUE,
        ("beta_start", "scheduler"),
    ),
    *config_cases("F27", SCHEDULER, prediction_type="eps", beta_schedule="squared", timestep_spacing="leadng"),
    *config_cases("F27", UNET_JSON, norm_eps=-1, attention_head_dim=0, act_fn="silou", in_channels="4"),
    *config_cases("F27", UNET_JSON, cross_attention_dim=25, sample_size=0, layers_per_block=2.5),
    *config_cases("F27", TEXT_JSON, num_attention_heads=5, layer_norm_eps="x", hidden_act="rellu"),
    Case("F27", "unet: unknown_key = 7", UNET_JSON, edited(unknown_key=7), (*EXTRA, "not know"), right="either"),
    Case(
        "F27",
        "tokenizer: ids beyond the embeddings",
        VOCABULARY,
        swapped(rb'"!": 0', b'"!": 99999'),
        (*VALUE, "index", "from 0 to"),
    ),
    *config_cases("F28", UNET_JSON, layers_per_block=10**9),
    *config_cases("F28", VAE_JSON, layers_per_block=10**9),
    *config_cases("F28", TEXT_JSON, num_hidden_layers=10**9),
    *config_cases("F29", UNET_JSON, block_out_channels=[10**6] * 3, out_channels=-4),
    *config_cases("F29", VAE_JSON, block_out_channels=[10**6] * 2),
    *config_cases("F29", SCHEDULER, num_train_timesteps=10**12),
    *config_cases("F29", TEXT_JSON, vocab_size=10**12),
    Case("F16", "unet/config.json nested 100,000 deep", UNET_JSON, content(DEEP), NESTED),
    Case("F16", "model_index.json nested 100,000 deep", INDEX, content(DEEP), NESTED),
    Case("F16", "scheduler's JSON nested 100,000 deep", SCHEDULER, content(DEEP), NESTED),
    Case("F16", "tokenizer.json nested 100,000 deep", VOCABULARY, content(DEEP), NESTED),
    Case("F33", "model_index.json is missing", INDEX, removed, MISSING),
    Case("F33", "vae/config.json is missing", VAE_JSON, removed, MISSING),
    Case("F33", "scheduler's JSON is missing", SCHEDULER, removed, MISSING),
    Case("F33", "tokenizer.json is missing", VOCABULARY, removed, MISSING),
    Case(
        "F35",
        "index: a class of subprocess",
        INDEX,
        edited(unet=["subprocess", "Popen"]),
        CODE,
        ("subprocess", "popen"),
    ),
    Case("F35", "index: os.system", INDEX, edited(vae=["os", "system"]), CODE, ("system", "vae")),
    Case("F35", "index: another network", INDEX, edited(unet=["diffusers", "AutoencoderKL"]), CODE, ("unet",)),
    Case("F35", "index: another pipeline", INDEX, edited(_class_name="FluxPipeline"), CODE, ("flux",)),
    Case("F35", "index: a component that is no pair", INDEX, edited(unet="UNet3D"), (*CODE, *VALUE), ("unet",)),
    Case(
        "F36",
        "index: a component called ../elsewhere",
        INDEX,
        edited(**{"../elsewhere": ["diffusers", "UNet2DConditionModel"]}),
        CODE,
        ("elsewhere",),
        right="either",
    ),
    Case("F37", "Python beside the weights", FOLDER, python_files, right="same"),
    Case(
        "F37",
        "a pipeline of its own code",
        FOLDER,
        each(python_files, beside(INDEX, edited(_class_name=["pipeline", "MyPipeline"]))),
        CODE,
        ("pipeline",),
    ),
    Case(
        "F37",
        "a U-Net of its own code",
        FOLDER,
        each(python_files, beside(INDEX, edited(unet=["my_unet", "MyUNet"]))),
        CODE,
        ("my_unet", "unet"),
    ),
    Case(
        "F37",
        "an auto_map in the text encoder",
        FOLDER,
        each(python_files, beside(TEXT_JSON, edited(auto_map={"AutoModel": "my_unet.MyUNet"}))),
        CODE,
        right="either",
    ),
]

PLACES = [
    Case(
        "F30",
        "a shard called ../outside",
        UNET,
        shard_called("../outside.safetensors"),
        OUTSIDE,
        ("outside", "index.json"),
    ),
    Case(
        "F30",
        "a shard by an absolute path",
        UNET,
        shard_called("{folder}/../../outside.safetensors"),
        OUTSIDE,
        ("outside", "index.json"),
    ),
    Case(
        "F30",
        "a shard in a folder below",
        UNET,
        shard_called("below/x.safetensors"),
        OUTSIDE,
        ("below", "index.json"),
        right="either",
    ),
    Case(
        "F31",
        "a shard that is a link out of the folder",
        UNET,
        shards(beside(f"unet/{FIRST_SHARD}", linked_outside)),
        LINK,
    ),
    Case("F31", "weights that are a link out of the folder", UNET, linked_outside, LINK),
    Case("F31", "a config.json that is a link out of the folder", VAE_JSON, linked_outside, LINK),
    Case("F31", "the hub's cache, all links", FOLDER, hub_cache(False), right="same", opens=SNAPSHOT),
    Case("F31", "the hub's cache, a link past its blobs", FOLDER, hub_cache(True), LINK, opens=SNAPSHOT),
    *(
        Case("F32", f"U-Net is {name}", UNET, special(kind), (*REGULAR, *LARGE))
        for name, kind in (
            ("a fifo", "fifo"),
            ("a folder", "folder"),
            ("a socket", "socket"),
            ("/dev/zero", "/dev/zero"),
        )
    ),
    Case("F32", "U-Net is a file of 65 GiB, all holes", UNET, special("giant"), (*LARGE, *HEADER)),
    Case("F32", "a shard is a fifo", UNET, shards(beside(f"unet/{FIRST_SHARD}", special("fifo"))), REGULAR),
    Case("F32", "a shard is /dev/zero", UNET, shards(beside(f"unet/{FIRST_SHARD}", special("/dev/zero"))), REGULAR),
    Case("F32", "unet/config.json is a fifo", UNET_JSON, special("fifo"), REGULAR),
    Case("F32", "model_index.json is /dev/zero", INDEX, special("/dev/zero"), REGULAR),
    single("F32", "a fifo", special("fifo"), REGULAR),
    single("F32", "/dev/zero", special("/dev/zero"), (*REGULAR, *LARGE)),
    Case("F33", "a shard is missing", UNET, shards(beside(f"unet/{SECOND_SHARD}", removed)), MISSING, ("00002-of",)),
    Case("F33", "the weights are missing", UNET, removed, MISSING),
    Case("F33", "an index without metadata", UNET, index(lambda said: said.pop("metadata")), right="same"),
    Case("F33", "an index without its map", UNET, index(lambda said: said.pop("weight_map")), ("weight_map",)),
    Case("F33", "an index that is cut", UNET, shards(beside(f"unet/{STEM}.safetensors.index.json", cut(0.5))), JSON),
    Case(
        "F33",
        "a shard lacks a tensor of the index",
        UNET,
        index(lambda said: said["weight_map"].update(x=FIRST_SHARD)),
        (*MISSING, "not in", *EXTRA),
    ),
    Case("F34", "an index lists a tensor twice", UNET, shards(index_twice), TWICE),
    Case("F34", "a tensor in two shards", UNET, shards(in_both_shards), (*TWICE, "otherwise", "both", "two")),
]

PICKLES = [
    ckpt("F38", "os.mkdir in a zip", content(pickled.saved({"state_dict": {"a": Gadget()}})), FORBIDDEN),
    ckpt("F38", "os.mkdir in the old format", content(pickled.saved({"a": Gadget()}, zipped=False)), FORBIDDEN),
    ckpt("F38", "os.mkdir in a bare pickle", content(pickle.dumps(Gadget(), 2)), FORBIDDEN),
    ckpt("F38", "eval, beside all weights", pickled_dict(lambda found: found.update(x=Evaluated())), FORBIDDEN),
    Case(
        "F38",
        "U-Net's .bin runs code",
        UNET,
        bin_in_place_of_safetensors(f"{STEM}.bin", lambda found: found.update(x=Gadget())),
        FORBIDDEN,
    ),
    Case(
        "F38",
        "text encoder's .bin runs code",
        TEXT,
        bin_in_place_of_safetensors("pytorch_model.bin", lambda found: found.update(x=Gadget())),
        FORBIDDEN,
    ),
    Case(
        "F39",
        "bad safetensors beside a good .bin",
        UNET,
        each(lambda path: torch.save(load_file(path), path.with_suffix(".bin")), cut(0.5)),
        CUT,
    ),
    Case(
        "F39",
        "bad safetensors beside a .bin that runs code",
        UNET,
        each(lambda path: torch.save({"a": Gadget()}, path.with_suffix(".bin")), cut(0.5)),
        CUT,
    ),
    Case(
        "F39",
        "no safetensors, a good .bin",
        UNET,
        bin_in_place_of_safetensors(f"{STEM}.bin", lambda found: None),
        right="same",
    ),
    ckpt("F40", "a zip bomb, 512 MiB of 0.5 MB", zip_bomb, ("compress", "stored", "deflate", *LARGE)),
    ckpt(
        "F41",
        "a weight expanded from one number",
        in_pickle(IN, lambda t: torch.ones(1).expand(t.shape)),
        SIZES,
        names=("checkpoint", "conv_in"),
    ),
    ckpt(
        "F41",
        "4 TB expanded from one number",
        pickled_dict(lambda found: found.update(x=torch.ones(1).expand(1 << 20, 1 << 20))),
        SIZES,
    ),
    ckpt("F42", "a sparse weight", in_pickle(IN, sparse), ("sparse",), names=("checkpoint", "conv_in")),
    ckpt(
        "F42",
        "a sparse tensor of 4 TB",
        pickled_dict(lambda found: found.update(x=sparse(torch.ones(1).expand(1 << 20, 1 << 20)))),
        ("sparse",),
    ),
    ckpt("F43", "a storage shorter than it says", archive(half_a_storage), SIZES),
    ckpt("F43", "an item set on a list", content(pickled.archive(b"\x80\x02]q\x00K\x01K\x02s.")), PICKLE),
    ckpt("F43", "a global object as a tensor", pickled_dict(lambda found: found.update(x=print)), ("print", *PICKLE)),
    ckpt("F44", "a 7z archive", content(b"7z\xbc\xaf\x27\x1c" + bytes(999)), ("archive", "7z", "7-zip", "not a zip")),
    ckpt(
        "F44",
        "a second program in the zip",
        archive(second_program),
        ("data.pkl", "twice", "duplicate", "folder", "other/"),
    ),
    ckpt(
        "F44",
        "a flag says encrypted",
        lambda path: path.write_bytes(pickled.listed(path.read_bytes(), 0, f3=1)),
        ("flag", "encrypt"),
    ),
    ckpt("F44", "the zip's directory is cut off", cut(-30), (*CUT, "directory", "zip")),
]

KIND_CASES = [
    kind_case(
        name,
        "not a stable diffusion",
        "not supported",
        "unrecogni",
        "unknown",
        "mismatch",
        "not seem to contain",
        *MISSING,
    )
    for name in (
        "kohya LoRA",
        "peft LoRA",
        "textual inversion",
        "ControlNet",
        "T2I-Adapter",
        "IP-Adapter",
        "AnimateDiff",
        "autoencoder",
        "TAESD decoder",
        "CLIP text encoder",
        "U-Net of the hub",
        "Stable Video Diffusion",
        "SD 2 depth",
        "SD 3 medium",
        "Flux",
        "PixArt",
        "Wan",
        "ESRGAN",
        "Llama",
    )
]

FILES = sorted([*WEIGHTS, *CONFIGS, *PLACES, *PICKLES, *KIND_CASES], key=lambda case: case.fault)
