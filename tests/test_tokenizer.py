"""The tokenizer: the ids that transformers gives, from both layouts, and what a hostile folder can say."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from fastldm import prompt as module
from fastldm.errors import ConfigError, Error, FileError
from fastldm.prompt import Tokenizer
from fastldm.weights.files import ModelFolder
from tests import oracle

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = oracle.tokenizer()
SIZE = len(REFERENCE)
SETTINGS = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}

PROMPTS = [
    "",
    " ",
    "a red cat in the street",
    "Café naïve Ångström e\u0301",
    "👩‍🚀 🐈‍⬛ 🏳️‍🌈",
    "一只红色的猫",
    "THE Red cAT İSTANBUL ẞ",
    "it's we're I'd they'll 's 'S don't",
    "1234 3.14 ½ ٣",
    "  the \n\n red\t\tcat\r\n\u3000\u00a0 ",
    "a <|endoftext|> cat<|startoftext|>the <|ENDOFTEXT|>'s",
    "wow!!! (really?) a_b -- <|",
    "a\x00b\x07c",
    "the red cat " * 34,
]


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """As transformers 5 saves it: tokenizer.json."""
    REFERENCE.save_pretrained(tmp_path / "model/tokenizer")
    return tmp_path / "model"


@pytest.fixture
def old(new: Path, tmp_path: Path) -> Path:
    """As the hub has it: vocab.json and merges.txt."""
    model = json.loads((new / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))["model"]
    folder = tmp_path / "old/tokenizer"
    write(folder / "vocab.json", model["vocab"])
    write(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    write(folder / "tokenizer_config.json", SETTINGS)
    return folder.parent


def edit(path: Path, **changes: Any) -> None:
    write(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def ours(root: Path, *, positions: int = 77, vocab_size: int = SIZE) -> Tokenizer:
    return Tokenizer.from_folder(ModelFolder(root), "tokenizer", positions=positions, vocab_size=vocab_size)


def theirs(root: Path) -> Callable[[list[str]], list[list[int]]]:
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    assert tokenizer.model_max_length == 77
    return lambda texts: tokenizer(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]


def same(root: Path) -> None:
    ids = ours(root)(PROMPTS)
    assert (ids.dtype, ids.shape, ids.device.type) == (torch.int64, (len(PROMPTS), 77), "cpu")
    for text, found, expected in zip(PROMPTS, ids.tolist(), theirs(root)(PROMPTS), strict=True):
        assert found == expected, text


# --------------------------------------------------------------------------------------------- as transformers


@pytest.mark.parametrize("layout", ["new", "old"])
def test_the_ids_are_those_of_transformers(layout: str, request: pytest.FixtureRequest) -> None:
    same(request.getfixturevalue(layout))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_the_ids_of_transformers(text: str) -> None:
    expected = REFERENCE([text], padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert BOTH[0]([text]).tolist() == BOTH[1]([text]).tolist() == expected


BOTH: list[Tokenizer] = []


@pytest.fixture(autouse=True)
def _both(request: pytest.FixtureRequest) -> None:
    if "any_text" in request.node.name and not BOTH:
        BOTH.extend(ours(request.getfixturevalue(layout)) for layout in ("new", "old"))


TOKEN = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
FILES: dict[str, dict[str, Any]] = {
    "SDXL's second pads with !": {"tokenizer_config.json": {**SETTINGS, "pad_token": "!"}},
    "SD 2's map says so over the settings": {"special_tokens_map.json": {"pad_token": "!"}},
    "the map is for old folders": {
        "tokenizer_config.json": {
            **SETTINGS,
            "added_tokens_decoder": {
                "0": {**TOKEN, "content": "!", "special": True, "normalized": False},
                str(SIZE - 2): {**TOKEN, "content": "<|startoftext|>", "special": True},
                str(SIZE - 1): {**TOKEN, "content": "<|endoftext|>", "special": True, "normalized": False},
            },
        },
        "special_tokens_map.json": {"pad_token": "!"},
    },
    "as SD 1 writes them": {
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": {**TOKEN, "content": "<|startoftext|>"},
            "do_lower_case": True,
            "eos_token": {**TOKEN, "content": "<|endoftext|>"},
            "errors": "replace",
            "model_max_length": 77,
            "name_or_path": "/home/somebody/tokenizer",
            "pad_token": "<|endoftext|>",
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": {**TOKEN, "content": "<|endoftext|>"},
        },
        "special_tokens_map.json": {"bos_token": {k: v for k, v in TOKEN.items() if k[0] != "_"} | {"content": "a"}},
    },
    "strips its spaces": {
        "special_tokens_map.json": {"pad_token": {"content": "cat</w>", "lstrip": True, "rstrip": True}}
    },
}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES.keys())
def test_special_tokens_are_those_of_transformers(old: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        write(old / "tokenizer" / name, content)
    same(old)


@pytest.mark.parametrize("kind", ["added_tokens.json", "added_tokens_decoder"])
def test_words_added_by_training_are_found(old: Path, kind: str) -> None:
    folder = old / "tokenizer"
    if kind == "added_tokens.json":
        write(folder / kind, {"<Toy>": SIZE, "<toy2>": SIZE + 1})
    else:
        words = {str(SIZE): {**TOKEN, "content": "<Toy>"}, str(SIZE + 1): {**TOKEN, "content": "<toy2>"}}
        decoder = {k: {n: v for n, v in word.items() if n != "__type"} for k, word in words.items()}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    texts = ["a <toy> and <Toy>, <toy2>!", "the cat"]
    tokenizer = ours(old, vocab_size=SIZE + 2)
    assert tokenizer(texts).tolist() == theirs(old)(texts)
    assert SIZE in tokenizer(texts)[0].tolist()
    with pytest.raises(FileError, match=f"{SIZE + 1} of '<toy2>' is beyond the {SIZE + 1}"):
        ours(old, vocab_size=SIZE + 1)


def test_merges_as_one_text_and_with_windows_line_ends(new: Path, old: Path) -> None:
    data = json.loads((new / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    write(new / "tokenizer/tokenizer.json", data)
    merges = old / "tokenizer/merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert torch.equal(ours(new)(PROMPTS), ours(old)(PROMPTS))
    same(new)


def test_no_settings_are_clips(old: Path) -> None:
    expected = ours(old)(PROMPTS)
    (old / "tokenizer/tokenizer_config.json").unlink()
    assert torch.equal(ours(old)(PROMPTS), expected)


@pytest.mark.parametrize(("longest", "window"), [(3, 3), (20, 20), (78, 77), (int(1e30), 77), (None, 77)])
def test_the_window_is_the_smaller_one(old: Path, longest: int | None, window: int) -> None:
    edit(old / "tokenizer/tokenizer_config.json", model_max_length=longest)
    ids = ours(old)(["the red cat " * 60])
    assert ids.shape == (1, window)
    assert (int(ids[0, 0]), int(ids[0, -1])) == (SIZE - 2, SIZE - 1)


def test_what_is_cut_is_said_once(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours(old)(["cat " * 75 + "red the", "a cat"])
    (record,) = caplog.records
    assert record.getMessage() == "the prompt is longer than 77 tokens; left out: 'red the'"


def test_the_ids_are_on_the_cpu_whatever_the_default(old: Path) -> None:
    with torch.device("meta"):
        assert ours(old)(["a cat"]).device.type == "cpu"


def test_threads_share_one_tokenizer(new: Path) -> None:
    tokenizer = ours(new)
    expected = [tokenizer([text]) for text in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: tokenizer([text]), PROMPTS * 20))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 20, strict=True))


def test_transformers_is_not_imported(new: Path) -> None:
    code = (
        "import sys\nfrom fastldm.prompt import Tokenizer\nfrom fastldm.weights.files import ModelFolder\n"
        f"t = Tokenizer.from_folder(ModelFolder({str(new)!r}), 'tokenizer', positions=77, vocab_size={SIZE})\n"
        "t(['a cat'])\nprint(*{'transformers', 'huggingface_hub'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ----------------------------------------------------------------------------------------------- hostile folders


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that Python code opens."""
    names: list[str] = []
    before = os.open

    def record(path: Any, *args: Any, **options: Any) -> int:
        names.append(os.fspath(path))
        return before(path, *args, **options)

    monkeypatch.setattr(os, "open", record)
    return names


