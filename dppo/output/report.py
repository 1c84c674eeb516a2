"""How numbers read, and the table at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dppo.statistics import EvaluationSummary, Interval


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
    """As 0.0042, or 4.2e-05 where that would be nothing, or 4.2e+05 where it would be too long."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"


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
