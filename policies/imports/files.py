"""Reading what others saved, without running any of it."""

from __future__ import annotations

import itertools
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from policies.chain import DiffusionConfig, DiffusionPolicy
from policies.errors import UserError
from policies.skeleton import check_shapes, shapes_of, skeleton

Rules = Iterable[tuple[str, str]]


def load_plain_pickle(path: Path, stand_ins: Mapping[str, Any] | None = None) -> Any:
    """What torch saved, if that is nothing but tensors and plain containers; any other global is refused by its name.

    Args:
        path: of torch's own format.
        stand_ins: something inert for each of the globals that the file may name besides: those themselves are neither
            imported nor called.

    Raises:
        UserError: a file that is no such thing.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in (stand_ins or {}).items()]
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            safe_globals(allowed),
        ):  # it warns of other protocols than its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_asked_for(error)}") from error
    except Exception as error:  # what a damaged file raises is anything from IndexError to RuntimeError
        raise UserError(f"{path} cannot be read as weights: {one_line(error)}") from error


def _asked_for(error: Exception) -> str:
    """What a pickle wanted besides weights."""
    found = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|GLOBAL) '?([\w.]+)", str(error))
    what = f"its pickle asks for {found[1]}, which" if found else f"its pickle ({one_line(error)})"
    return f"{what} is more than tensors and plain data, and nothing of a file is executed"


def load_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` in float64; objects in it are refused.

    Raises:
        UserError: a file that is no such thing.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.asarray(file[name], np.float64)) for name in file.files}
    except Exception as error:  # a damaged archive asks for other versions of ZIP, other compression, other types
        raise UserError(f"{path} cannot be read as arrays (.npz): {one_line(error)}") from error


def tensors_under(content: Any, where: str) -> dict[str, Tensor]:
    """The tensors of a flat mapping.

    Raises:
        UserError: it is none, or holds something else, or weights without entries of their own.
    """
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{where} is no mapping of names to weights")
    for name, value in content.items():
        if value.nbytes > value.untyped_storage().nbytes():  # strides of zero make terabytes of nothing
            raise UserError(f"{where} does not hold all the entries that {name} is said to have")
    return {str(name): value.detach() for name, value in content.items()}


def renamed(weights: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Weights under the names that ``rules``, pairs of a pattern and its replacement, make of theirs, in order."""
    result = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result


def inverted(rules: Rules) -> list[tuple[str, str]]:
    """Rules that lead back, of those whose patterns are literal text and groups, each used once in the replacement."""
    return [_inverted(pattern, replacement) for pattern, replacement in rules]


def _inverted(pattern: str, replacement: str) -> tuple[str, str]:
    groups = re.findall(r"\([^)]*\)", pattern)
    anchor = "^" if pattern.startswith("^") else ""
    back = re.sub(r"\\\\(\d)", lambda found: groups[int(found[1]) - 1], re.escape(replacement))
    count = itertools.count(1)
    forth = re.sub(r"\([^)]*\)", lambda _: f"\\{next(count)}", pattern.removeprefix("^"))
    return anchor + back, forth.replace(r"\.", ".")


def without_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def filled(config: DiffusionConfig, networks: Mapping[str, Mapping[str, Tensor]], where: str) -> DiffusionPolicy:
    """A policy with these weights in its ``network``, and in ``frozen`` where it has one.

    Raises:
        UserError: weights that are missing, superfluous or of another shape; nothing of their size was made until then.
    """
    bare = skeleton(lambda: DiffusionPolicy(config), where)
    for part, weights in networks.items():
        given = {name: tuple(value.shape) for name, value in weights.items()}
        check_shapes(shapes_of(getattr(bare, part)), given, f"{where} does not fit")
    policy = DiffusionPolicy(config)
    for part, weights in networks.items():
        getattr(policy, part).load_state_dict(dict(weights))
    return policy


REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def referred(root: Mapping[str, Any], value: Any, depth: int = 8) -> Any:
    """``value`` with each ``${path.to.entry}`` in it replaced by that entry of ``root``, as OmegaConf would.

    Nothing else is computed: ``${eval:...}`` and the like stay what they are, text. So does what leads nowhere, or in
    circles.
    """
    if isinstance(value, Mapping):
        return {name: referred(root, entry, depth) for name, entry in value.items()}
    if isinstance(value, list):
        return [referred(root, entry, depth) for entry in value]
    reference = REFERENCE.fullmatch(value.strip()) if isinstance(value, str) else None
    if reference is None or depth == 0:
        return value
    found: Any = root
    for part in reference[1].split("."):
        if not isinstance(found, Mapping) or part not in found:
            return value
        found = found[part]
    return referred(root, found, depth - 1)


def one_line(error: Exception) -> str:
    """The message of an error, shortened."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
