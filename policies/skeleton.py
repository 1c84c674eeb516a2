"""Modules without memory, to learn the shapes of their weights before anything of that size is made.

A configuration from elsewhere may ask for terabytes. What it asks for is compared with what its weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from policies.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


def skeleton(build: Callable[[], nn.Module], where: str) -> nn.Module:
    """What ``build`` makes, with shapes only.

    Raises:
        UserError: sizes that no memory has.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # of sizes that do not even fit into 64 bits
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{where} asks for sizes that cannot be: {detail}") from error


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of each of its weights and buffers that are saved."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def check_shapes(wanted: Shapes, given: Shapes, where: str) -> None:
    """Refuse weights that are missing, superfluous or of another shape.

    Raises:
        UserError: naming the first of them.
    """
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            found = f"has {given[name]}" if name in given else "has none"
            needs = f"needs {wanted[name]}" if name in wanted else "has no place for it"
            raise UserError(f"{where}: for {name} the file {found}, the network {needs}")
