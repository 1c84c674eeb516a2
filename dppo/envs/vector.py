"""From a task to its environments.

To history, Ta executed chunk, Da action dimension, Do observation dimension.
"""

import logging
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial

import cloudpickle
import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, flatdim
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import FlattenObservation

from dppo.envs.action_mask import ActionMask, choices_of
from dppo.envs.chunk import ChunkEnv
from dppo.envs.native.registry import rules_of
from dppo.envs.one_by_one import OneByOne
from dppo.envs.workers.choice import worthwhile_workers
from dppo.envs.workers.process import WorkerDiedError
from dppo.envs.workers.vector_env import WorkerVectorEnv
from dppo.processors import usable_processors
from dppo.task import Task
from policies.errors import UserError
from policies.features import Feature, in_words

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spaces:
    """What a policy must know of a task's spaces."""

    obs_dim: int
    """Do, after an observation that is no vector has been flattened; with the mask of actions, if there is one."""
    action_dim: int
    """Da (discrete: the number of actions, of all dimensions together)."""
    action_low: np.ndarray
    """Smallest action [Da] float32, -inf where there is no bound (discrete: empty)."""
    action_high: np.ndarray
    """Largest action [Da] float32, inf where there is no bound (discrete: empty)."""
    discrete: bool = False
    choices: tuple[int, ...] | None = None
    """Number of actions in each of several dimensions (MultiDiscrete, MultiBinary); None: one dimension at most."""
    masked: bool = False
    """Whether the last Da entries of an observation say which actions are valid."""
    observation_parts: tuple[Feature, ...] = ()
    """What the entries of an observation are, in order."""
    action_parts: tuple[Feature, ...] = ()
    """What those of an action are."""


def make_env(task: Task, *, history: int, chunk: int, render_mode: str | None = None) -> ChunkEnv:
    """One environment of the task.

    Raises:
        UserError: the environment does not exist, cannot be built, or has a space that is not supported.
    """
    env = make_plain_env(task, render_mode=render_mode)
    if task.action_mask is not None:
        env = ActionMask(env, task.action_mask)
    elif not isinstance(env.observation_space, Box) and env.observation_space.is_np_flattenable:
        env = FlattenObservation(env)
    return ChunkEnv(env, history=history, chunk=chunk)


def make_plain_env(task: Task, *, render_mode: str | None = None) -> gymnasium.Env:
    """The environment as gymnasium makes it, with its episode limit, without history and chunks.

    Raises:
        UserError: the environment does not exist or cannot be built.
    """
    spec = task.env_spec()
    rendering = {} if render_mode is None else {"render_mode": render_mode}  # not every environment takes the argument
    try:
        # The checker tests the environment itself, at every step: it is for those who write environments.
        return gymnasium.make(
            spec, max_episode_steps=task.max_episode_steps, disable_env_checker=True, **rendering, **task.env_kwargs
        )
    except TypeError as error:
        if not task.env_kwargs or "argument" not in str(error):
            raise
        raise UserError(f"task {task.name}: {task.env_id} does not take these env_kwargs: {error}") from error
    except (ImportError, OSError, gymnasium.error.Error) as error:
        raise UserError(f"task {task.name}: {task.env_id} cannot be built: {error}") from error


def make_vector_env(
    task: Task,
    num_envs: int,
    *,
    history: int,
    chunk: int,
    autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
    threads: int | None = None,
) -> VectorEnv:
    """`num_envs` environments of the task, stepped together: observations [N, To, Do], actions [N, Ta, Da] or [N].

    MuJoCo environments of Gymnasium are stepped natively, with `threads` threads (None: one per processor). Any others
    run in up to so many worker processes if there is enough work for them, else one after the other. Neither changes
    the results: they are those of `sync_vector_env`, bit for bit.

    The observations it returns may be a buffer that the next step overwrites: a `Stepper` copies them.

    Raises:
        UserError: as `make_env`, `num_envs` is not positive, or a worker process dies as often as it is started.
    """
    _check_num_envs(task, num_envs)
    threads = threads or usable_processors()
    if autoreset_mode is AutoresetMode.SAME_STEP:
        env = make_env(task, history=history, chunk=chunk)
        rules = rules_of(env.env)
        if rules is not None:
            # Imports mujoco, which only who has built one of its environments may do: see video.choose_gl_backend.
            from dppo.envs.native.vector_env import NativeVectorEnv

            return NativeVectorEnv(env, rules, num_envs, threads=threads)
        with closing(env):
            workers = worthwhile_workers(env, num_envs, threads)
        if workers > 1:
            try:
                return WorkerVectorEnv(env, _constructor(task, history, chunk), num_envs, workers=workers)
            except (WorkerDiedError, MemoryError):  # what a process has no room for, or crashes in, is not for this one
                raise
            except Exception as error:  # what keeps an environment from other processes need not keep it from this one
                log.warning("task %s: the environments are stepped without worker processes: %s", task.name, error)
    return sync_vector_env(task, num_envs, history=history, chunk=chunk, autoreset_mode=autoreset_mode)


