"""``dppo import``: what another project saved becomes a policy directory of this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dppo.building import build_task
from dppo.checkpoint import find_policy, load_policy
from dppo.fitting import fitted
from dppo.sources import Foreign
from policies import UserError
from policies.pretrained import CONFIG_NAME


def run(config: Mapping[str, Any], overridden: Collection[str]) -> Path:
    """Import as the composed configuration of ``configs/import.yaml`` says; the directory that was written."""
    output = Path(str(config["output"])).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; output=... names a directory")
    if (output / CONFIG_NAME).exists() and not config["overwrite"]:
        raise UserError(f"{output} holds a policy already; choose another output=..., or set overwrite=true")
    foreign = Foreign.of(config)
    policy, _ = load_policy(find_policy(str(config["source"])), foreign=foreign)
    if config.get("task") is not None:
        task = build_task(config)
        policy = fitted(policy, task, str(config["source"]), foreign.map)
        policy.metadata["task"] = dataclasses.asdict(task)
    elif foreign.map:
        raise UserError("foreign.map matches a policy to a task: name that, too, task=...")
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
        f"{policy.num_steps} denoising steps"
    )
