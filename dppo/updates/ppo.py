"""Proximal policy optimisation over the inner steps of any policy (Schulman et al. 2017; Ren et al. 2024, alg. 1)."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dppo.advantages import explained_variance, inner_discount, normalized
from dppo.critic import Critic
from dppo.surrogates import LogRatio, approximate_kl, clip_ranges, clipped_loss, log_ratio, value_loss
from dppo.updates.batch import Batch, minibatches
from dppo.updates.schedule import Schedule, schedule_factor, set_learning_rate
from policies import Policy, UserError, log_prob_factors

MICRO_BATCH = 5000
"""Pairs whose gradient a CPU computes at once. A larger minibatch's is summed up from such parts: what lies between its
layers then stays in the processor's cache, and its memory is not returned to the system and fetched again each time."""


@dataclass(frozen=True)
class PPOConfig:
    """Settings of `PPO` and of the advantages that it is given."""

    gamma: float = 0.99
    """Discount per chunk."""
    gae_lambda: float = 0.95
    inner_gamma: float = 0.99
    """Discount per inner step ("denoising discount"); says nothing where K = 1."""
    reward_scaling: bool = True
    """Divide rewards by the running deviation of the discounted return."""

    epochs: int = 10
    """Passes over the rollout."""
    batch_size: int = 2048
    """At most so many (environment step, inner step) pairs in a minibatch."""
    learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    """Of both learning rates, over the whole training."""
    final_learning_rate_share: float = 0.0
    """Where a descending schedule ends, as a share of the learning rate."""
    weight_decay: float = 0.0
    max_grad_norm: float | None = 0.5
    """Clip of the gradient norm, of actor and critic each."""
    critic_warmup_iterations: int = 0
    """First iterations in which only the critic learns."""

    clip: float = 0.2
    """Clip range of the ratio at the inner step next to the action."""
    clip_base: float | None = None
    """Clip range at the first inner step; None: the same as ``clip``."""
    clip_rate: float = 3.0
    """How sharply the clip range grows in between."""
    log_ratio: LogRatio = "sum"
    """``sum``: true ratio of the chunk; ``mean``: over its dimensions, as the original DPPO has it."""
    log_prob_clamp: tuple[float, float] | None = None
    """Bounds of each factor's log-likelihood; [-5, 2] in the original DPPO."""
    normalize_advantages: bool = True
    """To zero mean and unit deviation in each minibatch."""
    value_clip: float | None = None
    """Clip of the critic's move away from its estimates before the update; None: no clip."""
    target_kl: float | None = None
    """Stop the actor's epochs once a minibatch's `approximate_kl` exceeds this; None: never."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, not {self.epochs} and {self.batch_size}")
        for name in ("gamma", "gae_lambda", "inner_gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("learning_rate", "critic_learning_rate", "weight_decay", "clip", "clip_base", "clip_rate"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("max_grad_norm", "value_clip", "target_kl"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, or null for none, not {getattr(self, name)}")
        if not 0 <= self.final_learning_rate_share <= 1:
            raise ValueError(f"final_learning_rate_share must lie in [0, 1], not {self.final_learning_rate_share}")
        if self.log_prob_clamp is not None and not self.log_prob_clamp[0] < self.log_prob_clamp[1]:
            raise ValueError(f"log_prob_clamp must be [low, high], not {list(self.log_prob_clamp)}")


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate of one minibatch."""

    loss: Tensor
    """Scalar."""
    log_ratios: Tensor
    """[B]"""
    approx_kl: Tensor
    """Scalar."""
    clip_fraction: Tensor
    """Scalar, share of ratios outside their range."""


