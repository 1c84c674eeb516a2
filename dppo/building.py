"""From plain configuration to tasks and policies that fit each other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from dppo import anchors, estimators
from dppo.anchors import Anchor, Imitation, KLPenalty, KLReward, Replay, ReplayConfig
from dppo.checkpoint import SCRATCH, find_policy, load_policy
from dppo.configuration import default_settings, options
from dppo.data.demos import Episode, WindowDataset, check_dimensions, load_episodes
from dppo.envs.vector import Spaces, space_dims
from dppo.estimators import AdvantageConfig
from dppo.fitting import check_spaces, fitted
from dppo.sources import Foreign
from dppo.task import Task, permitted
from dppo.updates.config import UpdateConfig
from dppo.updates.rules import CONFIGS
from policies import DiffusionPolicy, ODEPolicy, Policy, UserError
from policies.config import config_from_dict, near_misses
from policies.samplers import Sampler

log = logging.getLogger(__name__)

Plain = Mapping[str, Any]
PARTS = ("network", "sampler")
"""Groups of a configuration that are settings of the policy."""
DEFAULT_SAMPLER = "ddpm"
Record = TypeVar("Record")


def build_task(config: Plain) -> Task:
    """The task of a configuration."""
    return config_from_dict(Task, config["task"], "task")


def task_for(config: Plain, checkpoint: str, trained_for: Task | None, named: bool) -> Task:
    """The task of a configuration, if the user ``named`` it there; else that of the checkpoint.

    Raises:
        UserError: the checkpoint says none, or one that imports a module which the user has not named.
    """
    if named:
        return build_task(config)
    if trained_for is None:
        raise UserError(f"{checkpoint} does not say which task it was trained for; name it: task=...")
    composed = [] if config.get("task") is None else [build_task(config).env_id.rpartition(":")[0]]
    return permitted(trained_for, checkpoint, [*composed, config["trust"]])


def build_policy(config: Plain, spaces: Spaces, **changes: Any) -> Policy:
    """An untrained policy for the task's spaces; ``changes`` replace settings of the configuration.

    Raises:
        UserError: settings that are wrong, or do not fit the action space.
    """
    sizes: dict[str, Any] = {"obs_dim": spaces.obs_dim, "action_dim": spaces.action_dim}
    if config["policy"]["type"] == "categorical":
        sizes |= {"choices": spaces.choices, "masked": spaces.masked}
    parts = {name: config[name] for name in PARTS if config.get(name) is not None}
    if "sampler" in parts and config["policy"]["type"] != DiffusionPolicy.type:
        raise _no_sampler(config["policy"]["type"])
    policy = Policy.from_config({**config["policy"], **sizes, **parts, **changes})
    _warn_of_a_late_start(policy)
    check_spaces(policy, spaces, "this configuration", config["task"]["name"])
    return policy


def build_update_rule(config: Plain) -> UpdateConfig:
    """The settings of the update rule that ``algo`` names.

    Raises:
        UserError: an unknown rule or setting.
    """
    return _of_type(CONFIGS, config, "algo")


def build_advantage(config: Plain) -> AdvantageConfig:
    """The settings of the estimator that ``advantage`` names.

    Raises:
        UserError: an unknown estimator or setting.
    """
    return _of_type(estimators.CONFIGS, config, "advantage")


def build_anchor(config: Plain, policy: Policy, task: Task) -> Anchor | None:
    """What ``anchor`` names, holding on to the policy as it is now; the demonstrations that it replays are the task's.

    Raises:
        UserError: an unknown anchor or setting, or demonstrations that are not there or do not fit.
    """
    name = config["anchor"]["type"]
    if name == "none":
        return None
    settings = _of_type(anchors.CONFIGS, config, "anchor")
    if not isinstance(settings, ReplayConfig):
        kinds = {"imitation": Imitation, "kl": KLPenalty, "kl_reward": KLReward}
        return kinds[name](settings.coefficient, policy)
    episodes = load_demonstrations(task, settings.dataset, "anchor.dataset")
    windows = WindowDataset(episodes, policy.config.history, policy.config.chunk, policy.config.first_executed)
    return Replay(settings.coefficient, policy, windows.to(next(policy.parameters()).device))


def load_demonstrations(task: Task, dataset: str | None, key: str = "dataset") -> list[Episode]:
    """Those of a dataset, or of the task's own; ``key`` is what the user would name one with.

    Raises:
        UserError: they are not there, or of another task.
    """
    name = dataset or task.dataset
    if not name:
        raise UserError(f"task {task.name} names no dataset of demonstrations; set {key}=...")
    same = "" if name == task.dataset else f" dataset={name}"
    spaces = demonstrable_spaces(task)
    episodes = load_episodes(name, hint=f"build it with `dppo collect task={task.name}{same}`")
    check_dimensions(episodes, spaces.obs_dim, spaces.action_dim, spaces.discrete, dataset=f"dataset {name}")
    return episodes


def _of_type(kinds: Mapping[str, type[Record]], config: Plain, group: str) -> Record:
    """The record of a group's settings, by their ``type``."""
    settings = dict(config[group])
    name = settings.pop("type", None)
    if name not in kinds:
        known = ", ".join(kinds)
        raise UserError(f"unknown {group}.type {name!r}{near_misses(str(name), kinds)}; there are: {known}")
    return config_from_dict(kinds[name], settings, group)


