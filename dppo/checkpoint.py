"""Checkpoints on disk: ``policy/`` (the policy alone, Hugging Face layout) and ``trainer/`` (all else of training)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dppo.sources import Foreign, is_foreign, located, read_policy
from dppo.task import Task
from policies import Policy, UserError
from policies.config import config_from_dict
from policies.pretrained import CONFIG_NAME

EMBEDDED = "embedded"
SCRATCH = "scratch"
PRETRAINED = Path(__file__).parent / "pretrained"
"""Embedded checkpoints: <task>/ holds a policy."""


def save_checkpoint(directory: Path, policy: Policy, task: Task, trainer: Mapping[str, Any]) -> Path:
    """Write a checkpoint under a temporary name, then rename it, so that ``directory`` is whole or absent.

    Args:
        directory: ``<run>/checkpoints/<steps>``.
        policy: saved with its task as metadata.
        task: what the policy was trained for.
        trainer: nested mappings and lists of tensors and plain values.
    """
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    policy.metadata["task"] = dataclasses.asdict(task)
    policy.save_pretrained(temporary / "policy")
    _save_state(temporary / "trainer", trainer)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
    return directory


def _save_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Tensors to ``state.safetensors`` under their path in ``state``, all else to ``state.json``."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {str(key): plain(item, f"{path}/{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item, f"{path}/{index}") for index, item in enumerate(value)]
        return value

    content = plain(state, "")
    directory.mkdir(parents=True)
    save_file(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(content, indent=1) + "\n")


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
    if (path / "policy").is_dir():
        return path / "policy"
    finished = [entry for entry in (path / "checkpoints").glob("*") if entry.name.isdigit()]
    if not finished:
        raise UserError(
            f"{checkpoint} is neither a run (no checkpoints/<steps>/ in it), nor a checkpoint (no policy/), nor a "
            f"policy (no {CONFIG_NAME})"
        )
    return max(finished, key=lambda entry: int(entry.name)) / "policy"


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
