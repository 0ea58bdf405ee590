"""Pickles that run code: each is refused with the global named, nothing of it is run, and there is no other way in."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastldm.errors import FileError
from fastldm.weights import files, pickles
from fastldm.weights.files import open_file, open_model
from tests.weights.folders import STEM, Gadget, refused, weights
from tests.weights.pickled import CONTAINERS, constant, in_memory, name, saved, state_dict, tensor, text

pytestmark = pytest.mark.usefixtures("no_hang", "no_open_files_left", "no_network")
ROOT = Path(__file__).resolve().parent.parent.parent

CANARY = "CANARY"  # in the gadgets: a file that running them makes
TOUCH = f"open('{CANARY}', 'w')"
SHELL = f"touch {CANARY}"
GADGETS: list[tuple[str, tuple[Any, ...]]] = [
    ("os.system", (SHELL,)),
    ("posix.system", (SHELL,)),
    ("nt.system", (SHELL,)),
    ("posix.mkdir", (CANARY,)),
    ("os.mkdir", (CANARY,)),
    ("os.popen", (SHELL,)),
    ("os.spawnlp", (0, "touch", "touch", CANARY)),
    ("os.execlp", ("touch", "touch", CANARY)),
    ("posix.fork", ()),
    ("pty.spawn", (SHELL,)),
    ("subprocess.Popen", (("touch", CANARY),)),
    ("subprocess.call", (("touch", CANARY),)),
    ("subprocess.run", (("touch", CANARY),)),
    ("subprocess.check_output", (("touch", CANARY),)),
    ("subprocess.getoutput", (SHELL,)),
    ("commands.getoutput", (SHELL,)),
    ("multiprocessing.util.spawnv_passfds", (b"/bin/touch".decode(), ("touch", CANARY), ())),
    ("distutils.spawn.spawn", (("touch", CANARY),)),
    ("builtins.eval", (TOUCH,)),
    ("builtins.exec", (TOUCH,)),
    ("__builtin__.eval", (TOUCH,)),
    ("__builtin__.execfile", (CANARY,)),
    ("builtins.open", (CANARY, "w")),
    ("builtins.getattr", ("", "join")),
    ("builtins.__import__", ("os",)),
    ("builtins.compile", (TOUCH, "", "exec")),
    ("builtins.breakpoint", ()),
    ("builtins.globals", ()),
    ("builtins.map", ()),
    ("builtins.type", ("X", (), {})),
    ("builtins.object", ()),
    ("builtins.set", ()),
    ("builtins.bytearray", (1 << 40,)),
    ("_io.open", (CANARY, "w")),
    ("io.FileIO", (CANARY, "w")),
    ("pathlib.Path", (CANARY,)),
    ("pathlib.Path.touch", (CANARY,)),
    ("shutil.rmtree", ("/nowhere",)),
    ("tempfile.mkdtemp", ("", CANARY)),
    ("runpy.run_path", (CANARY,)),
    ("runpy.run_module", ("antigravity",)),
    ("runpy._run_code", (TOUCH, {})),
    ("webbrowser.open", ("http://localhost",)),
    ("importlib.import_module", ("antigravity",)),
    ("imp.load_source", ("x", CANARY)),
    ("pkgutil.resolve_name", ("os:system",)),
    ("pydoc.locate", ("os.system",)),
    ("pydoc.pipepager", ("", SHELL)),
    ("timeit.timeit", (TOUCH,)),
    ("cProfile.run", (TOUCH,)),
    ("profile.run", (TOUCH,)),
    ("pdb.run", (TOUCH,)),
    ("bdb.Bdb.run", (TOUCH,)),
    ("code.InteractiveInterpreter", ()),
    ("trace.Trace.run", (TOUCH,)),
    ("doctest.debug_script", (TOUCH,)),
    ("site.main", ()),
    ("ctypes.CDLL", ("libc.so.6",)),
    ("ctypes.util._findLib_gcc", (CANARY,)),
    ("functools.partial", ()),
    ("functools.reduce", ()),
    ("operator.attrgetter", ("system",)),
    ("operator.methodcaller", ("system", SHELL)),
    ("itertools.starmap", ()),
    ("types.FunctionType", ()),
    ("types.CodeType", ()),
    ("marshal.loads", (b"".decode(),)),
    ("pickle.loads", ("",)),
    ("_pickle.loads", ("",)),
    ("shelve.open", (CANARY,)),
    ("sqlite3.connect", (CANARY,)),
    ("copyreg._reconstructor", ()),
    ("copy_reg._reconstructor", ()),
    ("codecs.encode", ("x", "rot13")),
    ("_codecs.encode", ("x", "latin1")),
    ("codecs.open", (CANARY, "w")),
    ("logging.FileHandler", (CANARY,)),
    ("logging.config.fileConfig", (CANARY,)),
    ("socket.create_connection", (("localhost", 1),)),
    ("urllib.request.urlopen", ("http://localhost",)),
    ("ssl.get_server_certificate", (("localhost", 1),)),
    ("asyncio.unix_events._UnixSubprocessTransport._start", ()),
    ("unittest.mock._importer", ("os",)),
    ("idlelib.pyshell.ModifiedInterpreter.runcommand", (TOUCH,)),
    ("lib2to3.pgen2.pgen.ParserGenerator", (CANARY,)),
    ("collections.Counter", ()),
    ("collections.defaultdict", ()),
    ("collections.OrderedDict.fromkeys", ()),
    ("sys.modules", ()),
    ("sys.exit", ()),
    ("__main__.anything", ()),
    ("pip.main", (("install", "x"),)),
    ("pip._internal.main", (("install", "x"),)),
    ("numpy.load", (CANARY,)),
    ("numpy.core.multiarray._reconstruct", ()),
    ("numpy.core.multiarray.scalar", ()),
    ("numpy.testing._private.utils.runstring", (TOUCH, {})),
    ("numpy.f2py.crackfortran.myeval", (TOUCH,)),
    ("numpy.dtype", ("O8", 0, 1)),
    ("torch.load", (CANARY,)),
    ("torch.serialization.load", (CANARY,)),
    ("torch.storage._load_from_bytes", ("",)),
    ("torch.storage.UntypedStorage.from_file", (CANARY, True, 8)),
    ("torch.storage.UntypedStorage", (1 << 40,)),
    ("torch.FloatStorage.from_file", (CANARY, True, 8)),
    ("torch.hub.load", ("a/b", "c")),
    ("torch.jit.load", (CANARY,)),
    ("torch.Tensor", (1 << 40,)),
    ("torch.Size", ((1,),)),
    ("torch.nn.parameter.Parameter", ()),
    ("torch.utils.collect_env.run", (SHELL,)),
    ("torch.utils.cpp_extension.load_inline", ("x", "")),
    ("torch.utils._config_module.ConfigModule.load_config", (CANARY,)),
    ("torch._inductor.codecache.compile_file", (CANARY,)),
    ("torch._dynamo.guards.GuardBuilder.get", (TOUCH,)),
    ("torch._utils._rebuild_tensor", ()),
    ("torch._utils._rebuild_tensor_v2.__globals__", ()),
    ("torch._utils._rebuild_tensor_v3", ()),
    ("torch._utils._rebuild_qtensor", ()),
    ("torch._utils._rebuild_sparse_tensor", ()),
    ("torch._utils._rebuild_device_tensor_from_numpy", ()),
    ("torch._utils._rebuild_wrapper_subclass", ()),
    ("torch._utils._rebuild_parameter_with_state", ()),
    ("torch._utils.os.system", (SHELL,)),
    ("torch._utils._rebuild_tensor_v2 ", ()),
    ("torch.floatstorage", ()),
    ("torch.QInt8Storage", ()),
    ("torch.serialization.os.system", (SHELL,)),
    ("torch.serialization._get_layout", ("torch.strided",)),
    ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", ()),
    ("argparse.Namespace", ()),
    ("omegaconf.dictconfig.DictConfig", ()),
    ("dill._dill._create_code", ()),
    ("cloudpickle.cloudpickle._make_function", ()),
    ("joblib.load", (CANARY,)),
    ("pandas.read_pickle", (CANARY,)),
    ("keras.models.load_model", (CANARY,)),
    ("transformers.AutoModel.from_pretrained", ("x",)),
    ("fastldm.weights.files.open_file", (CANARY,)),
]
CALL = b"R"


def new_names(path: str) -> bytes:
    """The same global as protocol 4 names it, from the stack."""
    module, _, attribute = path.rpartition(".")
    return b"".join(b"\x8c" + bytes([len(word)]) + word.encode() + b"\x94" for word in (module, attribute)) + b"\x93"


def pickled_call(path: str, arguments: tuple[Any, ...], protocol: int) -> bytes:
    front, named = (b"\x80\x02", name(path)) if protocol == 2 else (b"\x80\x04", new_names(path))
    return front + b"}" + text("a") + named + constant(arguments) + CALL + b"s."


@pytest.mark.parametrize("container", CONTAINERS)
def test_f38_a_gadget_is_refused_with_its_global_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    assert len(GADGETS) >= 60
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw the file"))
    modules = set(sys.modules)
    for path, arguments in GADGETS:
        for protocol in (2, 4):
            (tmp_path / "model.ckpt").write_bytes(CONTAINERS[container](pickled_call(path, arguments, protocol)))
            with pytest.raises(FileError) as caught:
                open_file(tmp_path / "model.ckpt")
            assert f"{tmp_path / 'model.ckpt'}: its pickle names '{path}', which may run code" in str(caught.value)
            assert "safetensors" in str(caught.value)
    assert os.listdir(tmp_path) == ["model.ckpt"]
    assert {module for module in set(sys.modules) - modules if not module.startswith("encodings")} == set()


def test_f38_the_gadgets_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary sings where pickles are loaded carelessly: otherwise the test above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for path in ("os.mkdir", "builtins.eval", "builtins.open", "subprocess.call", "runpy._run_code", "posix.mkdir"):
        arguments = dict(GADGETS)[path]
        for protocol in (2, 4):
            value = pickle.loads(pickled_call(path, arguments, protocol))["a"]
            if hasattr(value, "close"):
                value.close()
            made = tmp_path / CANARY
            assert made.exists(), path
            made.rmdir() if made.is_dir() else made.unlink()


SYSTEM = b"\x8c\x06system"
POSIX = b"\x8c\x05posix"
PAIR = POSIX + SYSTEM
RUN = text(SHELL) + b"\x85R"
TRICKS: dict[str, tuple[bytes, str]] = {
    "from the memo": (POSIX + b"\x940" + SYSTEM + b"\x940h\x00h\x01\x93" + RUN + b".", "posix.system"),
    "from the long memo": (
        POSIX + b"r\xff\0\0\x000" + SYSTEM + b"r\xfe\0\0\x000j\xff\0\0\0j\xfe\0\0\0\x93" + RUN + b".",
        "posix.system",
    ),
    "from the text memo": (POSIX + b"p77\n0" + SYSTEM + b"p78\n0g77\ng78\n\x93" + RUN + b".", "posix.system"),
    "a note made twice": (b"\x8c\x01x\x94" + POSIX + b"q\x000h\x00" + SYSTEM + b"\x93" + RUN + b".", "posix.system"),
    "as text": (b"Vposix\nVsystem\n\x93" + RUN + b".", "posix.system"),
    "as strings": (b"S'posix'\nS\"system\"\n\x93" + RUN + b".", "posix.system"),
    "as counted strings": (b"U\x05posixT\x06\x00\x00\x00system\x93" + RUN + b".", "posix.system"),
    "as a long string": (b"\x8d\5\0\0\0\0\0\0\0posix" + text("system") + b"\x93" + RUN + b".", "posix.system"),
    "with noise between": (POSIX + b"N0(NNt0(1" + SYSTEM + b"]0\x93" + RUN + b".", "posix.system"),
    "doubled and dropped": (POSIX + b"20" + SYSTEM + b"20\x93" + RUN + b".", "posix.system"),
    "in a frame": (b"\x95" + struct.pack("<Q", 20) + PAIR + b"\x93" + RUN + b".", "posix.system"),
    "by INST": (b"(" + text(SHELL) + b"iposix\nsystem\n.", "posix.system"),
    "by OBJ": (b"(cposix\nsystem\n" + text(SHELL) + b"o.", "posix.system"),
    "by NEWOBJ": (name("subprocess.Popen") + constant((SHELL,)) + b"\x81.", "subprocess.Popen"),
    "by NEWOBJ_EX": (name("subprocess.Popen") + constant((SHELL,)) + b"}\x92.", "subprocess.Popen"),
    "by BUILD": (name("builtins.object") + b")\x81}" + text("x") + constant(1) + b"sb.", "builtins.object"),
    "by EXT1": (b"\x82\x07" + RUN + b".", "extension 7"),
    "by EXT4": (b"\x84\x07\x00\x00\x00" + RUN + b".", "extension 7"),
    "never called": (name("os.system") + b"0N.", "os.system"),
    "as a key": (b"}" + name("os.system") + constant(1) + b"s.", "os.system"),
    "in a tuple": (b"}(" + name("os.system") + b"t" + constant(1) + b"s.", "os.system"),
    "behind tensors": (state_dict({"a": tensor((1,))})[2:-1] + name("os.system") + b"0.", "os.system"),
    "as a tensor's hooks": (b"}" + text("a") + tensor((1,), hooks=name("os.system")) + b"s.", "os.system"),
    "as metadata": (
        name("collections.OrderedDict") + b")R}" + text("_metadata") + name("os.system") + b"sb.",
        "os.system",
    ),
    "as a storage": (constant(("storage", name("os.system"), "0", "cpu", 1)) + b"Q.", "os.system"),
    "nested calls": (
        name("builtins.getattr") + constant((name("builtins.__import__") + constant(("os",)) + b"R", "system")) + b"R.",
        "builtins.getattr",
    ),
    "in two words": (b"ccollections OrderedDict\n\n)R.", "collections.OrderedDict "),
    "escaped": (b"cpos\\x69x\nsystem\n" + RUN + b".", "posix.system"),
    "cut behind it": (name("os.system") + text(SHELL), "os.system"),
    "behind a short stack": (b"000" + name("os.system") + RUN + b".", "os.system"),
    "behind damage of the stack": (b"NR" + name("os.system") + RUN + b".", "os.system"),
    "with dots": (b"\x8c\x0bcollections\x8c\x0cabc.sys.exit\x93)R.", "collections.abc.sys.exit"),
    "allowed, then not": (name("collections.OrderedDict") + b")R0" + name("os.system") + RUN + b".", "os.system"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("trick", TRICKS)
def test_f38_a_hidden_global_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str, container: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw the file"))
    program, forbidden = TRICKS[trick]
    (tmp_path / "model.bin").write_bytes(CONTAINERS[container](b"\x80\x02" + program))
    with pytest.raises(FileError, match=f"its pickle names '{forbidden}'"):
        open_file(tmp_path / "model.bin")
    assert os.listdir(tmp_path) == ["model.bin"]


UNTOLD = {  # where no global can be told, the reason is another one
    "a persistent name": b"Pposix.system\n.",
    "a persistent string": text("posix.system") + b"Q.",
    "an allowed name, escaped": b"c\\x63ollections\nOrderedDict\n)R.",
    "a name beyond ASCII": "cpοsix\nsystem\n".encode() + RUN + b".",
    "a storage called": name("torch.FloatStorage") + constant((8,)) + b"R.",
    "a list called": b"])R.",
    "a dict built": b"}}b.",
    "an attribute set": name("collections.OrderedDict") + b")R}" + text("items") + constant(1) + b"sb.",
    "arguments of OrderedDict": name("collections.OrderedDict") + b"(]tR.",
    "a tuple filled": b")" + constant(1) + constant(2) + b"s.",
    "a dict appended to": b"}Na.",
    "half a pair": b"}(Nu.",
    "a new protocol": b"\x80\x05N.",
    "an unknown opcode": b"\xff.",
    "nothing": b"",
    "no end": b"N",
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("kind", UNTOLD)
def test_f38_what_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str, container: str) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw the file"))
    with pytest.raises(FileError, match="its pickle is not one of tensors, or damaged: ") as caught:
        in_memory(CONTAINERS[container](b"\x80\x02" + UNTOLD[kind]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("place", range(5))
def test_f38_every_pickle_of_an_old_checkpoint_is_read(place: int) -> None:
    pieces = [pickle.dumps(value, 2) for value in (pickles._LEGACY[0], 1001, {"little_endian": True})]
    pieces += [state_dict({"a": tensor((1,), legacy=True)}), pickle.dumps(["0"], 2)]
    pieces[place] = b"\x80\x02" + name("os.system") + RUN + b"."
    with pytest.raises(FileError, match=r"its pickle names 'os\.system'"):
        in_memory(b"".join(pieces) + struct.pack("<q", 1) + bytes(4))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_f38_a_global_is_named_whatever_the_protocol(tmp_path: Path, protocol: int, zipped: bool) -> None:
    """Also behind the first pickles of the old format, whose protocol is reason enough to refuse them."""
    with pytest.raises(FileError, match=r"its pickle names 'posix\.mkdir'"):
        in_memory(saved({"a": Gadget(tmp_path / "canary")}, zipped, pickle_protocol=protocol))


def test_f38_real_gadgets_of_every_kind(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    roots: list[Any] = [Gadget(canary), {"a": Gadget(canary)}]
    roots.append({"state_dict": {"a": torch.ones(1), "b": Gadget(canary)}})
    for root in roots:
        for zipped in (True, False):
            (tmp_path / "model.ckpt").write_bytes(saved(root, zipped))
            with pytest.raises(FileError, match=r"names 'posix\.mkdir'"):
                open_file(tmp_path / "model.ckpt")
        for protocol in range(1, 6):
            (tmp_path / "model.ckpt").write_bytes(pickle.dumps(root, protocol))
            with pytest.raises(FileError, match=r"names '(posix\.mkdir|torch)|header of|is a text"):
                open_file(tmp_path / "model.ckpt")
    assert not canary.exists()


# ----------------------------------------------------------------------------------------------------- no other way


def test_f39_torch_is_asked_once_restricted_and_for_the_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        asked.append((arguments, options))
        raise pickle.UnpicklingError("Re-run it unsafely. WeightsUnpickler error: no 'x' here")

    monkeypatch.setattr(torch, "load", refuse)
    (tmp_path / "model.pt").write_bytes(saved(weights()))
    with pytest.raises(FileError, match=r"model\.pt: torch cannot load it: UnpicklingError: \"no 'x' here\"$"):
        open_file(tmp_path / "model.pt")
    (((stream,), options),) = asked
    assert options == {"map_location": "cpu", "weights_only": True, "mmap": False}
    with pytest.raises(OSError):
        stream.fileno()


ERRORS = [RuntimeError("x"), MemoryError(), RecursionError("deep"), KeyError("y"), OSError(5, "z")]


@pytest.mark.parametrize("error", ERRORS)
def test_f43_whatever_torch_raises_names_the_file(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(FileError, match=f"memory: torch cannot load it: {type(error).__name__}"):
        in_memory(saved(weights()))


PROGRAM = """
import sys
from fastldm.errors import FileError
from fastldm.weights import pickles
from fastldm.weights.files import open_file
from tests.weights.pickled import in_memory

