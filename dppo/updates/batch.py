"""What an update rule learns from: transitions with advantages, flat over time and environments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from dppo.advantages import explained_variance

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
    returns: Tensor | None
    """[M] targets of the critic, or [M, K] of one that values inner steps; None: there is no critic"""
    values: Tensor | None
    """As ``returns``: the critic's estimates before the update"""

    @property
    def num_steps(self) -> int:
        """K."""
        return self.log_prob_factors.shape[1]

    def __len__(self) -> int:
        return len(self.obs)

    def statistics(self) -> dict[str, float | None]:
        """Metrics of what was sampled: the entropy, of actions or of the chain, and what the critic explains of it."""
        of_critic: dict[str, float | None] = {}
        if self.values is not None and self.returns is not None:
            of_critic["explained_variance"] = explained_variance(self.values, self.returns)
        return {"entropy": -float(self.log_prob_factors.sum()) / len(self), **of_critic}

    @property
    def num_targets(self) -> int:
        """How many `targets` there are."""
        return 0 if self.returns is None else self.returns.numel()

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

    def targets(self, indices: Tensor) -> Targets | InnerTargets:
        """Copies of what the critic learns from, of the rows [B], or as of `pairs` if it values inner steps."""
        assert self.returns is not None and self.values is not None
        if self.returns.dim() == 1:
            return Targets(self.obs[indices], self.returns[indices], self.values[indices])
        rows, steps = indices // self.num_steps, indices % self.num_steps
        known = self.obs[rows], self.returns[rows, steps], self.values[rows, steps]
        return InnerTargets(*known, self.chain[rows, steps], steps)


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
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """[B, ...] each, what losses beside the surrogate have to know, by name"""

    def __len__(self) -> int:
        return len(self.step)


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

    @property
    def inner(self) -> tuple[Tensor, ...]:
        """What the critic sees beside the observations."""
        return ()


@dataclass(frozen=True)
class InnerTargets(Targets):
    """B inner steps."""

    latent: Tensor
    """[B, *latent], z_k"""
    step: Tensor
    """[B] integers, k"""

    @property
    def inner(self) -> tuple[Tensor, ...]:
        return self.latent, self.step


Record = TypeVar("Record", Pairs, Targets, InnerTargets, tuple[Tensor, ...])
"""Tensors that have their B rows in common."""


@dataclass(frozen=True)
class Form:
    """What a record is beside its `columns`."""

    kind: type[Any]
    extra: tuple[str, ...] = ()
    """Names of what is in `Pairs.extra`."""


def form_of(record: Any) -> Form:
    """Its form."""
    return Form(type(record), tuple(record.extra) if isinstance(record, Pairs) else ())


def column_names(record: Any) -> tuple[str, ...]:
    """The names of its `columns`; numbers, where they have none."""
    if isinstance(record, tuple):
        return tuple(str(number) for number in range(len(record)))
    return (*(name for name in vars(record) if name != "extra"), *form_of(record).extra)


def columns(record: Pairs | Targets | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, [B, ...] each."""
    if isinstance(record, tuple):
        return record
    own = (value for name, value in vars(record).items() if name != "extra")
    return (*own, *record.extra.values()) if isinstance(record, Pairs) else tuple(own)


def num_rows(record: Pairs | Targets | tuple[Tensor, ...]) -> int:
    """B."""
    return len(columns(record)[0])


def of_columns(form: Form, tensors: Sequence[Tensor]) -> Any:
    """The record of a form that has these `columns`."""
    if issubclass(form.kind, tuple):
        return tuple(tensors)
    if not form.extra:
        return form.kind(*tensors)
    own = len(tensors) - len(form.extra)
    return form.kind(*tensors[:own], extra=dict(zip(form.extra, tensors[own:], strict=True)))


def split(record: Record, sizes: int | list[int]) -> Iterator[Record]:
    """Consecutive parts of these lengths, or of this length but for the last, without copying."""
    parts = zip(*(column.split(sizes) for column in columns(record)), strict=True)
    form = form_of(record)
    return (of_columns(form, part) for part in parts)


def partition(size: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """range(size) in random order, in ``count`` <= size parts whose lengths differ by at most one."""
    return torch.randperm(size, generator=generator, device=generator.device).tensor_split(count)


@dataclass(frozen=True)
class PairOrder:
    """Which pairs an epoch is about, and which of them share a minibatch."""

    inner_steps: int | None = None
    """So many inner steps of each environment step, drawn anew in each epoch; None: all."""
    whole_chains: bool = False
    """Whether the inner steps of an environment step stay together."""

    def count(self, batch: Batch, batch_size: int | None) -> int:
        """How many minibatches an epoch has, of at most so many pairs (but of a whole chain at least); None: one."""
        if batch_size is None:
            return 1
        of_row = self.inner_steps or batch.num_steps
        if self.whole_chains:
            return math.ceil(len(batch) / max(1, batch_size // of_row))
        return math.ceil(len(batch) * of_row / batch_size)

    def parts(self, batch: Batch, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The indices ``row * K + step`` of an epoch in ``count`` minibatches of nearly equal length.

        Every pair is as likely to be among them as every other: the mean over them is that over all pairs, on average.
        """
        rows, steps = len(batch), batch.num_steps
        if not self.whole_chains and self.inner_steps is None:
            return partition(rows * steps, count, generator)
        chosen = torch.arange(steps, device=generator.device)
        if self.inner_steps is not None:
            noise = torch.rand(rows, steps, generator=generator, device=generator.device)
            chosen = noise.argsort(1)[:, : self.inner_steps]  # [M, m]
        pairs = steps * torch.arange(rows, device=chosen.device)[:, None] + chosen
        if not self.whole_chains:
            pairs = pairs.flatten()
        return tuple(pairs[part].flatten() for part in partition(len(pairs), count, generator))


def minibatches(gather: Callable[[Tensor], Record], parts: Sequence[Tensor]) -> Iterator[Record]:
    """What belongs to each of these parts of indices.

    Args:
        gather: copies what belongs to indices [B].
        parts: of nearly equal length.
    """
    at_once = max(1, GATHERED // len(parts[0]))
    for first in range(0, len(parts), at_once):
        together = parts[first : first + at_once]
        yield from split(gather(torch.cat(tuple(together))), [len(part) for part in together])
