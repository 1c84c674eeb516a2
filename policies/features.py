"""The parts of observations and actions, by name, and how those of a policy are found among those of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.errors import UserError

LEROBOT = {"observation.state": "agent_pos", "observation.environment_state": "environment_state"}
"""What LeRobot calls the parts of its own environments' observations."""


@dataclass(frozen=True)
class Feature:
    """A part of an observation, or of an action."""

    name: str
    dim: int


Features = Sequence[Feature]


def in_words(features: Features) -> str:
    """Such as "agent_pos (2), keypoints (16)"."""
    return ", ".join(f"{feature.name} ({feature.dim})" for feature in features)


def features_in(content: Any, dim: int) -> Features:
    """Those in a policy's metadata, pairs of a name and a dimension; none where it does not say ``dim`` entries."""
    if not isinstance(content, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in content):
        return []
    features = [Feature(str(name), size) for name, size in content if isinstance(size, int) and size > 0]
    return features if sum(feature.dim for feature in features) == dim else []


def places(own: Features, offered: Features, chosen: Mapping[str, Sequence[str]], where: str) -> list[int] | None:
    """Where among the entries that a task offers those of a policy are; None where nothing tells.

    Parts are found by their names. Where the task offers a single part, the policy's are in it, in their order.

    Args:
        own: the policy's parts, in order.
        offered: the task's, in order.
        chosen: for names of the policy's parts, the task's that make it up.
        where: for the errors.

    Raises:
        UserError: a choice that names what is not there, is of another dimension, or takes an entry twice.
    """
    entries = _entries(offered)
    for name, names in chosen.items():
        sizes = [feature.dim for feature in own if feature.name == name]
        unknown = [part for part in names if part not in entries]
        if not sizes:
            raise UserError(f"{where}: the policy has no {name!r}, but {in_words(own)}")
        if unknown:
            raise UserError(f"{where}: the task has no {unknown[0]!r}, but {in_words(offered)}")
        if sizes[0] != sum(len(entries[part]) for part in names):
            raise UserError(f"{where}: {name} has dimension {sizes[0]}, and {' + '.join(names)} another")
    found = [entry for feature in own for entry in _entries_for(feature, entries, chosen)]
    total = sum(feature.dim for feature in own)
    if len(set(found)) < len(found):
        raise UserError(f"{where}: an entry of {in_words(offered)} would be taken twice")
    if len(found) == total:
        return found
    return list(range(total)) if not chosen and len(offered) == 1 and total == offered[0].dim else None


def _entries(features: Features) -> dict[str, range]:
    """Those of each part."""
    entries, start = {}, 0
    for feature in features:
        entries[feature.name] = range(start, start + feature.dim)
        start += feature.dim
    return entries


def _entries_for(feature: Feature, entries: Mapping[str, range], chosen: Mapping[str, Sequence[str]]) -> list[int]:
    """Those of the parts that were chosen for a policy's, or of its namesake of the same dimension, if there is one."""
    if feature.name in chosen:
        return [entry for name in chosen[feature.name] for entry in entries[name]]
    name = feature.name if feature.name in entries else LEROBOT.get(feature.name, "")
    return list(entries[name]) if len(entries.get(name, ())) == feature.dim else []
