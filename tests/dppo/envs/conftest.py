"""An environment whose every observation and reward says where in which episode it belongs."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from dppo.task import Task

Ending = tuple[int, bool, bool]
"""Length of an episode in environment steps, terminated, truncated."""

ENDINGS: tuple[Ending, ...] = ((5, True, False), (4, False, True), (1, True, True), (7, False, True))


class CountingEnv(gymnasium.Env[np.ndarray, Any]):
    """Observes [step in the episode, episode], pays the step number, and ends episode e as `endings[e]` says.

    A seed sets the number of the first episode, so that seeded copies are out of step with each other.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, endings: Sequence[Ending] = ENDINGS, discrete: bool = False, bad: str = "") -> None:
        self.action_space = (
            Discrete(3) if discrete else Box(np.array([-1, -2], np.float32), np.array([1, np.inf], np.float32))
        )
        self.received: list[Any] = []
        self._endings = endings
        self._bad = bad
        self._episode = -1
        # One buffer for all observations: environments do that, and a history must not be made of views of it.
        self._obs = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._episode = seed if seed is not None else self._episode + 1
        self._obs[:] = (0, self._episode)
        if self._bad == "reset" and seed is None:
            self._obs[0] = np.inf
        return self._obs, {"noise": 1.0}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.received.append(action)
        self._obs[0] += 1
        length, terminated, truncated = self._endings[self._episode % len(self._endings)]
        ended = bool(self._obs[0] >= length)
        reward = float(self._obs[0])
        # The second environment goes wrong at its third step.
        if self._obs[0] == 3 and self._episode == 1:
            reward = np.inf if self._bad == "reward" else reward
            self._obs[1] = np.nan if self._bad == "observation" else self._obs[1]
        return (self._obs, reward, ended and terminated, ended and truncated, {"distance": np.zeros(3)})


if "Counting-v0" not in gymnasium.registry:
    gymnasium.register("Counting-v0", lambda **kwargs: CountingEnv(**kwargs))


@pytest.fixture(scope="session")
def counting_env() -> type[CountingEnv]:
    return CountingEnv


@pytest.fixture
def counting_task() -> Task:
    return Task("counting", "Counting-v0")
