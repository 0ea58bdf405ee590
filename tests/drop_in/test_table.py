"""Each row of the tables of fastldm/drop_in.py, against diffusers and against the Pipeline."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import fastldm
from benchmarks import drop_in as page
from fastldm import drop_in
from fastldm.drop_in import ATTRIBUTES, CALL, LOADING, check_options
from fastldm.errors import ArgumentError, Error, RefusedError, UnknownArgumentError
from tests import oracle

ROOT = Path(__file__).resolve().parent.parent.parent
TABLES = {"ATTRIBUTES": ATTRIBUTES, "CALL": CALL, "LOADING": LOADING}
HUGE = "x" * 1_000_000
MOVES = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
FROM_SINGLE_FILE = "pretrained_model_link_or_path"


def names(table: drop_in.Table, kind: str) -> list[str]:
    return sorted(name for name, row in table.items() if row.kind == kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.saved(oracle.stable_diffusion(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(folder: Path) -> fastldm.Pipeline:
    return fastldm.Pipeline(folder)


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which nothing has been said yet."""
    monkeypatch.setattr(drop_in, "_TOLD", {})


def painted(pipe: fastldm.Pipeline) -> np.ndarray:
    return np.asarray(pipe("the red cat", num_inference_steps=2, seed=1, output_type="np").images)


# ----------------------------------------------------------------------------------------------------- beside diffusers


def test_every_name_of_diffusers_has_a_row_and_every_row_a_name() -> None:
    assert page.problems() == []


def test_the_names_are_found_in_all_their_places() -> None:
    attributes, call, loading = (section.names() for section in page.SECTIONS)
    assert attributes["to"] == ["txt2img", "img2img", "inpaint", "instruct"]
    assert attributes["prepare_mask_latents"] == ["inpaint"]
    assert attributes["image_processor"] == attributes["to"]  # of instances alone
    assert attributes["_guidance_scale"] == attributes["to"]  # of an instance that was called
    assert call["callback"] == attributes["to"]  # popped from **kwargs
    assert loading["mirror"] == ["from_pretrained"]  # documented alone
    assert loading["dduf_file"] == ["from_pretrained"]  # asked for in **kwargs
    assert loading["scheduler_type"] == ["from_single_file"]
    assert loading["image_encoder"] == ["constructor"]
    assert not {"self", "kwargs", "scale"} & {*attributes, *call, *loading}


@pytest.mark.parametrize("change", ["no row", "nobody has it", "not only elsewhere"])
def test_a_difference_is_told(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    attributes, call, loading = page.SECTIONS
    table = dict(CALL)
    if change == "no row":
        del table["prompt"]
    elif change == "nobody has it":
        table["promt"] = table["prompt"]
    else:
        monkeypatch.setattr(page, "ELSEWHERE", {**page.ELSEWHERE, "prompt": "nowhere"})
    changed = page.Section("call", table, call.names, call.everywhere)
    monkeypatch.setattr(page, "SECTIONS", (attributes, changed, loading))
    (problem,) = page.problems()
    assert problem.startswith("call: prom")
    assert change in problem


def test_the_page_is_what_the_script_writes() -> None:
    text = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    assert page.rewritten(text, page.tables()) == text


def test_a_page_without_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="there is no '<!-- call: written by"):
        page.rewritten("# Page\n", {"call": "text"})


@pytest.mark.parametrize("table", TABLES)
def test_rows_say_something(table: str) -> None:
    for name, row in TABLES[table].items():
        assert name.isidentifier()
        assert row.kind in get_args(drop_in.Kind)
        assert row.note
        assert row.note == row.note.strip(" .")
        assert "\n" not in row.note
        assert len(row.note) < 130


# ------------------------------------------------------------------------------------------------------------ supported


@pytest.mark.parametrize("name", names(ATTRIBUTES, "supported"))
def test_what_is_supported_is_there(pipe: fastldm.Pipeline, name: str) -> None:
    assert hasattr(pipe, name)
    assert callable(getattr(pipe, name)) or not callable(getattr(fastldm.Pipeline, name))


@pytest.mark.parametrize("name", names(CALL, "supported"))
def test_supported_arguments_of_a_call_are_there(name: str) -> None:
    assert name in inspect.signature(fastldm.Pipeline.__call__).parameters


