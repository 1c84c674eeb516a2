"""The gradient of a mean loss, computed in parts by several threads, and compiled if asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from dppo.threads import map_in_threads
from dppo.updates.optimizer import FlatAdamW
from policies import UserError

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")
Loss = Callable[[Inputs], tuple[Tensor, Result]]
"""From a part of a minibatch to its mean loss (scalar), and whatever else is to be known of it, without a graph."""


class MeanGradient(Generic[Inputs, Result]):
    """Of a loss by all parameters of an optimiser; a minibatch's is the mean of its parts', weighted by their rows."""

    def __init__(
        self,
        loss: Loss[Inputs, Result],
        module: nn.Module,
        optimizer: FlatAdamW,
        *,
        threads: int,
        compile: bool = False,
    ) -> None:
        """The optimiser has the parameters of ``module``.

        ``compile`` is for small networks: the parts are then computed one after the other.
        """
        self._optimizer = optimizer
        self._threads = 1 if compile else threads  # compiling swaps the module's parameters for a moment
        self._buffers: list[Tensor] = []  # allocated once: the system takes long to hand out fresh memory
        self._compute = _compiled(loss, module, optimizer) if compile else _eager(loss, optimizer)

    def __call__(self, parts: Sequence[tuple[Inputs, float]]) -> tuple[Tensor, list[Result]]:
        """The gradient [P], valid until the next call, and the results of the parts.

        Args:
            parts: what the loss takes, and the part's share of the minibatch's rows.
        """

        def compute(part: tuple[tuple[Inputs, float], Tensor | None]) -> tuple[Tensor, Result]:
            (inputs, _), buffer = part
            return self._compute(inputs, buffer)

        with_buffers = list(zip(parts, self._buffers_for(len(parts)), strict=True))
        computed = map_in_threads(compute, with_buffers, self._threads)
        total = computed[0][0]
        if len(parts) > 1:
            total.mul_(parts[0][1])
        for (gradient, _), (_, share) in zip(computed[1:], parts[1:], strict=True):  # always in the same order
            total.add_(gradient, alpha=share)
        return total, [result for _, result in computed]

    def _buffers_for(self, parts: int) -> Sequence[Tensor | None]:
        """Memory for the gradients; a single one, mostly of a small network, brings its own."""
        if parts == 1:
            return [None]
        while len(self._buffers) < parts:
            self._buffers.append(torch.empty_like(self._optimizer.flat))
        return self._buffers[:parts]


Compute = Callable[[Any, Tensor | None], tuple[Tensor, Any]]
"""From inputs, and memory [P] for the gradient if there is some, to the gradient and the result."""


def _eager(loss: Loss[Any, Any], optimizer: FlatAdamW) -> Compute:
    def compute(inputs: Any, out: Tensor | None) -> tuple[Tensor, Any]:
        value, result = loss(inputs)
        return optimizer.gradient(value, out), result

    return compute


def _compiled(loss: Loss[Any, Any], module: nn.Module, optimizer: FlatAdamW) -> Compute:
    """The whole gradient as one function of the parameters, without a graph of autograd at run time."""
    compiler = os.environ.get("CXX", "g++")  # the one that torch.compile will call
    if shutil.which(compiler) is None:
        raise UserError(f"compile needs a C++ compiler, and {compiler} is not there; install it, or name one in CXX")
    holder = _Holder(module, loss)
    shapes = {name: value.shape for name, value in holder.named_parameters() if value.requires_grad}

    def value_of(flat: Tensor, record: type, columns: Sequence[Tensor]) -> tuple[Tensor, Any]:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(holder, parameters, (record(*columns),))

    def gradient_of(flat: Tensor, record: type, *columns: Tensor) -> tuple[Tensor, Any]:
        gradient, (_, result) = grad_and_value(value_of, has_aux=True)(flat, record, columns)
        return gradient, result

    # The compiler keeps and limits its versions of a function by code object, and this one is made again and again.
    own = FunctionType(gradient_of.__code__.replace(), globals(), "gradient_of", None, gradient_of.__closure__)
    compiled = torch.compile(own, dynamic=True)

    def compute(inputs: Any, out: Tensor | None) -> tuple[Tensor, Any]:
        gradient, result = compiled(optimizer.flat, type(inputs), *vars(inputs).values())
        return (gradient if out is None else out.copy_(gradient)), result

    return compute


class _Holder(nn.Module):
    """Makes a module's parameters those of a call of the loss."""

    def __init__(self, module: nn.Module, loss: Loss[Any, Any]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, inputs: Any) -> tuple[Tensor, Any]:
        return self.loss(inputs)
