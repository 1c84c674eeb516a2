"""AdamW on a network whose parameters lie end to end in one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from policies import UserError


class FlatAdamW:
    """AdamW, with clipped gradients, in a handful of operations however many parameters there are.

    In small networks the operations on single parameters (gradients to accumulate, norms, moments, steps) take longer
    than the networks themselves. So the parameters become views of one tensor; they keep their names and shapes, and
    whoever loads weights into them copies. They must stay on their device from then on.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        what: str,
    ) -> None:
        """Take over the parameters that require a gradient; ``what`` names their network in errors."""
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.flat = flatten(self.parameters)
        self.max_grad_norm = max_grad_norm
        self.what = what
        self.adamw = torch.optim.AdamW([self.flat], lr=learning_rate, weight_decay=weight_decay, fused=True)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.adamw.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.adamw.param_groups[0]["lr"] = value

    def gradient(self, loss: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient [P] of a scalar by all parameters, zero for those it does not depend on; in ``out`` if given."""
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients], out=out)

    def step(self, gradient: Tensor, loss: Tensor | None = None) -> None:
        """One step down a gradient [P], shortened to the largest norm allowed.

        Args:
            gradient: as of `gradient`.
            loss: if given, it and the gradient are checked first (on a GPU, this waits for them).

        Raises:
            UserError: the loss or its gradient is not finite; no step is taken.
        """
        if self.parameters[0].data_ptr() != self.flat.data_ptr():
            raise RuntimeError("the parameters are no views of the optimiser's any more: were they moved or replaced?")
        norm = None
        if loss is not None:
            self._check(loss, "loss")
            self._check(norm := torch.linalg.vector_norm(gradient), "gradient of the loss")
        if self.max_grad_norm is not None:
            norm = torch.linalg.vector_norm(gradient) if norm is None else norm
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.flat.grad = gradient
        self.adamw.step()

    def _check(self, value: Tensor, what: str) -> None:
        number = value.item()
        if not math.isfinite(number):
            advice = "lower the learning rate, or look for extreme values in what is learned from"
            raise UserError(f"the {self.what} network's {what} became {number}; {advice}")

    def state_dict(self) -> dict[str, Any]:
        """The moments [P] and settings of AdamW."""
        return self.adamw.state_dict()


def flatten(parameters: Iterable[nn.Parameter]) -> Tensor:
    """[P]: the parameters that require a gradient, end to end; they become views of it."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return flat
