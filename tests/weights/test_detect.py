"""Files that are something else are refused by what they are; unknown ones at once, and with a message that is safe."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastldm.errors import Error, FileError
from fastldm.weights.detect import found, other_kind, wrapper
from fastldm.weights.families import FAMILIES, SD1
from fastldm.weights.files import open_file
from fastldm.weights.shapes import text_json, unet_json, vae_json
from tests.weights import originals
from tests.weights.named import FILE, UNET, VAE
from tests.weights.originals import CHECKPOINTS, Shapes
from tests.weights.other_kinds import KINDS

SD15 = originals.shapes(CHECKPOINTS["SD 1.5"])


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_is_refused_by_what_it_is(kind: str) -> None:
    with pytest.raises(FileError) as caught:
        found(KINDS[kind].shapes, FILE)
    assert KINDS[kind].says.lower() in str(caught.value).lower()
    assert str(caught.value).startswith(f"{FILE}: is ")
    assert caught.value.field == "model"


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_does_not_make_it_another(kind: str) -> None:
    for family in (None, *FAMILIES):
        with pytest.raises(FileError):
            found(KINDS[kind].shapes, FILE, family=family, configured=True)


@pytest.mark.parametrize("kind", ["kohya LoRA", "SD 2 depth", "Stable Video Diffusion", "SSD-1B", "CosXL"])
def test_the_order_of_names_does_not_matter(kind: str) -> None:
    names = list(KINDS[kind].shapes.items())
    for seed in range(5):
        random.Random(seed).shuffle(names)
        with pytest.raises(FileError) as caught:
            found(dict(names), FILE)
        assert KINDS[kind].says.lower() in str(caught.value).lower()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_of_no_other_kind(name: str) -> None:
    """Each of its parts alone is, and says which argument is meant."""
    shapes = originals.shapes(CHECKPOINTS[name])
    assert found(shapes, FILE).sections["unet"] == UNET
    assert other_kind(n for n in shapes if n.startswith(VAE)).startswith("is an autoencoder alone: pass it as vae=")
    texts = [n for n in shapes if n.startswith(("cond_stage_model.", "conditioner."))]
    assert "text encoder alone: pass it as text_encoder=" in other_kind(texts)
    assert "text encoder alone" in other_kind(n.partition("transformer.")[2] for n in texts if ".transformer." in n)


@pytest.mark.parametrize(
    ("channels", "task"),
    [
        (4, "text-to-image"),
        (8, "instruct-pix2pix"),
        (9, "inpainting"),
        (6, "6 input channels"),
        (3, "3 input channels"),
    ],
)
def test_channels_tell_the_task(channels: int, task: str) -> None:
    assert found(SD15 | {f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3)}, FILE).task == task


@pytest.mark.parametrize("shape", [(), (320,), (320, 9), (320, 4, 3), (9,) * 8])
def test_a_first_layer_that_is_none(shape: tuple[int, ...]) -> None:
    shapes = SD15 | {f"{UNET}input_blocks.0.0.weight": shape}
    assert found(shapes, FILE).family is SD1


# ---------------------------------------------------------------------------------------------------- unknown files


def test_an_unknown_file_names_a_few_tensors() -> None:
    with pytest.raises(FileError, match=r"7 tensors, such as 'a\.0', 'a\.1', 'a\.2'$") as caught:
        found({f"a.{i}": (1,) for i in range(7)}, FILE)
    assert str(caught.value).startswith(f"{FILE}: is nothing that fastldm knows")


@pytest.mark.parametrize("name", ["\x1b[2Jx", "a\nb", "a\rb", "\x00", "‮abc", "\ud800", "x" * 100_000, ""])
def test_f17_names_are_escaped_and_short(name: str) -> None:
    with pytest.raises(FileError) as caught:
        found({name: (1,)}, FILE)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_an_empty_file() -> None:
    with pytest.raises(FileError, match="0 tensors"):
        found({}, FILE)


PAGES = {
    "html": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
    "html without doctype": b"<html>" + b" " * 4096 + b"</html>",
    "text": b"Access to this model is restricted. You must be authenticated.\n",
    "json": b'{"error": "Repository not found"}',
    "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n",
    "empty": b"",
    "png": b"\x89PNG\r\n\x1a\n" + b"\x00" * 100,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("page", PAGES)
def test_f20_a_page_in_place_of_a_file(tmp_path: Path, page: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(PAGES[page])
    with pytest.raises(FileError) as caught, open_file(path):
        pass
    assert "model" in str(caught.value)
    assert len(str(caught.value)) < 500


# --------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ([], ""),
        (["a"], ""),
        (["state_dict.a", "state_dict.b"], "state_dict."),
        (["state_dict.a", "b"], ""),
        (["module.module.a"], "module.module."),
        (["module.state_dict.a", "module.b"], "module."),
        (["state_dict"], ""),
        (["modules.a"], ""),
    ],
)
def test_what_stands_before_every_name(names: list[str], word: str) -> None:
    assert wrapper(names) == word


# ------------------------------------------------------------------------------------------------------- any names


def dimensions(shapes: Shapes) -> None:
    """All that is told from names and shapes before tensors are looked up."""
    seen = found(shapes, FILE)
    for component, prefix in seen.sections.items():
        section = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        if component == "unet":
            unet_json(section, seen.family, FILE, prefix)
        elif component == "vae":
            vae_json(section, seen.family, FILE, prefix)
        else:
            text_json(section, seen.family.texts[component], FILE, prefix)


def recognised(shapes: Shapes) -> bool:
    start = time.process_time()
    try:
        dimensions(shapes)
        return True
    except Error:
        return False
    finally:
        assert time.process_time() - start < 1


NAMES = sorted(SD15)
TELLING = [n for n in NAMES if "blocks.0" in n or "conv_in" in n or "embedding" in n or "block.0" in n or "out.2" in n]
SHAPES = st.lists(st.sampled_from([0, 1, 3, 4, 9, 320, 768, 1 << 31]), max_size=5).map(tuple)
PARTS = st.sampled_from([*{part for n in NAMES for part in n.split(".")}, "", "-1", "99", "\n", "lora_A"])


@given(st.randoms(use_true_random=False), st.sampled_from([1, 5, 200, 1000, 1144]))
@settings(max_examples=30, deadline=None)
def test_some_of_the_names_of_a_checkpoint(generator: random.Random, count: int) -> None:
    recognised({n: SD15[n] for n in generator.sample(NAMES, count)})


@given(st.dictionaries(st.sampled_from(TELLING), SHAPES, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_shapes(shapes: Shapes) -> None:
    recognised(SD15 | shapes)


@given(st.dictionaries(st.lists(PARTS, max_size=6).map(".".join), SHAPES, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_names_made_of_the_same_words(shapes: Shapes, among: bool) -> None:
    recognised(SD15 | shapes if among else {UNET + n: s for n, s in shapes.items()} | shapes)


@given(st.dictionaries(st.text(max_size=40), SHAPES, max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_names(shapes: Shapes) -> None:
    assert not recognised(shapes)


def test_a_checkpoint_is_recognised() -> None:
    """So that the tests above do not all end at the first error."""
    assert recognised(SD15)
    assert recognised({n: s for n, s in SD15.items() if n.startswith(UNET)})


@pytest.mark.parametrize(
    "form", ["blk.{}.attn.weight", "<{}", "input_blocks.{}.0", "encoder.{}", "lora.{}.hada_", "{}"]
)
@pytest.mark.parametrize("beside", [{}, SD15], ids=["alone", "beside a checkpoint"])
def test_f04_many_names_take_no_time(form: str, beside: Shapes) -> None:
    shapes = {form.format(i): (1,) for i in range(65_536 - len(beside))} | beside
    start = time.process_time()
    recognised(shapes)
    assert time.process_time() - start < 1


def test_f04_names_of_many_parts_take_no_memory() -> None:
    """A U-Net whose stray name has 40,000 dots: all beginnings of it would be 1.6 GB."""
    start = time.process_time()
    recognised(SD15 | {f"{UNET}{'a.' * 40_000}": (1,)})
    assert time.process_time() - start < 1


def test_endless_wrappers_take_no_time() -> None:
    """The beginning that all names share is looked for a few times, and not as often as a name repeats it."""
    start = time.process_time()
    assert len(wrapper(["state_dict." * 100_000 + "a"])) == 3 * len("state_dict.")
    assert time.process_time() - start < 0.1


def test_parts_of_different_families_are_named() -> None:
    shapes = originals.shapes(originals.CHECKPOINTS["SD 1.5"])
    other = {name: shape for name, shape in shapes.items() if not name.startswith("cond_stage_model.")}
    other["cond_stage_model.model.token_embedding.weight"] = (49408, 1024)
    with pytest.raises(
        FileError, match=r"the text encoder is that of Stable Diffusion 2.x, and the U-Net that of .*1.x"
    ):
        found(other, "file")
