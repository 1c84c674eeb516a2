"""Learning rates over the course of training."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: Schedule, progress: float, warmup: float = 0.0, final: float = 0.0) -> float:
    """Factor on the learning rate.

    Args:
        schedule: what follows the warm-up: nothing, or a linear or cosine descent to ``final``.
        progress: share of the training that is done, in [0, 1].
        warmup: share of the training over which the factor climbs linearly to 1.
        final: factor at the end of a descent.
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    shape = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (1 - final) * shape
