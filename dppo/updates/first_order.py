"""Update rules that take steps of Adam on a surrogate, over the inner steps of any policy: VPG, A2C, PPO, PPO-KL.

Schulman et al. 2017; Ren et al. 2024, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dppo.advantages import explained_variance, inner_discount, normalized
from dppo.critic import Critic, SharedCritic
from dppo.precision import computing_in
from dppo.surrogates import LogRatio, approximate_kl, clip_ranges, entropy_terms, log_ratio, value_losses
from dppo.threads import single_thread
from dppo.updates.batch import Batch, JointPairs, Pairs, minibatches
from dppo.updates.config import UpdateConfig
from dppo.updates.critic_fit import CriticFit
from dppo.updates.objective import Objective, Rows, as_it_is
from dppo.updates.optimizer import FlatAdamW
from dppo.updates.schedule import schedule_factor
from dppo.updates.step import make_step
from dppo.updates.surrogate import ClippedRatio, LogLikelihood, PenalisedRatio, Surrogate
from policies import Policy, log_prob_factors


@dataclass(frozen=True)
class FirstOrderConfig(UpdateConfig):
    """Settings of `FirstOrder` with the policy gradient itself as surrogate: VPG and A2C."""

    epochs: int = 1
    """Passes over the rollout."""
    batch_size: int | None = None
    """At most so many (environment step, inner step) pairs in a minibatch; None: all of them."""
    learning_rate: float = 3e-4

    entropy_coefficient: float = 0.0
    """Of the policy's entropy, as a bonus."""
    target_kl: float | None = None
    """Take no more steps in an update once the `approximate_kl` exceeds this; None: never mind."""
    target_kl_of: Literal["minibatch", "epoch"] = "minibatch"
    """What it is estimated over, and looked at before the next step or after all steps of."""
    log_ratio: LogRatio = "sum"
    """``sum``: true ratio of the chunk; ``mean``: over its dimensions, as the original DPPO has it."""
    log_prob_clamp: tuple[float, float] | None = None
    """Bounds of each factor's log-likelihood; [-5, 2] in the original DPPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least_one("epochs", "batch_size")
        self.check_not_negative("learning_rate", "entropy_coefficient")
        self.check_positive("target_kl")
        if self.log_prob_clamp is not None and not self.log_prob_clamp[0] < self.log_prob_clamp[1]:
            raise ValueError(f"log_prob_clamp must be [low, high], not {list(self.log_prob_clamp)}")

    def check_that_kl_can_be_seen(self) -> None:
        """Refuse a single step per update: the KL is that before each step, and before the first it is 0."""
        if self.epochs == 1 and self.batch_size is None:
            raise ValueError("desired_kl needs more than one step per update: set epochs or batch_size")

    def surrogate(self, num_steps: int, device: torch.device) -> Surrogate:
        """What is minimised, for a policy of K = ``num_steps`` inner steps."""
        return LogLikelihood()

    def next_speed(self, speed: float, kl: float) -> float:
        """A factor on the learning rate, from that of an update and the KL of its last epoch."""
        return speed


@dataclass(frozen=True)
class PPOConfig(FirstOrderConfig):
    """Settings of `FirstOrder` with the clipped ratio as surrogate."""

    epochs: int = 10
    batch_size: int | None = 2048
    clip: float = 0.2
    """Clip range of the ratio at the inner step next to the action."""
    clip_base: float | None = None
    """Clip range at the first inner step; None: the same as ``clip``."""
    clip_rate: float = 3.0
    """How sharply the clip range grows in between."""
    dual_clip: float | None = None
    """Bound of the loss where an advantage is negative, in multiples of the advantage, above 1; None: no bound."""
    desired_kl: float | None = None
    """Adapt the learning rate to it: divide it by 1.5 after an update whose last epoch had a KL above twice this,
    multiply it by 1.5 where that was below half of this, tenfold at most either way. None: leave it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("clip", "clip_base", "clip_rate")
        self.check_positive("desired_kl")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, not {self.dual_clip}")
        if self.desired_kl is not None:
            self.check_that_kl_can_be_seen()

    def surrogate(self, num_steps: int, device: torch.device) -> Surrogate:
        base = self.clip if self.clip_base is None else self.clip_base
        return ClippedRatio(clip_ranges(num_steps, base, self.clip, self.clip_rate).to(device), self.dual_clip)

    def next_speed(self, speed: float, kl: float) -> float:
        if self.desired_kl is None or self.desired_kl / 2 <= kl <= 2 * self.desired_kl:
            return speed
        return min(max(speed * (1 / 1.5 if kl > self.desired_kl else 1.5), 0.1), 10.0)


