"""What diffusers' Stable Diffusion pipelines have, held against the tables of fastldm/drop_in.py.

    python benchmarks/drop_in.py                             # says what is not in a table, or in one for nothing
    python benchmarks/drop_in.py --write docs/drop-in.md     # and writes the tables into the page

The names are read from the installed diffusers: the public attributes of the classes and of an instance, the arguments
of their calls, of their constructors and of loading, documented or taken out of **kwargs. Ends with an error if one
has no row, or a row no name.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import diffusers

    from fastldm import drop_in
except ImportError as error:
    sys.exit(f"{error}: install the checkout first, with: pip install -c constraints.txt -e .[test]")

CLASSES: Mapping[str, type] = {
    "txt2img": diffusers.StableDiffusionPipeline,
    "img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
    "instruct": diffusers.StableDiffusionInstructPix2PixPipeline,
}
# Names that programs use although the installed classes do not have them, and where they come from.
EARLIER, PAG, MODELS = "earlier versions", "the classes with PAG", "single models"
ELSEWHERE: Mapping[str, str] = {
    "enable_vae_slicing": EARLIER,
    "disable_vae_slicing": EARLIER,
    "enable_vae_tiling": EARLIER,
    "disable_vae_tiling": EARLIER,
    "init_image": EARLIER,
    "resume_download": EARLIER,
    "use_auth_token": EARLIER,
    "extract_ema": EARLIER,
    "enable_pag": PAG,
    "pag_applied_layers": PAG,
    "pag_scale": PAG,
    "pag_adaptive_scale": PAG,
    "image_size": MODELS,
    "num_in_channels": MODELS,
    "upcast_attention": MODELS,
}
Names: TypeAlias = dict[str, list[str]]
"""Where each name is found."""


# ------------------------------------------------------------------------------------------------- what diffusers has


def attributes() -> Names:
    return gathered({where: [*_public(cls), *_underscored(cls)] for where, cls in CLASSES.items()})


def call_arguments() -> Names:
    return gathered({where: _arguments(cls.__call__) for where, cls in CLASSES.items()})


def loading_arguments() -> Names:
    pipeline = diffusers.StableDiffusionPipeline
    legacy = diffusers.loaders.single_file_utils._legacy_load_scheduler
    return gathered(
        {
            "from_pretrained": _arguments(pipeline.from_pretrained),
            "from_single_file": [*_arguments(pipeline.from_single_file), *_taken(legacy)],
            "constructor": [name for cls in CLASSES.values() for name in _parameters(cls)],
        }
    )


def gathered(names: Mapping[str, Iterable[str]]) -> Names:
    found: Names = {}
    for where, each in names.items():
        for name in dict.fromkeys(each):
            found.setdefault(name, []).append(where)
    return found


def _public(cls: type) -> list[str]:
    """Of the class, of an instance, and of its configuration, whose entries diffusers gives as attributes, too."""
    parts = {name: None for name in _parameters(cls) if name != "requires_safety_checker"}
    instance = cls(**parts, requires_safety_checker=False)
    return [name for name in (*dir(cls), *dir(instance), *instance.config) if not name.startswith("_")]


def _underscored(cls: type) -> list[str]:
    """Of the names with an underscore those that have a row: all others are nobody's business."""
    source = inspect.getsource(cls)
    names = (name for name in drop_in.ATTRIBUTES if name.startswith("_"))
    return [name for name in names if hasattr(cls, name) or f"self.{name} = " in source]


def _arguments(function: Callable[..., Any]) -> list[str]:
    return [*_parameters(function), *_taken(function), *_documented(function)]


def _parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind not in kinds]


def _taken(function: Callable[..., Any]) -> list[str]:
    """What a function takes out of its **kwargs."""
    found = re.findall(r'\bkwargs\.(?:pop|get)\("(\w+)"|"(\w+)" in kwargs\b', inspect.getsource(function))
    return [one or other for one, other in found]


def _documented(function: Callable[..., Any]) -> list[str]:
    """The arguments that a docstring lists: "    cache_dir (`str`, *optional*):"."""
    names = re.findall(r"^ *(\w+) ?\([`'\"].*\):$", inspect.getdoc(function) or "", re.MULTILINE)
    return [name for name in names if name != "kwargs"]


# ------------------------------------------------------------------------------------------------ beside what we say


@dataclass(frozen=True)
class Section:
    """One table of the page, between two marks that name it."""

    name: str
    table: drop_in.Table
    names: Callable[[], Names]
    everywhere: int  # the number of places that is told as "all"; 0: never

    def placed(self) -> Names:
        """Where each name is found, names from elsewhere with them."""
        return {**{name: [ELSEWHERE[name]] for name in self.table if name in ELSEWHERE}, **self.names()}


SECTIONS = (
    Section("attributes", drop_in.ATTRIBUTES, attributes, len(CLASSES)),
    Section("call", drop_in.CALL, call_arguments, len(CLASSES)),
    Section("loading", drop_in.LOADING, loading_arguments, 0),
)


def problems() -> list[str]:
    """Names without a row, rows without a name, and names that are no longer elsewhere."""
    found = []
    for section in SECTIONS:
        has, rows = section.names(), section.table.keys()
        found += [f"{section.name}: {name} ({', '.join(has[name])}) has no row" for name in has if name not in rows]
        found += [
            f"{section.name}: {name} has a row, and nobody has it" for name in rows - has.keys() - ELSEWHERE.keys()
        ]
        found += [f"{section.name}: {name} is not only elsewhere" for name in has.keys() & ELSEWHERE.keys()]
    return sorted(found)


def tables() -> dict[str, str]:
    """The text of each section, by its name; `summary` among them."""
    texts = {"summary": summary()}
    for section in SECTIONS:
        placed = section.placed()
        lines = ["| name | in | here | |", "|---|---|---|---|"]
        for kind in get_args(drop_in.Kind):
            for name in sorted(section.table, key=lambda name: name.lstrip("_")):
                row, places = section.table[name], placed[name]
                where = "all" if len(places) == section.everywhere else ", ".join(places)
                if row.kind == kind:
                    lines.append(f"| `{name}` | {where} | {kind} | {_plain(row.note)} |")
        texts[section.name] = "\n".join(lines)
    return texts


def _plain(note: str) -> str:
    """A note as Markdown shows it unchanged."""
    return re.sub(r"([|*<])", r"\\\1", note)


def summary() -> str:
    kinds = get_args(drop_in.Kind)
    lines = [f"| diffusers {diffusers.__version__} | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for section in SECTIONS:
        counts = Counter(row.kind for row in section.table.values())
        lines.append(f"| {section.name} | {' | '.join(str(counts[kind]) for kind in kinds)} |")
    return "\n".join(lines)


def rewritten(page: str, texts: Mapping[str, str]) -> str:
    """The page with each text between the marks that name it."""
    for name, text in texts.items():
        begin, end = f"<!-- {name}: written by benchmarks/drop_in.py -->\n", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"there is no {begin.strip()!r} with {end!r} behind it")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="What of diffusers' pipelines is supported, does nothing, or is not.")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables into this page (docs/drop-in.md)")
    args = parser.parse_args()
    if args.write and not args.write.is_file():
        parser.error(f"--write {args.write}: is no file")
    if found := problems():
        sys.exit("\n".join(found))
    print(summary())
    if args.write:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(rewritten(page, tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
