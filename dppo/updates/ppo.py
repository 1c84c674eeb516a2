"""Proximal policy optimisation over the inner steps of any policy (Schulman et al. 2017; Ren et al. 2024, alg. 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dppo.advantages import explained_variance, inner_discount, normalized
from dppo.critic import Critic
from dppo.precision import Precision, computing_in
from dppo.surrogates import LogRatio, approximate_kl, clip_ranges, clipped_loss, log_ratio, value_losses
from dppo.threads import single_thread
from dppo.updates.batch import Batch, Pairs, Record, Targets, minibatches
from dppo.updates.compiled import CompiledStep
from dppo.updates.gradient import GradientStep
from dppo.updates.objective import Objective, Rows, as_it_is
from dppo.updates.optimizer import FlatAdamW
from dppo.updates.schedule import Schedule, schedule_factor
from policies import Policy, log_prob_factors


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
    precision: Precision = "float32"
    """In which the policy's networks are evaluated during the update."""
    compile: bool = False
    """Compile the steps with `torch.compile`: faster for small networks, after some seconds at the start."""

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
    """The clipped surrogate of B pairs."""

    losses: Tensor
    """[B]"""
    log_ratios: Tensor
    """[B]"""
    clip: Tensor
    """[B], the range of each pair's ratio"""

    @staticmethod
    def joined(minibatches: Sequence[Rows]) -> PolicyLoss:
        """Of all pairs of several minibatches."""
        return PolicyLoss(*(torch.cat(column) for column in zip(*minibatches, strict=True)))

    def __len__(self) -> int:
        return len(self.losses)

    def metrics(self) -> Tensor:
        """[3]: mean loss, approximate KL, and share of ratios outside their range."""
        clipped = (self.log_ratios.expm1().abs() > self.clip).float()
        return torch.stack([self.losses.mean(), approximate_kl(self.log_ratios), clipped.mean()])


class PPO:
    """Minibatch epochs with Adam on the clipped surrogate; beside it the critic, each row once an epoch."""

    def __init__(self, config: PPOConfig, policy: Policy, critic: Critic, generator: torch.Generator) -> None:
        """``generator`` draws the minibatches."""
        self.config = config
        self.policy = policy
        self.critic = critic
        self.generator = generator
        self.actor_optimizer = FlatAdamW(
            policy.parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            what="policy",
        )
        self.critic_optimizer = FlatAdamW(
            critic.parameters(),
            learning_rate=config.critic_learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            what="critic",
        )
        self.actor_objective = Objective(
            policy,
            self.policy_rows,
            prepare=_with_normalized_advantages if config.normalize_advantages else as_it_is,
            allow=None if config.target_kl is None else _nearer_than(config.target_kl),
        )
        self.critic_objective = Objective(critic, self.value_rows)
        self._actor_step = self._stepper(self.actor_objective, self.actor_optimizer)
        self._critic_step = self._stepper(self.critic_objective, self.critic_optimizer)
        device = next(policy.parameters()).device
        base = config.clip if config.clip_base is None else config.clip_base
        self.clip_ranges = clip_ranges(policy.num_steps, base, config.clip, config.clip_rate).to(device)  # [K]
        self.discount = inner_discount(policy.num_steps, config.inner_gamma).to(device)  # [K]

    def _stepper(self, objective: Objective[Record], optimizer: FlatAdamW) -> Callable[[Record], tuple[Rows, bool]]:
        if self.config.compile:
            return CompiledStep(objective, optimizer)
        return GradientStep(objective, optimizer, threads=torch.get_num_threads())

    def policy_rows(self, pairs: Pairs) -> Rows:
        """What `PolicyLoss` holds of B pairs, their advantages taken as they are."""
        with computing_in(self.config.precision, pairs.obs.device):
            law = self.policy.transition(pairs.obs, pairs.latent, pairs.step)
        log_ratios = log_ratio(
            log_prob_factors(law, pairs.following),
            pairs.log_prob_factors,
            self.config.log_ratio,
            self.config.log_prob_clamp,
            self.policy.config.executed,
        )
        clip = self.clip_ranges[pairs.step]
        return clipped_loss(log_ratios, pairs.advantages * self.discount[pairs.step], clip), log_ratios, clip

    def value_rows(self, targets: Targets) -> Rows:
        """The critic's losses on B environment steps."""
        values = self.critic(self.policy.normalize_obs(targets.obs))
        return (value_losses(values, targets.returns, targets.values, self.config.value_clip),)

    @single_thread()
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
        self.actor_optimizer.learning_rate = factor * self.config.learning_rate
        self.critic_optimizer.learning_rate = factor * self.config.critic_learning_rate
        num_pairs = len(batch) * batch.num_steps
        count = math.ceil(num_pairs / self.config.batch_size)
        train_actor = iteration >= self.config.critic_warmup_iterations
        actor_steps = 0
        of_epochs: list[tuple[Tensor, int]] = []  # the actor's metrics, and over how many pairs they are
        of_critic_steps: list[Tensor] = []  # losses
        for _ in range(self.config.epochs):
            # Where minibatches are smaller than K, there are fewer of the critic's.
            of_critic = minibatches(batch.targets, len(batch), min(count, len(batch)), self.generator)
            of_actor = minibatches(batch.pairs, num_pairs, count, self.generator)
            seen: list[Rows] = []
            for _ in range(count):
                if train_actor:
                    rows, train_actor = self._actor_step(next(of_actor))
                    seen.append(rows)
                    actor_steps += train_actor
                targets = next(of_critic, None)
                if targets is not None:
                    (losses,), _ = self._critic_step(targets)
                    of_critic_steps.append(losses.mean())
            if seen:
                epoch = PolicyLoss.joined(seen)
                of_epochs.append((epoch.metrics(), len(epoch)))
        return {
            **_weighted_means(of_epochs),
            "value_loss": float(torch.stack(of_critic_steps).mean()),
            "explained_variance": explained_variance(batch.values, batch.returns),
            "actor_learning_rate": factor * self.config.learning_rate,
            "critic_learning_rate": factor * self.config.critic_learning_rate,
            "actor_steps": actor_steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers and the state of the generator."""
        return {
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }


def _with_normalized_advantages(pairs: Pairs) -> Pairs:
    return replace(pairs, advantages=normalized(pairs.advantages))


def _nearer_than(target_kl: float) -> Callable[[Rows], Tensor]:
    return lambda rows: approximate_kl(PolicyLoss(*rows).log_ratios) <= target_kl


def _weighted_means(of_epochs: list[tuple[Tensor, int]]) -> dict[str, float | None]:
    """`PolicyLoss.metrics` of all pairs; None where the actor learned from none."""
    names = ("policy_loss", "approx_kl", "clip_fraction")
    if not of_epochs:
        return dict.fromkeys(names)
    total = sum(size for _, size in of_epochs)
    means = torch.stack([metrics * (size / total) for metrics, size in of_epochs]).sum(0)
    return dict(zip(names, means.tolist(), strict=True))