dense = pickles.Dense(pickles.Storage("0", None, 1), 0, (), ())
pickles._describe_zip = pickles._describe_legacy = lambda file: {"a": dense}
pickles._problem = lambda name, dense: None
try:
    open_file(sys.argv[1])
except FileError as error:
    print(error)
"""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_f39_no_environment_opens_the_loader(tmp_path: Path, zipped: bool) -> None:
    """Even if our own check had let the file through."""
    canary = tmp_path / "canary"
    (tmp_path / "model.pt").write_bytes(saved({"a": Gadget(canary)}, zipped))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model.pt")],
        cwd=ROOT,
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "torch cannot load it: UnpicklingError" in done.stdout
    assert "posix.mkdir" in done.stdout
    assert not canary.exists()


DANGEROUS_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"}
DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__"}


def test_f39_the_sources_have_no_other_way() -> None:
    loads = []
    for path in [path for folder in ("fastldm", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]:
        source, file = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        for word in ("trust_remote_code", "allow_pickle", "safe_globals"):
            assert word not in source or path.name == "drop_in.py", file  # which names it to refuse it
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {name.partition(".")[0] for name in names} & DANGEROUS_MODULES, (file, node.lineno)
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called.removeprefix("builtins.") not in DANGEROUS_CALLS, (file, node.lineno)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if called == "torch.load" or "weights_only" in options:
                    loads.append((file, options))
    restricted = {"map_location": "'cpu'", "weights_only": "True", "mmap": "False"}
    assert loads == [("fastldm/weights/pickles.py", restricted)]


BREAKS: dict[str, Callable[[Path], object]] = {
    "cut": lambda place: os.truncate(place, place.stat().st_size - 1),
    "empty": lambda place: os.truncate(place, 0),
    "text": lambda place: place.write_text("not found"),
    "hostile": lambda place: place.write_bytes(saved({"a": Gadget(place.parent / "canary")})),
    "folder": lambda place: (place.unlink(), place.mkdir()),
    "dangling": lambda place: (place.unlink(), place.symlink_to("nothing")),
    "outside": lambda place: (place.unlink(), place.symlink_to("/etc/hostname")),
    "fifo": lambda place: (place.unlink(), os.mkfifo(place)),
    "index": lambda place: (place.unlink(), place.with_name(f"{place.name}.index.json").write_text("{}")),
    "no shards": lambda place: (
        place.unlink(),
        place.with_name(f"{place.name}.index.json").write_text('{"weight_map": {"a": "b"}}'),
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_f39_pickled_weights_are_never_a_fallback(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where there are safetensors, good or bad, the pickle beside them is not opened."""
    place = root / f"unet/{STEM}.safetensors"
    (root / f"unet/{STEM}.bin").write_bytes(saved(weights()))
    opened = []
    open_in_folder = files.ModelFolder.open
    monkeypatch.setattr(files.ModelFolder, "open", lambda self, name: opened.append(name) or open_in_folder(self, name))
    open_model(root).tensors("unet").close()
    BREAKS[kind](place)
    refused(root, "unet")
    assert opened
    assert not any(name.endswith(".bin") for name in opened)
    assert not (root / "unet/canary").exists()


def test_f39_hostile_weights_without_safetensors_are_refused(root: Path, tmp_path: Path) -> None:
    (root / f"unet/{STEM}.safetensors").unlink()
    canary = tmp_path / "canary"
    torch.save({"a": Gadget(canary)}, root / f"unet/{STEM}.bin")
    refused(root, r"its pickle names 'posix\.mkdir', which may run code and is never loaded")
    assert not canary.exists()


def test_f39_code_beside_the_weights_is_not_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    for file in ("unet/unet.py", "unet/pickle.py", "torch.py", "__init__.py", "unet/__init__.py", "pickletools.py"):
        (root / file).write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    shutil.copy(root / f"unet/{STEM}.safetensors", tmp_path / "w")
    (root / f"unet/{STEM}.safetensors").write_bytes(saved(weights()))
    with open_model(root).tensors("unet") as tensors:
        assert tensors.infos.keys() == weights().keys()
    assert not (tmp_path / "canary").exists()
