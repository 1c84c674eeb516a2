"""Signals that end a run between two of its steps, where all of it can be saved."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):
    """A run that a signal has ended; what it had learned is saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + number
        """The exit status, as shells have it."""


class Stop:
    """A context in which SIGINT and SIGTERM only leave a note, to be looked at where it is convenient.

    A second SIGINT raises KeyboardInterrupt at once. Outside of the main thread signals are somebody else's business.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that has come, if any."""
        self._before: dict[int, Any] = {}

    def check(self, message: str) -> None:
        """Raise `Stopped` with this message if a signal has come."""
        if self.asked is not None:
            raise Stopped(self.asked, f"stopped by {signal.Signals(self.asked).name}; {message}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked = number
            again = "; again to stop at once" if number == signal.SIGINT else ""
            # Not print, which the signal may have interrupted.
            os.write(2, f"\n{signal.Signals(number).name}: stopping when this step is done{again}\n".encode())

    def __enter__(self) -> Self:
        with suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
