"""A step down a mean loss as one compiled function."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from dppo.threads import single_thread
from dppo.updates.batch import Form, Record, columns, form_of, of_columns
from dppo.updates.faults import evidence_of
from dppo.updates.objective import Objective, Outcome, Rows
from dppo.updates.optimizer import BETAS, EPSILON, FlatAdamW
from policies import UserError


class CompiledStep(Generic[Record]):
    """`GradientStep` for small networks, in which what surrounds the arithmetic takes longer than it.

    Loss, gradient, checks and AdamW become one function of the optimiser's tensors, which it changes in place: no graph
    of autograd, no branch, one call.
    """

    def __init__(self, objective: Objective[Record], optimizer: FlatAdamW) -> None:
        """The optimiser has the parameters of the objective's module.

        Raises:
            UserError: there is no C++ compiler.
        """
        compiler = os.environ.get("CXX", "g++")  # the one that torch.compile will call
        if shutil.which(compiler) is None:
            message = f"compile needs a C++ compiler, and {compiler} is not there; install it, or name one in CXX"
            raise UserError(message)
        self._objective = objective
        self._optimizer = optimizer
        self._learning_rate = torch.zeros(
            (), device=optimizer.parameters.values.device
        )  # a number would be compiled in
        self._first = True
        self._compiled = _compiled(objective, optimizer)

    @torch.no_grad()
    def __call__(self, minibatch: Record) -> tuple[Rows, Outcome]:
        """See `GradientStep`."""
        optimizer, tensors = self._optimizer, columns(minibatch)
        for tensor in tensors if self._first else ():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        self._first = False
        self._learning_rate.fill_(optimizer.learning_rate)
        with single_thread():
            rows, allowed, loss, norm = self._compiled(
                optimizer.parameters.values, *optimizer.moments, self._learning_rate, form_of(minibatch), *tensors
            )
        if not allowed:
            return rows, Outcome.REFUSED
        evidence = partial(evidence_of, self._objective, optimizer.parameters, minibatch)
        finite = optimizer.skips.permits(loss.item(), norm.item(), evidence=evidence)
        return rows, Outcome.TAKEN if finite else Outcome.SKIPPED


def _compiled(objective: Objective[Any], optimizer: FlatAdamW) -> Any:
    holder = _Holder(objective)
    names = [name for name, value in holder.named_parameters() if value.requires_grad]
    largest, weight_decay = optimizer.max_grad_norm, optimizer.weight_decay

    def mean_loss(flat: Tensor, record: Any) -> tuple[Tensor, Rows]:
        rows = functional_call(holder, dict(zip(names, optimizer.parameters.split(flat), strict=True)), (record,))
        return rows[0].mean(), rows

    def step(
        flat: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: Tensor, rate: Tensor, form: Form, *tensors: Tensor
    ) -> tuple[Rows, Tensor, Tensor, Tensor]:
        record = objective.prepare(of_columns(form, tensors))
        gradient, (loss, rows) = grad_and_value(mean_loss, has_aux=True)(flat, record)
        norm = torch.linalg.vector_norm(gradient)
        allowed = torch.ones_like(loss, dtype=torch.bool) if objective.allow is None else objective.allow(rows)
        taken = allowed & loss.isfinite() & norm.isfinite()
        if largest is not None:
            gradient = gradient * (largest / (norm + 1e-6)).clamp(max=1.0)
        state = flat, exp_avg, exp_avg_sq, count
        for tensor, new in zip(state, _adamw(*state, gradient, rate, weight_decay), strict=True):
            tensor.copy_(torch.where(taken, new, tensor))
        return rows, allowed, loss, norm

    # The compiler keeps and limits its versions of a function by code object, and this one is made again and again.
    own = FunctionType(step.__code__.replace(), globals(), "step", None, step.__closure__)
    return torch.compile(own, options={"guard_filter_fn": _what_may_change})


def _what_may_change(guards: Sequence[Any]) -> list[bool]:
    """Of all that the compiler would look at again in each call: shapes of tensors, not the settings behind them."""
    return [guard.guard_type in ("SHAPE_ENV", "TENSOR_MATCH") for guard in guards]


def _adamw(
    flat: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    count: Tensor,
    gradient: Tensor,
    rate: Tensor,
    weight_decay: float,
) -> tuple[Tensor, ...]:
    """The parameters, moments and count after one step (Loshchilov and Hutter 2019, alg. 2)."""
    beta1, beta2 = BETAS
    count = count + 1
    exp_avg = exp_avg.lerp(gradient, 1 - beta1)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient.square()
    first = 1 - beta1 ** count.double()  # in float32, 1 - 0.999 would lose four of its seven digits
    second = 1 - beta2 ** count.double()
    size = (rate / first).float()
    root = exp_avg_sq.sqrt() / second.sqrt().float() + EPSILON
    return flat * (1 - rate * weight_decay) - size * exp_avg / root, exp_avg, exp_avg_sq, count


class _Holder(nn.Module):
    """Makes a module's parameters those of a call of its objective."""

    def __init__(self, objective: Objective[Any]) -> None:
        super().__init__()
        self.module = objective.module
        self.rows = objective.rows

    def forward(self, record: Any) -> Rows:
        return self.rows(record)
