"""Which runs a comparison consists of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dppo.configuration import compose_config
from dppo.output.run_directory import RunDirectory, write_json
from policies.errors import UserError


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared, as plain data."""

    name: str
    tasks: list[str]
    seeds: list[int]
    methods: dict[str, list[str]]
    """Overrides of `dppo finetune` by name of the method."""
    settings: list[str] = field(default_factory=list)
    """Overrides for all runs."""
    task_settings: dict[str, list[str]] = field(default_factory=dict)
    """Overrides by task; those of a method win over them."""

    def __post_init__(self) -> None:
        for what, names in (("tasks", self.tasks), ("seeds", self.seeds), ("methods", list(self.methods))):
            if not names:
                raise ValueError(f"{what} must not be empty")
            if len(set(names)) < len(names):
                raise ValueError(f"{what} holds something twice: {names}")
        for task in self.task_settings:
            if task not in self.tasks:
                raise ValueError(f"task_settings has settings for {task}, which is none of the tasks")


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a comparison."""

    method: str
    task: str
    seed: int
    overrides: tuple[str, ...]
    """Of `dppo finetune`, but for those that say where it runs."""
    path: Path

    def __str__(self) -> str:
        return f"{self.method}, {self.task}, seed {self.seed}"

    @property
    def directory(self) -> RunDirectory:
        """Where it writes."""
        return RunDirectory(self.path)

    @property
    def log_path(self) -> Path:
        """What it prints."""
        return self.path.with_suffix(".log")

    @property
    def _note(self) -> Path:
        """What it was asked for; beside the directory, which is the run's own."""
        return self.path.with_suffix(".json")

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        try:
            content = json.loads(self.directory.summary_path.read_text())
        except (OSError, ValueError):
            return None
        return content if content.get("after") is not None else None

    def note_settings(self) -> None:
        """Remember what is asked for."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._note, {"overrides": list(self.overrides)})

    def check_settings(self) -> None:
        """Refuse a finished run that was asked for something else.

        Raises:
            UserError: naming it, and the difference.
        """
        if self.summary is None or not self._note.is_file():
            return
        earlier = json.loads(self._note.read_text())["overrides"]
        if tuple(earlier) != self.overrides:
            gone, new = set(earlier) - set(self.overrides), set(self.overrides) - set(earlier)
            difference = f"{' '.join(sorted(gone)) or 'nothing'} then, {' '.join(sorted(new)) or 'nothing'} now"
            raise UserError(
                f"{self.path} was finished with other settings ({difference}); remove it, or choose another output=..."
            )


def plan(
    config: ComparisonConfig, output: Path, overrides: Sequence[str] = (), extra: Path | None = None
) -> list[PlannedRun]:
    """All runs; seeds last, so that every method has its first results early.

    Args:
        config: what is compared.
        output: the directory of the comparison.
        overrides: for all runs, after the comparison's own.
        extra: a directory with more choices, as of `compose_config`.

    Raises:
        UserError: settings of a run that cannot be composed, or a finished run with other ones.
    """
    runs = []
    for seed in config.seeds:
        for task in config.tasks:
            for method, own in config.methods.items():
                theirs = (*config.settings, *config.task_settings.get(task, ()), *own, *overrides)
                path = output / "runs" / method / task / f"seed{seed}"
                runs.append(PlannedRun(method, task, seed, (f"task={task}", *theirs, f"seed={seed}"), path))
    for run in runs:
        if run.seed == config.seeds[0]:
            _check(run, extra)
        run.check_settings()
    return runs


def _check(run: PlannedRun, extra: Path | None) -> Mapping[str, Any]:
    try:
        return compose_config("finetune", run.overrides, extra)
    except UserError as error:
        raise UserError(f"{run.method} on {run.task}: {error}") from error
