"""Discrete actions of every kind, their masks, and observations that are no vectors, through to the trainer."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from dppo.building import build_policy, build_task, scratch_policy
from dppo.cli import main
from dppo.configuration import compose_config
from dppo.envs.vector import make_env, make_vector_env, space_dims
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.first_order_config import PPOConfig
from policies import CategoricalPolicy, UserError

SPACES = {"discrete": Discrete(3), "several": MultiDiscrete([3, 2]), "binary": MultiBinary(4)}


class Choosing(gymnasium.Env):
    """Only the actions whose numbers have the parity of the step are valid; the reward is 1 for a valid one."""

    def __init__(self, actions: str, where: str | None) -> None:
        self.actions = actions
        self.action_space = SPACES[actions]
        self.where = where
        self.size = {"discrete": 3, "several": 5, "binary": 8}[actions]
        spaces: dict[str, gymnasium.Space] = {"count": Discrete(4), "place": Box(-1, 1, (2,))}
        if where == "observation":
            spaces["allowed"] = Box(0, 1, (self.size,), np.int8)
        self.observation_space = Dict(spaces)
        self.steps = 0

    def _mask(self) -> np.ndarray:
        return ((np.arange(self.size) + self.steps) % 2 == 0).astype(np.int8)

    def _answer(self) -> tuple[dict[str, Any], dict[str, Any]]:
        obs: dict[str, Any] = {"count": self.steps % 4, "place": np.array([0.5, -0.5], np.float32)}
        if self.where == "observation":
            obs["allowed"] = self._mask()
        last = self.steps == 5
        return obs, {"action_mask": self._mask()} if self.where == "info" and not last else {}

    def _chosen(self, action: Any) -> np.ndarray:
        """The mask's entries for an action, of each dimension."""
        counts = {"discrete": [3], "several": [3, 2], "binary": [2] * 4}[self.actions]
        starts = np.cumsum([0, *counts[:-1]])
        return self._mask()[starts + np.asarray(action).ravel()]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._answer()

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        reward = float(self._chosen(action).all())
        self.steps += 1
        obs, info = self._answer()
        return obs, reward, self.steps == 5, False, info


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register("Choosing-v0", Choosing)
    yield
    gymnasium.registry.pop("Choosing-v0")


def task(actions: str = "discrete", where: str | None = None, mask: str | None = None) -> Task:
    return Task("choosing", "Choosing-v0", {"actions": actions, "where": where}, action_mask=mask)


@pytest.mark.parametrize(("where", "source"), [("info", "info"), ("observation", "allowed")])
def test_the_mask_follows_the_flattened_observation(where, source):
    env = make_env(task(where=where, mask=source), history=1, chunk=1)
    assert env.observation_space.shape == (1, 4 + 2 + 3)
    obs, _ = env.reset(seed=0)
    assert obs[0].tolist() == [1, 0, 0, 0, 0.5, -0.5, 1, 0, 1]
    obs, *_ = env.step(0)
    assert obs[0].tolist() == [0, 1, 0, 0, 0.5, -0.5, 0, 1, 0]


def test_where_an_episode_ends_without_a_mask_everything_is_allowed():
    env = make_env(task(where="info", mask="info"), history=1, chunk=1)
    env.reset(seed=0)
    for _ in range(5):
        obs, _, terminated, _, _ = env.step(0)
    assert terminated
    assert obs[0, -3:].tolist() == [1, 1, 1]


def test_an_observation_of_numbers_becomes_one_hot():
    spaces = space_dims(Task("taxi", "Taxi-v4"))
    assert (spaces.obs_dim, spaces.action_dim, spaces.discrete) == (500, 6, True)
    env = make_env(Task("lake", "FrozenLake-v1"), history=2, chunk=1)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (2, 16)
    assert obs.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("actions", "choices", "total"), [("discrete", None, 3), ("several", (3, 2), 5), ("binary", (2,) * 4, 8)]
)
def test_the_sizes_of_discrete_spaces(actions, choices, total):
    spaces = space_dims(task(actions, "info", "info"))
    assert (spaces.choices, spaces.action_dim, spaces.masked) == (choices, total, True)
    assert spaces.obs_dim == 6 + total


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("actions", SPACES)
def test_a_policy_acts_and_learns_in_every_kind_of_discrete_space(actions, num_envs):
    masked = task(actions, "info", "info")
    config = compose_config("finetune", ["task=cartpole", "policy=categorical", "checkpoint=scratch"])
    policy = scratch_policy(config, masked)
    assert isinstance(policy, CategoricalPolicy)
    trainer = Trainer(policy, masked, TrainerConfig(100, num_envs, 10), PPOConfig(epochs=1), config["critic"])
    row = trainer.iterate()
    assert row["episodes"] == 2 * num_envs
    assert row["return_mean"] == 5, "every action was valid"
    assert row["policy_loss"] is not None
    trainer.close()


@pytest.mark.parametrize("command", ["collect", "pretrain"])
def test_demonstrations_with_a_mask_are_refused_before_any_work(command, tmp_path, monkeypatch, capsys):
    """Datasets hold plain observations: what a policy would learn from them is in another order."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "choosing.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /policy: categorical\ntask:\n  name: choosing\n"
        "  env_id: Choosing-v0\n  env_kwargs: {actions: several, where: info}\n  action_mask: info\n"
        "  dataset: me/choosing/x-v0\n"
    )
    assert main([command, "--config-dir", str(tmp_path), "task=choosing", f"run={tmp_path / 'run'}"]) == 2
    assert "there are no demonstrations; use checkpoint=scratch" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_policy_for_other_choices_does_not_fit():
    config = {**compose_config("finetune", ["task=cartpole"]), "task": {"name": "choosing", "env_id": "Choosing-v0"}}
    spaces = space_dims(task("several"))
    with pytest.raises(UserError, match="its policy has choices None, the task"):
        build_policy(config, spaces, choices=None)
    assert build_task(config).name == "choosing"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (task(mask="info"), "its info has no 'action_mask', but nothing"),
        (task(mask="other"), "no action_mask 'other' in the observation; its keys are count, place"),
        (Task("pendulum", "Pendulum-v1", action_mask="info"), "action_mask is for discrete actions"),
    ],
)
def test_a_mask_that_is_not_there_is_an_error(choice, message):
    with pytest.raises(UserError, match=message):
        make_vector_env(choice, 2, history=1, chunk=1).reset(seed=0)


def test_a_mask_of_the_wrong_length_is_an_error(monkeypatch):
    monkeypatch.setattr(Choosing, "_mask", lambda self: np.ones(2))
    with pytest.raises(UserError, match="its action mask has 2 entries for 3 actions"):
        make_env(task(where="info", mask="info"), history=1, chunk=1).reset(seed=0)
