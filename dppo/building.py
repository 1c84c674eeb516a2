"""From plain configuration to tasks and policies that fit each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from dppo.checkpoint import SCRATCH, find_policy, load_policy
from dppo.envs.vector import Spaces, space_dims
from dppo.task import Task
from dppo.updates.ppo import PPOConfig
from policies import Policy, UserError
from policies.config import config_from_dict

Plain = Mapping[str, Any]


def build_task(config: Plain) -> Task:
    """The task of a configuration."""
    return config_from_dict(Task, config["task"], "task")


def build_policy(config: Plain, spaces: Spaces, **changes: Any) -> Policy:
    """An untrained policy for the task's spaces; ``changes`` replace settings of the configuration.

    Raises:
        UserError: settings that are wrong, or do not fit the action space.
    """
    policy = Policy.from_config(
        {
            **config["policy"],
            "obs_dim": spaces.obs_dim,
            "action_dim": spaces.action_dim,
            "network": config["network"],
            **changes,
        }
    )
    check_spaces(policy, spaces, "this configuration", config["task"]["name"])
    return policy


def build_update_rule(config: Plain) -> PPOConfig:
    """The settings of the update rule that ``algo`` names.

    Raises:
        UserError: an unknown rule or setting.
    """
    settings = dict(config["algo"])
    name = settings.pop("type", None)
    if name != "ppo":
        raise UserError(f"unknown algo.type {name!r}; there is: ppo")
    return config_from_dict(PPOConfig, settings, "algo")


def check_spaces(policy: Policy, spaces: Spaces, where: str, task: str) -> None:
    """Refuse a policy whose dimensions are not the task's, naming both."""
    if policy.discrete != spaces.discrete:
        kinds = ("discrete", "continuous")
        has, needs = kinds if policy.discrete else kinds[::-1]
        fit = "policy=categorical" if spaces.discrete else "policy=diffusion or policy=gaussian"
        raise UserError(f"the {policy.type} policy has {has} actions, but task {task} has {needs} ones; use {fit}")
    for name in ("obs_dim", "action_dim"):
        ours, theirs = getattr(policy.config, name), getattr(spaces, name)
        if ours != theirs:
            raise UserError(
                f"{where} does not fit task {task}: its policy has {name} {ours} "
                f"(observation {policy.config.obs_dim}, action {policy.config.action_dim}), the task has {theirs} "
                f"(observation {spaces.obs_dim}, action {spaces.action_dim})"
            )


def scratch_policy(config: Plain, task: Task) -> Policy:
    """An untrained policy, scaled by running statistics and the bounds of the task's actions.

    Raises:
        UserError: continuous actions without bounds.
    """
    spaces = space_dims(task)
    policy = build_policy(config, spaces, observation_scaling="running")
    low, high = torch.from_numpy(spaces.action_low), torch.from_numpy(spaces.action_high)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise UserError(f"task {task.name}: its actions have no bounds; start from a pretrained checkpoint instead")
    policy.fit_actions(low, high)
    return policy


def starting_policy(config: Plain, task: Task, overridden: Collection[str]) -> Policy:
    """The policy that fine-tuning starts from.

    A pretrained checkpoint is fine-tuned with the configuration's adjustable settings (such as the number of
    fine-tuned steps); one that was fine-tuned before keeps its own, except for those in ``overridden``. Everything
    else about the policy is fixed by the checkpoint.

    Args:
        config: the composed configuration.
        task: what to fine-tune on.
        overridden: keys and groups that the user set explicitly, e.g. ``policy.finetuned_steps``.

    Raises:
        UserError: a checkpoint that is missing, damaged, or does not fit the task or the overrides.
    """
    if config["checkpoint"] == SCRATCH:
        return scratch_policy(config, task)
    directory = find_policy(config["checkpoint"], task.name)
    policy, _ = load_policy(directory)
    if config["policy"]["type"] != policy.type and "policy" in overridden:
        raise UserError(
            f"{directory} holds a {policy.type} policy, not a {config['policy']['type']} one; leave policy=... out, or "
            f"set checkpoint=scratch"
        )
    check_spaces(policy, space_dims(task), str(directory), task.name)
    keys = {key.split(".", 1)[1] for key in overridden if key.startswith("policy.")}
    if any(key.startswith("network") for key in overridden):
        raise UserError(f"the network is fixed by the checkpoint {directory}; it can be chosen when pretraining only")
    if config["policy"]["type"] != policy.type:
        changes = {}
    elif getattr(policy.config, "finetuned_steps", None) is None:
        changes = {key: config["policy"][key] for key in keys | (policy.config.adjustable & set(config["policy"]))}
    else:
        changes = {key: config["policy"][key] for key in keys}
    changes = {key: value for key, value in changes.items() if value != getattr(policy.config, key, ...)}
    return policy.adjusted(**changes)
