"""Fitting the critic to the returns of a rollout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dppo.critic import Critic, LatentCritic
from dppo.surrogates import value_losses
from dppo.updates.batch import Batch, Targets, minibatches, partition
from dppo.updates.config import UpdateConfig
from dppo.updates.objective import Objective, Outcome, Rows
from dppo.updates.optimizer import FlatAdamW
from dppo.updates.step import make_step
from policies import Policy


class CriticFit:
    """Minibatch epochs with Adam; each environment step is met once an epoch (or inner step)."""

    def __init__(
        self, config: UpdateConfig, policy: Policy, critic: Critic | LatentCritic, generator: torch.Generator
    ) -> None:
        """The policy scales the observations; ``generator`` draws the minibatches."""
        self.config = config
        self.policy = policy
        self.critic = critic
        self.generator = generator
        self.optimizer = FlatAdamW(
            critic.parameters(),
            learning_rate=config.critic_learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            what="critic",
        )
        self.objective = Objective(critic, self.rows)
        self._step = make_step(self.objective, self.optimizer, compile=config.compile)

    def rows(self, targets: Targets) -> Rows:
        """The losses of B environment steps."""
        values = self.critic(self.policy.normalize_obs(targets.obs), *targets.inner)
        return (value_losses(values, targets.returns, targets.values, self.config.value_clip),)

    def fit(
        self, batch: Batch, *, epochs: int, minibatches_per_epoch: int, learning_rate_factor: float
    ) -> dict[str, float | None]:
        """Learn from a rollout; metrics: mean loss on the way, learning rate, and how many updates were skipped.

        Args:
            batch: the transitions.
            epochs: passes over them, unless the configuration says how many.
            minibatches_per_epoch: in how many steps, unless the configuration says how large a minibatch is.
            learning_rate_factor: on the configuration's learning rate.

        Raises:
            NotFiniteError: too many updates in a row were skipped; the parameters are those before them.
        """
        self.optimizer.learning_rate = learning_rate_factor * self.config.critic_learning_rate
        size = self.config.critic_batch_size
        rows = batch.num_targets
        count = minibatches_per_epoch if size is None else math.ceil(len(batch) / size)
        losses: list[Tensor] = []
        for _ in range(self.config.critic_epochs or epochs):
            for targets in minibatches(batch.targets, partition(rows, min(count, rows), self.generator)):
                (of_rows,), outcome = self._step(targets)
                if outcome is Outcome.TAKEN:
                    losses.append(of_rows.mean())
        return {
            "value_loss": float(torch.stack(losses).mean()) if losses else None,
            "critic_learning_rate": self.optimizer.learning_rate,
            "skipped_critic_updates": self.optimizer.skips.since_last(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimiser."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.optimizer.load_state_dict(state)