@pytest.mark.parametrize("name", names(LOADING, "supported"))
def test_supported_arguments_of_loading_are_there(name: str) -> None:
    Pipeline = fastldm.Pipeline
    where = Pipeline.from_single_file if name == FROM_SINGLE_FILE else Pipeline.from_pretrained
    assert name in {*inspect.signature(where).parameters, *inspect.signature(Pipeline).parameters}


# --------------------------------------------------------------------------------------------------------------- no-ops


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize("name", names(ATTRIBUTES, "no-op"))
def test_a_no_op_says_so_once(pipe: fastldm.Pipeline, name: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"onload_device": "cpu"} if name == "enable_group_offload" else {}
    with caplog.at_level(logging.WARNING, logger="fastldm"):
        for _ in range(3):
            assert getattr(pipe, name)(**options) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages == [f"{name} does nothing here: {ATTRIBUTES[name].note}"]


@pytest.mark.usefixtures("untold")
def test_no_ops_change_no_image(folder: Path) -> None:
    plain = painted(fastldm.Pipeline(folder))
    pipe = fastldm.Pipeline(folder, **dict.fromkeys(names(LOADING, "no-op"), True))
    for name in names(ATTRIBUTES, "no-op"):
        getattr(pipe, name)(*(["cpu"] if name == "enable_group_offload" else []))
    pipe.to("cpu")
    assert np.array_equal(painted(pipe), plain)


@pytest.mark.parametrize("name", MOVES)
def test_offload_calls_are_methods_of_their_own(name: str) -> None:
    """They move the model, which a row cannot."""
    assert callable(inspect.getattr_static(fastldm.Pipeline, name))


@pytest.mark.usefixtures("untold")
def test_a_no_op_takes_any_arguments() -> None:
    assert drop_in.attribute("enable_attention_slicing")("auto", slice_size=1, name="x") is None


@pytest.mark.usefixtures("untold")
def test_of_many_threads_one_says_it(caplog: pytest.LogCaptureFixture) -> None:
    start, does_nothing = threading.Barrier(16), drop_in.attribute("remove_all_hooks")

    def call() -> None:
        start.wait()
        for _ in range(100):
            does_nothing()

    threads = [threading.Thread(target=call) for _ in range(16)]
    with caplog.at_level(logging.WARNING, logger="fastldm"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("untold")
def test_a_no_op_argument_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    for name in names(LOADING, "no-op"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fastldm"):
            for value in (None, False, True, True):
                check_options(LOADING, {name: value}, known=())
        assert caplog.messages == [f"{name} does nothing here: {LOADING[name].note}"]


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", names(ATTRIBUTES, "refused"))
def test_a_refused_attribute_is_an_error_that_names_it(pipe: fastldm.Pipeline, name: str) -> None:
    assert not hasattr(pipe, name)
    assert getattr(pipe, name, "absent") == "absent"
    with pytest.raises(RefusedError) as raised:
        getattr(pipe, name)
    assert raised.value.field == raised.value.name == name
    assert raised.value.obj is None  # or Python would suggest another attribute behind the reason
    assert str(raised.value) == f"Pipeline has no {name}: {ATTRIBUTES[name].note}"


@pytest.mark.parametrize("table", ["CALL", "LOADING"])
def test_a_refused_argument_is_an_error_that_names_it(table: str) -> None:
    for name in names(TABLES[table], "refused"):
        with pytest.raises(ArgumentError) as raised:
            check_options(TABLES[table], {name: 0}, known=())
        assert not isinstance(raised.value, UnknownArgumentError)
        assert raised.value.field == name
        assert str(raised.value) == f"{name} = 0: {TABLES[table][name].note}"
        check_options(TABLES[table], {name: None}, known=())
        check_options(TABLES[table], {name: False}, known=())


def test_a_call_and_loading_refuse(pipe: fastldm.Pipeline, folder: Path) -> None:
    with pytest.raises(ArgumentError, match="callback_on_step_end is what is called") as raised:
        pipe("the red cat", callback=print)
    assert raised.value.field == "callback"
    for load in (fastldm.Pipeline, fastldm.Pipeline.from_pretrained):
        with pytest.raises(ArgumentError, match=r"^device_map = 'balanced': a model is whole on one device"):
            load(folder, device_map="balanced")
    fastldm.Pipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False, device_map=None)


# ------------------------------------------------------------------------------------------------------ to be assigned


@pytest.mark.parametrize("name", drop_in.OFF)
def test_what_is_off_may_be_set_to_off(pipe: fastldm.Pipeline, name: str) -> None:
    off = False if name == "requires_safety_checker" else None
    setattr(pipe, name, off)
    assert getattr(pipe, name) is off
    with pytest.raises(RefusedError, match=f"{name} cannot be assigned 'function': {off}, and {off} may be"):
        setattr(pipe, name, lambda images, **_: (images, False))


@pytest.mark.parametrize("name", drop_in.FIXED)
def test_networks_are_not_exchanged(pipe: fastldm.Pipeline, name: str) -> None:
    for value in (None, torch.nn.Linear(1, 1)):
        with pytest.raises(
            RefusedError, match=rf"{name} cannot be assigned '\w+': .*pass {name}= to Pipeline"
        ) as raised:
            setattr(pipe, name, value)
        assert raised.value.field == name
    assert getattr(pipe, name) is not None


@pytest.mark.parametrize("name", names(ATTRIBUTES, "refused"))
def test_an_assignment_without_effect_is_refused(name: str) -> None:
    with pytest.raises(RefusedError) as raised:
        drop_in.drops(name, 7.5)
    assert raised.value.field == name
    assert str(raised.value) == f"{name} cannot be assigned 'float': {ATTRIBUTES[name].note}"
    assert drop_in.drops(name, None)
    assert drop_in.drops(name, False)


def test_the_pipeline_refuses_assignments_without_effect(pipe: fastldm.Pipeline) -> None:
    with pytest.raises(RefusedError, match=r"_interrupt cannot be assigned 'bool': .*CancelToken"):
        pipe._interrupt = True
    pipe._interrupt = False
    assert not hasattr(pipe, "_interrupt")


def test_other_assignments_are_of_no_concern() -> None:
    assert not any(drop_in.drops(name, None) for name in ("scheduler", "_engine", "mine", "progress_bar", HUGE))


# -------------------------------------------------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("table", "given", "meant"),
    [
        ("CALL", "hieght", "height"),
        ("CALL", "num_inference_step", "num_inference_steps"),
        ("LOADING", "torch_dtyp", "torch_dtype"),
    ],
)
def test_an_unknown_argument_suggests_one(table: str, given: str, meant: str) -> None:
    with pytest.raises(UnknownArgumentError) as raised:
        check_options(TABLES[table], {given: 64}, known=["prompt"])
    assert raised.value.field == given
    assert str(raised.value) == f"{given} = 64: there is no such argument: did you mean {meant!r}?"


