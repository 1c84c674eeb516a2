"""What an update rule learns from: transitions with advantages, flat over time and environments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

GATHERED = 65_536
"""Rows that are copied into their random order at once. Small minibatches are slices of such a copy."""


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
    """[M, K] of the action, as each inner step is told"""
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

    @property
    def entropy(self) -> float:
        """An estimate from what was sampled: of the actions, and where there are several inner steps, of the chain."""
        return -float(self.log_prob_factors.sum()) / len(self)

    def pairs(self, indices: Tensor) -> Pairs:
        """Copies of the pairs ``row * K + step`` [B]."""
        rows, steps = indices // self.num_steps, indices % self.num_steps
        return Pairs(
            self.obs[rows],
            self.chain[rows, steps],
            steps,
            self.chain[rows, steps + 1],
            self.log_prob_factors[rows, steps],
            self.advantages[rows, steps],
        )

    def joint_pairs(self, indices: Tensor) -> JointPairs:
        """As `pairs`."""
        rows = indices // self.num_steps
        return JointPairs(**vars(self.pairs(indices)), returns=self.returns[rows], values=self.values[rows])

    def targets(self, rows: Tensor) -> Targets:
        """Copies of what the critic learns from, of the rows [B]."""
        return Targets(self.obs[rows], self.returns[rows], self.values[rows])


@dataclass(frozen=True)
class Pairs:
    """B pairs of an environment step and one of its inner steps: what a policy learns from."""

    obs: Tensor
    """[B, To, Do]"""
    latent: Tensor
    """[B, *latent], z_k"""
    step: Tensor
    """[B] integers, k"""
    following: Tensor
    """[B, *latent], z_{k+1}"""
    log_prob_factors: Tensor
    """[B, *F] of z_{k+1} under the policy that sampled"""
    advantages: Tensor
    """[B]"""

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class JointPairs(Pairs):
    """B pairs, with what a critic learns from the same environment steps."""

    returns: Tensor
    """[B]"""
    values: Tensor
    """[B], its estimates before the update"""


@dataclass(frozen=True)
class Targets:
    """B environment steps: what a critic learns from."""

    obs: Tensor
    """[B, To, Do]"""
    returns: Tensor
    """[B]"""
    values: Tensor
    """[B], its estimates before the update"""

    def __len__(self) -> int:
        return len(self.returns)


Record = TypeVar("Record", Pairs, JointPairs, Targets, tuple[Tensor, ...])
"""Tensors that have their B rows in common."""


def columns(record: Pairs | Targets | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, [B, ...] each."""
    return record if isinstance(record, tuple) else tuple(vars(record).values())


def num_rows(record: Pairs | Targets | tuple[Tensor, ...]) -> int:
    """B."""
    return len(columns(record)[0])


def of_columns(kind: type[Record], tensors: Iterable[Tensor]) -> Record:
    """The record of a kind that has these `columns`."""
    return kind(tensors) if issubclass(kind, tuple) else kind(*tensors)


def split(record: Record, sizes: int | list[int]) -> Iterator[Record]:
    """Consecutive parts of these lengths, or of this length but for the last, without copying."""
    parts = zip(*(column.split(sizes) for column in columns(record)), strict=True)
    return (of_columns(type(record), part) for part in parts)


def minibatches(
    gather: Callable[[Tensor], Record], size: int, count: int, generator: torch.Generator
) -> Iterator[Record]:
    """A random partition of range(size) into ``count`` minibatches whose lengths differ by at most one.

    Args:
        gather: copies what belongs to indices [B].
        size: how many indices there are, at least ``count``.
        count: how many minibatches.
        generator: draws the partition.
    """
    parts = torch.randperm(size, generator=generator, device=generator.device).tensor_split(count)
    at_once = max(1, GATHERED // len(parts[0]))
    for first in range(0, count, at_once):
        together = parts[first : first + at_once]
        yield from split(gather(torch.cat(together)), [len(part) for part in together])
