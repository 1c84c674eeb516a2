"""A runner does with single observations what training does with chunks of an environment."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from dppo.envs.chunk import ChunkEnv
from policies import Policy
from policies.runner import ChunkRunner, History, plan_with

SMALL = {"type": "mlp", "hidden_dims": [8, 8, 8]}
CASES: dict[str, dict[str, Any]] = {
    "diffusion": {"type": "diffusion", "network": SMALL, "denoising_steps": 3, "chunk": 4, "history": 2},
    "part of a chunk that begins in the past": {
        **{"type": "diffusion", "network": SMALL, "denoising_steps": 3, "chunk": 5, "history": 3},
        **{"first_executed": 2, "executed": 2},
    },
    "gaussian": {"type": "gaussian", "network": SMALL, "chunk": 3},
    "categorical": {"type": "categorical", "network": SMALL, "action_dim": 3, "history": 2},
}


class DriftEnv(gymnasium.Env[np.ndarray, Any]):
    """Observes what the actions add up to, in a buffer of its own, and ends after 6 steps; keeps what it was given."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, discrete: bool) -> None:
        self.action_space = Discrete(3) if discrete else Box(-0.8, 0.8, (2,), np.float32)
        self.given: list[Any] = []
        self._obs = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self._obs[:], self._steps = (1.0, len(self.given)), 0
        return self._obs, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.given.append(np.array(action))
        self._obs += action
        self._steps += 1
        return self._obs, 0.0, self._steps == 6, False, {}


def made(case: str) -> Policy:
    torch.manual_seed(0)
    policy = Policy.from_config({"obs_dim": 2, "action_dim": 2, **CASES[case]})
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.3 * torch.randn(weights.shape))
    return policy


def given_in_training(policy: Policy, episodes: int) -> list[Any]:
    """The actions that an environment is given by a policy that acts on chunks."""
    env = ChunkEnv(DriftEnv(policy.discrete), history=policy.config.history, chunk=policy.config.executed_chunk)
    generator = torch.Generator().manual_seed(7)
    for _ in range(episodes):
        obs, over = env.reset()[0], False
        while not over:
            action = policy.sample(torch.from_numpy(obs)[None], deterministic=True, generator=generator).action[0]
            obs, _, over, _, _ = env.step(action.numpy())
    assert isinstance(env.unwrapped, DriftEnv)
    return env.unwrapped.given


@pytest.mark.parametrize("case", CASES)
def test_the_same_noise_leads_to_the_actions_of_a_chunked_environment(case: str) -> None:
    policy = made(case)
    env = DriftEnv(policy.discrete)
    runner = ChunkRunner(plan_with(policy, seed=7), policy.config.history)
    for _ in range(3):
        obs, over = env.reset()[0], False
        runner.reset()
        while not over:
            action = runner.act(obs)
            if isinstance(env.action_space, Box):
                action = np.clip(action, env.action_space.low, env.action_space.high)
            obs, _, over, _, _ = env.step(action)
    expected = given_in_training(policy, 3)
    assert len(env.given) == len(expected) == 18
    np.testing.assert_array_equal(env.given, expected)


def test_without_a_seed_every_plan_has_noise_of_its_own() -> None:
    policy, history = made("diffusion"), np.zeros((2, 2), np.float32)
    assert not np.array_equal(plan_with(policy)(history), plan_with(policy)(history))
    assert np.array_equal(plan_with(policy, seed=1)(history), plan_with(policy, seed=1)(history))


def test_a_history_begins_with_the_first_observation_and_moves_at_every_step() -> None:
    history, obs = History(3), np.zeros(1)
    seen = []
    for value in (1.0, 2.0, 3.0, 4.0):
        obs[0] = value  # one buffer for all
        seen.append(history.add(obs)[:, 0].tolist())
    assert seen == [[1, 1, 1], [1, 1, 2], [1, 2, 3], [2, 3, 4]]
    history.clear()
    assert history.add(obs)[:, 0].tolist() == [4, 4, 4]


def test_a_new_episode_executes_nothing_of_the_last_ones_chunk() -> None:
    runner = ChunkRunner(lambda history: np.arange(3) + 10 * history[-1, 0], 1)
    first = [runner.act(np.array([1.0])), runner.act(np.array([2.0]))]
    runner.reset()
    assert [*first, runner.act(np.array([5.0]))] == [10, 11, 50]
