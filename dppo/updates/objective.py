"""What the steps of an optimiser minimise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Generic

from torch import Tensor, nn

from dppo.updates.batch import Record

Rows = tuple[Tensor, ...]
"""What is known of each row of a minibatch, [B] each; the first are the losses."""


class Outcome(Enum):
    """What became of a step."""

    TAKEN = "taken"
    REFUSED = "refused"
    """By `Objective.allow`."""
    SKIPPED = "skipped"
    """The loss or its gradient is not finite; nor is what is known of the rows, then."""


def as_it_is(minibatch: Record) -> Record:
    """The minibatch, unchanged."""
    return minibatch


@dataclass(frozen=True)
class Objective(Generic[Record]):
    """The mean of a loss over the rows of a minibatch, by the parameters of a network."""

    module: nn.Module
    rows: Callable[[Record], Rows]
    """The losses, and whatever else is to be known; a row depends on no other."""
    prepare: Callable[[Record], Record] = as_it_is
    """What concerns a minibatch as a whole, before the losses of its parts."""
    allow: Callable[[Rows], Tensor] | None = None
    """Whether to take the step after a look at its rows (a boolean scalar); None: always."""
