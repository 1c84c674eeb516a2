"""Generalised advantage estimation, the same for every policy (Schulman et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and lambda-returns, [T, N] each.

    Args:
        rewards: [T, N].
        values: [T, N], V(s_t).
        next_values: [T, N], V of the true successor: at a truncation the final observation's, not the reset one's.
        terminated: [T, N] bool; stops the bootstrap.
        truncated: [T, N] bool; cuts the lambda-sum but keeps the bootstrap.
        gamma: discount per row.
        gae_lambda: lambda in [0, 1].
    """
    next_values = torch.where(terminated, 0.0, next_values)
    ended = terminated | truncated
    deltas = rewards + gamma * next_values - values
    advantages = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        following = deltas[t] + torch.where(ended[t], 0.0, gamma * gae_lambda * following)
        advantages[t] = following
    return advantages, advantages + values


def inner_discount(num_steps: int, inner_gamma: float) -> Tensor:
    """[K]: gamma_inner^(K-1-k), what the advantage of the action is worth to inner step k (Ren et al. 2024, eq. 5)."""
    return inner_gamma ** torch.arange(num_steps - 1, -1, -1, dtype=torch.float32)


def normalized(advantages: Tensor) -> Tensor:
    """Zero mean and unit deviation over all entries; a single one becomes 0, not NaN."""
    if advantages.numel() < 2:
        return torch.zeros_like(advantages)
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


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
