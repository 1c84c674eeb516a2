"""What a person sees while work goes on: a line per iteration, a bar on a terminal, signs of life in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich import get_console
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dppo.output.metrics import Row
from dppo.output.report import count, duration, number, percent, small

HEADER_EVERY = 30
"""Lines after which a log repeats its header."""
SILENCE_S = 60.0
"""Without a line for so long, a log gets one that says how far the work is."""

COLUMNS = {
    "return_mean": ("return", number),
    "success_rate": ("success", percent),
    "eval_return_mean": ("eval ret", number),
    "eval_success_rate": ("eval suc", percent),
    "approx_kl": ("KL", small),
    "kl": ("KL", small),
    "step_failed": ("failed", lambda failed: "yes" if failed else "no"),
    "clip_fraction": ("clipped", percent),
    "train_loss": ("loss", small),
    "validation_loss": ("val loss", small),
}
"""Header and form of the metrics that a line may show."""


class _Meter:
    """How far some work is: a bar on a terminal, gone in the end; lines in a log file. A context manager."""

    def __init__(self, description: str, total: int, *, done: float = 0, console: Console | None = None) -> None:
        self.console = console or get_console()
        self._description = description
        self._total = total
        self._done_before = done
        self._done = done
        self._began = self._spoke = time.perf_counter()
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Bar(
            TextColumn("{task.description}"),
            *columns,
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total)
        self.move(done)

    def advance(self, units: float) -> None:
        """So much more is done; a log that has been silent for long hears of it."""
        self.move(self._done + units)
        if not self.console.is_terminal and time.perf_counter() - self._spoke > SILENCE_S:
            self.print(f"{self._description}: {self.share}, {self.left} left")

    def move(self, done: float) -> None:
        """So much is done."""
        self._done = done
        self._bar.update(self._task, completed=done)

    @property
    def share(self) -> str:
        """Of the whole, as 45 %; all of it only when it is done."""
        return percent(min(math.floor(100 * self._done / self._total) / 100, 1.0))

    @property
    def left(self) -> str:
        """The time that the rest will take, at the pace so far."""
        done = self._done - self._done_before
        if done <= 0:
            return "?"
        return duration((time.perf_counter() - self._began) / done * max(self._total - self._done, 0))

    def print(self, text: str, style: str | None = None) -> None:
        """Print a line as it is, whatever its length, above the bar."""
        self._spoke = time.perf_counter()
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


class Progress:
    """One line per row of metrics; on a terminal with a bar below them, in a log file without. A context manager."""

    def __init__(self, total: int, unit: str, *, done: int = 0, console: Console | None = None) -> None:
        """Report on a run of ``total`` units, counted by the rows' key ``unit``, e.g. "env_steps".

        So many were ``done`` before.
        """
        self._meter = _Meter("training", total, done=done, console=console)
        self._unit = unit
        name = unit.replace("_", " ")
        rate = f"{name.split()[-1]}/s"
        self._known = {"iteration": ("iter", count), unit: (name, count), **COLUMNS, f"{unit}_per_s": (rate, count)}
        self._seen: set[str] = set()
        self._lines = 0

    def advance(self, units: int) -> None:
        """Move the bar, between rows."""
        self._meter.advance(units)

    def update(self, row: Row) -> None:
        """Show a row, under a new header where it has a value in a column that had none before.

        Args:
            row: with the key ``unit``, perhaps ``iteration`` and ``<unit>_per_s``, and any of `COLUMNS`. A value that
                is missing or None shows as a dash, a column that never had one not at all.
        """
        self._meter.move(int(row[self._unit] or 0))
        new = {key for key in self._known if row.get(key) is not None} - self._seen
        self._seen |= new
        shown = {key: column for key, column in self._known.items() if key in self._seen}
        if new or (self._lines % HEADER_EVERY == 0 and not self._meter.console.is_terminal):
            headers = {key: header for key, (header, _) in shown.items()}
            self._meter.print(self._aligned(headers, "done", "left"), style="bold")
        cells = {key: _cell(row.get(key), form) for key, (_, form) in shown.items()}
        self._meter.print(self._aligned(cells, self._meter.share, self._meter.left))
        self._lines += 1

    def _aligned(self, cells: Mapping[str, str], done: str, left: str) -> str:
        widths = {"iteration": 6, self._unit: 11}
        text = " ".join(f"{cell:>{widths.get(key, 8)}}" for key, cell in cells.items())
        return f"{text} {done:>5} {left:>8}"

    def __enter__(self) -> Self:
        self._meter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._meter.__exit__(kind, error, traceback)


@contextmanager
def bar(
    description: str, total: int, *, done: float = 0, console: Console | None = None
) -> Iterator[Callable[[float], None]]:
    """A bar that is gone when its work is done; in a log file, a line at its start, and one a minute.

    So much was ``done`` before.

    Yields:
        A function that moves the bar by a number of steps.
    """
    with _Meter(description, total, done=done, console=console) as meter:
        if not meter.console.is_terminal:
            meter.print(f"{description} ...")
        yield meter.advance


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None or value != value else form(value)
