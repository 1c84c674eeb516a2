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
"""Of a learning curve, at most; each the mean of what was measured since the one before."""


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

    def curve(self, edges: np.ndarray) -> np.ndarray:
        """Mean training return [X] between each two edges [X + 1], in environment steps.

        Where no episode ended, the one before; before the first one, the first.
        """
        rows = [row for row in self.rows if row["env_steps"] <= edges[-1]]
        if not rows:
            return np.full(len(edges) - 1, self.start)
        steps = np.array([row["env_steps"] for row in rows], dtype=float)
        returns = np.array([row["return_mean"] for row in rows], dtype=float)
        bins = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, len(edges) - 2)
        counts = np.bincount(bins, minlength=len(edges) - 1)
        sums = np.bincount(bins, weights=returns, minlength=len(edges) - 1)
        means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
        last = np.maximum.accumulate(np.where(counts > 0, np.arange(len(means)), -1))
        return means[np.maximum(last, np.flatnonzero(counts)[0])]


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

    def edges(self, task: str, method: str) -> np.ndarray:
        """[X + 1] environment steps from 0 to what every run of a method reached, with something measured between."""
        results = self.of(task, method)
        points = min(POINTS, *(len(one.rows) for one in results))
        return np.linspace(0, min(float(one.summary["env_steps"]) for one in results), max(points, 1) + 1)
