"""Running commands in this process, on tasks so small that nothing is learned but everything is written."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from dppo.configuration import compose_config, overridden_keys

Command = Callable[..., dict[str, Any]]

POINT = (
    "task=hopper",
    "task.name=point",
    "task.env_id=Point-v0",
    "task.success_reward=-0.1",
    "task.dataset=dppo/point-v0",
)
"""The task of the tests' own `PointEnv`, in place of Hopper."""

TINY = {
    "collect": [
        *("steps=60", "demonstrator.expert.target_return=-1e9", "demonstrator.expert.num_envs=4"),
        *("demonstrator.expert.rollout_steps=60", "logger=none"),
    ],
    "pretrain": [
        *("updates=12", "log_interval=4", "batch_size=16", "network.hidden_dims=[8,8,8]", "logger=none", "video=false"),
        *("evaluation.episodes=4", "evaluation.num_envs=2", "evaluation.interval=0"),
    ],
    "finetune": [
        *("env_steps=300", "num_envs=3", "rollout_steps=20", "algo.epochs=2", "logger=none", "video=false"),
        *("evaluation.episodes=4", "evaluation.num_envs=2"),
    ],
    "evaluate": ["episodes=4", "num_envs=2"],
    "export": [],
}
"""Settings of each command that make it short."""


@pytest.fixture(scope="session")
def point() -> tuple[str, ...]:
    return POINT


@pytest.fixture(scope="session")
def tiny() -> dict[str, list[str]]:
    return TINY


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs a command by its name with its tiny settings and further overrides."""

    def run(name: str, *overrides: str) -> dict[str, Any]:
        given = [*TINY[name], *overrides]
        return import_module(f"dppo.commands.{name}").run(compose_config(name, given), overridden_keys(given))

    return run
