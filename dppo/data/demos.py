"""Demonstrations: Minari episodes -> (observation history, action chunk) windows for behaviour cloning.

Legend: S steps of all episodes together, L steps of one episode, B batch, To observation history, Tp predicted chunk,
Do observation dimension, Da action dimension.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from gymnasium import Space, spaces
from minari import EpisodeData, MinariDataset
from minari.dataset.minari_storage import MinariStorage
from minari.serialization import deserialize_space
from torch import Tensor

from dppo.data import minari_store
from policies.errors import UserError


@dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration, from a reset to the end."""

    observation: np.ndarray
    """[L+1, Do] float32; Dict observations flattened in gymnasium's order. The last one follows the last action."""
    action: np.ndarray
    """[L, Da] float32; for discrete actions [L] int64."""
    reward: np.ndarray
    """[L] float32."""
    terminated: bool
    """Whether the task itself ended the episode."""
    truncated: bool
    """Whether a time limit ended it."""

    def __len__(self) -> int:
        return len(self.action)

    @property
    def discrete(self) -> bool:
        """Whether actions are integers."""
        return self.action.ndim == 1


# --- reading ----------------------------------------------------------------------------------------------------------


def load_episodes(dataset: str, *, hint: str = "") -> list[Episode]:
    """Read all episodes of a Minari dataset; one that is not on this machine is looked for on the Minari hub.

    Args:
        dataset: a Minari id, e.g. ``mujoco/hopper/medium-v0``.
        hint: how to get the dataset otherwise, for the error message, e.g. "build it with `dppo collect task=hopper`".

    Raises:
        UserError: no such dataset, an unreadable, damaged or empty one, or one whose content cannot be learnt from
            (pixels, an episode without steps, NaN or inf).
    """
    if not minari_store.is_stored(dataset):
        minari_store.download(dataset, hint)
    path = minari_store.dataset_path(dataset)
    minari_store.check(path)
    try:
        stored = MinariDataset(path / "data")
        space = _observation_space(path, stored)
        _check_spaces(dataset, space, stored.action_space)
        episodes = [
            _to_episode(dataset, number, raw, space, stored.action_space)
            for number, raw in enumerate(stored.iterate_episodes())
        ]
    except UserError:
        raise
    except Exception as error:  # a foreign file: h5py, json, minari and gymnasium each fail in ways of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"dataset {dataset} at {path} cannot be read ({reason}); it may be half-written: delete that folder"
            + (f", then {hint}" if hint else " and get it again")
        ) from error
    if not episodes:
        raise UserError(f"dataset {dataset} at {path} holds no episodes")
    return episodes


def _observation_space(path: Path, stored: MinariDataset) -> Space[Any]:
    """The observation space in the key order it was stored in: minari sorts the keys, an environment need not."""
    description = MinariStorage.read_raw_metadata(path / "data").get("observation_space")
    return stored.observation_space if description is None else _in_stored_order(json.loads(description))


def _in_stored_order(description: dict[str, Any]) -> Space[Any]:
    subspaces = description.get("subspaces")
    if description["type"] == "Dict" and isinstance(subspaces, dict):
        return spaces.Dict(OrderedDict((key, _in_stored_order(sub)) for key, sub in subspaces.items()))
    if description["type"] == "Tuple" and isinstance(subspaces, list):
        return spaces.Tuple([_in_stored_order(sub) for sub in subspaces])
    return deserialize_space(description)


