"""Fast, exact inference for latent diffusion models: `fastldm.Pipeline(model)("a prompt").images[0]`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastldm.errors import Cancelled, Error

if TYPE_CHECKING:
    from fastldm.cancel import CancelToken
    from fastldm.image import outpaint_canvas
    from fastldm.pipeline import Pipeline
    from fastldm.sampling.names import samplers

__all__ = ["CancelToken", "Cancelled", "Error", "Pipeline", "__version__", "outpaint_canvas", "samplers"]
__version__ = "0.1.0"


_HOMES = {
    "CancelToken": "fastldm.cancel",
    "Pipeline": "fastldm.pipeline",
    "outpaint_canvas": "fastldm.image",
    "samplers": "fastldm.sampling.names",
}


def __getattr__(name: str) -> Any:
    """The public names are imported at their first use: `import fastldm` imports no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastldm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
