"""Parameters that lie end to end in one tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatParameters:
    """Those of a network that require a gradient, as views of one tensor.

    In small networks, operations on single parameters (gradients to accumulate, norms, steps) take longer than the
    networks themselves. The parameters keep their names and shapes, and whoever loads weights into them copies. They
    must stay on their device from then on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.values = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        """[P]; whoever changes it changes the parameters."""
        for parameter, part in zip(self.parameters, self.split(self.values), strict=True):
            parameter.data = part

    def __len__(self) -> int:
        return len(self.values)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A tensor [P] as tensors of the parameters' shapes."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for shape, part in zip(self.shapes, parts, strict=True)]

    def gradient(self, scalar: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient [P] of a scalar by all parameters, zero for those it does not depend on; in ``out`` if given."""
        gradients = torch.autograd.grad(scalar, self.parameters, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients], out=out)

    def check_views(self) -> None:
        """Raise RuntimeError where the parameters were moved or replaced, and would be left behind."""
        if self.parameters[0].data_ptr() != self.values.data_ptr():
            raise RuntimeError("the parameters are no views of the flat tensor any more: were they moved or replaced?")
