"""Updates that are skipped because their loss or its gradient is not finite, and what to look at if too many are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dppo.updates.batch import Record, column_names, columns
from dppo.updates.flat import FlatParameters
from dppo.updates.objective import Objective
from policies import UserError

MOST_SKIPPED = 10
"""So many updates in a row are skipped before training stops."""

Evidence = Mapping[str, Tensor]
"""What a skipped update was made of, by name: ``loss`` and ``gradient_norm`` at least."""


class NotFiniteError(UserError):
    """Too many updates in a row had to be skipped."""

    def __init__(self, message: str, evidence: Evidence) -> None:
        super().__init__(message)
        self.evidence = evidence


class Skips:
    """The updates of one network that were skipped. Its parameters and its optimiser are as if they had never been."""

    def __init__(self, network: str) -> None:
        """``network`` is its name in errors."""
        self._network = network
        self._in_a_row = 0
        self._counted = 0

    def permits(self, *numbers: float, evidence: Callable[[], Evidence]) -> bool:
        """Whether an update may be made that these are of, its loss for one; it is counted if it may not.

        Raises:
            NotFiniteError: `MOST_SKIPPED` in a row were skipped; with what ``evidence`` gives.
        """
        permitted = all(map(math.isfinite, numbers))
        self.count([permitted], evidence)
        return permitted

    def count(self, permitted: Iterable[bool], evidence: Callable[[], Evidence]) -> None:
        """Take in whether each of the last updates was made; see `permits`."""
        for made in permitted:
            self._in_a_row = 0 if made else self._in_a_row + 1
            self._counted += not made
        if self._in_a_row < MOST_SKIPPED:
            return
        found = evidence()
        of_loss, norm = found["loss"].item(), found["gradient_norm"].item()
        numbers = [f"a loss ({of_loss:g})", f"a gradient (norm {norm:g})"]
        if "curvature" in found:
            numbers.append(f"a curvature along the step ({found['curvature'].item():g})")
        raise NotFiniteError(
            f"{self._in_a_row} updates of the {self._network} network in a row had {', '.join(numbers[:-1])} or "
            f"{numbers[-1]} that was not finite; lower the learning rate, or look for extreme values in what is "
            "learned from",
            found,
        )

    def since_last(self) -> int:
        """How many were skipped since the last call."""
        counted, self._counted = self._counted, 0
        return counted

    def state_dict(self) -> dict[str, Any]:
        """How many were skipped in a row, and since the last call of `since_last`."""
        return {"in_a_row": self._in_a_row, "counted": self._counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._in_a_row, self._counted = state["in_a_row"], state["counted"]


@torch.enable_grad()
def evidence_of(objective: Objective[Record], parameters: FlatParameters, minibatch: Record) -> Evidence:
    """A minibatch, what the objective makes of its rows, the norms of the gradient, and the parameters."""
    rows = objective.rows(objective.prepare(minibatch))
    gradient = parameters.gradient(rows[0].mean())
    named = zip(column_names(minibatch), columns(minibatch), strict=True)
    return {
        **{f"minibatch/{name}": column for name, column in named},
        **{f"rows/{number}": column.detach() for number, column in enumerate(rows)},
        "loss": rows[0].detach().mean(),
        **of_network(objective.module, parameters, gradient),
    }


def of_network(module: nn.Module, parameters: FlatParameters, gradient: Tensor) -> dict[str, Tensor]:
    """The parameters by name, and the norms of a gradient [P], of each of them and of all together."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    values, slopes = parameters.split(parameters.values), parameters.split(gradient)
    return {
        "gradient_norm": gradient.norm(),
        **{f"gradient_norm/{name}": slope.norm() for name, slope in zip(names, slopes, strict=True)},
        **{f"parameters/{name}": value.detach() for name, value in zip(names, values, strict=True)},
    }