class PPO:
    """Minibatch epochs with Adam on the clipped surrogate; beside it the critic, each row once an epoch."""

    def __init__(self, config: PPOConfig, policy: Policy, critic: Critic, generator: torch.Generator) -> None:
        """``generator`` draws the minibatches."""
        self.config = config
        self.policy = policy
        self.critic = critic
        self.generator = generator
        self.actor_parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.actor_optimizer = torch.optim.AdamW(
            self.actor_parameters, lr=config.learning_rate, weight_decay=config.weight_decay, eps=1e-8
        )
        self.critic_optimizer = torch.optim.AdamW(
            critic.parameters(), lr=config.critic_learning_rate, weight_decay=config.weight_decay
        )
        device = self.actor_parameters[0].device
        base = config.clip if config.clip_base is None else config.clip_base
        self.clip_ranges = clip_ranges(policy.num_steps, base, config.clip, config.clip_rate).to(device)  # [K]
        self.discount = inner_discount(policy.num_steps, config.inner_gamma).to(device)  # [K]

    def policy_loss(self, batch: Batch, rows: Tensor, steps: Tensor, advantages: Tensor | None = None) -> PolicyLoss:
        """The clipped surrogate on the pairs (rows [B] of the batch, inner steps [B]).

        ``advantages`` [B] are those of the actions, where they were normalised over more than these pairs.
        """
        law = self.policy.transition(batch.obs[rows], batch.chain[rows, steps], steps)
        new_factors = log_prob_factors(law, batch.chain[rows, steps + 1])
        old_factors = batch.log_prob_factors[rows, steps]
        log_ratios = log_ratio(
            new_factors,
            old_factors,
            self.config.log_ratio,
            self.config.log_prob_clamp,
            self.policy.config.executed,
        )
        advantages = self._advantages(batch, rows) if advantages is None else advantages
        clip = self.clip_ranges[steps]
        loss = clipped_loss(log_ratios, advantages * self.discount[steps], clip).mean()
        with torch.no_grad():
            clip_fraction = (log_ratios.expm1().abs() > clip).float().mean()
            return PolicyLoss(loss, log_ratios, approximate_kl(log_ratios), clip_fraction)

    def _advantages(self, batch: Batch, rows: Tensor) -> Tensor:
        advantages = batch.advantages[rows]
        return normalized(advantages) if self.config.normalize_advantages else advantages

    def value_loss(self, batch: Batch, rows: Tensor) -> Tensor:
        """The critic's loss on the rows [B] of the batch."""
        values = self.critic(self.policy.normalize_obs(batch.obs[rows]))
        return value_loss(values, batch.returns[rows], batch.values[rows], self.config.value_clip)

    def update(self, batch: Batch, *, progress: float, iteration: int) -> dict[str, float | None]:
        """One policy update; its metrics.

        Args:
            batch: the transitions of one rollout.
            progress: share of the training that is done, in [0, 1], for the schedules.
            iteration: how many updates came before.

        Raises:
            UserError: a loss that is not finite; the parameters are those before the step that it would have led to.
        """
        factor = schedule_factor(self.config.schedule, progress, final=self.config.final_learning_rate_share)
        set_learning_rate(self.actor_optimizer, factor * self.config.learning_rate)
        set_learning_rate(self.critic_optimizer, factor * self.config.critic_learning_rate)
        pairs = len(batch) * batch.num_steps
        count = math.ceil(pairs / self.config.batch_size)
        train_actor = iteration >= self.config.critic_warmup_iterations
        seen: dict[str, list[Tensor]] = defaultdict(list)
        actor_steps = 0
        for _ in range(self.config.epochs):
            critic_parts = minibatches(len(batch), min(count, len(batch)), self.generator)
            for pair in minibatches(pairs, count, self.generator):
                if train_actor:
                    train_actor = self._actor_step(batch, pair, seen)
                    actor_steps += train_actor
                rows = next(critic_parts, None)  # where minibatches are smaller than K, there are fewer of these
                if rows is not None:
                    self._critic_step(batch, rows, seen)
        metrics: dict[str, float | None] = {name: float(torch.stack(values).mean()) for name, values in seen.items()}
        return {
            "policy_loss": None,
            "approx_kl": None,
            "clip_fraction": None,
            **metrics,
            "explained_variance": explained_variance(batch.values, batch.returns),
            "actor_learning_rate": factor * self.config.learning_rate,
            "critic_learning_rate": factor * self.config.critic_learning_rate,
            "actor_steps": actor_steps,
        }

    def _actor_step(self, batch: Batch, pair: Tensor, seen: dict[str, list[Tensor]]) -> bool:
        """Learn from the pairs [B]; False where the target KL says to stop."""
        rows, steps = pair // batch.num_steps, pair % batch.num_steps
        size = MICRO_BATCH if rows.device.type == "cpu" else len(rows)
        advantages = self._advantages(batch, rows)
        self.actor_optimizer.zero_grad()
        parts = []
        for part in zip(rows.split(size), steps.split(size), advantages.split(size), strict=True):
            result = self.policy_loss(batch, *part)
            share = len(part[0]) / len(rows)
            (share * result.loss).backward()
            parts.append(share * torch.stack([result.loss.detach(), result.approx_kl, result.clip_fraction]))
        loss, approx_kl, clip_fraction = torch.stack(parts).sum(0)
        seen["policy_loss"].append(loss)
        seen["approx_kl"].append(approx_kl)
        seen["clip_fraction"].append(clip_fraction)
        if self.config.target_kl is not None and approx_kl > self.config.target_kl:
            return False
        apply_gradients(loss, self.actor_optimizer, self.actor_parameters, self.config.max_grad_norm, "policy")
        return True

    def _critic_step(self, batch: Batch, rows: Tensor, seen: dict[str, list[Tensor]]) -> None:
        loss = self.value_loss(batch, rows)
        seen["value_loss"].append(loss.detach())
        self.critic_optimizer.zero_grad()
        loss.backward()
        parameters = list(self.critic.parameters())
        apply_gradients(loss.detach(), self.critic_optimizer, parameters, self.config.max_grad_norm, "value")

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers and the state of the generator."""
        return {
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }


def apply_gradients(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    max_grad_norm: float | None,
    what: str,
) -> None:
    """One optimiser step down the gradient that the backward pass of ``loss`` left.

    Raises:
        UserError: the loss or its gradient is not finite; no step is taken.
    """
    advice = "lower the learning rate or check the rewards' scale"
    if not torch.isfinite(loss):
        raise UserError(f"the {what} loss became {loss.item()}; {advice}")
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
    if not torch.isfinite(norm):
        raise UserError(f"the gradient of the {what} loss became {norm.item()}; {advice}")
    optimizer.step()