def sync_vector_env(
    task: Task, num_envs: int, *, history: int, chunk: int, autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> OneByOne:
    """As `make_vector_env`, with Gymnasium's own environments, one after the other: for any task, and the reference.

    Raises:
        UserError: as `make_vector_env`.
    """
    _check_num_envs(task, num_envs)
    env_fns = [partial(make_env, task, history=history, chunk=chunk)] * num_envs
    return OneByOne(env_fns, copy=False, autoreset_mode=autoreset_mode)


def worker_vector_env(task: Task, num_envs: int, *, history: int, chunk: int, workers: int) -> WorkerVectorEnv:
    """As `sync_vector_env` in SAME_STEP mode, with the environments in `workers` processes.

    Raises:
        UserError: as `make_vector_env`, or a process died.
        Exception: the environment cannot be made in another process.
    """
    _check_num_envs(task, num_envs)
    with closing(make_env(task, history=history, chunk=chunk)) as env:
        return WorkerVectorEnv(env, _constructor(task, history, chunk), num_envs, workers=workers)


def _constructor(task: Task, history: int, chunk: int) -> bytes:
    """What a worker makes its environments with."""
    return cloudpickle.dumps(partial(_make_elsewhere, task.env_spec(), task, history=history, chunk=chunk))


def _make_elsewhere(spec: EnvSpec, task: Task, *, history: int, chunk: int) -> ChunkEnv:
    """`make_env` in another process than the one in which `spec` was registered."""
    with suppress(UserError):
        task.env_spec()  # imports the module that is named in env_id, if there is one, which registers all it has
    gymnasium.registry[task.env_id.rpartition(":")[2]] = spec
    return make_env(task, history=history, chunk=chunk)


def _check_num_envs(task: Task, num_envs: int) -> None:
    if num_envs < 1:
        raise UserError(f"task {task.name}: num_envs must be at least 1, got {num_envs}")


def space_dims(task: Task) -> Spaces:
    """Sizes and bounds of the task's spaces (builds one environment to ask).

    Raises:
        UserError: as `make_env`.
    """
    env = make_env(task, history=1, chunk=1)
    try:
        assert env.observation_space.shape is not None
        obs_dim = env.observation_space.shape[-1]
        action, masked = env.action_space, task.action_mask is not None
        counts = choices_of(action)
        if counts is not None:
            bounds, choices = np.zeros(0, np.float32), None if isinstance(action, Discrete) else counts
            return Spaces(obs_dim, sum(counts), bounds, bounds, discrete=True, choices=choices, masked=masked)
        assert isinstance(action, Box)
        low, high = action.low[0].astype(np.float32), action.high[0].astype(np.float32)
        observed = env.env.env.observation_space if isinstance(env.env, FlattenObservation) else None
        keys = {name: flatdim(part) for name, part in observed.items()} if isinstance(observed, Dict) else None
        return Spaces(
            obs_dim,
            low.shape[0],
            low,
            high,
            observation_parts=_parts(task, "observation", task.observation_parts or keys, obs_dim),
            action_parts=_parts(task, "action", task.action_parts, low.shape[0]),
        )
    finally:
        env.close()


def _parts(task: Task, what: str, dims: Mapping[str, int] | None, total: int) -> tuple[Feature, ...]:
    """The parts of an observation or action of dimension ``total``; a single one is called what it is."""
    parts = tuple(Feature(name, dim) for name, dim in (dims or {what: total}).items())
    if sum(part.dim for part in parts) != total or min(part.dim for part in parts) < 1:
        raise UserError(f"task {task.name}: {what}_parts {in_words(parts)} do not make up the {total} of its {what}")
    return parts