@dataclass(frozen=True)
class PPOKLConfig(FirstOrderConfig):
    """Settings of `FirstOrder` with a KL penalty in the surrogate."""

    epochs: int = 10
    batch_size: int | None = 2048
    kl_penalty: float = 1.0
    """Its coefficient beta at first."""
    desired_kl: float = 0.01
    """Beta is doubled or halved after an update whose last epoch had a KL 1.5 times above or below this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("kl_penalty", "desired_kl")
        self.check_that_kl_can_be_seen()

    def surrogate(self, num_steps: int, device: torch.device) -> Surrogate:
        return PenalisedRatio(self.kl_penalty, self.desired_kl, device)


class FirstOrder:
    """Minibatch epochs with Adam on a surrogate; the critic is fitted after it, or with it if it is shared."""

    def __init__(
        self, config: FirstOrderConfig, policy: Policy, critic: Critic | SharedCritic, generator: torch.Generator
    ) -> None:
        """``generator`` draws the minibatches."""
        self.config = config
        self.policy = policy
        self.generator = generator
        self.critic_fit = None if isinstance(critic, SharedCritic) else CriticFit(config, policy, critic, generator)
        self.shared = critic if isinstance(critic, SharedCritic) else None
        trained = policy if self.shared is None else nn.ModuleList([policy, critic])
        self.optimizer = FlatAdamW(
            trained.parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            what="policy",
        )
        device = next(policy.parameters()).device
        self.surrogate = config.surrogate(policy.num_steps, device)
        self.discount = inner_discount(policy.num_steps, config.inner_gamma).to(device)  # [K]
        self.speed = 1.0
        """What the KL has made of the learning rate."""
        limit = config.target_kl if config.target_kl_of == "minibatch" else None
        self.objective = Objective(
            trained,
            self.rows,
            prepare=_with_normalized_advantages if config.normalize_advantages else as_it_is,
            allow=None if limit is None else lambda rows: ~(approximate_kl(rows[1]) > limit),  # NaN is found later
        )
        self._step = make_step(self.objective, self.optimizer, compile=config.compile)
        names = (*self.surrogate.known, "policy_loss", "value_loss") if self.shared else self.surrogate.known
        # Of metrics that are means over pairs.
        self._names = ("loss" if self.shared else "policy_loss", "approx_kl", *names)

    def rows(self, pairs: Pairs) -> Rows:
        """Of B pairs, their advantages taken as they are: losses, log-ratios, and what the surrogate knows."""
        with computing_in(self.config.precision, pairs.obs.device):
            law = self.policy.transition(pairs.obs, pairs.latent, pairs.step)
        factors = log_prob_factors(law, pairs.following)
        log_ratios = log_ratio(
            factors,
            pairs.log_prob_factors,
            self.config.log_ratio,
            self.config.log_prob_clamp,
            self.policy.config.executed,
        )
        advantages = pairs.advantages * self.discount[pairs.step]
        losses, *known = self.surrogate.rows(log_ratios, advantages, pairs.step)
        if self.config.entropy_coefficient > 0:
            losses = losses - self.config.entropy_coefficient * entropy_terms(
                law, factors, log_ratios, self.policy.config.executed
            )
        if self.shared is not None:
            assert isinstance(pairs, JointPairs)
            values = self.shared(self.policy.normalize_obs(pairs.obs))
            value_terms = value_losses(values, pairs.returns, pairs.values, self.config.value_clip)
            known += [losses, value_terms]
            losses = losses + self.shared.coefficient * value_terms
        return losses, log_ratios, *known

    @single_thread()
    def update(self, batch: Batch, *, progress: float, iteration: int) -> dict[str, float | None]:
        """One update of policy and critic; its metrics.

        Args:
            batch: the transitions of one rollout.
            progress: share of the training that is done, in [0, 1], for the schedules.
            iteration: how many updates came before.

        Raises:
            UserError: a loss that is not finite; the parameters are those before the step that it would have led to.
        """
        config = self.config
        factor = schedule_factor(config.schedule, progress, final=config.final_learning_rate_share)
        num_pairs = len(batch) * batch.num_steps
        count = 1 if config.batch_size is None else math.ceil(num_pairs / config.batch_size)
        self.optimizer.learning_rate = factor * self.speed * config.learning_rate
        metrics: dict[str, float | None] = dict.fromkeys(self._names)
        steps = 0
        if iteration >= config.critic_warmup_iterations:
            learned, steps = self._epochs(batch, count)
            metrics |= learned
            if config.epochs * count == 1:
                metrics["approx_kl"] = None  # it is that before the only step, where nothing has changed yet
        if self.critic_fit is not None:
            metrics |= self.critic_fit.fit(
                batch, epochs=config.epochs, minibatches_per_epoch=count, learning_rate_factor=factor
            )
        return {
            **metrics,
            "entropy": batch.entropy,
            "explained_variance": explained_variance(batch.values, batch.returns),
            "actor_learning_rate": self.optimizer.learning_rate,
            "actor_steps": steps,
        }

    def _epochs(self, batch: Batch, count: int) -> tuple[dict[str, float], int]:
        """Learn from a rollout in ``count`` minibatches an epoch; metrics over all pairs seen, and the steps taken."""
        config = self.config
        of_epochs: list[tuple[Tensor, int]] = []  # metrics, and over how many pairs they are
        steps, kl = 0, 0.0
        for _ in range(config.epochs):
            seen: list[Rows] = []
            taken = True
            gather = batch.pairs if self.shared is None else batch.joint_pairs
            for pairs in minibatches(gather, len(batch) * batch.num_steps, count, self.generator):
                rows, taken = self._step(pairs)
                seen.append(rows)
                if not taken:
                    break
                steps += 1
            losses, log_ratios, *known = (torch.cat(column) for column in zip(*seen, strict=True))
            means = torch.stack([losses.mean(), approximate_kl(log_ratios), *(column.mean() for column in known)])
            kl = float(means[1])
            of_epochs.append((means, len(losses)))
            if not taken or (config.target_kl is not None and kl > config.target_kl):
                break
        metrics = self.surrogate.adapt(kl)
        self.speed = config.next_speed(self.speed, kl)
        total = sum(size for _, size in of_epochs)
        means = torch.stack([mean * (size / total) for mean, size in of_epochs]).sum(0).tolist()
        return {**dict(zip(self._names, means, strict=True)), **metrics}, steps

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers, what was adapted, and the state of the generator."""
        return {
            "actor_optimizer": self.optimizer.state_dict(),
            **({} if self.critic_fit is None else {"critic_optimizer": self.critic_fit.state_dict()}),
            "surrogate": self.surrogate.state_dict(),
            "speed": self.speed,
            "generator": self.generator.get_state(),
        }


def _with_normalized_advantages(pairs: Pairs) -> Pairs:
    return replace(pairs, advantages=normalized(pairs.advantages))
