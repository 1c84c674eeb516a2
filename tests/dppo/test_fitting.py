"""What a policy sees and does is matched to a task by name and dimension, or by what the user says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo.envs.vector import make_vector_env, space_dims
from dppo.fitting import fitted
from dppo.sources import read_policy
from dppo.task import Task
from policies import DiffusionPolicy, Policy, UserError
from policies.features import Feature
from policies.samplers import Sampler

LEROBOT = Path(__file__).parents[1] / "data" / "imports" / "lerobot_ddim"
"""Sees observation.state (2), then observation.environment_state (6)."""


def parts_task(parts: dict[str, int], action_dim: int = 2, **settings: Any) -> Task:
    flat = settings.pop("flat", False)
    return Task("parts", "Parts-v0", {"parts": parts, "action_dim": action_dim, "flat": flat}, **settings)


@pytest.fixture
def lerobot() -> Policy:
    return read_policy(LEROBOT)


def acts(policy: Policy, obs: torch.Tensor) -> torch.Tensor:
    return policy.sample(obs, deterministic=True, generator=torch.Generator().manual_seed(0)).action


def test_the_parts_of_a_task_are_the_keys_of_its_dict_or_what_it_names() -> None:
    spaces = space_dims(parts_task({"b": 2, "a": 3}))
    assert spaces.observation_parts == (Feature("a", 3), Feature("b", 2)), "in the order in which they are flattened"
    assert spaces.action_parts == (Feature("action", 2),)
    flat = parts_task({"b": 2, "a": 3}, flat=True)
    assert space_dims(flat).observation_parts == (Feature("observation", 5),)
    named = parts_task({"b": 2, "a": 3}, flat=True, observation_parts={"b": 2, "a": 3}, action_parts={"x": 1, "y": 1})
    assert space_dims(named).observation_parts == (Feature("b", 2), Feature("a", 3))
    assert space_dims(named).action_parts == (Feature("x", 1), Feature("y", 1))
    with pytest.raises(UserError, match=r"observation_parts b \(2\) do not make up the 5 of its observation"):
        space_dims(parts_task({"b": 2, "a": 3}, flat=True, observation_parts={"b": 2}))


def test_parts_in_another_order_reach_the_policy_in_its_own(lerobot: Policy) -> None:
    task = parts_task({"agent_pos": 2, "a_goal": 1, "environment_state": 6})
    policy = fitted(lerobot, task, "here")
    assert policy.metadata["inputs"] == [["a_goal", 1], ["agent_pos", 2], ["environment_state", 6]]
    obs, _ = make_vector_env(task, 3, history=2, chunk=8).reset(seed=0)
    obs = torch.from_numpy(obs).clone()  # [3, 2, 9]
    torch.testing.assert_close(acts(policy, obs), acts(lerobot, obs[..., 1:]), rtol=1e-4, atol=1e-5)
    assert fitted(policy, task, "here") is policy, "it fits now"


def test_a_map_says_what_names_do_not(lerobot: Policy) -> None:
    task = parts_task({"keypoints": 6, "position": 2})
    map = {"observation.state": "position", "observation.environment_state": ["keypoints"]}
    policy = fitted(lerobot, task, "here", map)
    obs = torch.rand(3, 2, 8)
    expected = acts(lerobot, torch.cat([obs[..., 6:], obs[..., :6]], dim=-1))
    torch.testing.assert_close(acts(policy, obs), expected, rtol=1e-4, atol=1e-5)


def test_actions_are_put_into_the_tasks_order(lerobot: Policy) -> None:
    lerobot.metadata["outputs"] = [["x", 1], ["y", 1]]
    task = parts_task({"agent_pos": 2, "environment_state": 6}, action_parts={"y": 1, "x": 1})
    policy = fitted(lerobot, task, "here")
    assert policy.metadata["outputs"] == [["y", 1], ["x", 1]]
    obs, noise = torch.rand(3, 2, 8), lerobot.draw_noise(3)
    action = lerobot.sample(obs, noise=noise, deterministic=True).action
    moved = policy.sample(obs, noise=noise.flip(-1), deterministic=True).action
    torch.testing.assert_close(moved, action.flip(-1), rtol=1e-4, atol=1e-5)


def test_parts_that_cannot_be_told_apart_are_an_error_that_shows_both_sides(lerobot: Policy) -> None:
    with pytest.raises(UserError) as caught:
        fitted(lerobot, parts_task({"keypoints": 6, "position": 2}), "here")
    assert str(caught.value) == (
        "here does not fit task parts: its policy sees observation.state (2), observation.environment_state (6), "
        "in this order; the task has keypoints (6), position (2); say which is which: "
        "foreign.map={observation.state: ..., observation.environment_state: ...}"
    )


def test_a_task_whose_observation_is_one_vector_is_taken_as_it_is(lerobot: Policy) -> None:
    assert fitted(lerobot, parts_task({"all": 8}, flat=True), "here") is lerobot
    with pytest.raises(UserError, match=r"sees observation.state \(2\).*; the task has observation \(9\)"):
        fitted(lerobot, parts_task({"all": 9}, flat=True), "here")
    with pytest.raises(UserError, match=r"its policy has action_dim 2 .*, the task has 3"):
        fitted(lerobot, parts_task({"all": 8}, 3, flat=True), "here")


@pytest.mark.parametrize(
    ("map", "complaint"),
    [
        ({"state": "position"}, r"foreign.map: here has no 'state', but observation.state \(2\), .*, action \(2\)"),
        ({"observation.state": "pos"}, "foreign.map: the task has no 'pos', but keypoints"),
        ({"observation.state": "keypoints"}, "observation.state has dimension 2, and keypoints another"),
    ],
)
def test_a_map_of_what_is_not_there_is_refused(lerobot: Policy, map: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        fitted(lerobot, parts_task({"keypoints": 6, "position": 2}), "here", map)


def test_a_policy_that_names_no_parts_takes_a_task_as_it_is(small_policy: Callable[..., Policy]) -> None:
    policy = small_policy("gaussian")
    assert fitted(policy, parts_task({"b": 1, "a": 1}), "here") is policy
    with pytest.raises(UserError, match="here has no 'obs', but no parts with names"):
        fitted(policy, parts_task({"b": 1, "a": 1}), "here", {"obs": "a"})
    policy.metadata["inputs"] = [["b", 1], ["a", 1]]
    with pytest.raises(UserError, match="a gaussian policy cannot be put into another order"):
        fitted(policy, parts_task({"b": 1, "a": 1}), "here")


def test_discrete_actions_have_no_parts(small_policy: Callable[..., Policy]) -> None:
    task = Task("points", "Point-v0", {"discrete": True})
    policy = small_policy("categorical")
    assert fitted(policy, task, "here") is policy
    with pytest.raises(UserError, match="discrete actions"):
        fitted(policy, task, "here", {"action": "action"})


def test_an_evaluation_does_not_outlive_its_task_and_its_sampler(small_policy: Callable[..., Policy]) -> None:
    policy = small_policy("diffusion")
    policy.metadata |= {"evaluation": {"return_mean": 1.0}, "mine": 1}
    assert isinstance(policy, DiffusionPolicy)
    assert policy.with_sampler(Sampler(steps=4)).metadata == {"mine": 1}
    assert policy.metadata["evaluation"], "it is still that policy's"
    assert fitted(policy, parts_task({"b": 1, "a": 1}), "here").metadata == {"mine": 1}