def demonstrable_spaces(task: Task) -> Spaces:
    """The spaces of a task that there can be demonstrations of.

    Raises:
        UserError: several discrete actions at once, or a mask of the valid ones, which datasets do not hold.
    """
    spaces = space_dims(task)
    if spaces.choices is not None or spaces.masked:
        what = "a mask of valid actions" if spaces.masked else "several discrete actions at once"
        raise UserError(f"task {task.name} has {what}, of which there are no demonstrations; use checkpoint=scratch")
    return spaces


def whole_chain(config: Plain) -> dict[str, Any]:
    """The change of settings that leaves no part of a chain frozen, for weights that are still to be trained."""
    return {"finetuned_steps": None} if "finetuned_steps" in config["policy"] else {}


def policy_settings(policy: Policy) -> dict[str, Any]:
    """``policy`` and its `PARTS`, of a configuration that says what the policy is."""
    settings = {"type": policy.type, **dataclasses.asdict(policy.config)}
    parts = {name: settings.pop(name) for name in PARTS if name in settings}
    return {"policy": settings, **parts}


def implied_choices(config: Plain, overridden: Collection[str], extra: Path | None = None) -> list[str]:
    """Overrides that follow from the checkpoint: policy, task and network, where the user named none.

    So that the settings that come with them (of the update rule, of the tuning) are composed too. ``extra`` is the
    user's own directory of choices.
    """
    if config.get("checkpoint") in (None, SCRATCH) or "policy" not in config:
        return []
    path = find_policy(str(config["checkpoint"]), build_task(config).name)
    policy, task = load_policy(path, foreign=Foreign.of(config))
    network = policy.config.network["type"]  # type: ignore[attr-defined]
    same_network = network == config["network"]["type"]  # whose settings the checkpoint has, whatever it is called
    implied = {
        "policy": policy.type,
        "task": "" if task is None else task.name,
        "network": "" if same_network else network,
    }
    return [
        f"{group}={name}"
        for group, name in implied.items()
        if group not in overridden and name in options(group, extra)
    ]


def scratch_policy(config: Plain, task: Task, overridden: Collection[str] = ()) -> Policy:
    """An untrained policy, scaled by running statistics and the bounds of the task's actions.

    Raises:
        UserError: continuous actions without bounds.
    """
    spaces = space_dims(task)
    chain = {} if "policy.finetuned_steps" in overridden else whole_chain(config)
    policy = build_policy(config, spaces, observation_scaling="running", **chain)
    low, high = torch.from_numpy(spaces.action_low), torch.from_numpy(spaces.action_high)
    if not (low.isfinite().all() and high.isfinite().all()):
        raise UserError(f"task {task.name}: its actions have no bounds; start from a pretrained checkpoint instead")
    policy.fit_actions(low, high)
    return policy


