"""Losses beside the surrogate, of the same pairs and in the same steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from dppo.critic import SharedCritic
from dppo.surrogates import value_losses
from dppo.updates.batch import Batch, Pairs
from policies import Policy


@dataclass(frozen=True)
class Scored:
    """What the surrogate has found out about B pairs."""

    pairs: Pairs
    law: Distribution
    """Of the next latents, batch shape [B]."""
    factors: Tensor
    """[B, *F], log-likelihood factors of what was sampled."""
    log_ratios: Tensor
    """[B], log pi_new / pi_old."""
    log_likelihoods: Callable[[Distribution, Tensor], Tensor]
    """[B], of latents under a law, reduced as log-ratios are."""


class ExtraLoss(ABC):
    """The mean over pairs of a loss, times a coefficient."""

    name: str
    """Of its metric, the loss without the coefficient."""
    coefficient: float

    def begin(self, batch: Batch, generator: torch.Generator) -> None:
        """Get ready for an update with this batch."""
        return

    def gather(self, batch: Batch, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What `losses` finds in `Pairs.extra`: copies of what belongs to the pairs at these indices [B], by name."""
        return {}

    @abstractmethod
    def losses(self, policy: Policy, scored: Scored) -> Tensor:
        """[B], a row depends on no other."""


class SharedValueLoss(ExtraLoss):
    """Of a critic that shares the policy's network."""

    name = "value_loss"

    def __init__(self, critic: SharedCritic, clip: float | None) -> None:
        """``clip`` as of `value_losses`."""
        self.critic = critic
        self.coefficient = critic.coefficient
        self.clip = clip

    def gather(self, batch: Batch, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert batch.returns is not None and batch.values is not None
        rows = indices // batch.num_steps
        return {"returns": batch.returns[rows], "values": batch.values[rows]}

    def losses(self, policy: Policy, scored: Scored) -> Tensor:
        pairs = scored.pairs
        values = self.critic(policy.normalize_obs(pairs.obs))
        return value_losses(values, pairs.extra["returns"], pairs.extra["values"], self.clip)
