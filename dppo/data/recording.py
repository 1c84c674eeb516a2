"""Recording demonstrations: an environment and something that acts in it -> a Minari dataset."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Protocol

import gymnasium as gym
import minari
import numpy as np
from gymnasium import spaces
from minari import MinariDataset
from minari.data_collector import EpisodeBuffer

from dppo.data import minari_store
from dppo.output.progress import bar
from policies.errors import UserError

STEPS_IN_MEMORY = 50_000
"""Finished episodes are written to disk whenever they have this many steps together."""

LONGEST_EPISODE = 100_000
"""An episode of more steps is taken for one that never ends."""


class Demonstrator(Protocol):
    """Anything that acts: an expert, a policy, a random number generator."""

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode whose first observation is ``obs`` [Do] float32 (flattened)."""
        ...

    def __call__(self, obs: np.ndarray) -> Any:
        """The action for ``obs`` [Do] float32: [Da] numbers in the environment's units, or an integer."""
        ...


def record(
    env: gym.Env[Any, Any],
    act: Demonstrator,
    dataset_id: str,
    *,
    seed: int,
    steps: int | None = None,
    episodes: int | None = None,
    algorithm_name: str | None = None,
    overwrite: bool = False,
) -> MinariDataset:
    """Record complete episodes as a Minari dataset that appears only once it is complete.

    Each episode's own seed is drawn from ``seed`` and stored with it. Stored are the actions that the environment got:
    clipped to its bounds. `minari.DataCollector` does the same job but needs jax.

    Args:
        env: as `gymnasium.make` returns it, so that the dataset can recover it; it stays open.
        act: called once a step, `Demonstrator.reset` before each episode.
        dataset_id: e.g. ``dppo/hopper/expert-v0``.
        seed: decides every reset, and nothing else.
        steps: record at least this many environment steps (the last episode is finished), or else
        episodes: exactly this many episodes.
        algorithm_name: what ``act`` is; stored only if given.
        overwrite: replace a dataset of the same id, once the new one is complete.

    Raises:
        UserError: the dataset exists, the environment cannot be stored or never ends an episode, it or ``act`` returns
            NaN or inf, or not exactly one of ``steps`` and ``episodes`` is given.
    """
    if (steps is None) == (episodes is None) or (steps or episodes or 0) < 1:
        raise UserError(f"give one of steps and episodes, at least 1; not steps={steps} and episodes={episodes}")
    if minari_store.is_stored(dataset_id) and not overwrite:
        raise UserError(f"dataset {dataset_id} exists already; add overwrite=true to replace it")
    check_storable(env)
    seeds = np.random.default_rng(seed)
    target = steps or episodes or 0
    with minari_store.staging() as staged, bar(f"recording {dataset_id}", target) as advance:
        writer = _Writer(dict(dataset_id=dataset_id, env=env, algorithm_name=algorithm_name))
        done = 0
        while done < target:
            episode = _run_episode(env, act, int(seeds.integers(2**31)))
            writer.add(episode)
            amount = len(episode) if steps is not None else 1
            advance(amount)
            done += amount
        writer.flush()
        minari_store.seal(staged / dataset_id)
        minari_store.publish(staged, dataset_id, overwrite=overwrite)
    return minari.load_dataset(dataset_id)


class _Writer:
    """Gathers episodes and appends them to a dataset now and then."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about
        self.waiting: list[EpisodeBuffer] = []
        self.waiting_steps = 0
        self.dataset: MinariDataset | None = None

    def add(self, episode: EpisodeBuffer) -> None:
        self.waiting.append(episode)
        self.waiting_steps += len(episode)
        if self.waiting_steps >= STEPS_IN_MEMORY:
            self.flush()

    def flush(self) -> None:
        if self.dataset is not None:
            self.dataset.update_dataset_from_buffer(self.waiting)
        elif self.waiting:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"`\w+` is set to None")  # what is unknown stays unsaid
                self.dataset = minari.create_dataset_from_buffers(buffer=self.waiting, **self.about)
        self.waiting, self.waiting_steps = [], 0


def _run_episode(env: gym.Env[Any, Any], act: Demonstrator, seed: int) -> EpisodeBuffer:
    obs, _ = env.reset(seed=seed)
    _check_finite(env, obs, 0.0, f"at a reset with seed {seed}")
    observations, actions, rewards, terminations, truncations = [copy.deepcopy(obs)], [], [], [], []
    act.reset(_flat(env, obs))
    while not terminations or not (terminations[-1] or truncations[-1]):
        if len(rewards) == LONGEST_EPISODE:
            raise UserError(f"{_name(env)} has not ended an episode in {LONGEST_EPISODE} steps; set max_episode_steps")
        action = _executed(env, act(_flat(env, obs)))
        obs, reward, terminated, truncated, _ = env.step(action)
        _check_finite(env, obs, float(reward), f"in step {len(rewards)} after a reset with seed {seed}")
        observations.append(copy.deepcopy(obs))  # some environments return the same array again and again
        actions.append(copy.deepcopy(action))
        rewards.append(float(reward))
        terminations.append(bool(terminated))
        truncations.append(bool(truncated))
    return EpisodeBuffer(
        seed=seed,
        observations=_stack(env.observation_space, observations),
        actions=_stack(env.action_space, actions),
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        infos={},
    )


def _check_finite(env: gym.Env[Any, Any], obs: Any, reward: float, where: str) -> None:
    for name, value in (("observation", _flat(env, obs)), ("reward", reward)):
        if not np.isfinite(value).all():
            raise UserError(f"{_name(env)} returned a {name} that is NaN or inf {where}")


def _flat(env: gym.Env[Any, Any], obs: Any) -> np.ndarray:
    return np.asarray(spaces.flatten(env.observation_space, obs), dtype=np.float32)  # [Do]


def _executed(env: gym.Env[Any, Any], action: Any) -> Any:
    """The action as the environment gets it."""
    if not np.isfinite(np.asarray(action, dtype=np.float64)).all():
        raise UserError(f"NaN or inf in the action for {_name(env)}")
    space = env.action_space
    if isinstance(space, spaces.Box):
        return np.clip(np.asarray(action, dtype=space.dtype).reshape(space.shape), space.low, space.high)
    return np.int64(action) if isinstance(space, spaces.Discrete) else action


def _stack(space: gym.Space[Any], values: list[Any]) -> Any:
    """[L, ...] per entry of a Dict or Tuple space, as HDF5 stores it."""
    if isinstance(space, spaces.Dict):
        return {key: _stack(sub, [value[key] for value in values]) for key, sub in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_stack(sub, [value[index] for value in values]) for index, sub in enumerate(space))
    return np.stack([np.asarray(value) for value in values])


def check_storable(env: gym.Env[Any, Any]) -> None:
    """Refuse an environment that could not be recovered from a dataset.

    Raises:
        UserError: it is not registered, or not in a way that can be written down.
    """
    try:
        recoverable = env.spec is not None and bool(env.spec.to_json())
    except (TypeError, ValueError):  # an entry point that is a class rather than its name, keyword arguments like it
        recoverable = False
    if not recoverable:
        raise UserError(
            f"{_name(env)} cannot be stored in a dataset: register it under the name of its class, 'module:Class', and "
            "give it keyword arguments of plain data only"
        )


def _name(env: gym.Env[Any, Any]) -> str:
    return f"environment {env.spec.id if env.spec is not None else type(env.unwrapped).__name__}"
