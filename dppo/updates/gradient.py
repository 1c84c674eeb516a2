"""A step down a mean loss, its gradient computed in parts by several threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from dppo.threads import map_in_threads, rows_per_part
from dppo.updates.batch import Record, num_rows, split
from dppo.updates.objective import Objective, Rows
from dppo.updates.optimizer import FlatAdamW


class GradientStep(Generic[Record]):
    """A minibatch's gradient is the mean of its parts', weighted by their rows."""

    def __init__(
        self, objective: Objective[Record], optimizer: FlatAdamW, *, threads: int, checked: bool = True
    ) -> None:
        """The optimiser has the parameters of the objective's module; ``checked`` as in `FlatAdamW.step`."""
        self._objective = objective
        self._optimizer = optimizer
        self._threads = threads
        self._checked = checked
        self._buffers: list[Tensor] = []  # allocated once: the system takes long to hand out fresh memory

    def __call__(self, minibatch: Record) -> tuple[Rows, bool]:
        """Step; what is known of the rows before it, and whether it was allowed and so taken.

        Raises:
            UserError: the loss or its gradient is not finite; no step is taken.
        """
        gradient, rows = self.gradient(self._objective.prepare(minibatch))
        if self._objective.allow is not None and not self._objective.allow(rows):
            return rows, False
        self._optimizer.step(gradient, rows[0].mean() if self._checked else None)
        return rows, True

    def gradient(self, minibatch: Record) -> tuple[Tensor, Rows]:
        """The gradient [P] of a prepared minibatch, valid until the next call, and what is known of its rows."""

        def compute(part: tuple[Record, Tensor | None]) -> tuple[Tensor, Rows]:
            record, buffer = part
            rows = self._objective.rows(record)
            return self._optimizer.gradient(rows[0].mean(), buffer), tuple(column.detach() for column in rows)

        count = num_rows(minibatch)
        at_once = rows_per_part(count, len(self._optimizer.flat), self._optimizer.flat.device)
        if at_once == count:
            ((gradient, rows),) = map_in_threads(compute, [(minibatch, None)], self._threads)
            return gradient, rows
        parts = list(split(minibatch, at_once))
        computed = map_in_threads(compute, list(zip(parts, self._memory(len(parts)), strict=True)), self._threads)
        total = computed[0][0].mul_(num_rows(parts[0]) / count)
        for (gradient, _), part in zip(computed[1:], parts[1:], strict=True):  # always in the same order
            total.add_(gradient, alpha=num_rows(part) / count)
        return total, tuple(torch.cat(columns) for columns in zip(*(rows for _, rows in computed), strict=True))

    def _memory(self, parts: int) -> Sequence[Tensor]:
        """[P] for the gradient of each part."""
        while len(self._buffers) < parts:
            self._buffers.append(torch.empty_like(self._optimizer.flat))
        return self._buffers[:parts]
