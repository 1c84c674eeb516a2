"""The random generators that a process has in common: whatever draws from them goes on where it was."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from policies.errors import UserError


def seed_shared(seed: int) -> None:
    """Let all of them begin with this seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (environments may use it, whatever is better)
    random.seed(seed)


def shared_state() -> dict[str, Any]:
    """Of the generators of torch (on the CPU), NumPy and Python, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kept = math.nan if gauss is None else gauss  # so that the state has one form
    python = {"version": version, "words": np.array(words, np.uint64), "gauss": kept}
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {"torch": torch.get_rng_state(), "numpy": numpy, "python": python}


def load_shared_state(state: Mapping[str, Any]) -> None:
    """Take over what `shared_state` gave.

    Raises:
        UserError: it is of the same form, but no state of these generators.
    """
    python = state["python"]
    gauss = None if math.isnan(python["gauss"]) else python["gauss"]
    try:
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        random.setstate((python["version"], tuple(python["words"].tolist()), gauss))
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the state of the random generators is damaged: {str(error).splitlines()[0]}") from error
