"""Stopping a call from another thread."""

from __future__ import annotations

import threading

from fastldm.errors import Cancelled


class CancelToken:
    """Stops the calls that it is given to, `pipe(..., cancel=token)`: they end within a row, or one image's encoding
    or decoding, and raise `Cancelled`.

    It stays cancelled: a call that is given it later does not begin. Any thread may cancel it, a callback too.
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises `Cancelled` if it is."""
        if self.cancelled:
            raise Cancelled("the call was cancelled through its token", field="cancel")

    def __repr__(self) -> str:
        return f"CancelToken(cancelled={self.cancelled})"