def test_an_unknown_argument_without_a_likeness_gives_the_choices() -> None:
    with pytest.raises(UnknownArgumentError, match=r"zzz = 'a': there is no such argument; there are prompt, cancel$"):
        check_options(CALL, {"zzz": "a"}, known=["prompt", "cancel"])


def test_our_own_arguments_are_suggested(pipe: fastldm.Pipeline, folder: Path) -> None:
    with pytest.raises(UnknownArgumentError, match="did you mean 'cancel'"):
        pipe("the red cat", cancell=None)
    with pytest.raises(UnknownArgumentError, match="did you mean 'extract_ema'"):
        fastldm.Pipeline(folder, extractema=True)


def test_a_name_that_is_supported_but_was_not_taken_is_not_dropped() -> None:
    with pytest.raises(UnknownArgumentError):
        check_options(CALL, {"clip_skip": 1}, known=())


@pytest.mark.parametrize("name", [HUGE, "a\x00\n\x1b[31m", "\ud800", "", "prompt\n", "é" * 65])
def test_a_wild_name_is_not_echoed_raw(pipe: fastldm.Pipeline, name: str) -> None:
    errors = []
    for use in (lambda: check_options(CALL, {name: HUGE}, ["prompt"]), lambda: getattr(pipe, name)):
        with pytest.raises((Error, AttributeError)) as raised:
            use()
        errors.append(str(raised.value))
    for message in errors:
        assert len(message) < 300
        assert message.encode().decode().isprintable()


def test_checking_takes_no_time() -> None:
    known = list(inspect.signature(fastldm.Pipeline.__call__).parameters)

    def seconds(name: str, use: Callable[[str], object]) -> float:
        start = time.perf_counter()
        with pytest.raises(Error if use is options else AttributeError):
            use(name)
        return time.perf_counter() - start

    def options(name: str) -> None:
        check_options(CALL, {name: HUGE}, known)

    for name in ("hieght", "callback", HUGE, "x" * 64, "é" * 64):
        for use in (options, drop_in.attribute):
            assert min(seconds(name, use) for _ in range(5)) < 0.001


