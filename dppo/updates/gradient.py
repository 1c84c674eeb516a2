"""Means over a minibatch, computed in parts by several threads, and the steps down a mean loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dppo.threads import map_in_threads, rows_per_part
from dppo.updates.batch import Record, num_rows, split
from dppo.updates.faults import evidence_of
from dppo.updates.flat import FlatParameters
from dppo.updates.objective import Objective, Outcome, Rows
from dppo.updates.optimizer import FlatAdamW

Known = TypeVar("Known")


class MeanOverParts:
    """A mean [P] over the rows of a minibatch: that of its parts', weighted by their rows.

    Neither the parts nor the order in which they are added depend on the number of threads.
    """

    def __init__(self, parameters: FlatParameters, *, threads: int) -> None:
        self._like = parameters.values
        self._threads = threads
        self._buffers: list[Tensor] = []  # allocated once: the system takes long to hand out fresh memory

    def __call__(
        self, compute: Callable[[Record, Tensor | None], tuple[Tensor, Known]], minibatch: Record
    ) -> tuple[Tensor, list[Known]]:
        """The mean, valid until the next call, and what else was found out in each part.

        Args:
            compute: the mean of a part, in the memory [P] that it is given, if any; and whatever is to be known of it.
            minibatch: the rows.
        """

        def in_memory(part: tuple[Record, Tensor | None]) -> tuple[Tensor, Known]:
            return compute(*part)

        count = num_rows(minibatch)
        at_once = rows_per_part(count, len(self._like), self._like.device)
        if at_once == count:
            ((mean, known),) = map_in_threads(in_memory, [(minibatch, None)], self._threads)
            return mean, [known]
        parts = list(split(minibatch, at_once))
        computed = map_in_threads(in_memory, list(zip(parts, self._memory(len(parts)), strict=True)), self._threads)
        total = computed[0][0].mul_(num_rows(parts[0]) / count)
        for (mean, _), part in zip(computed[1:], parts[1:], strict=True):
            total.add_(mean, alpha=num_rows(part) / count)
        return total, [known for _, known in computed]

    def _memory(self, parts: int) -> Sequence[Tensor]:
        while len(self._buffers) < parts:
            self._buffers.append(torch.empty_like(self._like))
        return self._buffers[:parts]


class MeanGradient(Generic[Record]):
    """The gradient of an objective by flat parameters."""

    def __init__(self, objective: Objective[Record], parameters: FlatParameters, *, threads: int) -> None:
        """The parameters are those of the objective's module."""
        self._objective = objective
        self._parameters = parameters
        self._mean = MeanOverParts(parameters, threads=threads)

    def __call__(self, minibatch: Record) -> tuple[Tensor, Rows]:
        """The gradient [P] of a prepared minibatch, valid until the next call, and what is known of its rows."""
        gradient, of_parts = self._mean(self._of_part, minibatch)
        if len(of_parts) == 1:
            return gradient, of_parts[0]
        return gradient, tuple(torch.cat(columns) for columns in zip(*of_parts, strict=True))

    def _of_part(self, part: Record, memory: Tensor | None) -> tuple[Tensor, Rows]:
        rows = self._objective.rows(part)
        return self._parameters.gradient(rows[0].mean(), memory), tuple(column.detach() for column in rows)


class GradientStep(Generic[Record]):
    """A step of AdamW down an objective."""

    def __init__(self, objective: Objective[Record], optimizer: FlatAdamW, *, threads: int) -> None:
        """The optimiser has the parameters of the objective's module."""
        self._objective = objective
        self._optimizer = optimizer
        self._gradient = MeanGradient(objective, optimizer.parameters, threads=threads)

    def __call__(self, minibatch: Record) -> tuple[Rows, Outcome]:
        """Step; what is known of the rows before it, and what became of it.

        Raises:
            NotFiniteError: too many steps in a row were skipped.
        """
        gradient, rows = self._gradient(self._objective.prepare(minibatch))
        if self._objective.allow is not None and not self._objective.allow(rows):
            return rows, Outcome.REFUSED
        evidence = partial(evidence_of, self._objective, self._optimizer.parameters, minibatch)
        taken = self._optimizer.step(gradient, rows[0].mean(), evidence)
        return rows, Outcome.TAKEN if taken else Outcome.SKIPPED
