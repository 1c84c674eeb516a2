"""Update rules that imitate what was sampled, the better the more: RWR and AWR, on whatever a policy imitates with.

Peters and Schaal 2007; Peng et al. 2019; for diffusion policies, DRWR and DAWR of Ren et al. 2024, section 5. Here they
learn from the last rollout only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dppo.critic import Critic, LatentCritic
from dppo.precision import computing_in
from dppo.threads import single_thread
from dppo.updates.batch import Batch, minibatches, partition
from dppo.updates.config import UpdateConfig
from dppo.updates.critic_fit import CriticFit
from dppo.updates.objective import Objective, Outcome, Rows
from dppo.updates.optimizer import FlatAdamW
from dppo.updates.schedule import schedule_factor
from dppo.updates.step import make_step
from policies import Policy

METRICS = ("policy_loss", "weight", "weight_clip_fraction")
"""That an update has only if the policy learns in it."""


@dataclass(frozen=True)
class WeightedImitationConfig(UpdateConfig):
    """Settings of `WeightedImitation`."""

    epochs: int = 10
    """Passes over the rollout."""
    batch_size: int | None = 256
    """At most so many environment steps in a minibatch; None: all of them."""
    learning_rate: float = 3e-4
    temperature: float = 1.0
    """The lower, the more the best count."""
    max_weight: float = 20.0
    """Largest weight of an action; that of an advantage of 0 is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least_one("epochs", "batch_size")
        self.check_not_negative("learning_rate")
        self.check_positive("temperature", "max_weight")


class WeightedImitation:
    """Minibatch epochs with Adam on the imitation loss of sampled chunks, each weighted by its advantage's exponential.

    The whole chunk is imitated, also what was not executed of it. A policy's loss need not be a likelihood (that of a
    diffusion policy is an error of its denoiser), nor know of inner steps: so a chunk has one advantage, that of the
    last.
    """

    def __init__(
        self,
        config: WeightedImitationConfig,
        policy: Policy,
        critic: Critic | LatentCritic | None,
        generator: torch.Generator,
    ) -> None:
        """``generator`` draws minibatches, and what is random in exercises."""
        self.config = config
        self.policy = policy
        self.generator = generator
        self.critic_fit = None if critic is None else CriticFit(config, policy, critic, generator)
        self.optimizer = FlatAdamW(
            policy.parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            what="policy",
        )
        objective = Objective[tuple[Tensor, ...]](policy, self.rows)
        self._step = make_step(objective, self.optimizer, compile=config.compile)

    def rows(self, exercise: tuple[Tensor, ...]) -> Rows:
        """The losses of weights [B] and of an exercise of B rows."""
        weights, *columns = exercise
        with computing_in(self.config.precision, weights.device):
            return (weights * self.policy.exercise_losses(*columns),)

    def weights(self, batch: Batch) -> Tensor:
        """[M], of each environment step."""
        advantages = self.config.weights(batch.advantages[:, -1])
        return (advantages / self.config.temperature).clamp(max=math.log(self.config.max_weight)).exp()

    @single_thread()
    def update(self, batch: Batch, *, progress: float, iteration: int) -> dict[str, float | None]:
        """One update of policy and critic; its metrics. See `FirstOrder.update`."""
        config = self.config
        factor = schedule_factor(config.schedule, progress, final=config.final_learning_rate_share)
        self.optimizer.learning_rate = factor * config.learning_rate
        count = 1 if config.batch_size is None else math.ceil(len(batch) / config.batch_size)
        learns = iteration >= config.critic_warmup_iterations
        metrics: dict[str, float | None] = dict.fromkeys(METRICS)
        if learns:
            metrics |= self._learn(batch, count)
        if self.critic_fit is not None:
            metrics |= self.critic_fit.fit(
                batch, epochs=config.epochs, minibatches_per_epoch=count, learning_rate_factor=factor
            )
        skipped = self.optimizer.skips.since_last()
        return {
            **metrics,
            **batch.statistics(),
            "actor_learning_rate": self.optimizer.learning_rate,
            "actor_steps": config.epochs * count - skipped if learns else 0,
            "skipped_updates": skipped,
        }

    def _learn(self, batch: Batch, count: int) -> dict[str, float]:
        weights = self.weights(batch)

        def gather(rows: Tensor) -> tuple[Tensor, ...]:
            action = self.policy.chunk_of(batch.chain[rows, -1])
            return weights[rows], *self.policy.imitation_exercise(batch.obs[rows], action, self.generator)

        losses: list[Tensor] = []
        for _ in range(self.config.epochs):
            for exercise in minibatches(gather, partition(len(batch), count, self.generator)):
                (of_rows,), outcome = self._step(exercise)
                if outcome is Outcome.TAKEN:
                    losses.append(of_rows)
        if not losses:
            return {}
        clipped = weights >= self.config.max_weight * (1 - 1e-6)
        means = torch.stack([torch.cat(losses).mean(), weights.mean(), clipped.float().mean()])
        return dict(zip(METRICS, means.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers and the state of the generator."""
        fit = {} if self.critic_fit is None else {"critic_optimizer": self.critic_fit.state_dict()}
        return {"actor_optimizer": self.optimizer.state_dict(), **fit, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.optimizer.load_state_dict(state["actor_optimizer"])
        if self.critic_fit is not None:
            self.critic_fit.load_state_dict(state["critic_optimizer"])
        self.generator.set_state(state["generator"])
