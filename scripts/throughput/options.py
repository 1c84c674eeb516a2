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


def positive(text: str) -> int:
    """A number of an argument."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def say(text: str) -> None:
    """Tell what is being measured."""
    print(f"  {text}", flush=True)


def medians(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The median of every column."""
    rows = list(rows)
    return {name: statistics.median(float(row[name]) for row in rows) for name in rows[0]}
