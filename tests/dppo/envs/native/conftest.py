from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dppo.envs.native.vector_env import NativeVectorEnv
from dppo.envs.vector import make_vector_env
from dppo.task import Task

NativeEnv = Callable[..., NativeVectorEnv]


@pytest.fixture
def native_env() -> Iterator[NativeEnv]:
    """Builds vector environments and closes them in the end; they must be native ones."""
    built: list[NativeVectorEnv] = []

    def build(task: Task, num_envs: int = 3, *, history: int = 2, chunk: int = 4, **settings: Any) -> NativeVectorEnv:
        env = make_vector_env(task, num_envs, history=history, chunk=chunk, **settings)
        assert isinstance(env, NativeVectorEnv)
        built.append(env)
        return env

    yield build
    for env in built:
        env.close()


@pytest.fixture
def chunks() -> Callable[..., np.ndarray]:
    """Random actions for some steps of an environment, [steps, N, Ta, Da] float32, some of them out of bounds."""

    def draw(env: NativeVectorEnv, steps: int, seed: int = 0) -> np.ndarray:
        size = (steps, *env.action_space.shape)
        return (env.action_space.high * np.random.default_rng(seed).normal(0, 0.7, size)).astype(np.float32)

    return draw
