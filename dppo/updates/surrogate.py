"""What a first-order step minimises in place of the return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dppo.surrogates import clipped_loss, kl_terms, ratio_of
from dppo.updates.objective import Rows


class Surrogate(ABC):
    """A loss of log-ratios and advantages."""

    known: ClassVar[tuple[str, ...]] = ()
    """Names of what else `rows` says of each pair."""
    of_divergences: ClassVar[bool] = False
    """Whether `rows` has to be given them."""

    @abstractmethod
    def rows(self, log_ratios: Tensor, advantages: Tensor, steps: Tensor, divergences: Tensor | None = None) -> Rows:
        """The losses of B pairs, then what `known` names, [B] each.

        Args:
            log_ratios: [B], log pi_new / pi_old.
            advantages: [B], discounted over the inner steps.
            steps: [B] integers, the inner steps k.
            divergences: [B], KL(old || new) of the laws of the inner steps; None where they are not asked for.
        """

    def adapt(self, kl: float) -> dict[str, float]:
        """Learn from the KL that an update ended with; metrics of the surrogate itself during that update."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What `adapt` has learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (most have learned nothing)
        """Take over what `state_dict` gave."""


class LogLikelihood(Surrogate):
    """- A log pi, whose gradient is the policy gradient (Williams 1992); the ratio's denominator is a constant."""

    def rows(self, log_ratios: Tensor, advantages: Tensor, steps: Tensor, divergences: Tensor | None = None) -> Rows:
        return (-advantages * log_ratios,)


class ClippedRatio(Surrogate):
    """See `clipped_loss`; clip ranges for each inner step."""

    known = ("clip_fraction",)

    def __init__(self, below: Tensor, above: Tensor, dual_clip: float | None) -> None:
        """``below`` and ``above`` [K]; they and ``dual_clip`` as of `clipped_loss`."""
        self.below = below
        self.above = above
        self.dual_clip = dual_clip

    def rows(self, log_ratios: Tensor, advantages: Tensor, steps: Tensor, divergences: Tensor | None = None) -> Rows:
        below, above = self.below[steps], self.above[steps]
        beyond = log_ratios.detach().expm1()
        outside = ((beyond > above) | (beyond < -below)).float()
        return clipped_loss(log_ratios, advantages, below, above, self.dual_clip), outside


class MaskedRatio(Surrogate):
    """- r A, but of pairs whose law has left a trust region no better than - A (Wang et al. 2020, TR-PPO).

    So there is nothing to gain from leaving it, and as with PPO's clip, a gradient remains that leads back. (Without
    any gradient outside, more than half of the pairs end up there: others push them on, and nothing back.)
    """

    known = ("masked_fraction",)
    of_divergences = True

    def __init__(self, max_kl: float) -> None:
        self.max_kl = max_kl

    def rows(self, log_ratios: Tensor, advantages: Tensor, steps: Tensor, divergences: Tensor | None = None) -> Rows:
        assert divergences is not None
        objective = ratio_of(log_ratios) * advantages
        masked = (divergences.detach() > self.max_kl) & (objective.detach() > advantages)
        return -torch.where(masked, advantages, objective), masked.float()


class PenalisedRatio(Surrogate):
    """- r A + beta KL(old || new), beta doubled or halved after an update (Schulman et al. 2017, section 4).

    The KL is estimated from the samples themselves, without bias (`approximate_kl`): so it needs no closed form.
    """

    def __init__(self, beta: float, target_kl: float, device: torch.device) -> None:
        self.beta = torch.tensor(beta, device=device)
        self.target_kl = target_kl

    def rows(self, log_ratios: Tensor, advantages: Tensor, steps: Tensor, divergences: Tensor | None = None) -> Rows:
        return (self.beta * kl_terms(log_ratios) - ratio_of(log_ratios) * advantages,)

    def adapt(self, kl: float) -> dict[str, float]:
        before = float(self.beta)
        if kl > 1.5 * self.target_kl:
            self.beta.mul_(2).clamp_(max=1e6)
        elif kl < self.target_kl / 1.5:
            self.beta.div_(2).clamp_(min=1e-6)
        return {"kl_penalty": before}

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.beta.copy_(state["beta"])
