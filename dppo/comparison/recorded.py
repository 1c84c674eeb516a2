"""Learning curves that were recorded elsewhere, to be drawn beside one's own."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dppo.output.plots import Curve
from policies import UserError

COLUMNS = ("task", "env_steps", "return")


def read_recorded(files: Mapping[str, str]) -> dict[str, list[Curve]]:
    """By task, a curve without an interval for each CSV file, which has the `COLUMNS`.

    Args:
        files: paths by the name that a curve shall have.

    Raises:
        UserError: a file that cannot be read, lacks a column, or holds something else than numbers.
    """
    curves: dict[str, list[Curve]] = {}
    for name, path in files.items():
        points = _points(Path(path).expanduser())
        for task in dict.fromkeys(task for task, *_ in points):
            x, value = np.array([numbers for of, *numbers in points if of == task]).T
            curves.setdefault(task, []).append(Curve(name, x, value, value, value))
    return curves


def _points(path: Path) -> list[tuple[str, float, float]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"recorded: {path} has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}")
            return [(row["task"], float(row["env_steps"]), float(row["return"])) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recorded: {path} cannot be read: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"recorded: {path} holds something else than numbers: {error}") from error
