"""What a person sees: a line per iteration while a run goes on, and a table at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from dppo.output.metrics import Row
from dppo.statistics import EvaluationSummary, Interval

HEADER_EVERY = 30
"""Lines after which a log repeats its header."""


def number(value: float) -> str:
    """About four digits: 3,120 or 312.4 or 3.12."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def percent(rate: float) -> str:
    """A rate in [0, 1] as 45 %."""
    return f"{100 * rate:.0f} %"


def duration(seconds: float) -> str:
    """As 0:42, 12:05 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(value: float) -> str:
    """As 1,638,400."""
    return f"{value:,.0f}"


def small(value: float) -> str:
    """As 0.0042, or 4.2e-05 where that would be nothing."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


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


class Progress:
    """One line per row of metrics; on a terminal with a bar below them, in a log file without. A context manager."""

    def __init__(self, total: int, unit: str, *, done: int = 0, console: Console | None = None) -> None:
        """Report on a run of ``total`` units, counted by the rows' key ``unit``, e.g. "env_steps".

        So many were ``done`` before.
        """
        self._console = console or get_console()
        self._total = total
        self._done_before = done
        self._unit = unit
        self._began = time.perf_counter()
        name = unit.replace("_", " ")
        rate = f"{name.split()[-1]}/s"
        self._known = {"iteration": ("iter", count), unit: (name, count), **COLUMNS, f"{unit}_per_s": (rate, count)}
        self._seen: set[str] = set()
        self._lines = 0
        self._bar = _bar(self._console)
        self._task = self._bar.add_task("training", total=total, completed=done)

    def advance(self, units: int) -> None:
        """Move the bar, between rows."""
        self._bar.advance(self._task, units)

    def update(self, row: Row) -> None:
        """Show a row, under a new header where it has a value in a column that had none before.

        Args:
            row: with the key ``unit``, perhaps ``iteration`` and ``<unit>_per_s``, and any of `COLUMNS`. A value that
                is missing or None shows as a dash, a column that never had one not at all.
        """
        done = int(row[self._unit] or 0)
        seconds = (time.perf_counter() - self._began) / max(done - self._done_before, 1)
        left = seconds * max(self._total - done, 0)
        new = {key for key in self._known if row.get(key) is not None} - self._seen
        self._seen |= new
        shown = {key: column for key, column in self._known.items() if key in self._seen}
        if new or (self._lines % HEADER_EVERY == 0 and not self._console.is_terminal):
            headers = {key: header for key, (header, _) in shown.items()}
            self._print(self._aligned(headers, "done", "left"), style="bold")
        cells = {key: _cell(row.get(key), form) for key, (_, form) in shown.items()}
        self._print(self._aligned(cells, percent(min(done / self._total, 1.0)), duration(left)))
        self._bar.update(self._task, completed=done)
        self._lines += 1

    def _aligned(self, cells: Mapping[str, str], done: str, left: str) -> str:
        widths = {"iteration": 6, self._unit: 11}
        text = " ".join(f"{cell:>{widths.get(key, 8)}}" for key, cell in cells.items())
        return f"{text} {done:>5} {left:>8}"

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


@contextmanager
def bar(description: str, total: int, *, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """A bar that is gone when its work is done; in a log file, one line at its start.

    Yields:
        A function that moves the bar by a number of steps.
    """
    console = console or get_console()
    if not console.is_terminal:
        console.print(f"{description} ...", markup=False, highlight=False, soft_wrap=True)
    with _bar(console) as shown:
        task = shown.add_task(description, total=total)
        yield lambda steps: shown.advance(task, steps)


def _bar(console: Console) -> Bar:
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Bar(
        TextColumn("{task.description}"), *columns, console=console, transient=True, disable=not console.is_terminal
    )


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None or value != value else form(value)


def final_table(
    evaluations: Mapping[str, EvaluationSummary],
    *,
    seconds: float,
    paths: Mapping[str, Path],
    console: Console | None = None,
    **counts: int,
) -> None:
    """Print how a run ended.

    Args:
        evaluations: rows of the table by name, e.g. ``before`` and ``after``.
        seconds: wall-clock time that the counts took.
        paths: what was written, by what it is, e.g. ``learning curve``.
        console: where to print; the terminal's own unless told.
        counts: what was done, e.g. ``env_steps=1_000_000`` or ``updates=20_000``.
    """
    console = console or get_console()
    has_success = any(summary.success_rate is not None for summary in evaluations.values())
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for header in ("return (95 % CI)", *(["success (95 % CI)"] if has_success else []), "episodes"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, summary in evaluations.items():
        cells = [_with_interval(summary.return_mean, summary.return_ci95, number)]
        if has_success:
            cells.append(_with_interval(summary.success_rate, summary.success_ci95, percent))
        table.add_row(*map(Text, (name, *cells, str(summary.episodes))))
    console.print(table)

    facts = {name.replace("_", " "): _pace(amount, seconds) for name, amount in counts.items()}
    facts |= {name: str(path) for name, path in paths.items()}
    width = max(map(len, facts))
    for name, fact in facts.items():
        # Unwrapped, whatever the width: a path that is broken over two lines cannot be copied.
        console.print(f"{name:<{width}}  {fact}", markup=False, highlight=False, soft_wrap=True)


def _pace(amount: int, seconds: float) -> str:
    pace = f"{count(amount)} in {duration(seconds)}"
    return f"{pace}, {count(amount / seconds)} per second" if seconds > 0 else pace


def _with_interval(value: float | None, interval: Interval | None, form: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    low, high = interval or (None, None)
    return form(value) if low is None or high is None else f"{form(value)} [{form(low)}, {form(high)}]"