def refused(root: Path, match: str, kind: type[Error] = Error, **sizes: int) -> None:
    with pytest.raises(kind, match=match) as caught:
        ours(root, **sizes)
    assert "tokenizer" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("layout", ["new", "old"])
def test_links_out_of_the_folder_are_refused_file_by_file(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path, opened: list[str]
) -> None:
    root = request.getfixturevalue(layout)
    folder = root / "tokenizer"
    for name in ("special_tokens_map.json", "added_tokens.json"):
        write(folder / name, {})
    ours(root)
    assert sorted({Path(name).name for name in opened}) == sorted(os.listdir(folder))
    for path in sorted(folder.iterdir()):
        outside = tmp_path / "outside" / path.name
        outside.parent.mkdir(exist_ok=True)
        path.rename(outside)
        path.symlink_to(outside)
        refused(root, rf"{path.name} is a link that leads out of the model's folder", FileError)
        path.unlink()
        path.symlink_to("nothing")
        refused(root, rf"{path.name} is missing", FileError)
        path.unlink()
        os.mkfifo(path)
        refused(root, rf"{path.name} is not a regular file", FileError)
        path.unlink()
        outside.rename(path)
    shutil.move(folder, tmp_path / "outside/tokenizer")
    folder.symlink_to(tmp_path / "outside/tokenizer")
    refused(root, "is a link that leads out", FileError)
    assert not [name for name in opened if "outside" in name]


