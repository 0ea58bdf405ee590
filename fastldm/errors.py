"""The errors that fastldm raises on purpose. Each names the thing, its value and the choices."""

from __future__ import annotations

import reprlib

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: object) -> str:
    """A value for a message: its repr, at most 80 characters, at once whatever its size."""
    try:
        text = _BRIEF.repr(value[:80] if isinstance(value, bytes | bytearray) else value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


class Error(Exception):
    """Base of every error that fastldm raises on purpose.

    `field` names what is wrong: an argument ("height"), a configuration key ("unet/config.json: norm_num_groups")
    or a tensor ("conv_in.weight"); it is None where nothing smaller than the message can be named.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ArgumentError(Error, ValueError):
    """An argument of a call is missing, of the wrong type, out of range or at odds with another one."""


class UnknownArgumentError(ArgumentError, TypeError):
    """An argument that the call does not have."""


class RefusedError(Error, AttributeError):
    """A name of diffusers' pipelines that fastldm does not offer, and the reason. `hasattr` is False for it."""


class Cancelled(Error):
    """The call was stopped through its `CancelToken`."""


class ForkError(Error, RuntimeError):
    """A pipeline was used in another process than the one that made it."""


class ConfigError(Error, ValueError):
    """A configuration file has a value that is out of range or that fastldm does not support."""


class FileError(Error, OSError):
    """A file is missing, damaged, of another kind, or outside the model's folder."""


class WeightsError(Error, ValueError):
    """The tensors of a checkpoint do not fit the model: missing, left over, of another shape, or not finite."""


class NonFiniteError(Error, ArithmeticError):
    """A computation gave NaN or infinity, so that its result would be a black picture."""
