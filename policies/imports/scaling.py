"""How other projects normalise observations and actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.errors import UserError
from policies.normalization import Affine


@dataclass(frozen=True)
class Scaling:
    """normalised = (x - shift) / scale, each [dim] in float64."""

    shift: Tensor
    scale: Tensor

    @staticmethod
    def identity(dim: int) -> Scaling:
        """That of what is not normalised."""
        return Scaling(torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64))


def put_scaling(affine: Affine, parts: Sequence[Scaling]) -> None:
    """Fill a scaler with the parts of what it scales, end to end."""
    affine.shift.copy_(torch.cat([part.shift for part in parts]))
    affine.scale.copy_(torch.cat([part.scale for part in parts]))


def check_finite(scaling: Scaling, name: str, where: str) -> Scaling:
    """The scaling, if it can be computed with.

    Raises:
        UserError: statistics that are infinite, as of a policy that was never given any, or zero.
    """
    if not (scaling.shift.isfinite().all() and scaling.scale.isfinite().all() and (scaling.scale != 0).all()):
        raise UserError(f"{where}: the statistics of {name!r} cannot normalise: they are zero, infinite or missing")
    return scaling
