"""The number format in which networks are evaluated while they learn."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products inside are computed in this format, but for output layers; everything else stays float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
