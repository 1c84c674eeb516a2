"""What came of the runs of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dppo.comparison.plan import PlannedRun
from dppo.output.metrics import read_metrics

POINTS = 50
"""Of a learning curve, at most."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: PlannedRun
    summary: dict[str, Any]

    @property
    def score(self) -> float:
        """Mean return of the last evaluation."""
        return float(self.summary["after"]["return_mean"])

    @property
    def start(self) -> float:
        """Mean return of the evaluation before training."""
        return float(self.summary["before"]["return_mean"])

    @property
    def provenance(self) -> dict[str, Any]:
        """When, where and with what it ran, as of `dppo.output.run_directory.provenance`."""
        return self.run.directory.read_provenance()

    @property
    def success(self) -> float | None:
        """Success rate of the last evaluation, where the task has such a notion."""
        return self.summary["after"]["success_rate"]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of metrics of iterations in which episodes ended."""
        return [row for row in read_metrics(self.run.directory.metrics_path) if row.get("return_mean") is not None]

    @cached_property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Environment steps, and mean training returns until then, [P] each; of many iterations, several in a row."""
        if not self.rows:
            return np.array([float(self.summary["env_steps"])]), np.array([self.start])
        steps, returns = np.array([[row["env_steps"], row["return_mean"]] for row in self.rows], dtype=float).T
        groups = np.array_split(np.arange(len(steps)), min(len(steps), POINTS))
        return steps[[group[-1] for group in groups]], np.array([returns[group].mean() for group in groups])

    def curve(self, x: np.ndarray) -> np.ndarray:
        """Mean training returns [X] at environment steps [X], between the `points` on straight lines."""
        return np.interp(x, *self.points)


def finished(runs: Sequence[PlannedRun]) -> list[Result]:
    """Those that have a summary."""
    found = ((run, run.summary) for run in runs)
    return [Result(run, summary) for run, summary in found if summary is not None]


@dataclass(frozen=True)
class Table:
    """Results by task and method."""

    results: list[Result]
    tasks: list[str]
    methods: Mapping[str, Sequence[str]]
    """Their overrides by name."""

    def of(self, task: str, method: str) -> list[Result]:
        """Of one cell."""
        return [one for one in self.results if (one.run.task, one.run.method) == (task, method)]

    def scores(self, task: str, method: str) -> np.ndarray:
        """Of the runs of one cell, [R]."""
        return np.array([one.score for one in self.of(task, method)])

    def complete(self, method: str) -> bool:
        """Whether there is a run of it on every task."""
        return all(self.of(task, method) for task in self.tasks)

    def normalized(self, method: str) -> list[np.ndarray]:
        """Scores [R] by task: 0 is the mean before training, 1 or -1 the run of any method that is farthest from it."""
        return [(self.scores(task, method) - self.start(task)) / self._scale(task) for task in self.tasks]

    def start(self, task: str) -> float:
        """Mean return before training, over all runs."""
        return float(np.mean([one.start for one in self.results if one.run.task == task]))

    def _scale(self, task: str) -> float:
        start = self.start(task)
        return max(abs(one.score - start) for one in self.results if one.run.task == task) or 1.0

    def grid(self, task: str, method: str) -> np.ndarray:
        """Environment steps [X] for the curves of a cell: those that all its runs measured, as many as the fewest."""
        measured = [one.points[0] for one in self.of(task, method)]
        first = max(steps[0] for steps in measured)
        last = max(first, min(steps[-1] for steps in measured))
        return np.linspace(first, last, min(map(len, measured)))

    def budgets_differ(self, task: str) -> bool:
        """Whether some methods had clearly more environment steps than others, on average."""
        cells = [self.of(task, method) for method in self.methods]
        steps = [np.mean([one.summary["env_steps"] for one in cell]) for cell in cells if cell]
        return bool(max(steps) > 1.2 * min(steps))
