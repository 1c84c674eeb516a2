"""What all update rules can be told, and the checks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dppo.advantages import clipped_to_quantiles, normalized
from dppo.precision import Precision
from dppo.updates.schedule import Schedule


@dataclass(frozen=True)
class UpdateConfig:
    """Settings of an update rule, of its critic, and of the advantages that it is given."""

    gamma: float = 0.99
    """Discount per chunk."""
    gae_lambda: float = 0.95
    reward_scaling: bool = True
    """Divide rewards by the running deviation of the discounted return."""
    normalize_advantages: bool = True
    """To zero mean and unit deviation in each minibatch."""
    advantage_quantiles: tuple[float, float] | None = None
    """Then clip them to these quantiles of the minibatch, [low, high]; None: leave them."""

    critic_learning_rate: float = 1e-3
    critic_epochs: int | None = None
    """Passes of the critic over the rollout; None: as many as the policy's."""
    critic_batch_size: int | None = None
    """At most so many environment steps in a minibatch of the critic; None: as many minibatches as the policy has."""
    value_clip: float | None = None
    """Clip of the critic's move away from its estimates before the update; None: no clip."""
    weight_decay: float = 0.0
    """Of whatever Adam trains."""
    max_grad_norm: float | None = 0.5
    """Clip of the gradient norm, of each network that Adam trains."""
    schedule: Schedule = "constant"
    """Of all learning rates, over the whole training."""
    final_learning_rate_share: float = 0.0
    """Where a descending schedule ends, as a share of the learning rate."""
    critic_warmup_iterations: int = 0
    """First iterations in which only the critic learns."""

    precision: Precision = "float32"
    """In which the policy's networks are evaluated during the update."""
    compile: bool = False
    """Compile Adam's steps with `torch.compile`: faster for small networks, after some seconds at the start."""

    def __post_init__(self) -> None:
        self.check_shares("gamma", "gae_lambda", "final_learning_rate_share")
        if self.advantage_quantiles is not None:
            low, high = self.advantage_quantiles
            if not 0 <= low < high <= 1:
                raise ValueError(f"advantage_quantiles must be [low, high] in [0, 1], not [{low}, {high}]")
        self.check_at_least_one("critic_epochs", "critic_batch_size")
        self.check_not_negative("critic_learning_rate", "weight_decay", "critic_warmup_iterations")
        self.check_positive("max_grad_norm", "value_clip")

    def weights(self, advantages: Tensor, discount: Tensor | float = 1.0) -> Tensor:
        """What pairs are weighted with: their advantages over one another, worth less far from the action.

        Args:
            advantages: of all that are looked at together.
            discount: broadcasts to them, `inner_discount` of their inner steps.
        """
        if self.normalize_advantages:
            advantages = normalized(advantages)
        if self.advantage_quantiles is not None:
            advantages = clipped_to_quantiles(advantages, *self.advantage_quantiles)
        return advantages * discount

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def check_shares(self, *names: str) -> None:
        """Refuse values outside [0, 1]."""
        for name, value in self._given(*names).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {value}")

    def check_at_least_one(self, *names: str) -> None:
        """Refuse values below 1."""
        for name, value in self._given(*names).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def check_not_negative(self, *names: str) -> None:
        """Refuse values below 0, and NaN."""
        for name, value in self._given(*names).items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, but is {value}")

    def check_positive(self, *names: str) -> None:
        """Refuse values that are not above 0."""
        for name, value in self._given(*names).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
