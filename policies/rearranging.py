"""A diffusion policy whose observations and actions are in another order, for a task that has them so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from policies.chain import DiffusionPolicy
from policies.networks.denoiser import Port

ONES = ("scale", "variance")
"""Statistics that are one where nothing is scaled; others are zero."""


def rearranged(
    policy: DiffusionPolicy, observation: Sequence[int], obs_dim: int, action: Sequence[int] | None = None
) -> DiffusionPolicy:
    """The same policy, but for the order of what it sees and does.

    Args:
        policy: sees Do entries and puts out Da.
        observation: [Do] at which of the ``obs_dim`` entries of the new observation the policy's are found; the others
            have no effect.
        obs_dim: Do from now on.
        action: [Da] where in the new action the policy's entries are to be; None: as they are.

    Raises:
        UserError: a network whose actions have to stay in their order.
    """
    made = type(policy)(dataclasses.replace(policy.config, obs_dim=obs_dim))
    weights = policy.state_dict()

    def move(part: str, ports: Sequence[Port], places: Sequence[int], size: int) -> None:
        for port in ports:
            name = f"{part}.{port.weight}"
            weights[name] = port.moved(weights[name], places, size)

    for part in ("network", "frozen"):
        if getattr(policy, part) is not None:
            move(part, policy.network.observation_ports(), observation, obs_dim)
            if action is not None:
                move(part, policy.network.action_ports(), action, len(action))
    if policy.config.sampler.learned_eta == "state":
        move("eta", [Port("network.0.weight", 1, 0, policy.config.history)], observation, obs_dim)
    if policy.config.sampler.learned_eta == "action" and action is not None:
        move("eta", [Port("logit", 0)], action, len(action))
    _move_statistics(weights, "obs_scaler", observation, obs_dim)
    if action is not None:
        _move_statistics(weights, "action_scaler", action, len(action))
    made.load_state_dict(weights)
    return policy.handed_on(made)


def _move_statistics(weights: dict[str, Tensor], part: str, places: Sequence[int], size: int) -> None:
    """Those of what was not there before leave it as it is."""
    for name, value in weights.items():
        if name.startswith(f"{part}.") and value.dim() == 1:
            filled = value.new_full((size,), float(name.endswith(ONES)))
            filled[list(places)] = value
            weights[name] = filled
