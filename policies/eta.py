"""Eta, the share of DDPM's noise in a DDIM chain, as something to learn (Ren et al. 2024, appendix)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from policies.samplers import Sampler

HIDDEN = 64
MARGIN = 0.01
"""How far from the ends of its range, as a share of it, eta begins at most: a sigmoid never reaches them."""


class Eta(nn.Module):
    """eta = low + (high - low) sigmoid(logit), the logit a parameter or a function of the observation."""

    def __init__(self, sampler: Sampler, obs_dim: int, action_dim: int) -> None:
        """``obs_dim`` is that of the flattened history, To * Do."""
        super().__init__()
        self.low, self.high = sampler.eta_range
        share = min(max((sampler.eta - self.low) / (self.high - self.low), MARGIN), 1 - MARGIN)
        start = torch.full((action_dim if sampler.learned_eta == "action" else 1,), math.log(share / (1 - share)))
        self.network = None
        if sampler.learned_eta == "state":
            self.network = nn.Sequential(nn.Linear(obs_dim, HIDDEN), nn.Mish(), nn.Linear(HIDDEN, 1))
            last = self.network[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)  # so that it begins the same in every state
            last.bias.data = start
        else:
            self.logit = nn.Parameter(start)

    def forward(self, context: Tensor) -> Tensor:
        """Observations [B, To * Do], as the denoiser sees them -> [B, 1, 1], or [1, 1, Da] and [1, 1, 1]."""
        logit = self.logit[None] if self.network is None else self.network(context)
        return (self.low + (self.high - self.low) * logit.sigmoid())[:, None]
