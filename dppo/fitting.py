"""Whether a policy fits a task, and how what it sees and does is found among what the task offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dppo.envs.vector import Spaces, space_dims
from dppo.task import Task
from policies import DiffusionPolicy, Policy, UserError
from policies.features import Features, features_in, in_words, places
from policies.rearranging import rearranged

Choice = Mapping[str, str | Sequence[str]]
"""For names of a policy's parts, the task's that they are."""


def check_spaces(policy: Policy, spaces: Spaces, where: str, task: str) -> None:
    """Refuse a policy whose dimensions are not the task's, naming both."""
    if policy.discrete != spaces.discrete:
        kinds = ("discrete", "continuous")
        has, needs = kinds if policy.discrete else kinds[::-1]
        fit = "policy=categorical" if spaces.discrete else "policy=diffusion, policy=gaussian or policy=mixture"
        raise UserError(f"the {policy.type} policy has {has} actions, but task {task} has {needs} ones; use {fit}")
    for name in ("obs_dim", "action_dim"):
        ours, theirs = getattr(policy.config, name), getattr(spaces, name)
        if ours != theirs:
            raise UserError(
                f"{where} does not fit task {task}: its policy has {name} {ours} "
                f"(observation {policy.config.obs_dim}, action {policy.config.action_dim}), the task has {theirs} "
                f"(observation {spaces.obs_dim}, action {spaces.action_dim})"
            )
    for name in ("choices", "masked") if spaces.discrete else ():
        ours, theirs = getattr(policy.config, name), getattr(spaces, name)
        if ours != theirs:
            raise UserError(f"{where} does not fit task {task}: its policy has {name} {ours}, the task {theirs}")


@dataclass(frozen=True)
class Side:
    """What a policy sees, or does, and what the task has for it."""

    own: Features
    """The policy's parts; none where it does not name them."""
    offered: Features
    key: str
    """Under which the policy's metadata holds its parts."""
    verb: str


def fitted(policy: Policy, task: Task, where: str, choice: Choice | None = None) -> Policy:
    """The policy, with what it sees and does in the order in which the task has them, and no evaluation any more.

    Args:
        policy: one that another project made names its parts in its metadata; others take a task as it is.
        task: what it is to do.
        where: what it came from, for the errors.
        choice: which part is which, where their names do not say so.

    Raises:
        UserError: it does not fit.
    """
    spaces = space_dims(task)
    if not (policy.discrete or spaces.discrete):
        policy = _in_order(policy, _sides(policy, spaces), task, where, choice or {})
    elif choice:
        raise UserError("foreign.map: discrete actions, and what goes with them, have no parts")
    check_spaces(policy, spaces, where, task.name)
    policy.metadata.pop("evaluation", None)  # which was of another task, or as another policy
    return policy


def _sides(policy: Policy, spaces: Spaces) -> tuple[Side, Side]:
    inputs, outputs = (policy.metadata.get(key) for key in ("inputs", "outputs"))
    return (
        Side(features_in(inputs, policy.config.obs_dim), spaces.observation_parts, "inputs", "sees"),
        Side(features_in(outputs, policy.config.action_dim), spaces.action_parts, "outputs", "does"),
    )


def _in_order(policy: Policy, sides: tuple[Side, Side], task: Task, where: str, choice: Choice) -> Policy:
    known = [feature for side in sides for feature in side.own]
    names = [feature.name for feature in known]
    unknown = [name for name in choice if name not in names]
    if unknown:
        raise UserError(f"foreign.map: {where} has no {unknown[0]!r}, but {in_words(known) or 'no parts with names'}")
    observation, action = (_places(side, task, where, choice) for side in sides)
    if observation is None and action is None:
        return policy
    if not isinstance(policy, DiffusionPolicy):
        raise UserError(f"{where}: the parts of a {policy.type} policy cannot be put into another order")
    seen = observation if observation is not None else list(range(policy.config.obs_dim))
    width = sum(feature.dim for feature in sides[0].offered) if observation is not None else policy.config.obs_dim
    policy = rearranged(policy, seen, width, action)
    for side, moved in zip(sides, (observation, action), strict=True):
        if moved is not None:
            policy.metadata[side.key] = [[feature.name, feature.dim] for feature in side.offered]
    return policy


def _places(side: Side, task: Task, where: str, choice: Choice) -> list[int] | None:
    """Where the policy's entries are among the task's; None where they are the same, or it does not name them."""
    if not side.own:
        return None
    names = {feature.name for feature in side.own}
    chosen = {name: [parts] if isinstance(parts, str) else list(parts) for name, parts in choice.items()}
    found = places(side.own, side.offered, {name: chosen[name] for name in chosen if name in names}, "foreign.map")
    total = sum(feature.dim for feature in side.offered)
    one_vector = len(side.own) <= 1 and len(side.offered) == 1  # of which dimensions say it all
    if one_vector or (found is not None and found == list(range(total))):
        return None
    if found is None or (side.verb == "does" and len(found) != total):
        raise UserError(_unmatched(side, task, where))
    return found


def _unmatched(side: Side, task: Task, where: str) -> str:
    example = ", ".join(f"{feature.name}: ..." for feature in side.own)
    return (
        f"{where} does not fit task {task.name}: its policy {side.verb} {in_words(side.own)}, in this order; the task "
        f"has {in_words(side.offered)}; say which is which: foreign.map={{{example}}}"
    )
