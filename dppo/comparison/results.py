"""What came of the runs of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dppo.comparison.plan import PlannedRun
from dppo.output.metrics import read_metrics

POINTS = 50
"""Of a learning curve; each the mean of what was measured since the one before."""


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
    def success(self) -> float | None:
        """Success rate of the last evaluation, where the task has such a notion."""
        return self.summary["after"]["success_rate"]

    def curve(self, edges: np.ndarray) -> np.ndarray:
        """Mean training return [X] between each two edges [X + 1], in environment steps.

        Where no episode ended, the one before.
        """
        rows = [row for row in read_metrics(self.run.directory.metrics_path) if row.get("return_mean") is not None]
        steps = np.array([row["env_steps"] for row in rows], dtype=float)
        returns = np.array([row["return_mean"] for row in rows], dtype=float)
        bins = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, len(edges) - 2)
        counts = np.bincount(bins, minlength=len(edges) - 1)
        sums = np.bincount(bins, weights=returns, minlength=len(edges) - 1)
        means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
        last = np.maximum.accumulate(np.where(counts > 0, np.arange(len(means)), -1))
        return np.where(last >= 0, means[last], self.start)


def finished(runs: Sequence[PlannedRun]) -> list[Result]:
    """Those that have a summary."""
    found = ((run, run.summary) for run in runs)
    return [Result(run, summary) for run, summary in found if summary is not None]


@dataclass(frozen=True)
class Table:
    """Results by task and method."""

    results: list[Result]
    tasks: list[str]
    methods: list[str]

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
        """Scores [R] by task, where 0 is the mean before training and 1 the best run of any method."""
        return [
            (self.scores(task, method) - self.start(task)) / (self._best(task) - self.start(task) or 1.0)
            for task in self.tasks
        ]

    def start(self, task: str) -> float:
        """Mean return before training, over all runs."""
        return float(np.mean([one.start for one in self.results if one.run.task == task]))

    def _best(self, task: str) -> float:
        return max(one.score for one in self.results if one.run.task == task)

    def edges(self, task: str) -> np.ndarray:
        """[POINTS + 1] environment steps from 0 to what every run reached."""
        reached = min(float(one.summary["env_steps"]) for one in self.results if one.run.task == task)
        return np.linspace(0, reached, POINTS + 1)
