"""Reading what others saved, without running any of it."""

from __future__ import annotations

import itertools
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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
MOST_UNPACKED = 2**24
"""Bytes of an archive of statistics, of which a few thousand are usual."""
MOST_NODES = 100_000
"""Entries of a configuration, each counted as often as it is met: what is shared can be met 2^n times."""
MOST_REFERENCES = 8
"""From one to the next."""


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


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Arrays of an ``.npz`` in float64; objects are refused, and nothing but these is read.

    Raises:
        UserError: a file that is no such thing, lacks one of the arrays, or would unpack to more than `MOST_UNPACKED`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise UserError(f"{path} has no {missing[0]}; it has: {', '.join(sorted(file.files)) or 'nothing'}")
            if sum(member.file_size for member in file.zip.infolist()) > MOST_UNPACKED:
                raise UserError(f"{path} would unpack to more than {MOST_UNPACKED >> 20} MiB; it is not read")
            return {name: torch.from_numpy(np.asarray(file[name], np.float64)) for name in names}
    except UserError:
        raise
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
        UserError: weights that are missing, superfluous, of another shape, or have fewer entries of their own than they
            show; nothing of their size was made until then.
    """
    bare = skeleton(lambda: DiffusionPolicy(config), where)
    for part, weights in networks.items():
        given = {name: tuple(value.shape) for name, value in weights.items()}
        check_shapes(shapes_of(getattr(bare, part)), given, f"{where} does not fit")
        _refuse_shared(weights.values(), where)
    policy = DiffusionPolicy(config)
    for part, weights in networks.items():
        getattr(policy, part).load_state_dict(dict(weights))
    return policy


def _refuse_shared(weights: Iterable[Tensor], where: str) -> None:
    """Many weights on one storage make a large network of a small file."""
    weights = list(weights)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (weight.untyped_storage() for weight in weights)}
    if sum(weight.nbytes for weight in weights) > sum(storages.values()):
        raise UserError(f"{where} holds weights that share their entries, which are fewer than they are said to be")


REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def referred(root: Mapping[str, Any], value: Any) -> Any:
    """``value`` with each ``${path.to.entry}`` in it replaced by that entry of ``root``, as OmegaConf would.

    Nothing else is computed: ``${eval:...}`` and the like stay what they are, text. So does what leads nowhere, or in
    circles.

    Raises:
        UserError: more than `MOST_NODES` entries.
    """
    count = counter()

    def resolved(value: Any, references: int) -> Any:
        count()
        if isinstance(value, Mapping):
            return {name: resolved(entry, references) for name, entry in value.items()}
        if isinstance(value, list):
            return [resolved(entry, references) for entry in value]
        found = entry_at(root, value)
        return value if found is value or references == 0 else resolved(found, references - 1)

    return resolved(value, MOST_REFERENCES)


def entry_at(root: Mapping[str, Any], value: Any) -> Any:
    """The entry of ``root`` that ``value`` refers to, ``${path.to.entry}``; any other value is itself."""
    reference = REFERENCE.fullmatch(value.strip()) if isinstance(value, str) else None
    if reference is None:
        return value
    found: Any = root
    for part in reference[1].split("."):
        if not isinstance(found, Mapping) or part not in found:
            return value
        found = found[part]
    return found


def counter() -> Callable[[], None]:
    """To be called at every entry of a configuration; raises a UserError after `MOST_NODES`."""
    left = iter(range(MOST_NODES))

    def count() -> None:
        if next(left, None) is None:
            raise UserError(f"the configuration in the checkpoint has more than {MOST_NODES:,} entries")

    return count


def one_line(error: Exception) -> str:
    """The message of an error, shortened."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
