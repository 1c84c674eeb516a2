"""Advantages as pure functions of rewards and values, the same for every policy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-6
"""Relative to their size, how far sums of float32 may lie apart and be the same."""


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and lambda-returns, [T, N] each (Schulman et al. 2016).

    Args:
        rewards: [T, N].
        values: [T, N], V(s_t).
        next_values: [T, N], V of the true successor: at a truncation the final observation's, not the reset one's.
        terminated: [T, N] bool; stops the bootstrap.
        truncated: [T, N] bool; cuts the lambda-sum but keeps the bootstrap.
        gamma: discount of what follows a row; of all of them, or [T, N].
        gae_lambda: lambda in [0, 1].
        valid: [T, N] bool, False where a row is no transition; None: they all are. An episode that is dropped in such a
            row is cut before it, like one that a time limit ends there: what came before is told the value of the
            observation that the row begins with, which is ``next_values`` of the row before, and nothing of the row.
    """
    next_values = torch.where(terminated, 0.0, next_values)
    deltas = rewards + gamma * next_values - values
    if valid is not None:
        deltas = deltas.masked_fill(~valid, 0.0)
    carried = (gamma * gae_lambda * torch.ones_like(deltas)).masked_fill_(terminated | truncated, 0.0)
    advantages = torch.from_numpy(_discounted_sums(deltas.cpu().numpy(), carried.cpu().numpy())).to(deltas.device)
    return advantages, advantages + values


def _discounted_sums(terms: np.ndarray, carried: np.ndarray) -> np.ndarray:
    """Of each row [T, N], itself and so much of the sum of the next row; NumPy's calls on single rows cost least."""
    sums = np.empty_like(terms)
    following = np.zeros_like(terms[0])
    for term, share, total in zip(terms[::-1], carried[::-1], sums[::-1], strict=True):
        following = np.add(term, share * following, out=total)
    return sums


def inner_discount(num_steps: int, inner_gamma: float) -> Tensor:
    """[K]: gamma_inner^(K-1-k), what the advantage of the action is worth to inner step k (Ren et al. 2024, eq. 5)."""
    return inner_gamma ** torch.arange(num_steps - 1, -1, -1, dtype=torch.float32)


def normalized(advantages: Tensor) -> Tensor:
    """Zero mean and unit deviation over all entries; a single one becomes 0, not NaN."""
    if advantages.numel() < 2:
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def group_advantages(returns: Tensor, size: int, known: Tensor) -> Tensor:
    """[N]: returns of episodes, `normalized` in each consecutive group of so many (Shao et al. 2024, section 4.1.2).

    Those that are not ``known`` [N] are neither counted nor told anything: theirs are 0. So are those of a group whose
    returns are equal but for rounding.
    """
    advantages = torch.zeros_like(returns)
    for group, own, kept in zip(advantages.split(size), returns.split(size), known.split(size), strict=True):
        if kept.any() and (own[kept] - own[kept][0]).abs().max() > ROUNDING * own[kept].abs().max():
            group[kept] = normalized(own[kept])
    return advantages


def clipped_to_quantiles(values: Tensor, low: float, high: float) -> Tensor:
    """The values, those outside these of their own quantiles moved to them; [0, 1] moves none.

    The original DPPO's ``clip_advantage_lower_quantile`` and ``clip_advantage_upper_quantile``.
    """
    flat = values.flatten()
    return values.clamp(torch.quantile(flat, low), torch.quantile(flat, high))


def explained_variance(predictions: Tensor, targets: Tensor) -> float | None:
    """1 - Var[target - prediction] / Var[target]; None where the targets do not vary."""
    if targets.numel() < 2:
        return None
    variance = targets.var()
    return float(1 - (targets - predictions).var() / variance) if variance > 0 else None
