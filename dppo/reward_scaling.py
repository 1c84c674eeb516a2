"""Rewards divided by the running deviation of the discounted return."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from policies.normalization import RunningStandardizer


class RewardScaler(nn.Module):
    """r / std(G), where G is the discounted sum of past rewards in its episode (Engstrom et al. 2020), clipped.

    The statistics are updated with a whole rollout before it is scaled, so one factor serves all of its rows.
    """

    discounted: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma = gamma
        self.clip = clip
        self.statistics = RunningStandardizer(1)
        self.register_buffer("discounted", torch.zeros(num_envs, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, rewards: Tensor, ended: Tensor, valid: Tensor) -> Tensor:
        """Scale rewards [T, N]; ``ended`` and ``valid`` [T, N] bool mark episode ends and rows that count."""
        discounted = self.discounted.cpu().numpy().copy()  # [N]; NumPy's calls on single rows cost least
        sums = rewards.cpu().numpy().astype(np.float64)  # [T, N]
        ends, some = ended.cpu().numpy(), ended.any(1).tolist()
        for total, end, ends_somewhere in zip(sums, ends, some, strict=True):
            total += discounted * self.gamma
            discounted = np.where(end, 0.0, total) if ends_somewhere else total
        self.discounted.copy_(torch.from_numpy(discounted))
        self.statistics.update(torch.from_numpy(sums).to(rewards.device)[valid][:, None])
        scale = (self.statistics.variance + 1e-8).rsqrt().to(rewards.dtype)
        return (rewards * scale).clamp(-self.clip, self.clip)
