"""``dppo import``: what another project saved becomes a policy directory of this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dppo.building import build_task, check_spaces
from dppo.configuration import compose_config
from dppo.envs.vector import space_dims
from dppo.importing import import_policy
from policies import UserError
from policies.base import CONFIG_NAME


def run(config: Mapping[str, Any], overridden: Collection[str], *, extra: Path | None = None) -> Path:
    """Import as the composed configuration of ``configs/import.yaml`` says; the directory that was written.

    ``extra`` is the user's own directory of choices, which may hold the task.
    """
    output = Path(str(config["output"])).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; output=... names a directory")
    if (output / CONFIG_NAME).exists() and not config["overwrite"]:
        raise UserError(f"{output} holds a policy already; choose another output=..., or set overwrite=true")
    policy = import_policy(config)
    if config["for_task"] is not None:
        task = build_task(compose_config("finetune", [f"task={config['for_task']}"], extra))
        check_spaces(policy, space_dims(task), str(config["source"]), task.name)
        policy.metadata["task"] = dataclasses.asdict(task)
    policy.save_pretrained(output)
    print(_told(policy, config, output))
    return output


def _told(policy: Any, config: Mapping[str, Any], output: Path) -> str:
    """What was imported, in a few words."""
    c = policy.config
    size = sum(parameter.numel() for parameter in policy.network.parameters())
    return (
        f"{config['source']} -> {output}: a {policy.type} policy ({c.network['type']}, {size:,} weights), observations "
        f"{c.history} x {c.obs_dim}, actions {c.chunk} x {c.action_dim}, {c.executed_chunk} of them executed, "
        f"{policy.num_steps} steps to fine-tune"
    )
