"""Fast, exact inference for latent diffusion models: `fastldm.Pipeline(model)("a prompt").images[0]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastldm.errors import Error

if TYPE_CHECKING:
    from fastldm.pipeline import Pipeline

__all__ = ["Error", "Pipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Pipeline` is imported at its first use: `import fastldm` imports no torch."""
    if name == "Pipeline":
        from fastldm.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'fastldm' has no attribute {name!r}")
