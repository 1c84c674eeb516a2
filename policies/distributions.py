"""Laws that torch.distributions does not have."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional as F

QUADRATURE = tuple(torch.from_numpy(values) for values in np.polynomial.hermite.hermgauss(64))
"""Nodes and weights of Gauss and Hermite."""


def log_slope(z: Tensor) -> Tensor:
    """log d tanh(z) / dz = log(1 - tanh(z)^2), without rounding to log 0 far from zero."""
    return 2 * (math.log(2) - z - F.softplus(-2 * z))


class SquashedNormal(Normal):
    """Of z ~ Normal, scored as what tanh(z) is: by the density of the squashed value.

    The value itself is z, since tanh(z) = 1 has no way back. KL divergences are those of the Normal: a bijection
    changes none.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of tanh(value) at tanh(value)."""
        return super().log_prob(value) - log_slope(value)

    def entropy(self) -> Tensor:
        """Of tanh(z), by Gauss-Hermite quadrature: H(z) + E[log d tanh(z) / dz]."""
        nodes, weights = (values.to(self.loc) for values in QUADRATURE)
        z = self.loc[..., None] + math.sqrt(2) * self.scale[..., None] * nodes
        return super().entropy() + (weights * log_slope(z)).sum(-1) / math.sqrt(math.pi)
