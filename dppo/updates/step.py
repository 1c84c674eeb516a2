"""The one choice between ways to take a step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dppo.updates.batch import Record
from dppo.updates.compiled import CompiledStep
from dppo.updates.gradient import GradientStep
from dppo.updates.objective import Objective, Outcome, Rows
from dppo.updates.optimizer import FlatAdamW
from policies import Policy, UserError

Step = Callable[[Record], tuple[Rows, Outcome]]
"""See `GradientStep.__call__`."""


def make_step(objective: Objective[Record], optimizer: FlatAdamW, *, compile: bool) -> Step[Record]:
    """Down the objective; compiled, or with as many threads as torch has.

    Raises:
        UserError: it cannot be compiled.
    """
    if compile:
        if isinstance(objective.module, Policy) and not objective.module.compilable:
            raise UserError(f"steps of a {objective.module.type} policy cannot be compiled; set algo.compile=false")
        return CompiledStep(objective, optimizer)
    return GradientStep(objective, optimizer, threads=torch.get_num_threads())
