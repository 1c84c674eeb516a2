"""What a section is asked for."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TASKS = ("hopper", "halfcheetah")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """The size of the measurements, for all sections alike."""

    quick: bool = False
    """Try it out: everything is small, and the numbers mean nothing."""
    turns: int | None = None
    """How often each of the things compared is measured; None: the section's own choice."""
    tasks: Sequence[str] = TASKS
    """For the sections that run several."""
    precisions: Sequence[str] = PRECISIONS
    """Of the arithmetic in updates and cloning."""

    def turns_or(self, default: int) -> int:
        """The number of turns, where the section would choose ``default``."""
        return self.turns or (2 if self.quick else default)


def say(text: str) -> None:
    """Tell what is being measured."""
    print(f"  {text}", flush=True)


def known_precisions(asked: Iterable[str], settings: Mapping[str, Any]) -> list[str]:
    """Those of the precisions asked for that a configuration's settings allow."""
    return [precision for precision in asked if precision == "float32" or "precision" in settings]


def precision_override(precision: str, prefix: str = "") -> list[str]:
    """The override that chooses a precision; none for the default."""
    return [] if precision == "float32" else [f"{prefix}precision={precision}"]


def medians(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The median of every column."""
    rows = list(rows)
    return {name: statistics.median(float(row[name]) for row in rows) for name in rows[0]}
