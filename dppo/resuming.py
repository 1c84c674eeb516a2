"""Going on with a run from its directory alone: its configuration, and its latest whole checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from dppo.checkpoint import TRAINER, checkpoints_in, latest_checkpoint
from dppo.configuration import groups_of
from dppo.durable import damage, recover
from dppo.output.metrics import cut_back
from dppo.output.run_directory import RunDirectory
from dppo.saving import Best
from dppo.states import STATE_NAME, check_state, read_state
from dppo.statistics import EvaluationSummary
from dppo.task import Task, permitted
from policies import Policy, UserError
from policies.config import config_from_dict

_ALWAYS = ("checkpoint_interval", "checkpoint_minutes", "keep_checkpoints", "evaluation.interval")
CHANGEABLE = {
    "finetune": ("env_steps", "max_minutes", *_ALWAYS, "threads", "device", "logger", "video", "trust"),
    "pretrain": ("updates", *_ALWAYS, "threads", "device", "logger", "video", "trust"),
}
"""Settings of each command that a run that goes on may be given anew."""

NOT_EXACTLY = (
    "the environments could not be restored and start new episodes: the run goes on, but not as it would have without "
    "a stop"
)
Loaded = TypeVar("Loaded", covariant=True)


class Learner(Protocol[Loaded]):
    """What has a state."""

    def state_dict(self) -> dict[str, Any]:
        """All of it, see `write_state`."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Loaded:
        """Take over what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class Notes:
    """What a checkpoint says beside the state of what learns."""

    device: str
    """The kind of device that it learned on."""
    best: Best | None = None
    """The best checkpoint of the run then."""
    before: EvaluationSummary | None = None
    """What fine-tuning began with."""


@dataclass(frozen=True)
class Resumed:
    """A run that is to go on."""

    directory: RunDirectory
    config: dict[str, Any]
    """That it began with, but for what is changed on purpose."""
    checkpoint: Path | None
    """Where it goes on; None: there is nothing to go on from, it starts anew."""

    @property
    def overridden(self) -> set[str]:
        """The keys of the configuration that say how the policy differs from its checkpoint's, or defaults."""
        cls = Policy.registry[self.config["policy"]["type"]]
        adjustable = cls.Config.adjustable - {"sampler"}
        return {"task"} | {f"policy.{name}" for name in self.config["policy"] if name in adjustable}

    def last_evaluation(self, name: str, x_axis: str, done: int) -> EvaluationSummary | None:
        """What its summary calls so, of when so much was done; None: the run had not ended there."""
        summary = self.directory.read_summary() or {}
        found = summary.get(name)
        return EvaluationSummary.from_dict(found) if found is not None and summary.get(x_axis) == done else None


def resumed_run(
    command: str, config: Mapping[str, Any], overridden: Collection[str], held: ExitStack
) -> Resumed | None:
    """The run that ``resume`` names; None: it names none.

    Args:
        command: of the run.
        config: composed of what the user gave.
        overridden: keys and groups that the user set explicitly.
        held: keeps other processes out of the run until it is closed.

    Raises:
        UserError: it is no run of this command, is given what cannot be changed any more, is running, or has no
            checkpoint that is whole, but some that are not.
    """
    if config["resume"] is None:
        return None
    directory = RunDirectory(Path(str(config["resume"])).expanduser())
    stored = directory.read_config()
    if strangers := sorted(stored.keys() - config.keys()):
        raise UserError(f"{directory.path} is no run of `dppo {command}`: it has a setting {strangers[0]!r}")
    changed = {key for key in overridden if key != "resume"}
    for key in sorted(changed):
        if key not in CHANGEABLE[command] and key.split(".")[0] != "logger":
            raise UserError(
                f"{key} cannot be changed in a run that goes on: it has its configuration from "
                f"{directory.config_path}; what can be changed are: "
                f"{', '.join(CHANGEABLE[command])}"
            )
    held.enter_context(directory.held())
    new = {key: copy.deepcopy(value) for key, value in config.items() if key not in groups_of(command)}
    merged = {**new, **stored, "run": str(directory.path), "resume": None}  # new: settings that it has not known yet
    for key in {*changed, "trust"}:  # which is the user's own, and not the file's
        _copy_setting(key.split("."), config, merged)
    permitted(config_from_dict(Task, merged["task"], "task"), str(directory.config_path), [merged["trust"]])
    recover(directory.checkpoints)
    checkpoint = latest_checkpoint(directory.checkpoints)
    if checkpoint is None:
        if damaged := checkpoints_in(directory.checkpoints):
            raise UserError(
                f"no checkpoint in {directory.checkpoints} is whole, of the newest, {damaged[0].name}, "
                f"{damage(damaged[0])}; put a copy in its place, or move that folder away to start anew"
            )
        print(f"{directory.path} has no checkpoint to go on from: it starts anew from its configuration", flush=True)
        merged["overwrite"] = True
    return Resumed(directory, merged, checkpoint)


def restore(
    checkpoint: Path, learner: Learner[Loaded], device: torch.device, free: Collection[str]
) -> tuple[Loaded, Notes]:
    """Put a learner into the state of a checkpoint; what it says to that, and the notes beside its state.

    Args:
        checkpoint: a whole one.
        learner: of the run's configuration.
        device: that it is on.
        free: paths of entries in its state whose form it does not know beforehand.

    Raises:
        UserError: a state that is not of such a learner, or of one on another kind of device.
    """
    where = checkpoint / TRAINER / STATE_NAME
    state = read_state(where.parent)
    found = state.pop("notes", None)
    notes = config_from_dict(Notes, found if isinstance(found, dict) else {}, f"{where}, notes")
    if notes.device != device.type:  # whose random generators cannot take over from those of another kind
        raise UserError(
            f"{where} was written on device={notes.device} and goes on on that kind of device only, not on {device}"
        )
    check_state(state, learner.state_dict(), str(where), free)
    try:
        return learner.load_state_dict(state), notes
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def go_on(resumed: Resumed, config: Mapping[str, Any], x_axis: str, done: int) -> None:
    """Make the run's files those of when so much was done, on the axis of its metrics."""
    cut_back(resumed.directory.metrics_path, x_axis, done)
    resumed.directory.go_on(config, steps=done)
    print(f"going on in {resumed.directory.path} from {resumed.checkpoint}", flush=True)


def finished_line(directory: RunDirectory, x_axis: str, done: int) -> str:
    """What there is to say of a run that has nothing left to do."""
    what = x_axis.replace("_", " ")
    return f"{directory.path} is finished, with {done:,} {what}; {x_axis}=... larger than that trains on"


def _copy_setting(path: list[str], source: Mapping[str, Any], target: dict[str, Any]) -> None:
    first, *rest = path
    if rest:
        _copy_setting(rest, source[first], target[first])
    else:
        target[first] = source[first]
