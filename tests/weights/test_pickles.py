"""Checkpoints of torch.save: what is read, and that each tensor is what its file holds (F41, F42)."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastldm.errors import FileError
from fastldm.weights import pickles as module
from fastldm.weights.files import open_file, open_model
from fastldm.weights.opcodes import GLOBALS, STORAGES
from tests.weights import pickled
from tests.weights.folders import STEM, equal, refused, weights
from tests.weights.pickled import archive, constant, in_memory, legacy, name, raw_bytes, saved, state_dict, tensor

pytestmark = pytest.mark.usefixtures("no_hang", "no_open_files_left", "no_network")


def rejected(file: bytes, match: str) -> str:
    with pytest.raises(FileError, match=match) as caught:
        in_memory(file)
    assert str(caught.value).startswith("memory: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.fixture
def torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("torch saw the file")

    monkeypatch.setattr(torch, "load", fail)


# ---------------------------------------------------------------------------------------------------- what is read


def parameters() -> OrderedDict[str, torch.Tensor]:
    layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Linear(3, 4, bias=False))
    return OrderedDict(layer.named_parameters())


def module_state() -> OrderedDict[str, torch.Tensor]:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()


def views() -> dict[str, torch.Tensor]:
    shared = torch.randn(4, 6)
    tensors = {"whole": shared, "part": shared[1:3, 2:], "turned": shared.t(), "step": shared[:, ::2]}
    return {**tensors, "one": shared[3, 5], "expanded": shared[:1].expand(2, 6)}


def dtypes() -> dict[str, torch.Tensor]:
    return {str(dtype): (torch.randn(2, 3) * 3).to(dtype) for dtype in STORAGES.values()}


def odd() -> dict[str, torch.Tensor]:
    same = torch.ones(2)
    return {"v_pred": torch.tensor([]), "ztsnr": torch.zeros(0), "scalar": torch.tensor(2.5), "é\n": same, "": same}


ROOTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "weights": weights,
    "parameters": parameters,
    "module": module_state,
    "views": views,
    "dtypes": dtypes,
    "odd": odd,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "plain"])
@pytest.mark.parametrize("root", ROOTS)
def test_what_torch_saves_is_read(tmp_path: Path, root: str, wrapped: bool, zipped: bool) -> None:
    tensors = ROOTS[root]()
    trained = {"epoch": 3, "global_step": 470000, "callbacks": {"x": [1, 2.5, None, (True,)]}, "state_dict": tensors}
    (tmp_path / "model.ckpt").write_bytes(saved(trained if wrapped else tensors, zipped))
    with open_file(tmp_path / "model.ckpt") as opened:
        equal(opened, dict(tensors))
        assert opened.metadata == ({"global_step": "470000"} if wrapped else {})
        assert opened.where == str(tmp_path / "model.ckpt")
        for key, value in tensors.items():
            found = opened.read(key)
            assert found.is_contiguous()
            assert not found.requires_grad
            assert type(found) is torch.Tensor
            assert opened.infos[key].nbytes == value.numel() * value.itemsize


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_read_is_a_copy(zipped: bool) -> None:
    opened = module.Pickled(pickled.Memory(saved(views(), zipped)))
    before = opened.read("turned")
    opened.read("whole").zero_()
    opened.read("turned").zero_()
    assert torch.equal(opened.read("turned"), before)
    assert before.any()


def test_pickles_are_read_where_other_tensors_would_be_on_meta() -> None:
    file = saved(weights())
    with torch.device("meta"):
        found = in_memory(file)
    assert raw_bytes(found) == raw_bytes(weights())


def test_values_that_are_no_tensors_are_left_out() -> None:
    root = {"model": {"x": torch.ones(1)}, "w": torch.ones(2), "epoch": 1, "state_dict": [1], 5: "five", None: {}}
    assert in_memory(saved(root)).keys() == {"w"}
    root = {"w": torch.ones(2), "state_dict": {"v": torch.ones(3), "n": torch.ones(4), "_": 1}, "global_step": 1.5}
    opened = module.Pickled(pickled.Memory(saved(root)))
    assert opened.infos.keys() == {"v", "n"}
    assert opened.metadata == {}


NAMELESS = [{}, [], 5, torch.ones(2), [torch.ones(2)], {"a": 1}, {"state_dict": {}}]


@pytest.mark.parametrize("root", [*NAMELESS, {"state_dict": {"a": {"b": torch.ones(1)}}}])
def test_a_checkpoint_without_named_tensors_is_an_error(root: object) -> None:
    rejected(saved(root), "holds no tensors by name")


@pytest.mark.parametrize("key", [5, 1.5, None, True, "\ud800"])
def test_tensors_have_names(key: object) -> None:
    file = state_dict({"a": tensor((2,))})[:-2] + constant(key) + tensor((2,)) + b"u."
    rejected(archive(file, {"0": bytes(8)}), "is not the name of a tensor")


def test_a_flag_is_false_or_true(monkeypatch: pytest.MonkeyPatch) -> None:
    file = archive(state_dict({"a": tensor((4,), kind="BoolStorage")}), {"0": b"\0\1\2\xff"})
    assert in_memory(file)["a"].view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_our_pieces_are_what_torch_writes() -> None:
    """The tests below damage pickles that are written here: they must be right before."""
    for zipped in (True, False):
        data, storages = pickled.sample(zipped)
        raw = {key: value.view(torch.uint8).numpy().tobytes() for key, value in storages.items()}
        file = archive(data, raw) if zipped else legacy(data, storages)
        found = in_memory(file)
        assert raw_bytes(found) == raw_bytes(pickled.by_torch(file))
        assert found["w"].tolist() == torch.arange(24.0).view(4, 6).t().tolist()


def test_the_warning_comes_once_per_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.pt").write_bytes(saved(weights()))
    with caplog.at_level(logging.WARNING, logger="fastldm"), open_file(tmp_path / "model.pt") as opened:
        for key in opened.infos:
            opened.read(key)
    (message,) = (record.getMessage() for record in caplog.records)
    assert str(tmp_path / "model.pt") in message
    assert "restricted loader" in message


def test_a_closed_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(saved(weights()))
    opened = open_file(tmp_path / "model.pt")
    opened.close()
    opened.close()
    with pytest.raises(FileError, match="is closed"):
        opened.read("scale")


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu128", "2.10.0a0+git1234", "1.13.1", "2.10.0rc1"])
@pytest.mark.usefixtures("torch_is_not_asked")
def test_f38_an_older_torch_reads_no_pickles(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    file = saved(weights())
    monkeypatch.setattr(torch, "__version__", version)
    assert "elsewhere" in rejected(file, rf"only torch 2\.10 or newer reads it safely; this is {version[:5]}")


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cpu", "2.11.0a0+git1234", "2.13.0+cu130", "3.0", "10.0.0"])
def test_f38_a_newer_torch_reads_pickles(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    file = saved(weights())
    monkeypatch.setattr(torch, "__version__", version)
    assert in_memory(file).keys() == weights().keys()


# --------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("component", "variant", "file"),
    [
        ("unet", None, f"{STEM}.bin"),
        ("vae", "fp16", f"{STEM}.fp16.bin"),
        ("text_encoder", None, "pytorch_model.bin"),
        ("text_encoder_2", "fp16", "pytorch_model.fp16.bin"),
    ],
)
def test_a_folder_without_safetensors_gives_its_pickle(
    tmp_path: Path, component: str, variant: str | None, file: str
) -> None:
    (tmp_path / component).mkdir()
    (tmp_path / component / file).write_bytes(saved(weights()))
    with open_model(tmp_path, variant=variant).tensors(component) as opened:
        equal(opened, weights())
        assert opened.where.endswith(file)


@pytest.mark.parametrize(
    ("index", "names", "variant"),
    [
        ("pytorch_model.bin.index.json", "pytorch_model-0000{}-of-00002.bin", None),
        ("pytorch_model.bin.index.fp16.json", "pytorch_model.fp16-0000{}-of-00002.bin", "fp16"),
    ],
)
def test_sharded_pickles(tmp_path: Path, index: str, names: str, variant: str | None) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    place = {key: names.format(i % 2 + 1) for i, key in enumerate(weights())}
    for file in set(place.values()):
        (folder / file).write_bytes(saved({key: weights()[key] for key in weights() if place[key] == file}))
    (folder / index).write_text(json.dumps({"weight_map": place}))
    with open_model(tmp_path, variant=variant).tensors("text_encoder") as opened:
        equal(opened, weights())
    (folder / index).write_text(json.dumps({"weight_map": {**place, "scale": names.format(2), "x": names.format(1)}}))
    with pytest.raises(FileError, match="the index says"):
        open_model(tmp_path, variant=variant).tensors("text_encoder")


def test_the_names_of_the_other_formats_stems(root: Path) -> None:
    (root / f"unet/{STEM}.safetensors").rename(root / "unet/model.safetensors")
    (root / "unet/pytorch_model.bin").write_bytes(saved(weights()))
    refused(root, rf"{STEM}\.safetensors is missing")


def test_variants_of_pickles_are_listed(root: Path) -> None:
    (root / f"unet/{STEM}.non_ema.bin").touch()
    (root / f"unet/{STEM}.bin.index.ema.json").touch()
    with pytest.raises(FileError, match=r"no variant 'fp16'; variants here: none, 'ema', 'non_ema'$"):
        open_model(root, variant="fp16").tensors("unet")


# ----------------------------------------------------------------------------------- tensors larger than their file


LARGER = [  # shape, stride, offset, number of elements in the storage
    ((1 << 40,), (0,), 0, 1),
    ((2,), (0,), 0, 1),
    ((1000, 1000), (0, 0), 0, 1),
    ((1000, 1000), (0, 1), 0, 1000),
    ((2, 3), (0, 1), 0, 3),
    ((1 << 31, 1 << 31), (0, 0), 0, 1),
    ((1 << 31, 2), (0, 1), 0, 2),
    ((8,), (1,), 0, 7),
    ((8,), (1,), 1, 8),
    ((4,), (1,), 5, 8),
    ((1,), (1,), 8, 8),
    ((1,), (1,), 1 << 53, 8),
    ((2,), (8,), 0, 8),
    ((2, 2), (4, 4), 0, 8),
    ((2, 2), (1 << 53, 1), 0, 8),
    ((3, 3), (3, 1), 0, 8),
    ((1, 1, 9), (0, 0, 1), 0, 8),
    ((1 << 31,), (1,), 0, 1 << 20),
    ((2,) * 8, (0,) * 8, 0, 255),
    ((1 << 32,), (0,), 0, 4),
    ((1,), (1,), 0, 0),
]


@pytest.mark.parametrize(("shape", "stride", "offset", "numel"), LARGER)
@pytest.mark.usefixtures("torch_is_not_asked")
def test_f41_a_tensor_is_no_larger_than_its_storage(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, numel: int
) -> None:
    match = r"tensor 'a': (.* takes \d+ bytes; its storage has|leads out of its storage|shape .* from 0 to 2147483648)"
    described = {"shape": shape, "stride": stride, "offset": offset, "numel": numel}
    small = {"0": torch.zeros(numel)} if numel < 1 << 16 else {"0": torch.empty(numel)}
    rejected(archive(state_dict({"a": tensor(**described)}), {"0": bytes(4 * numel)}), match)
    rejected(legacy(state_dict({"a": tensor(**described, legacy=True)}), small), match)


@pytest.mark.usefixtures("torch_is_not_asked")
def test_f41_what_torch_itself_saves_of_an_expanded_tensor() -> None:
    for zipped in (True, False):
        rejected(saved({"a": torch.zeros(1).expand(1 << 40)}, zipped), "'a': shape .* must be of integers from 0 to")
        match = "'a': .* takes 4398046511104 bytes; its storage has 4$"
        rejected(saved({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, zipped), match)


SIZES = [0, 1, 3, 5, 1 << 20, 1 << 40, 1 << 53, 1 << 62, 1 << 200, -1, -4, 4.0, True, None, "4"]  # for one of 4


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.usefixtures("torch_is_not_asked")
def test_f43_a_storage_has_the_size_that_the_pickle_says(numel: Any) -> None:
    """The old format takes memory for it before it reads the storage."""
    match = "is damaged: storage '0' has .* expected$|is not one of tensors"
    rejected(archive(state_dict({"a": tensor((1,), numel=numel)}), {"0": bytes(16)}), match)
    rejected(legacy(state_dict({"a": tensor((1,), numel=numel, legacy=True)}), {"0": torch.zeros(4)}), match)


@pytest.mark.parametrize(
    "damage",
    [
        {"stride": (1, 1)},
        {"stride": ()},
        {"offset": -1},
        {"offset": 0.0},
        {"offset": "0"},
        {"stride": (-1,)},
        {"stride": (True,)},
        {"stride": (1 << 60,)},
        {"stride": (None,)},
        {"shape": (-2,), "numel": 2},
        {"shape": (2.0,), "numel": 2},
        {"shape": (1,) * 9, "numel": 2},
        {"hooks": b"N"},
        {"hooks": b"}"},
        {"hooks": name("collections.OrderedDict") + b")R" + constant("k") + constant(1) + b"s"},
        {"key": 0},
        {"key": ("0",)},
        {"key": None},
        {"rest": b"}"},
        {"rest": b"}" + constant("conj") + constant(True) + b"s"},
        {"numel": 3, "kind": "UntypedStorage"},
        {"legacy": True, "numel": None, "key": b"N"},
    ],
)
@pytest.mark.usefixtures("torch_is_not_asked")
def test_f43_a_tensor_is_described_as_torch_does_it(damage: dict[str, Any]) -> None:
    described = {"shape": (2,), **damage}
    rejected(archive(state_dict({"a": tensor(**described)}), {"0": bytes(8)}), "is not one of tensors|its pickle names")


@pytest.mark.usefixtures("torch_is_not_asked")
def test_f43_one_storage_is_described_in_one_way() -> None:
    for other in ({"numel": 2}, {"kind": "IntStorage"}):
        items = {"a": tensor((1,), numel=4), "b": tensor((1,), **{"numel": 4, **other})}
        rejected(archive(state_dict(items), {"0": bytes(16)}), "storage 0 is described twice, and differently")


STORES = {"0": torch.ones(2), "1": torch.ones(3)}
LISTS = [[], ["0"], ["1"], ["0", "0"], ["0", "1", "1"], ["0", "2"], ["0", 1], ["0", None], "01", {"0": 0, "1": 1}]


@pytest.mark.parametrize("keys", LISTS)
@pytest.mark.usefixtures("torch_is_not_asked")
def test_f43_an_old_checkpoint_fills_all_of_its_storages(keys: object) -> None:
    """What is not listed would be left as the memory happens to be."""
    items = {key: tensor((len(value),), key=key, legacy=True) for key, value in STORES.items()}
    rejected(legacy(state_dict(items), STORES, keys=keys), "its storages are not those of its tensors")


def test_f43_the_storages_of_an_old_checkpoint_stand_in_any_order() -> None:
    items = {key: tensor((len(value),), key=key, legacy=True) for key, value in STORES.items()}
    for storages in (STORES, dict(reversed(STORES.items()))):
        assert raw_bytes(in_memory(legacy(state_dict(items), storages))) == raw_bytes(STORES)


@pytest.mark.parametrize("extra", [b"\0", bytes(8), b"x" * 100])
@pytest.mark.usefixtures("torch_is_not_asked")
def test_f07_an_old_checkpoint_ends_with_its_last_storage(extra: bytes) -> None:
    file = saved({"a": torch.ones(2)}, zipped=False)
    rejected(file + extra, f"{len(file)} bytes expected, {len(file) + len(extra)} present")
    for cut in (1, 4, 8):
        rejected(file[:-cut], f"{len(file)} bytes expected, {len(file) - cut} present")


@pytest.mark.parametrize("system", [{}, {"little_endian": False}, {"little_endian": 1}, None, [], 5])
@pytest.mark.usefixtures("torch_is_not_asked")
def test_an_old_checkpoint_of_another_machine(system: object) -> None:
    items = {"a": tensor((2,), legacy=True)}
    rejected(legacy(state_dict(items), {"0": torch.ones(2)}, system=system), "not written on a little-endian machine")


# --------------------------------------------------------------------------------------------- tensors of other kinds


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


class Special(torch.Tensor):
    pass


OTHERS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "coo": (lambda: torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    "huge coo": (lambda: torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,)), "torch._utils._rebuild_sparse_tensor"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "torch._utils._rebuild_sparse_tensor"),
    "csc": (lambda: torch.eye(3).to_sparse_csc(), "torch._utils._rebuild_sparse_tensor"),
    "bsr": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), "torch._utils._rebuild_sparse_tensor"),
    "bsc": (lambda: torch.eye(4).to_sparse_bsc((2, 2)), "torch._utils._rebuild_sparse_tensor"),
    "quantized": (quantized, "torch._utils._rebuild_qtensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), "torch._utils._rebuild_nested_tensor"),
    "meta": (lambda: torch.empty(1 << 40, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e4m3fn), "torch._utils._rebuild_tensor_v3"),
    "uint16": (lambda: torch.ones(2).to(torch.uint16), "torch._utils._rebuild_tensor_v3"),
    "subclass": (lambda: torch.ones(2).as_subclass(Special), "torch._tensor._rebuild_from_type_v2"),
    "attribute": (lambda: noted(torch.ones(2)), "torch._tensor._rebuild_from_type_v2"),
}


def noted(value: torch.Tensor) -> torch.Tensor:
    value.note = 1  # type: ignore[attr-defined]
    return value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.usefixtures("torch_is_not_asked")
def test_f42_only_plain_dense_tensors_are_read(kind: str) -> None:
    build, forbidden = OTHERS[kind]
    for zipped in (True, False):
        if kind == "nested" and not zipped:
            continue
        message = rejected(saved({"w": torch.ones(2), "a": build()}, zipped), f"its pickle names '{forbidden}'")
        assert forbidden not in GLOBALS
        assert "may run code and is never loaded" in message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*OTHERS, "missing", "shape", "stride", "offset", "dtype", "short", "float", "None"])
def test_f42_torch_must_give_what_was_described(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As if the file were changed between the description and the load, or torch understood it in another way."""
    others: dict[str, Any] = {
        "missing": {},
        "shape": {"a": torch.ones(4)[:2]},
        "stride": {"a": torch.ones(3, 3).t()},
        "offset": {"a": torch.ones(10)[1:].view(3, 3)},
        "dtype": {"a": torch.ones(3, 3, dtype=torch.int32)},
        "short": {"a": torch.ones(1).expand(3, 3)},
        "float": {"a": 1.0},
        "None": None,
    }
    given = others[kind] if kind in others else {"a": OTHERS[kind][0]()}
    monkeypatch.setattr(torch, "load", lambda *_, **__: given)
    rejected(saved({"a": torch.ones(3, 3)}), "tensor 'a': torch read another one than is described")


def test_f10_empty_tensors_only_as_known_markers() -> None:
    for shape in ((0,), (0, 4), (2, 0, 1 << 31)):
        rejected(saved({"a": torch.zeros(shape), "b": torch.ones(1)}), r"'a': is empty: shape \(")


@pytest.mark.usefixtures("torch_is_not_asked")
def test_f04_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TENSORS", 3)
    rejected(saved({str(i): torch.ones(1) for i in range(4)}), "has more than 3 tensors")


def test_a_safetensors_file_named_as_a_pickle_is_read_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file(weights(), tmp_path / f"unet/{STEM}.bin")
    with open_model(tmp_path).tensors("unet") as opened:
        equal(opened, weights())