def test_paths_in_the_settings_are_ignored(old: Path, tmp_path: Path, opened: list[str]) -> None:
    expected = ours(old)(PROMPTS)
    write(tmp_path / "outside.json", {"a": 0})
    names = ("vocab", "vocab_file", "merges", "merges_file", "tokenizer_file", "tokenizer_object", "gguf_file")
    more = {"auto_map": {"AutoTokenizer": "evil.Evil"}, "tokenizer_class": "Evil", "init_inputs": [1], "backend": "x"}
    edit(old / "tokenizer/tokenizer_config.json", **dict.fromkeys(names, str(tmp_path / "outside.json")), **more)
    del opened[:]
    assert torch.equal(ours(old)(PROMPTS), expected)
    assert {Path(name).parent for name in opened} == {(old / "tokenizer").resolve()}


def test_the_rules_of_splitting_are_ours(new: Path) -> None:
    """A regular expression or a truncation of the file is not used, so that none can hang or cut."""
    expected = ours(new)(PROMPTS)
    edit(
        new / "tokenizer/tokenizer.json",
        normalizer={"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": ""},
        pre_tokenizer={"type": "no such thing"},
        post_processor=5,
        truncation={"max_length": 1},
        padding={"strategy": {"Fixed": 1 << 40}},
    )
    assert torch.equal(ours(new)(PROMPTS), expected)


NAMES = ["tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper than 32 levels"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"a": 1e999}', "not finite"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
    ids=["deep", "deep list", "list", "cut", "empty", "twice", "infinite", "surrogate", "no UTF-8"],
)
def test_json_is_read_strictly(old: Path, name: str, content: str | bytes, match: str) -> None:
    (old / "tokenizer" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(old, f"{re.escape(name)}: .*{match}", FileError)


@pytest.mark.parametrize(("name", "limit"), [*((n, 16 << 20) for n in NAMES[:2]), *((n, 1 << 20) for n in NAMES[2:])])
def test_files_are_of_bounded_size(old: Path, name: str, limit: int) -> None:
    with (old / "tokenizer" / name).open("ab") as file:
        file.truncate(limit + 1)
    refused(old, f"{re.escape(name)} has {limit + 1} bytes; at most {limit}", FileError)


def test_merges_are_of_bounded_size(old: Path) -> None:
    os.truncate(old / "tokenizer/merges.txt", module.MAX_VOCABULARY + 1)
    refused(old, "merges.txt has 16777217 bytes", FileError)


def test_missing_files_are_named(new: Path, old: Path) -> None:
    (new / "tokenizer/tokenizer.json").unlink()
    refused(new, "neither tokenizer.json nor vocab.json", FileError)
    (old / "tokenizer/merges.txt").unlink()
    refused(old, r"merges\.txt is missing", FileError)
    shutil.rmtree(old / "tokenizer")
    refused(old, "neither tokenizer.json nor vocab.json", FileError)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"type": "Unigram"}, "must be 'BPE'"),
        ({"type": None}, "must be 'BPE'"),
        ({"end_of_word_suffix": None}, "end_of_word_suffix must be '</w>'"),
        ({"vocab": "/etc/passwd", "merges": "/etc/passwd"}, "vocab must map"),
        ({"vocab": [["a", 0]]}, "vocab must map"),
        ({"vocab": {}}, "unk_token = .* is not in the vocabulary"),
        ({"merges": {}}, "merges must be a list"),
        ({"merges": ["a b c"]}, "'a b c' must be two tokens"),
        ({"merges": [["a"]]}, "must be two tokens"),
        ({"merges": [["a", 1]]}, "must be two tokens"),
        ({"merges": [5]}, "the merge 5 must be two tokens"),
        ({"merges": [None]}, "must be two tokens"),
        ({"merges": [["a", "nothing"]]}, "is no byte-pair encoding: .*nothing"),
        ({"merges": [["a", "b"]]}, "is no byte-pair encoding: .*ab"),
    ],
)
def test_models_of_another_form(new: Path, change: dict[str, Any], match: str) -> None:
    path = new / "tokenizer/tokenizer.json"
    edit(path, model=json.loads(path.read_text(encoding="utf-8"))["model"] | change)
    refused(new, rf"tokenizer\.json: .*{match}", FileError)


