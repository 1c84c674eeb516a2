"""Surrogate objectives as pure functions of log-likelihoods and advantages."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, kl_divergence

LogRatio = Literal["sum", "mean"]

ALL = slice(None)
MAX_LOG_RATIO = 80.0
"""Beyond it a ratio overflows float32, and the gradient of an infinite one is NaN even where it is clipped away."""


def log_ratio(
    new_factors: Tensor,
    old_factors: Tensor,
    reduction: LogRatio,
    clamp: tuple[float, float] | None = None,
    executed: slice = ALL,
) -> Tensor:
    """log pi_new / pi_old of each sample, [B].

    Args:
        new_factors: [B, *F] log-likelihood factors under the current policy.
        old_factors: [B, *F] under the policy that sampled.
        reduction: ``sum`` is the true ratio; ``mean`` over the factors is what the original DPPO uses, and what its
            small clip ranges assume.
        clamp: bounds on each factor, [-5, 2] in the original DPPO.
        executed: for factors of an action chunk [B, Tp, Da], which actions to score (`PolicyConfig.executed_part`). On
            a chain this is an approximation (the original's, too): what is not executed of an inner latent still has
            its influence on the next one.
    """
    if clamp is not None:
        new_factors, old_factors = new_factors.clamp(*clamp), old_factors.clamp(*clamp)
    difference = new_factors - old_factors
    if difference.dim() == 1:
        return difference
    difference = difference[:, executed].flatten(1)
    return difference.sum(1) if reduction == "sum" else difference.mean(1)


def ratio_of(log_ratios: Tensor) -> Tensor:
    """pi_new / pi_old of each sample [B]."""
    return log_ratios.clamp(max=MAX_LOG_RATIO).exp()


def clipped_loss(
    log_ratios: Tensor, advantages: Tensor, below: Tensor, above: Tensor, dual_clip: float | None = None
) -> Tensor:
    """PPO's clipped objective (Schulman et al. 2017, eq. 7), negated, per sample [B].

    Args:
        log_ratios: [B].
        advantages: [B].
        below: how far under 1 a ratio counts, broadcasts to [B].
        above: how far over 1; a range of its own leaves unlikely actions room to grow (Yu et al. 2025, section 3.1).
        dual_clip: above 1; where an advantage is negative, the objective is at least so many times it, however large
            the ratio (Ye et al. 2020, eq. 5). None: no bound.
    """
    ratio = ratio_of(log_ratios)
    clipped = torch.clamp(ratio, 1 - below, 1 + above)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def clip_ranges(num_steps: int, base: float, full: float, rate: float) -> Tensor:
    """[K]: clip range per inner step, growing or falling from ``base`` at k = 0 to ``full`` at k = K - 1.

    base + (full - base) (e^(rate t) - 1) / (e^rate - 1), t = k / (K - 1) (Ren et al. 2024, appendix).
    """
    if num_steps == 1:
        return torch.tensor([full])
    t = torch.arange(num_steps, dtype=torch.float32) / (num_steps - 1)
    share = t if rate == 0 else torch.expm1(rate * t) / math.expm1(rate)
    return base + (full - base) * share


def kl_terms(log_ratios: Tensor) -> Tensor:
    """r - 1 - log r >= 0 of each sample of the old policy [B]; their mean estimates KL(old || new) without bias."""
    log_ratios = log_ratios.clamp(max=MAX_LOG_RATIO)
    return log_ratios.expm1() - log_ratios


def approximate_kl(log_ratios: Tensor) -> Tensor:
    """KL(old || new) from samples of the old policy (scalar), where the ratios are true ones: the mean of `kl_terms`.

    With ratios of mean log-likelihoods (`log_ratio` with ``mean``) it is a KL on that reduced scale only.
    """
    return kl_terms(log_ratios).mean()


def divergence_terms(old: Distribution, new: Distribution, log_ratios: Tensor, executed: slice = ALL) -> Tensor:
    """KL(old || new) of each row [B]; where there is no closed form, `kl_terms`, whose mean estimates it.

    Args:
        old: batch shape [B].
        new: of the same kind.
        log_ratios: [B], of ``new`` to ``old`` where ``old`` has sampled.
        executed: as of `log_ratio`.
    """
    divergences = closed_divergences(old, new, executed)
    return kl_terms(log_ratios) if divergences is None else divergences


def closed_divergences(old: Distribution, new: Distribution, executed: slice = ALL) -> Tensor | None:
    """KL(old || new) of each row [B], see `divergence_terms`; None where there is no closed form."""
    try:
        if isinstance(old, Independent) and isinstance(new, Independent):
            return _divergence(old.base_dist, new.base_dist)[:, executed].flatten(1).sum(1)
        return _divergence(old, new)
    except NotImplementedError:
        return None


def _divergence(old: Distribution, new: Distribution) -> Tensor:
    if isinstance(old, Categorical) and isinstance(new, Categorical):
        # Logits are finite here; torch looks for probabilities of zero, by an index that no compiler takes.
        return (old.probs * (old.logits - new.logits)).sum(-1)
    return kl_divergence(old, new)


def entropy_terms(law: Distribution, factors: Tensor, log_ratios: Tensor, executed: slice = ALL) -> Tensor:
    """Terms [B] whose mean is the entropy of a policy, and whose gradient is the entropy's.

    Where a law has no closed form: -r log pi of what was sampled, without bias at the policy that sampled.

    Args:
        law: batch shape [B].
        factors: [B, *F], log-likelihood factors of what was sampled.
        log_ratios: [B], of the new policy to that which sampled.
        executed: as of `log_ratio`; the entropy of actions that are never executed costs nothing and gains nothing.
    """
    try:
        if isinstance(law, Independent):
            return law.base_dist.entropy()[:, executed].flatten(1).sum(1)
        return law.entropy()
    except NotImplementedError:
        return -ratio_of(log_ratios) * factors.reshape(len(factors), -1).sum(1)


def value_losses(values: Tensor, returns: Tensor, old_values: Tensor, clip: float | None = None) -> Tensor:
    """Half the squared errors [B]; with ``clip``, the worse of that and of the value moved at most ``clip``."""
    error = (values - returns).square()
    if clip is not None:
        limited = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (limited - returns).square())
    return 0.5 * error
