"""AdamW on a network whose parameters lie end to end in one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from policies import UserError

BETAS = (0.9, 0.999)
"""Of AdamW: how long it remembers gradients, and their squares."""
EPSILON = 1e-8
"""Of AdamW: what is added to the root of the mean square."""


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
        self.weight_decay = weight_decay
        settings = {"betas": BETAS, "eps": EPSILON, "weight_decay": weight_decay}
        self.adamw = torch.optim.AdamW([self.flat], lr=learning_rate, fused=True, **settings)

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
        self._check_views()
        norm = None
        if loss is not None:
            norm = torch.linalg.vector_norm(gradient)
            self.check(loss, norm)
        if self.max_grad_norm is not None:
            norm = torch.linalg.vector_norm(gradient) if norm is None else norm
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        self.flat.grad = gradient
        self.adamw.step()

    def check(self, loss: Tensor, norm: Tensor) -> None:
        """Raise UserError where a loss or the norm of its gradient is not finite."""
        for what, value in (("loss", loss.item()), ("gradient of the loss", norm.item())):
            if not math.isfinite(value):
                advice = "lower the learning rate, or look for extreme values in what is learned from"
                raise UserError(f"the {self.what} network's {what} became {value}; {advice}")

    @property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """AdamW's own tensors, for whoever takes its step elsewhere and changes them and ``flat`` in place.

        The mean gradient [P], the mean square [P], and the number of steps (scalar).
        """
        self._check_views()
        state = self.adamw.state[self.flat]
        if not state:  # as AdamW does before its first step
            zeros = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
            state.update(step=self.flat.new_zeros(()), exp_avg=zeros[0], exp_avg_sq=zeros[1])
        return state["exp_avg"], state["exp_avg_sq"], state["step"]

    def _check_views(self) -> None:
        if self.parameters[0].data_ptr() != self.flat.data_ptr():
            raise RuntimeError("the parameters are no views of the optimiser's any more: were they moved or replaced?")

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
