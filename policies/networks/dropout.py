"""Dropout whose randomness is given: of each row by a seed of its own."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor

LARGEST_SEED = 2**31 - 1


def draw_seeds(batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """One seed for each row, [B]."""
    return torch.randint(LARGEST_SEED, (batch,), generator=generator, device=device, dtype=torch.int32)


class RowDropout:
    """Dropout in one pass through a network: which entries of a row are dropped depends on its seed alone.

    So parts of a batch lose what they would lose together, whatever thread computes them, and no generator is shared
    between threads. Each call drops other entries than the one before.
    """

    def __init__(self, seeds: Tensor | None) -> None:
        """``seeds`` [B] as of `draw_seeds`; None: nothing is ever dropped."""
        self._seeds = seeds
        self._call = count(1)

    def __call__(self, x: Tensor, share: float) -> Tensor:
        """x [B, ...] with that share of its entries zero, and the others larger in return."""
        call = next(self._call)
        if self._seeds is None or share == 0:
            return x
        kept = hashed(self._seeds, call, x[0].numel()) >= int(share * 2**31)
        return x * kept.view(x.shape) / (1 - share)


def hashed(seeds: Tensor, call: int, size: int) -> Tensor:
    """Integers [B, size], as good as random and uniform in [0, 2^31): of seeds [B], a call and a position.

    Rounds of shifts and products that wrap around, with Wellons' constants ("Prospecting for hash functions").
    """
    positions = torch.arange(size, dtype=torch.int32, device=seeds.device)
    return _mixed(_mixed(seeds + _wrapped(call * 0x9E3779B9))[:, None] + positions) & 0x7FFFFFFF


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * _wrapped(0x7FEB352D)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _wrapped(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _wrapped(value: int) -> int:
    """As a signed integer of 32 bits."""
    return (value + 2**31) % 2**32 - 2**31