def starting_point(config: Plain, overridden: Collection[str]) -> tuple[Policy, Task]:
    """The policy that fine-tuning starts from, and its task: the checkpoint's own, unless the user named one.

    The policy's settings are the checkpoint's, too, but for two kinds: adjustable ones that the configuration sets to
    something else than their default, and the number of fine-tuned steps, which a pretrained policy does not have yet.
    The user may name the probability flow of a diffusion checkpoint in place of its chain.

    Args:
        config: the composed configuration.
        overridden: keys and groups that the user set explicitly, e.g. ``policy.finetuned_steps``.

    Raises:
        UserError: a checkpoint that is missing, damaged, or does not fit the task or the overrides.
    """
    task = build_task(config)
    if config["checkpoint"] == SCRATCH:
        if "policy.observation_scaling" in overridden:
            raise UserError("policy.observation_scaling: without demonstrations it is always running")
        return scratch_policy(config, task, overridden), task
    foreign = Foreign.of(config)
    path = find_policy(str(config["checkpoint"]), task.name)
    policy, trained_for = load_policy(path, foreign=foreign)
    groups = {key.split(".")[0] for key in overridden}
    named = "task" in groups or (trained_for is None and "experiment" in groups)
    task = task_for(config, str(config["checkpoint"]), trained_for, named)
    policy = fitted(policy, task, str(path), foreign.map)
    if config["policy"]["type"] == ODEPolicy.type and isinstance(policy, DiffusionPolicy):
        policy = ODEPolicy.from_diffusion(policy)
    if config["policy"]["type"] != policy.type:
        raise UserError(
            f"{path} holds a {policy.type} policy, not a {config['policy']['type']} one; leave policy=... out, or "
            f"set checkpoint=scratch"
        )
    if any(key.startswith("network") for key in overridden):
        raise UserError(
            f"the network is fixed by the checkpoint {path}; another one needs `dppo pretrain task={task.name} "
            f"network=...`, or checkpoint=scratch"
        )
    if _is_other_sampler(config, policy, overridden):
        policy = with_sampler(policy, config["sampler"])
    settings, defaults = config["policy"], default_settings("policy", policy.type)["policy"]
    named = {key.split(".", 1)[1] for key in overridden if key.startswith("policy.")}
    free = policy.config.adjustable - {"finetuned_steps", "sampler"}
    chosen = {key for key in settings if key in free and settings[key] != defaults.get(key)}
    changes = {key: settings[key] for key in named | chosen}
    if getattr(policy.config, "finetuned_steps", 0) is None:
        wanted = policy.num_steps if settings["finetuned_steps"] is None else settings["finetuned_steps"]
        changes["finetuned_steps"] = wanted if "finetuned_steps" in named else min(wanted, policy.num_steps)
    changes = {key: value for key, value in changes.items() if value != getattr(policy.config, key, ...)}
    return policy.adjusted(**changes), task


def _is_other_sampler(config: Plain, policy: Policy, overridden: Collection[str]) -> bool:
    """Whether the user named a sampler, or another setting did that is not the default."""
    sampler = config.get("sampler")
    named = any(key.split(".")[0] == "sampler" for key in overridden)
    return sampler is not None and (named or sampler != default_settings("sampler", DEFAULT_SAMPLER))


def with_sampler(policy: Policy, settings: Plain) -> Policy:
    """The policy under another sampler of its denoising chain.

    Raises:
        UserError: a policy without one, or a sampler that is wrong or does not fit it.
    """
    if not isinstance(policy, DiffusionPolicy):
        raise _no_sampler(policy.type)
    changed = policy.with_sampler(config_from_dict(Sampler, settings, "sampler"))
    _warn_of_a_late_start(changed)
    return changed


def _no_sampler(policy_type: str) -> UserError:
    return UserError(f"a {policy_type} policy has no sampler; leave sampler=... out")


def _warn_of_a_late_start(policy: Policy) -> None:
    """Steps that do not divide the timesteps leave the noisiest of them out, and yet begin with pure noise."""
    if not isinstance(policy, DiffusionPolicy):
        return
    steps, timesteps = len(policy.timesteps), policy.config.denoising_steps
    left_out = timesteps % steps
    if left_out:
        better = next(number for number in range(steps, timesteps + 1) if timesteps % number == 0)
        log.warning(
            f"sampler.steps={steps} does not divide policy.denoising_steps={timesteps}: the {left_out} noisiest "
            f"timesteps are left out, and the chain begins with their noise all the same; sampler.steps={better} "
            f"leaves none out"
        )
