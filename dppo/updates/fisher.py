"""The Fisher information of a policy times a vector, and the linear system that it makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from dppo.updates.flat import FlatParameters


def fisher_outputs(law: Distribution, value: Tensor) -> tuple[list[Tensor], Callable[[list[Tensor]], list[Tensor]]]:
    """Tensors that the law depends on, and its Fisher information by them, as a linear map of tangents.

    Gauss-Newton: F = J^T M J, with J the Jacobian of the tensors and M the map; the Hessian of KL(old || new) at the
    old policy (Martens 2020, section 9.2). Where the law has no known M, the tensor is the log-likelihood of what was
    sampled, and M one: the empirical Fisher information, whose mean over samples is the same.

    Args:
        law: batch shape [B], of factors that are Normal or Categorical, or of any other kind.
        value: [B, *event], sampled from the law.
    """
    base = law.base_dist if isinstance(law, Independent) else law
    if isinstance(base, Normal):
        scale = base.scale.detach()
        return [base.loc, base.scale], lambda tangents: [tangents[0] / scale**2, 2 * tangents[1] / scale**2]
    if isinstance(base, Categorical):
        probs = base.probs.detach()

        def centred(tangents: list[Tensor]) -> list[Tensor]:
            weighted = probs * tangents[0]
            return [weighted - probs * weighted.sum(-1, keepdim=True)]

        return [base.logits], centred
    return [law.log_prob(value)], lambda tangents: tangents


class FisherProduct:
    """v -> F v, of the mean over a law's B rows; keeps the graphs, for many products at the same parameters.

    The product J v is the gradient of (J^T u) v by u: reverse mode twice, since torch's forward mode has one state for
    all threads.
    """

    def __init__(self, law: Distribution, value: Tensor, parameters: FlatParameters) -> None:
        """The policy's parameters, and what `fisher_outputs` takes; the law has a graph to the parameters."""
        self._parameters = parameters
        self._rows = len(value)
        self._outputs, self._metric = fisher_outputs(law, value)
        self._with_graph = [output for output in self._outputs if output.requires_grad]
        self._probes = [torch.zeros_like(output, requires_grad=True) for output in self._with_graph]
        self._pulled = _grad(self._with_graph, parameters.parameters, self._probes, create_graph=True)

    def __call__(self, vector: Tensor, out: Tensor | None = None) -> Tensor:
        """[P], of a vector [P]; in memory ``out`` if given."""
        moved = iter(_grad(self._pulled, self._probes, self._parameters.split(vector)))
        tangents = [next(moved) if output.requires_grad else torch.zeros_like(output) for output in self._outputs]
        pairs = zip(self._metric(tangents), self._outputs, strict=True)
        weighted = [cotangent / self._rows for cotangent, output in pairs if output.requires_grad]
        products = _grad(self._with_graph, self._parameters.parameters, weighted)
        return torch.cat([product.flatten() for product in products], out=out)


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, create_graph: bool = False
) -> Sequence[Tensor]:
    """Zero where an output does not depend on an input; the graph stays."""
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, **how)


@dataclass(frozen=True)
class Solution:
    """Of a linear system A x = b."""

    x: Tensor
    """[P]"""
    quadratic: float
    """x^T A x"""
    residual: float
    """|b - A x| / |b|"""
    iterations: int


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int, tolerance: float
) -> Solution:
    """Solve A x = b for a symmetric positive definite A (Hestenes and Stiefel 1952; Nocedal and Wright 2006, alg. 5.2).

    Args:
        product: A times a vector [P]; the result may be overwritten by the next call.
        b: [P].
        iterations: at most so many products.
        tolerance: stop once the residual's norm is below so much of b's.

    Returns:
        The solution; its ``quadratic`` is NaN where a product or ``b`` is.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction = residual.clone()
    squared = residual.dot(residual)
    goal = tolerance**2 * float(squared)
    done = 0
    while done < iterations and float(squared) > goal:
        moved = product(direction)
        curvature = direction.dot(moved)
        if curvature.isnan():
            return Solution(x, math.nan, math.nan, done)
        if not float(curvature) > 0:  # by rounding only: what is left of the residual is noise
            break
        step = squared / curvature
        x.add_(step * direction)
        residual.sub_(step * moved)
        previous, squared = squared, residual.dot(residual)
        direction.mul_(squared / previous).add_(residual)
        done += 1
    norm = float(b.norm())
    quadratic = float(x.dot(b - residual))
    return Solution(x, quadratic, float(squared.sqrt()) / norm if norm > 0 else 0.0, done)
