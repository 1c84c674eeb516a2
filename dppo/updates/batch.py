"""What an update rule learns from: transitions with advantages, flat over time and environments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """M transitions of environment steps, each with the K inner steps that led to its action."""

    obs: Tensor
    """[M, To, Do]"""
    chain: Tensor
    """[M, K+1, *latent]"""
    log_prob_factors: Tensor
    """[M, K, *F] under the policy that sampled"""
    advantages: Tensor
    """[M] of the action"""
    returns: Tensor
    """[M] targets of the critic"""
    values: Tensor
    """[M] the critic's estimates before the update"""

    @property
    def num_steps(self) -> int:
        """K."""
        return self.log_prob_factors.shape[1]

    def __len__(self) -> int:
        return len(self.obs)


def minibatches(size: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random partition of range(size) into ``count`` index tensors whose lengths differ by at most one."""
    yield from torch.randperm(size, generator=generator, device=generator.device).tensor_split(count)
