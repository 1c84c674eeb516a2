"""Observation and action scaling; buffers of the policy, so that they are saved with its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """x -> (x - shift) / scale, per dimension; the identity until `fit`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, low: Tensor, high: Tensor) -> None:
        """Map [low, high] (each [dim]) to [-1, 1]; a dimension that hardly varies is only centred, not blown up."""
        half, centre = (high - low) / 2, (high + low) / 2
        self.shift.copy_(centre)
        self.scale.copy_(torch.where(half > 1e-4 * centre.abs().clamp(min=1), half, torch.ones_like(half)))

    def place(self, low: Tensor, width: Tensor) -> None:
        """Map ``low`` to -1 and ``low + width`` to 1, each [dim] in float64, however small the width.

        Where float32 can hardly tell the middle from ``low``, at least that goes to -1, as a constant should.
        """
        lowest, width = low.float(), width.clamp(min=0)
        shift = torch.maximum((low + width / 2).float(), torch.nextafter(lowest, torch.tensor(torch.inf)))
        narrow = width < 1e-4 * low.abs().clamp(min=1)
        self.shift.copy_(shift)
        self.scale.copy_(torch.where(narrow, shift - lowest, (width / 2).float()))

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale

    def prepared(self) -> Callable[[Tensor], Tensor]:
        """`normalize` with the scaling as it is now, for many calls."""
        shift, scale = self.shift, self.scale
        return lambda x: (x - shift) / scale

    def denormalize(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class RunningStandardizer(nn.Module):
    """Standardises with the mean and variance of everything that `update` has seen, clipped to +-``clip``.

    Merging of batch moments after Chan et al. 1979. The statistics change in `update` only, so they are frozen during a
    policy update.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, dim: int, clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge the moments of a batch [B, dim]; an empty one changes nothing."""
        x = x.double()
        batch = x.shape[0]
        if batch == 0:
            return
        total = self.count + batch
        delta = x.mean(0) - self.mean
        between = delta.square() * self.count * batch / total
        summed = self.variance * self.count + x.var(0, unbiased=False) * batch + between
        self.variance.copy_(summed / total)
        self.mean.add_(delta * batch / total)
        self.count.copy_(total)

    def normalize(self, x: Tensor) -> Tensor:
        return self.prepared(x.dtype)(x)

    def prepared(self, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        """`normalize` with the statistics as they are now, for many calls."""
        scale = (self.variance + 1e-8).rsqrt().to(dtype)
        mean, clip = self.mean.to(dtype), self.clip
        return lambda x: (x - mean).mul_(scale).clamp_(-clip, clip)
