"""Environments that say where an observation belongs or pay for reaching a target, and small policies."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from dppo.cli import main
from dppo.task import Task
from policies import Policy

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
        if seed is None and (self._bad == "reset" or (self._bad == "one reset" and self._episode == 2)):
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
            reward = {"reward": np.inf, "huge": 1e300}.get(self._bad, reward)
            self._obs[1] = np.nan if self._bad == "observation" else self._obs[1]
        return (self._obs, reward, ended and terminated, ended and truncated, {"distance": np.zeros(3)})


class PointEnv(gymnasium.Env[np.ndarray, Any]):
    """Shows a new target in [-1, 1]^2 at every step and pays minus the squared distance of the action to it.

    Discrete actions 0, 1, 2 stand for -1, 0, 1 in both dimensions. Every episode is truncated after `length` steps. A
    `reward` replaces what is paid, and that of step `broken` of an episode is NaN.
    """

    observation_space = Box(-1, 1, (2,), np.float32)

    def __init__(
        self, length: int = 6, discrete: bool = False, reward: float | None = None, broken: int | None = None
    ) -> None:
        self.action_space = Discrete(3) if discrete else Box(-1, 1, (2,), np.float32)
        self.length, self.discrete, self.reward, self.broken = length, discrete, reward, broken

    def _observe(self) -> np.ndarray:
        self.target = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.target

    def get_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "target": self.target.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.steps, self.target = state["steps"], state["target"].copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        at = action - 1 if self.discrete else action
        reward = -float(np.square(at - self.target).sum()) if self.reward is None else self.reward
        if self.steps == self.broken:
            reward = np.nan
        self.steps += 1
        return self._observe(), reward, False, self.steps >= self.length, {}


class PartsEnv(gymnasium.Env[Any, Any]):
    """Observes random parts, of the given dimensions, as a Dict or end to end; every episode has 20 steps."""

    def __init__(self, parts: dict[str, int], action_dim: int, flat: bool = False) -> None:
        self.action_space = Box(-1, 1, (action_dim,), np.float32)
        dims = {"all": sum(parts.values())} if flat else parts
        self.parts = gymnasium.spaces.Dict({name: Box(-1, 1, (dim,), np.float32) for name, dim in dims.items()})
        self.observation_space = self.parts["all"] if flat else self.parts
        self.flat = flat

    def _observe(self) -> Any:
        parts = {name: self.np_random.uniform(-1, 1, space.shape) for name, space in self.parts.items()}
        parts = {name: value.astype(np.float32) for name, value in parts.items()}
        return parts["all"] if self.flat else parts

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        return self._observe(), -float(np.square(action).sum()), False, self.steps >= 20, {}


class ClosedEnv(PointEnv):
    """Does not tell its state."""

    get_state = set_state = None  # type: ignore[assignment]


if "Counting-v0" not in gymnasium.registry:
    gymnasium.register("Counting-v0", lambda **kwargs: CountingEnv(**kwargs))
    gymnasium.register("Point-v0", lambda **kwargs: PointEnv(**kwargs))
    gymnasium.register("Parts-v0", lambda **kwargs: PartsEnv(**kwargs))
    gymnasium.register("Closed-v0", lambda **kwargs: ClosedEnv(**kwargs))


@pytest.fixture(autouse=True)
def datasets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Minari keeps its datasets: nowhere that matters."""
    folder = tmp_path / "datasets"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    return folder


@pytest.fixture(scope="session")
def counting_env() -> type[CountingEnv]:
    return CountingEnv


@pytest.fixture
def counting_task() -> Task:
    return Task("counting", "Counting-v0")


@pytest.fixture
def point_task() -> Task:
    return Task("point", "Point-v0", success_reward=-0.1)


KINDS: dict[str, dict[str, Any]] = {
    "gaussian": {"history": 2, "chunk": 3, "executed": 2},
    "mixture": {"history": 2, "chunk": 3, "components": 2},
    "categorical": {},
    "diffusion_ode": {
        "history": 2,
        "chunk": 3,
        "denoising_steps": 3,
        "prediction": "v_prediction",
        "solver": "midpoint",
    },
    "diffusion": {"history": 2, "chunk": 3, "executed": 2, "denoising_steps": 4, "finetuned_steps": 3},
}


@pytest.fixture(scope="session")
def small_policy() -> Callable[..., Policy]:
    """Builds a policy of a kind with a seed; further settings replace those of `KINDS`."""

    def build(kind: str, seed: int = 0, **settings: Any) -> Policy:
        torch.manual_seed(seed)
        network = {"type": "mlp", "hidden_dims": [8, 8, 8]}
        if kind.startswith("diffusion"):
            network["step_dim"] = 4
        dims = {"obs_dim": 2, "action_dim": 3 if kind == "categorical" else 2}
        return Policy.from_config({"type": kind, **dims, "network": network, **KINDS[kind], **settings})

    return build


@pytest.fixture
def task_of(point_task: Task) -> Callable[[str], Task]:
    """A task that fits a kind of policy."""
    discrete = Task("points", "Point-v0", {"discrete": True})
    return lambda kind: discrete if kind == "categorical" else point_task


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command line that must end with status 2 and a single line on stderr, which it returns."""
    monkeypatch.setattr("dppo.output.video.choose_gl_backend", lambda: None)

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.endswith("\n")
        assert message.count("\n") == 1
        return message[:-1]

    return run
