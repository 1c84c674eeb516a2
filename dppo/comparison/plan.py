"""Which runs a comparison consists of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dppo.checkpoint import checkpoints_in
from dppo.configuration import compose_config, options
from dppo.output.metrics import last_row
from dppo.output.run_directory import RunDirectory, write_json
from dppo.task import Task, trust_of
from policies.config import config_from_dict, near_misses
from policies.errors import UserError

OWN = ("task", "seed", "run", "threads", "overwrite")
"""Settings of `dppo finetune` that differ from run to run."""


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
    recorded: dict[str, str] = field(default_factory=dict)
    """CSV files of learning curves from elsewhere by their names, to be drawn beside the methods'."""

    def __post_init__(self) -> None:
        for what, names in (("tasks", self.tasks), ("seeds", self.seeds), ("methods", list(self.methods))):
            if not names:
                raise ValueError(f"{what} must not be empty")
            if len(set(names)) < len(names):
                raise ValueError(f"{what} holds something twice: {names}")
        for overrides in (self.settings, *self.task_settings.values(), *self.methods.values()):
            check_overrides(overrides)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse those that a comparison chooses itself.

    Raises:
        UserError: naming the first of them.
    """
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if key in OWN:
            raise UserError(f"{override}: a comparison chooses {key} of each run itself")


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
    def last_words(self) -> str:
        """The last line that it printed."""
        lines = self.log_path.read_text(errors="replace").split("\n") if self.log_path.is_file() else []
        return next((line for line in reversed(lines) if line.strip()), "it printed nothing")

    @property
    def _note(self) -> Path:
        """What it was asked for; beside the directory, which is the run's own."""
        return self.path.with_suffix(".json")

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        content = self.directory.read_summary()
        return None if content is None or content.get("after") is None else content

    @property
    def share(self) -> float:
        """Of its training that is done, from 0 to 1."""
        row = last_row(self.directory.metrics_path)
        with suppress(UserError):  # it is just being overwritten
            return 0.0 if row is None else min(row["env_steps"] / self.directory.read_config()["env_steps"], 1.0)
        return 0.0

    def note_settings(self) -> None:
        """Remember what is asked for."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._note, {"overrides": list(self.overrides)})

    @property
    def can_go_on(self) -> bool:
        """Whether an earlier run was asked for the same, and has a checkpoint."""
        return bool(checkpoints_in(self.directory.checkpoints)) and self._earlier == list(self.overrides)

    def trust(self, extra: Path | None) -> list[str]:
        """What going on with it needs besides: its task's module, which the comparison names and not the run's files.

        Args:
            extra: a directory with more choices, as of `compose_config`.
        """
        task = compose_config("finetune", self.overrides, extra)["task"]
        return trust_of(config_from_dict(Task, task, "task")).split()

    @property
    def _earlier(self) -> list[str] | None:
        """The overrides of an earlier run; None: there was none."""
        return json.loads(self._note.read_text())["overrides"] if self._note.is_file() else None

    @property
    def other_settings(self) -> str | None:
        """How a finished run that was asked for something else differs from this one; None: not at all."""
        earlier = self._earlier
        if self.summary is None or earlier is None or earlier == list(self.overrides):
            return None
        gone = [override for override in earlier if override not in self.overrides]
        new = [override for override in self.overrides if override not in earlier]
        if not gone and not new:  # the same in another order, and later ones win
            gone, new = earlier, list(self.overrides)
        return f"{' '.join(gone) or 'nothing'} then, {' '.join(new) or 'nothing'} now"


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
    known = options("task", extra)
    for task in config.task_settings:
        if task not in known:
            raise UserError(f"task_settings: unknown task {task!r}{near_misses(task, known)}")
    check_overrides(overrides)
    runs = []
    for seed in config.seeds:
        for task in config.tasks:
            for method, own in config.methods.items():
                theirs = (*config.settings, *config.task_settings.get(task, ()), *own, *overrides)
                path = output / "runs" / _folder(method) / task / f"seed{seed}"
                runs.append(PlannedRun(method, task, seed, (f"task={task}", *theirs, f"seed={seed}"), path))
    if len({run.path for run in runs}) < len(runs):
        raise UserError(f"these methods would share a folder: {', '.join(config.methods)}")
    for run in runs:
        if run.seed == config.seeds[0]:
            _check(run, extra)
    others = {run: difference for run in runs if (difference := run.other_settings) is not None}
    if others:
        run, difference = next(iter(others.items()))
        raise UserError(
            f"{len(others)} runs were finished with other settings, the first of them {run.path} ({difference}); "
            f"remove them, or choose another output=..."
        )
    return runs


def _folder(method: str) -> str:
    """A name that file systems and shells take."""
    return re.sub(r"[^\w.+-]+", "-", method).strip(".-") or "method"


def _check(run: PlannedRun, extra: Path | None) -> None:
    try:
        compose_config("finetune", run.overrides, extra)
    except UserError as error:
        raise UserError(f"{run.method} on {run.task}: {error}") from error