def test_an_unknown_attribute_is_told_as_python_does(pipe: fastldm.Pipeline) -> None:
    with pytest.raises(AttributeError) as raised:
        pipe.enable_atention_slicing  # noqa: B018
    assert type(raised.value) is AttributeError
    assert raised.value.name == "enable_atention_slicing"
    assert str(raised.value) == (
        "'Pipeline' object has no attribute 'enable_atention_slicing': did you mean 'enable_attention_slicing'?"
    )
    with pytest.raises(AttributeError, match=r"has no attribute 'zzz'$"):
        pipe.zzz  # noqa: B018


def test_what_is_supported_is_no_row_that_does_nothing() -> None:
    """Where the class lacks it, or a property of it raised an AttributeError."""
    with pytest.raises(AttributeError, match="has no attribute 'to'"):
        drop_in.attribute("to")


def test_own_attributes_are_suggested() -> None:
    with pytest.raises(AttributeError, match="did you mean 'peak_memory'"):
        drop_in.attribute("peak_memry", known=["peak_memory"])


# ------------------------------------------------------------------------------------------- an object like any other


def test_names_with_underscores_are_absent(pipe: fastldm.Pipeline) -> None:
    for name in ("__deepcopy__", "__array__", "_repr_html_", "_ipython_display_", "__wrapped__", "_scheduler_"):
        with pytest.raises(AttributeError) as raised:
            drop_in.attribute(name)
        assert type(raised.value) is AttributeError
        assert "did you mean" not in str(raised.value)
        assert not hasattr(pipe, name)


def test_a_copy_paints_the_same(pipe: fastldm.Pipeline) -> None:
    twin = copy.copy(pipe)
    assert np.array_equal(painted(twin), painted(pipe))


def test_a_pipeline_that_was_never_made_has_no_attributes() -> None:
    """What copy and pickle look at before there is any state: no endless recursion."""
    bare = fastldm.Pipeline.__new__(fastldm.Pipeline)
    assert not hasattr(bare, "__setstate__")
    assert not hasattr(bare, "_engine")
    with pytest.raises(AttributeError):
        bare("the red cat")


def test_pickling_ends(pipe: fastldm.Pipeline) -> None:
    """In a copy or in an error of its own, not in one of ours."""
    try:
        data = pickle.dumps(pipe)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        assert not isinstance(error, RefusedError)  # noqa: PT017
    else:
        assert np.array_equal(painted(pickle.loads(data)), painted(pipe))


def test_a_subclass_keeps_its_own(folder: Path) -> None:
    class Mine(fastldm.Pipeline):
        def load_lora_weights(self, name: str) -> str:
            return name

        guidance_scale = 3.0

    mine = Mine(folder)
    assert mine.load_lora_weights("a") == "a"
    assert mine.guidance_scale == 3.0
    mine.note = "of the caller"
    assert mine.note == "of the caller"
    with pytest.raises(RefusedError):
        mine.fuse_lora  # noqa: B018


def test_tools_can_look_at_it(pipe: fastldm.Pipeline) -> None:
    assert {"scheduler", "to", "encode_prompt"} <= set(dir(pipe))
    assert not set(names(ATTRIBUTES, "refused")) & set(dir(pipe))
    assert repr(pipe)
    found = dict(inspect.getmembers(pipe))
    assert found["safety_checker"] is None
    assert callable(inspect.unwrap(pipe))
    assert inspect.signature(pipe).parameters["prompt"].default is None


def test_nothing_is_imported_for_it() -> None:
    code = "import sys, fastldm.drop_in\nprint(*sorted({'torch', 'numpy', 'diffusers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# ----------------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize("write", [True, False])
def test_the_script(
    write: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "page.md"
    text = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    copied.write_text(text.replace("| supported |", "| no idea |"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["drop_in.py", *(["--write", str(copied)] if write else [])])
    page.main()
    assert "| call | " in capsys.readouterr().out
    assert (copied.read_text(encoding="utf-8") == text) is write


def test_the_script_ends_with_the_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["drop_in.py"])
    monkeypatch.setattr(page, "problems", lambda: ["call: new (txt2img) has no row"])
    with pytest.raises(SystemExit, match=r"new \(txt2img\) has no row"):
        page.main()
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--write", "no/such/page.md"])
    with pytest.raises(SystemExit):
        page.main()
    assert "is no file" in capsys.readouterr().err