def _check_spaces(dataset: str, observation: Space[Any], action: Space[Any]) -> None:
    for leaf in _leaves(observation):
        if isinstance(leaf, spaces.Box) and leaf.dtype == np.uint8 and len(leaf.shape) >= 2:
            raise UserError(f"dataset {dataset} has pixel observations {leaf.shape}; only state vectors are supported")
        if not isinstance(leaf, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            raise UserError(f"dataset {dataset} has observations of kind {type(leaf).__name__}, which are no numbers")
    if not isinstance(action, spaces.Box | spaces.Discrete):
        raise UserError(f"dataset {dataset} has actions of kind {type(action).__name__}; supported: Box and Discrete")


def _leaves(space: Space[Any]) -> list[Space[Any]]:
    if isinstance(space, spaces.Dict):
        return [leaf for sub in space.spaces.values() for leaf in _leaves(sub)]
    if isinstance(space, spaces.Tuple):
        return [leaf for sub in space.spaces for leaf in _leaves(sub)]
    return [space]


def _flatten_steps(space: Space[Any], value: Any) -> np.ndarray:
    """`gymnasium.spaces.flatten` for a whole episode: [L+1, Do]."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([_flatten_steps(sub, value[key]) for key, sub in space.spaces.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([_flatten_steps(sub, part) for sub, part in zip(space, value, strict=True)], axis=1)
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return np.asarray(value).reshape(len(value), -1)
    return np.stack([np.asarray(spaces.flatten(space, step)) for step in value])  # one-hot


def _to_episode(dataset: str, number: int, raw: EpisodeData, space: Space[Any], action_space: Space[Any]) -> Episode:
    length = len(raw.rewards)
    if length == 0:
        raise UserError(f"dataset {dataset}: episode {number} has no steps")
    observation = _flatten_steps(space, raw.observations).astype(np.float32)  # [L+1, Do]
    if isinstance(action_space, spaces.Discrete):
        action = np.asarray(raw.actions, dtype=np.int64)  # [L]
    else:
        action = np.asarray(raw.actions, dtype=np.float32).reshape(len(raw.actions), -1)  # [L, Da]
    if len(observation) != length + 1 or len(action) != length:
        raise UserError(
            f"dataset {dataset}: episode {number} has {length} rewards, {len(action)} actions and {len(observation)} "
            f"observations; {length} actions and {length + 1} observations belong together"
        )
    for name, values in (("observation", observation), ("action", action)):
        broken = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if broken.size:
            raise UserError(f"dataset {dataset}: NaN or inf in the {name} of episode {number}, step {broken[0]}")
    return Episode(
        observation=observation,
        action=action,
        reward=np.asarray(raw.rewards, dtype=np.float32),
        terminated=bool(raw.terminations[-1]),
        truncated=bool(raw.truncations[-1]),
    )


def check_dimensions(
    episodes: Sequence[Episode], obs_dim: int, action_dim: int, discrete: bool, *, dataset: str = "the dataset"
) -> None:
    """Refuse demonstrations of another task.

    Args:
        episodes: at least one.
        obs_dim: Do of the task.
        action_dim: Da of the task; the number of actions if ``discrete``.
        discrete: whether the task's actions are integers.
        dataset: its name, for the message.

    Raises:
        UserError: what the dataset has and what the task has, where they differ.
    """
    for episode in episodes:
        kind = "discrete" if episode.discrete else f"{episode.action.shape[1]}-dimensional"
        wanted = "discrete" if discrete else f"{action_dim}-dimensional"
        if episode.observation.shape[1] != obs_dim or kind != wanted:
            raise UserError(
                f"{dataset} has {episode.observation.shape[1]}-dimensional observations and {kind} actions, but the "
                f"task has {obs_dim}-dimensional observations and {wanted} actions"
            )
        if discrete and not (episode.action.min() >= 0 and episode.action.max() < action_dim):
            raise UserError(
                f"{dataset} has actions from {episode.action.min()} to {episode.action.max()}, but the task has the "
                f"{action_dim} actions 0 to {action_dim - 1}"
            )


# --- using ------------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """A batch for behaviour cloning."""

    obs: Tensor
    """[B, To, Do] float32 in the environment's units."""
    action: Tensor
    """[B, Tp, Da] float32 in the environment's units; discrete: [B] int64."""


class WindowDataset:
    """One window for every step t of every episode, cut out on demand: memory stays at the size of the raw data.

    The history o[t-To+1 .. t] repeats o[0] before the episode's beginning, as an environment's does after a reset, and
    the chunk a[t .. t+Tp-1] repeats the last action beyond its end (as Diffusion Policy does), so that the first and
    the last steps are learnt from too. A chunk may begin earlier, at a[t - past], and repeats the first action then.
    """

    _data = ("observation", "action", "first", "last")

    def __init__(self, episodes: Sequence[Episode], history: int, chunk: int, past: int = 0) -> None:
        """Lay the episodes end to end.

        Args:
            episodes: at least one, all of the same dimensions.
            history: To >= 1.
            chunk: Tp >= 1; 1 for discrete actions.
            past: how many actions of a chunk belong to observations before the latest.
        """
        if history < 1 or chunk < 1:
            raise ValueError(f"history and chunk must be at least 1, not {history} and {chunk}")
        if chunk > 1 and any(episode.discrete for episode in episodes):
            raise ValueError("discrete actions are not chunked")
        lengths = torch.tensor([len(episode) for episode in episodes])
        ends = lengths.cumsum(0)
        self.history = history
        self.chunk = chunk
        self.past = past
        self.observation = torch.from_numpy(np.concatenate([e.observation[:-1] for e in episodes]))  # [S, Do]
        self.action = torch.from_numpy(np.concatenate([e.action for e in episodes]))  # [S, Da], discrete [S]
        self.first = (ends - lengths).repeat_interleave(lengths)  # [S], the row of the first step of the same episode
        self.last = (ends - 1).repeat_interleave(lengths)  # [S], the row of its last step

    def __len__(self) -> int:
        """S, the number of windows."""
        return len(self.observation)

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return sum(getattr(self, name).nbytes for name in self._data)

    @property
    def device(self) -> torch.device:
        """Where the data lies and the batches appear."""
        return self.observation.device

    def batch(self, indices: Tensor) -> Windows:
        """The windows of some steps.

        Args:
            indices: [B] integers in [0, S), on any device.
        """
        now = indices.to(self.device)[:, None]  # [B, 1]
        past = torch.arange(1 - self.history, 1, device=self.device)  # [To]
        ahead = torch.arange(-self.past, self.chunk - self.past, device=self.device)  # [Tp]
        seen = torch.maximum(now + past, self.first[now])  # [B, To]
        done = torch.clamp(now + ahead, self.first[now], self.last[now])  # [B, Tp]
        action = self.action[done]  # [B, Tp, Da], discrete [B, 1]
        return Windows(self.observation[seen], action if action.dim() == 3 else action.squeeze(1))

    def to(self, device: str | torch.device) -> Self:
        """The same windows with their data on ``device``."""
        moved = copy.copy(self)
        for name in self._data:
            setattr(moved, name, getattr(self, name).to(device))
        return moved


def split_by_episode(
    episodes: Sequence[Episode], validation_fraction: float, seed: int
) -> tuple[list[Episode], list[Episode]]:
    """Split at random into training and validation episodes, each in its original order.

    Neighbouring windows overlap, so splitting by step would let training see the validation data. There is at least one
    episode on either side if there are two or more; a fraction of 0 asks for no validation at all.

    Args:
        episodes: any number.
        validation_fraction: in [0, 1).
        seed: decides who goes where, whatever else uses random numbers.

    Raises:
        UserError: a fraction outside [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"the validation fraction must lie in [0, 1), not {validation_fraction}")
    total = len(episodes)
    count = min(max(round(validation_fraction * total), 1), total - 1) if validation_fraction and total > 1 else 0
    chosen = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    train = [episode for number, episode in enumerate(episodes) if number not in chosen]
    return train, [episodes[number] for number in sorted(chosen)]


class Bounds(NamedTuple):
    """The range of the data, for min-max normalisation."""

    obs_min: Tensor
    """[Do] float32."""
    obs_max: Tensor
    """[Do] float32."""
    action_min: Tensor
    """[Da] float32; discrete: [1], the smallest action."""
    action_max: Tensor
    """[Da] float32; discrete: [1], the largest action."""


def bounds(episodes: Sequence[Episode]) -> Bounds:
    """The smallest and largest value of every dimension over all steps of one or more episodes, final ones included."""
    observation = [e.observation for e in episodes]
    action = [e.action.reshape(len(e), -1).astype(np.float32) for e in episodes]
    return Bounds(*(_extreme(extreme, arrays) for arrays in (observation, action) for extreme in (np.min, np.max)))


def _extreme(extreme: Any, arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(extreme([extreme(array, axis=0) for array in arrays], axis=0))