@pytest.mark.parametrize("model", [None, [], 5, "BPE"])
def test_no_model_at_all(new: Path, model: object) -> None:
    edit(new / "tokenizer/tokenizer.json", model=model)
    refused(new, "must be 'BPE'", FileError)


@pytest.mark.parametrize("content", [b"#version: 0.2\nt h e\n", b"th\n", b"t  h\n", b"\xff \xff\n", b"t nothing\n"])
def test_merges_of_another_form(old: Path, content: bytes) -> None:
    (old / "tokenizer/merges.txt").write_bytes(content)
    refused(old, "must be two tokens|is not UTF-8|is no byte-pair encoding", FileError)


@pytest.mark.parametrize("number", [SIZE, 1 << 40, -1, 1.0, True, "1", None, [1]])
@pytest.mark.parametrize("layout", ["new", "old"])
def test_every_id_is_one_of_the_text_encoder(layout: str, request: pytest.FixtureRequest, number: object) -> None:
    root = request.getfixturevalue(layout)
    if layout == "old":
        edit(root / "tokenizer/vocab.json", cat=number)
    else:
        path = root / "tokenizer/tokenizer.json"
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        edit(path, model=model | {"vocab": model["vocab"] | {"cat": number}})
    refused(root, f"of 'cat' must be an integer from 0 to {SIZE - 1}", FileError)


def test_a_smaller_text_encoder_is_refused(new: Path) -> None:
    refused(new, f"from 0 to {SIZE - 2}, the ids that the text encoder has", FileError, vocab_size=SIZE - 1)


@pytest.mark.parametrize("value", [-5, 0, 1, 2, "77", 77.5, True, [77], {}])
def test_windows_without_room_are_refused(new: Path, value: object) -> None:
    edit(new / "tokenizer/tokenizer_config.json", model_max_length=value)
    refused(new, r"tokenizer_config\.json: model_max_length = .* must be", ConfigError)


def test_a_text_encoder_without_room_is_refused(new: Path) -> None:
    refused(new, "the text encoder has 2 positions", ConfigError, positions=2)


@pytest.mark.parametrize("key", ["padding_side", "truncation_side"])
def test_the_left_side_is_refused(new: Path, key: str) -> None:
    edit(new / "tokenizer/tokenizer_config.json", **{key: "left"})
    refused(new, f"{key} = 'left': is not supported", ConfigError)


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token", "unk_token"])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("<nothing>", "'<nothing>' is not in the vocabulary"),
        ({"content": "<nothing>"}, "'<nothing>' is not in the vocabulary"),
        ("", "must be a text"),
        (5, "must be a text"),
        ([], "must be a text"),
        ({}, "must be a text"),
        ({"content": ["a"]}, "must be a text"),
        ({"content": "a", "lstrip": "yes"}, "must be a text"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_are_in_the_vocabulary(old: Path, file: str, role: str, value: object, match: str) -> None:
    write(old / "tokenizer" / file, {role: value})
    refused(old, match, FileError)


@pytest.mark.parametrize(
    ("decoder", "match"),
    [
        ([], "must map ids to tokens"),
        ({"x": "a"}, "must map ids to tokens"),
        ({"-1": "a"}, "must map ids to tokens"),
        ({"²": "a"}, "must map ids to tokens"),
        ({"9" * 5000: {"content": "a"}}, "the added token 'a' has the id"),
        ({"5": {"content": "a"}}, "the added token 'a' has the id"),
        ({str(SIZE): {"content": "<new>"}}, f"the id {SIZE} of '<new>' is beyond"),
        ({"5": 5}, "must be a text"),
        ({"5": {"content": "a", "special": 1}}, "must be a text"),
    ],
)
def test_added_tokens_of_another_form(old: Path, decoder: object, match: str) -> None:
    edit(old / "tokenizer/tokenizer_config.json", added_tokens_decoder=decoder)
    refused(old, match, FileError)


@pytest.mark.parametrize("added", [5, [5], [{"content": "a"}], [{"id": "0", "content": "!"}], [{"id": -1}]])
def test_added_tokens_of_the_new_layout(new: Path, added: object) -> None:
    edit(new / "tokenizer/tokenizer.json", added_tokens=added)
    refused(new, r"tokenizer\.json", FileError)


@pytest.mark.parametrize("content", [{"<new>": "1"}, {"<new>": None}, {"<new>": SIZE}, {"": 1}, {"<new>": -1}])
def test_added_tokens_of_the_old_layout(old: Path, content: object) -> None:
    write(old / "tokenizer/added_tokens.json", content)
    refused(old, "must be a|is beyond", FileError)
