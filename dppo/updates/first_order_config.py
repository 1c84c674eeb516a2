"""Settings of the update rules that take steps of Adam on a surrogate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dppo.surrogates import LogRatio, clip_ranges
from dppo.updates.config import UpdateConfig
from dppo.updates.surrogate import ClippedRatio, LogLikelihood, MaskedRatio, PenalisedRatio, Surrogate
from policies import UserError


@dataclass(frozen=True)
class FirstOrderConfig(UpdateConfig):
    """Settings of `first_order.FirstOrder` with the policy gradient itself as surrogate: VPG and A2C."""

    inner_gamma: float = 0.99
    """Discount per inner step ("denoising discount"); says nothing where K = 1."""
    epochs: int = 1
    """Passes over the rollout."""
    batch_size: int | None = None
    """At most so many (environment step, inner step) pairs in a minibatch; None: all of them."""
    inner_steps: int | None = None
    """Learn from so many inner steps of each environment step, drawn anew in each epoch; None: from all."""
    minibatches_of: Literal["pairs", "chains"] = "pairs"
    """Whether the inner steps of an environment step are dealt out to minibatches one by one, or stay together."""
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
        self.check_shares("inner_gamma")
        self.check_at_least_one("epochs", "batch_size", "inner_steps")
        self.check_not_negative("learning_rate", "entropy_coefficient")
        self.check_positive("target_kl")
        if self.log_prob_clamp is not None and not self.log_prob_clamp[0] < self.log_prob_clamp[1]:
            raise ValueError(f"log_prob_clamp must be [low, high], not {list(self.log_prob_clamp)}")

    def check_that_factors_are_not_needed(self, policy_type: str) -> None:
        """Refuse what is done to each factor of a likelihood, for a policy whose likelihood is one number.

        Raises:
            UserError: naming the settings.
        """
        wanted = {"log_ratio": "sum", "log_prob_clamp": None}
        others = {name: value for name, value in wanted.items() if getattr(self, name) != value}
        if others:
            names = " and ".join(f"algo.{name}={getattr(self, name)}" for name in others)
            settings = " ".join(f"algo.{name}={'null' if value is None else value}" for name, value in others.items())
            raise UserError(
                f"the likelihood of a {policy_type} policy is one number for the chunk, and {names} is for one of each "
                f"dimension: set {settings}, and an algo.clip that suits the ratio of a whole chunk"
            )

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
    """Settings of `first_order.FirstOrder` with the clipped ratio as surrogate."""

    epochs: int = 10
    batch_size: int | None = 2048
    clip: float = 0.2
    """Clip range of the ratio at the inner step next to the action."""
    clip_base: float | None = None
    """Clip range at the first inner step, smaller or larger; None: the same as ``clip``."""
    clip_rate: float = 3.0
    """How sharply the clip range grows or falls in between."""
    clip_above: float | None = None
    """``clip`` for ratios above 1, and at the other inner steps in the same proportion; None: the same as below 1."""
    dual_clip: float | None = None
    """Bound of the loss where an advantage is negative, in multiples of the advantage, above 1; None: no bound."""
    desired_kl: float | None = None
    """Adapt the learning rate to it: divide it by 1.5 after an update whose last epoch had a KL above twice this,
    multiply it by 1.5 where that was below half of this, tenfold at most either way. None: leave it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("clip", "clip_base", "clip_rate")
        self.check_positive("desired_kl", "clip_above", *(() if self.clip_above is None else ("clip",)))
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, not {self.dual_clip}")
        if self.desired_kl is not None:
            self.check_that_kl_can_be_seen()

    def surrogate(self, num_steps: int, device: torch.device) -> Surrogate:
        base = self.clip if self.clip_base is None else self.clip_base
        below = clip_ranges(num_steps, base, self.clip, self.clip_rate).to(device)
        above = below if self.clip_above is None else below * (self.clip_above / self.clip)
        return ClippedRatio(below, above, self.dual_clip)

    def next_speed(self, speed: float, kl: float) -> float:
        if self.desired_kl is None or self.desired_kl / 2 <= kl <= 2 * self.desired_kl:
            return speed
        return min(max(speed * (1 / 1.5 if kl > self.desired_kl else 1.5), 0.1), 10.0)


@dataclass(frozen=True)
class PPOMaskConfig(FirstOrderConfig):
    """Settings of `first_order.FirstOrder` with a trust region of each inner step in place of a clip."""

    epochs: int = 10
    batch_size: int | None = 2048
    max_kl: float = 0.03
    """KL(old || new) of an inner step, summed over action dimensions, beyond which nothing is to be gained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("max_kl")

    def surrogate(self, num_steps: int, device: torch.device) -> Surrogate:
        return MaskedRatio(self.max_kl)


@dataclass(frozen=True)
class PPOKLConfig(FirstOrderConfig):
    """Settings of `first_order.FirstOrder` with a KL penalty in the surrogate."""

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
