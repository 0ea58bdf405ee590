"""Where a model comes from, as the caller says it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from fastldm.errors import ArgumentError, FileError, brief
from fastldm.runtime.build import RUN
from fastldm.weights.files import ModelFolder, open_model

FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
HUB_FILE = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+)")
PathLike: TypeAlias = str | os.PathLike[str]
_NETWORK = "a folder, a single file, a module of diffusers or transformers, or that of another Pipeline"
NEEDED = {  # where there is no model, and what each may be
    **dict.fromkeys(RUN, _NETWORK),
    "tokenizer": "a folder with its files, one of transformers, or that of another Pipeline",
    "scheduler": "one of diffusers, a pair of its class and configuration, or that of another Pipeline",
}
PATHS = ("model", "config", "original_config", "cache_dir", *RUN, "tokenizer")
_NONE = type(None)
_KINDS: tuple[tuple[tuple[str, ...], tuple[type, ...], str], ...] = (
    (("model", "config", "original_config", "cache_dir"), (str, os.PathLike, _NONE), "a path"),
    (("variant", "revision", "prediction_type"), (str, _NONE), "a string"),
    (("token",), (str, bool, _NONE), "a string, True, False or None"),
    (("local_files_only", "extract_ema"), (bool,), "True or False"),
    (("use_safetensors",), (bool, _NONE), "True, False or None"),
)


def is_path(value: object) -> TypeGuard[PathLike]:
    """Whether it is a string, or gives one, and has a name in the file system's encoding."""
    if not isinstance(value, str | os.PathLike):
        return False
    try:
        name = os.fspath(value)
        os.fsencode(name)
        return isinstance(name, str)
    except (TypeError, UnicodeEncodeError):
        return False


@dataclass(frozen=True)
class Asked:
    """Where a model comes from, as the caller says it; `Pipeline` describes the fields.

    use_safetensors: True refuses pickles.
    """

    model: PathLike | None
    variant: str | None = None
    revision: str | None = None
    cache_dir: PathLike | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    config: PathLike | None = None
    original_config: PathLike | None = None
    unet: Any = None
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    scheduler: Any = None
    prediction_type: str | None = None
    extract_ema: bool = False
    use_safetensors: bool | None = None

    def __post_init__(self) -> None:
        for names, kinds, what in _KINDS:
            for name in names:
                if not isinstance(value := getattr(self, name), kinds):
                    shown = "" if name == "token" else f" = {brief(value)}"  # a secret
                    raise ArgumentError(f"{name}{shown}: must be {what}", field=name)
        for name in PATHS:
            value = getattr(self, name)
            if isinstance(value, str | os.PathLike) and not is_path(value):
                raise ArgumentError(f"{name} = {brief(value)}: is a path that no file can have", field=name)
        if self.model is None and all(getattr(self, name) is None for name in NEEDED):
            raise ArgumentError(f"model = None: must be a path; without one, pass {', '.join(NEEDED)}", field="model")

    @property
    def path(self) -> str:
        assert self.model is not None
        return os.path.expanduser(os.fspath(self.model))

    @property
    def is_file(self) -> bool:
        """Whether a single file is meant: one on disk, by its address on the hub, or by how its name ends."""
        if self.model is None:
            return False
        path = self.path
        if os.path.lexists(path):
            return not os.path.isdir(path)
        return HUB_FILE.fullmatch(path) is not None or path.lower().endswith(FILE_SUFFIXES)

    def file(self) -> Path:
        """The single file, fetched if need be."""
        if self.path.startswith(("http://", "https://")) and not HUB_FILE.fullmatch(self.path):
            reason = "only files of the hub are fetched: download it, and pass its path"
            raise FileError(f"{brief(self.path)}: {reason}", field="model")
        return self._fetched(self.path) if HUB_FILE.fullmatch(self.path) else Path(self.path)

    def folder(self, name: PathLike, argument: str) -> ModelFolder:
        """The folder that an argument names, on disk or in the hub's cache: nothing is fetched."""
        try:
            return open_model(name, cache_dir=self.cache_dir, local_files_only=True)
        except FileError as error:
            raise FileError(f"{argument}: {error}", field=argument) from None

    def _fetched(self, url: str) -> Path:
        """A file of the hub, by its address there."""
        from huggingface_hub import hf_hub_download

        matched = HUB_FILE.fullmatch(url)
        assert matched is not None
        try:
            path = hf_hub_download(
                matched[1],
                matched[3].partition("?")[0],
                revision=self.revision or matched[2],
                cache_dir=os.fspath(self.cache_dir) if self.cache_dir else None,
                local_files_only=self.local_files_only,
                token=self.token,
            )
        except Exception as error:  # the client lets errors of its HTTP library through, which differ by version
            reason = f"is not in the hub's cache, and was not fetched ({type(error).__name__})"
            raise FileError(f"{url} {reason}: download it, and pass its path", field="model") from error
        return Path(path)
