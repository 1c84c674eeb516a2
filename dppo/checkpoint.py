"""Checkpoints on disk: ``policy/`` (the policy alone, Hugging Face layout) and ``trainer/`` (all else of training)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dppo.durable import damage, new_directory
from dppo.sources import Foreign, is_foreign, located, read_policy
from dppo.states import write_state
from dppo.task import Task
from policies import Policy, UserError
from policies.config import config_from_dict
from policies.pretrained import CONFIG_NAME

log = logging.getLogger(__name__)

POLICY, TRAINER = "policy", "trainer"
"""The two folders of a checkpoint."""
EMBEDDED = "embedded"
SCRATCH = "scratch"
PRETRAINED = Path(__file__).parent / "pretrained"
"""Embedded checkpoints: <task>/ holds a policy."""


def save_checkpoint(directory: Path, policy: Policy, task: Task, trainer: Mapping[str, Any]) -> Path:
    """Write a checkpoint: see `new_directory`.

    Args:
        directory: ``<run>/checkpoints/<steps>``.
        policy: saved with its task as metadata.
        task: what the policy was trained for.
        trainer: a state, see `write_state`.

    Raises:
        UserError: it cannot be written, since the disk is full or for the like of it; nothing is left of it then.
    """
    policy.metadata["task"] = dataclasses.asdict(task)
    try:
        with new_directory(directory) as temporary:
            policy.save_pretrained(temporary / POLICY, str(directory / POLICY))
            write_state(temporary / TRAINER, trainer)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"the checkpoint {directory} could not be written: {reason}") from error
    return directory


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints ``<steps>/``, the newest first, whole or not."""
    found = [entry for entry in folder.glob("*") if entry.name.isdigit()]
    return sorted(found, key=lambda entry: int(entry.name), reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest of a run's checkpoints that is whole; of newer ones, a line each tells what is wrong with them."""
    for path in checkpoints_in(folder):
        wrong = damage(path)
        if wrong is None:
            return path
        log.warning("the checkpoint %s is passed over: %s", path, wrong)
    return None


def find_policy(checkpoint: str, task_name: str | None = None) -> Path:
    """The policy that ``checkpoint`` means: a directory, or a file of another project.

    Args:
        checkpoint: a run directory (its latest checkpoint), a checkpoint of one, a policy directory, ``embedded``,
            ``embedded/<task>``, or any of `dppo.sources`, here or on the Hugging Face Hub.
        task_name: whose checkpoint ``embedded`` alone means.

    Raises:
        UserError: there is none.
    """
    if checkpoint == EMBEDDED or checkpoint.startswith(f"{EMBEDDED}/"):
        task_name = checkpoint.partition("/")[2] or task_name
        directory = PRETRAINED / str(task_name)
        if not directory.is_dir():
            known = sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG_NAME}"))
            if task_name is None:
                raise UserError(f"name the task, too: checkpoint={EMBEDDED}/<task> (there are: {', '.join(known)})")
            raise UserError(
                f"no checkpoint is embedded for task {task_name!r} (there are: {', '.join(known) or 'none'}); make one "
                f"with `dppo collect task={task_name}` and `dppo pretrain task={task_name}`, or set checkpoint=scratch"
            )
        return directory
    path = located(checkpoint)
    if path is None:
        raise UserError(f"checkpoint {checkpoint} does not exist")
    if is_foreign(path) or (path / CONFIG_NAME).is_file():
        return path
    if (path / POLICY).is_dir():
        wrong = damage(path)
        if wrong is not None:
            raise UserError(f"the checkpoint {checkpoint} is not whole: {wrong}; use another one of its run")
        return path / POLICY
    latest = latest_checkpoint(path / "checkpoints")
    if latest is None:
        raise UserError(
            f"{checkpoint} is neither a run (no whole checkpoints/<steps>/ in it), nor a checkpoint (no policy/), nor "
            f"a policy (no {CONFIG_NAME})"
        )
    return latest / POLICY


def source_of(checkpoint: str) -> Path | None:
    """Where the user's checkpoint lies; None for one that is embedded, or none."""
    return None if checkpoint == SCRATCH or checkpoint.split("/")[0] == EMBEDDED else find_policy(checkpoint)


def load_policy(
    path: Path, device: str | torch.device = "cpu", foreign: Foreign | None = None
) -> tuple[Policy, Task | None]:
    """The policy that was found, and the task that it was trained for (None where it does not say)."""
    policy = read_policy(path, foreign).to(device)
    task = policy.metadata.get("task")
    return policy, None if task is None else config_from_dict(Task, task, f"the task in {path / CONFIG_NAME}")
