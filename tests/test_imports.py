"""Who may import whom: the rules of docs/design.md, read from the sources, so that nothing is run for it.

An import counts wherever it stands: at the top, in a function, under TYPE_CHECKING. The few that are allowed in a
function alone are the lazy ones.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# A unit is a folder or a file of fastldm/; `fastldm` is its __init__.py. The arrows as the design draws them.
ARROWS: Mapping[str, set[str]] = {
    "fastldm": {"errors"},
    "__main__": {"cli"},
    "cli": {"assets", "paint", "signals", "fastldm", "convert", "info", "warmup"},
    "paint": {"pipeline", "png", "signals", "fastldm"},
    "png": {"weights"},
    "signals": set(),
    "pipeline": {"assemble", "assets", "asked", "callback", "runtime", "sampling", "surface", "tasks"},
    "surface": {"components", "drop_in", "request", "save", "text"},
    "callback": {"request", "runtime", "tasks"},
    "text": {"prompt", "request", "runtime"},
    "components": {"arguments", "drop_in", "hub_config", "prompt", "runtime", "sampling"},
    "save": {"convert", "runtime", "sampling", "tokenizer_files", "weights"},
    "convert": {"assemble", "asked", "runtime", "sampling", "tokenizer_files", "weights"},
    "warmup": {"assemble", "asked", "runtime"},
    "info": {"assemble", "asked", "png", "runtime", "tokenizer_files", "weights"},
    "assemble": {"asked", "components", "prompt", "runtime", "sampling", "tokenizer_files", "weights"},
    "asked": {"runtime", "weights"},
    "tokenizer_files": {"prompt", "weights"},
    "drop_in": set(),
    "hub_config": set(),
    "cancel": set(),
    "arguments": {"image"},
    "tasks": {"runtime", "request", "source", "sampling"},
    "runtime": {"model", "weights", "quantize", "sampling"},
    "request": {"arguments", "cancel", "sampling", "source", "image"},
    "source": {"image"},
    "model": {"ops"},
    "weights": {"ops"},
    "quantize": {"ops"},
    "ops": {"kernels", "_C"},
    "prompt": {"weights"},
    "image": set(),
    "sampling": set(),
    "kernels": set(),
    "_C": set(),
    "assets": set(),
    "config": {"errors"},
    "errors": set(),
}
EVERYONE = {"config", "errors"}
# Where the design says "only": nothing follows from the arrows behind an arrow.
ONLY: Mapping[str, set[str]] = {
    "fastldm": {"errors"},
    "model": {"ops", "config"},
    "kernels": set(),
    "sampling": EVERYONE,
    "config": {"errors"},
    "errors": set(),
}
LAZY_UNITS: Mapping[str, set[str]] = {"fastldm": {"pipeline", "image", "sampling", "cancel"}}

# Other people's packages. Not named here: what pyproject.toml lists as needed at run time, without triton.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}
OUTSIDE: Mapping[str, set[str]] = {
    "fastldm": set(),
    "config": set(),
    "errors": set(),
    "model": {"torch"},
    "ops": {"torch"},
    "kernels": {"torch", "triton"},
    "sampling": {"numpy"},
    "sampling.noise": {"numpy", "torch"},
}
LAZY_OUTSIDE: Mapping[str, set[str]] = {
    "ops": {"triton"},
    "runtime": {"triton"},
    "sampling": {"scipy"},
    "sampling.noise": {"scipy", "torchsde"},
}
# They take a second or more to import, and only loading needs them.
ALWAYS_LAZY = {"transformers", "huggingface_hub", "scipy", "torchsde", "diffusers"}


class Import(NamedTuple):
    module: str  # the importing one, "fastldm.model.unet"
    target: str  # the imported one, with the name where that may be a module: "fastldm.ops", "torch.nn"
    line: int
    lazy: bool  # inside a function, or under TYPE_CHECKING


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(module name, file) of the package; kernels/ is installed as fastldm.kernels."""
    for folder, name in ((root / "fastldm", "fastldm"), (root / "kernels", "fastldm.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((name, *(part for part in parts if part != "__init__"))), path


def imports(module: str, path: Path) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (Import(module, f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        later = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        later = later or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, later)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def unit(module: str) -> str:
    """The unit of a module, or of a name in one: "fastldm.model.unet.UNet" -> "model", "fastldm.Error" -> "fastldm"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ARROWS else "fastldm"


def reachable(start: str) -> set[str]:
    """The units behind the arrows of `start`, and itself."""
    if start in ONLY:
        return {start, *ONLY[start]}
    found, new = {start, *EVERYONE}, [start]
    while new:
        further = ARROWS[new.pop()] - found
        found |= further
        new += further
    return found


def run_time_packages() -> set[str]:
    names = (re.split(r"[^\w-]", line)[0].lower() for line in PROJECT["project"]["dependencies"])
    return {IMPORT_NAMES.get(name, name) for name in names} - {"triton"}


def objection(found: Import) -> str | None:
    """Why an import is against the rules; None where it is not."""
    home = unit(found.module)
    if home == "fastldm" != found.module:
        return f"{found.module} is not in ARROWS: say there and in docs/design.md who may import it, and what it may"
    top = found.target.partition(".")[0]
    if top in ("fastldm", "kernels", "csrc"):
        if top != "fastldm":
            return f"kernels/ is installed as fastldm.kernels; {top!r} is another package's name"
        allowed = reachable(home) | (LAZY_UNITS.get(home, set()) if found.lazy else set())
        return None if unit(found.target) in allowed else f"{home} may import {', '.join(sorted(allowed))} of fastldm"
    if top in sys.stdlib_module_names:
        return None
    own = found.module.removeprefix("fastldm.")
    allowed = OUTSIDE.get(own, OUTSIDE.get(home, run_time_packages()))
    lazily = LAZY_OUTSIDE.get(own, LAZY_OUTSIDE.get(home, set())) | (allowed & ALWAYS_LAZY)
    if top in (lazily if found.lazy else allowed - ALWAYS_LAZY) or (found.lazy and top in allowed):
        return None
    also = f", inside a function {', '.join(sorted(lazily))}" if lazily else ""
    return f"{own} may import {', '.join(sorted(allowed - ALWAYS_LAZY)) or 'no other package'}{also}"


def violations(root: Path) -> list[str]:
    problems = []
    for module, path in modules(root):
        for found in imports(module, path):
            reason = objection(found)
            if reason is not None:
                problems.append(f"{path.relative_to(root)}:{found.line}: imports {found.target}: {reason}")
    return problems


def test_the_sources_keep_the_rules() -> None:
    assert len(list(modules(ROOT))) > 20
    assert violations(ROOT) == []


# One broken rule each, and the words that tell the reader which.
BROKEN = [
    ("fastldm/model/unet.py", "from fastldm.runtime import plan", "model may import config, model, ops"),
    ("fastldm/model/unet.py", "import triton", "model.unet may import torch"),
    ("fastldm/model/unet.py", "import fastldm.kernels.conv2d", "model may import config, model, ops"),
    ("fastldm/model/unet.py", "from ..pipeline import Pipeline", "model may import config, model, ops"),
    ("fastldm/model/unet.py", "def f():\n    from fastldm.weights import load", "model may import"),
    ("fastldm/model/unet.py", "if TYPE_CHECKING:\n    from fastldm.sampling import SamplerTable", "model may"),
    ("fastldm/model/unet.py", "from fastldm import Pipeline", "model may import config, model, ops"),
    ("fastldm/ops/reference.py", "from fastldm.model import layers", "ops may import"),
    ("fastldm/ops/reference.py", "import triton", "inside a function triton"),
    ("fastldm/weights/load.py", "from fastldm.model.unet import UNet", "weights may import"),
    ("fastldm/weights/load.py", "import huggingface_hub", "inside a function huggingface_hub"),
    ("fastldm/runtime/plan.py", "from fastldm.pipeline import Pipeline", "runtime may import"),
    ("fastldm/sampling/samplers.py", "import torch", "sampling.samplers may import numpy"),
    ("fastldm/sampling/samplers.py", "def f():\n    import torch", "inside a function scipy"),
    ("fastldm/sampling/schedules.py", "import scipy", "inside a function scipy"),
    ("fastldm/sampling/noise.py", "import torchsde", "inside a function"),
    ("fastldm/sampling/noise.py", "from fastldm import ops", "sampling may import config, errors, sampling"),
    ("fastldm/config.py", "import numpy", "config may import no other package"),
    ("fastldm/errors.py", "from fastldm import config", "errors may import errors"),
    ("fastldm/__init__.py", "from fastldm.pipeline import Pipeline", "fastldm may import"),
    ("fastldm/pipeline.py", "import diffusers", "pipeline may import"),
    ("fastldm/pipeline.py", "import transformers", "inside a function"),
    ("fastldm/pipeline.py", "from kernels import conv2d", "installed as fastldm.kernels"),
    ("fastldm/stray.py", "import math", "fastldm.stray is not in ARROWS"),
    ("kernels/conv2d.py", "import numpy", "kernels.conv2d may import torch, triton"),
    ("kernels/conv2d.py", "from fastldm.errors import Unsupported", "kernels may import kernels of fastldm"),
]


@pytest.mark.parametrize(("path", "code", "words"), BROKEN, ids=[f"{p}: {c}" for p, c, _ in BROKEN])
def test_a_broken_rule_is_found(tmp_path: Path, path: str, code: str, words: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    (problem,) = violations(tmp_path)
    assert problem.startswith(f"{path}:")
    assert words in problem


ALLOWED = [
    ("fastldm/__init__.py", "def __getattr__(name):\n    from fastldm.pipeline import Pipeline"),
    ("fastldm/pipeline.py", "from fastldm import config\nfrom fastldm.ops import using\nimport torch, PIL.Image"),
    ("fastldm/ops/fused.py", "from fastldm.kernels import conv2d"),
    ("fastldm/sampling/noise.py", "import torch\ndef f():\n    import torchsde"),
    ("kernels/conv2d.py", "import torch, triton\nimport triton.language as tl\nfrom fastldm.kernels import tuning"),
]


@pytest.mark.parametrize(("path", "code"), ALLOWED, ids=[path for path, _ in ALLOWED])
def test_what_the_rules_allow_is_not_found(tmp_path: Path, path: str, code: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastldm", ("torch", "numpy", "transformers", "triton")),
        ("import fastldm.sampling", ("torch", "scipy", "triton")),
        ("import fastldm.ops, fastldm.model.unet", ("transformers", "triton", "diffusers", "kernels")),
        ("import fastldm.pipeline", ("transformers", "huggingface_hub", "diffusers", "scipy", "kernels", "yaml")),
    ],
)
def test_an_import_brings_nothing_else(statement: str, absent: tuple[str, ...]) -> None:
    code = f"import sys\n{statement}\nprint(*sorted(set({absent!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_every_folder_is_installed() -> None:
    """setuptools installs what pyproject.toml lists, and nothing tells of a folder that was forgotten."""
    folders = {module for module, path in modules(ROOT) if path.name == "__init__.py"}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])
