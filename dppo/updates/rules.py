"""Update rules by the name that configurations give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from dppo.critic import AnyCritic, SharedCritic
from dppo.updates.batch import Batch
from dppo.updates.config import UpdateConfig
from dppo.updates.extra import ExtraLoss
from dppo.updates.first_order import FirstOrder
from dppo.updates.first_order_config import FirstOrderConfig, PPOConfig, PPOKLConfig, PPOMaskConfig
from dppo.updates.natural import NaturalConfig, NaturalGradient, TRPOConfig
from dppo.updates.weighted_imitation import WeightedImitation, WeightedImitationConfig
from policies import DiffusionPolicy, Policy, UserError

CONFIGS: dict[str, type[UpdateConfig]] = {
    "a2c": FirstOrderConfig,
    "awr": WeightedImitationConfig,
    "npg": NaturalConfig,
    "ppo": PPOConfig,
    "ppo_kl": PPOKLConfig,
    "ppo_mask": PPOMaskConfig,
    "rwr": WeightedImitationConfig,
    "trpo": TRPOConfig,
    "vpg": FirstOrderConfig,
}
"""The settings of each."""


class UpdateRule(Protocol):
    """How a policy and its critic learn from a rollout."""

    generator: torch.Generator
    """Draws all its random numbers."""

    def update(self, batch: Batch, *, progress: float, iteration: int) -> dict[str, float | None]:
        """One update; its metrics. See `FirstOrder.update`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that it has learned beside the networks, as tensors (live ones) and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, of a rule of the same kind and networks of the same shapes."""
        ...


def make_update_rule(
    config: UpdateConfig,
    policy: Policy,
    critic: AnyCritic | None,
    generator: torch.Generator,
    extras: Sequence[ExtraLoss] = (),
) -> UpdateRule:
    """The rule of a configuration.

    Args:
        config: its settings.
        policy: what it trains.
        critic: what it trains beside it, if anything.
        generator: draws its random numbers, on the policy's device.
        extras: losses of the policy beside the rule's own.

    Raises:
        UserError: it is to be compiled and cannot be, or needs a critic of its own and has a shared one.
    """
    if isinstance(critic, SharedCritic) and not isinstance(config, FirstOrderConfig):
        raise UserError("this rule's steps are of the policy alone: choose critic=mlp in place of critic=shared")
    if critic is None and config.critic_warmup_iterations:
        raise UserError("there is no critic to warm up: set algo.critic_warmup_iterations=0")
    if isinstance(critic, SharedCritic) and config.critic_warmup_iterations:
        raise UserError("a critic that shares the policy's network cannot learn alone: set critic_warmup_iterations=0")
    if isinstance(config, FirstOrderConfig):
        return FirstOrder(config, policy, critic, generator, extras)
    if extras:
        raise UserError("only rules that take steps of Adam on a surrogate have room for this anchor: choose kl_reward")
    assert not isinstance(critic, SharedCritic)
    if isinstance(config, WeightedImitationConfig):
        if isinstance(policy, DiffusionPolicy) and policy.eta is not None:
            raise UserError("the imitation loss says nothing of eta: set sampler.learned_eta=null, or choose algo=ppo")
        return WeightedImitation(config, policy, critic, generator)
    assert isinstance(config, NaturalConfig)
    return NaturalGradient(config, policy, critic, generator)
