from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo.envs.chunk import ChunkEnv
from dppo.envs.stepper import Step, Stepper
from dppo.envs.vector import make_vector_env
from dppo.task import Task
from policies.errors import UserError

MODES = list(AutoresetMode)
NUM_ENVS = 3

Ending = tuple[int, bool, bool]
Transition = tuple[Any, ...]
"""Observation history, successor history, rewards, steps, terminated, truncated."""


def counting_stepper(counting_env, endings, mode, *, history, chunk, num_envs=NUM_ENVS, **kwargs) -> Stepper:
    env_fns = [lambda: ChunkEnv(counting_env(endings, **kwargs), history=history, chunk=chunk)] * num_envs
    return Stepper(SyncVectorEnv(env_fns, copy=False, autoreset_mode=mode))


def expected_transitions(endings, first_episode: int, history: int, chunk: int, count: int) -> list[Transition]:
    """What one counting environment does, from its definition alone."""
    transitions: list[Transition] = []
    episode = first_episode
    while len(transitions) < count:
        length, terminated, truncated = endings[episode % len(endings)]
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            rewards = [float(i) if i <= end else 0.0 for i in range(start + 1, start + chunk + 1)]
            ends = end == length
            flags = (ends and terminated, ends and truncated and not terminated)
            before, after = ([(max(at - back, 0), episode) for back in reversed(range(history))] for at in (start, end))
            transitions.append((before, after, rewards, end - start, *flags))
        episode += 1
    return transitions[:count]


def row(obs: np.ndarray) -> list[tuple[int, int]]:
    return [(int(step), int(episode)) for step, episode in obs]


def valid_transitions(stepper: Stepper, count: int, seed: int = 0) -> list[list[Transition]]:
    """The first `count` valid transitions of each environment."""
    num_envs = stepper.env.num_envs
    found: list[list[Transition]] = [[] for _ in range(num_envs)]
    action = np.zeros_like(stepper.env.action_space.sample())
    obs = stepper.reset(seed)
    while min(map(len, found)) < count:
        step = stepper.step(action)
        for i in range(num_envs):
            if step.valid[i]:
                outcome = (step.step_rewards[i].tolist(), step.steps[i], step.terminated[i], step.truncated[i])
                found[i].append((row(obs[i]), row(step.final_obs[i]), *outcome))
            else:
                assert not step.terminated[i]
                assert not step.truncated[i]
                assert step.steps[i] == 0
                assert not step.step_rewards[i].any()
        obs = step.obs
    return [transitions[:count] for transitions in found]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("history", [1, 3])
def test_every_autoreset_mode_gives_the_same_valid_transitions(counting_env, mode, chunk, history):
    endings = ((5, True, False), (4, False, True), (1, True, True), (7, False, True), (6, True, True))
    stepper = counting_stepper(counting_env, endings, mode, history=history, chunk=chunk)
    found = valid_transitions(stepper, 20)
    for i in range(NUM_ENVS):
        assert found[i] == expected_transitions(endings, i, history, chunk, 20)


@settings(max_examples=40, deadline=None)
@given(
    endings=st.lists(
        st.tuples(st.integers(1, 9), st.booleans(), st.booleans()).filter(lambda e: e[1] or e[2]),
        min_size=1,
        max_size=5,
    ),
    chunk=st.integers(1, 5),
    history=st.integers(1, 4),
    mode=st.sampled_from(MODES),
)
def test_any_sequence_of_episodes_is_reported_as_it_was(counting_env, endings, chunk, history, mode):
    stepper = counting_stepper(counting_env, endings, mode, history=history, chunk=chunk)
    found = valid_transitions(stepper, 8)
    for i in range(NUM_ENVS):
        assert found[i] == expected_transitions(endings, i, history, chunk, 8)


@pytest.mark.parametrize("mode", MODES)
def test_environments_that_all_end_at_once_are_reported_alike(counting_env, mode):
    endings = ((3, False, True),)
    stepper = counting_stepper(counting_env, endings, mode, history=2, chunk=4)
    for i, transitions in enumerate(valid_transitions(stepper, 6)):
        assert transitions == expected_transitions(endings, i, 2, 4, 6)


@pytest.mark.parametrize("mode", MODES)
def test_worker_processes_give_the_same_transitions(counting_env, mode):
    endings = ((5, True, False), (3, False, True))
    env_fns = [lambda: ChunkEnv(counting_env(endings), history=2, chunk=2)] * 2
    stepper = Stepper(AsyncVectorEnv(env_fns, copy=False, autoreset_mode=mode))
    try:
        for i, transitions in enumerate(valid_transitions(stepper, 8)):
            assert transitions == expected_transitions(endings, i, 2, 2, 8)
    finally:
        stepper.close()


@pytest.mark.parametrize("mode", MODES)
def test_the_successor_at_a_truncation_is_the_last_observation_and_not_the_first_of_the_next_episode(
    counting_env, mode
):
    stepper = counting_stepper(counting_env, [(2, False, True)], mode, history=1, chunk=4, num_envs=1)
    stepper.reset(0)
    step = stepper.step(np.zeros((1, 4, 2), np.float32))
    assert step.truncated[0]
    np.testing.assert_array_equal(step.final_obs[0], [[2, 0]])
    np.testing.assert_array_equal(step.obs[0], [[2, 0]] if mode is AutoresetMode.NEXT_STEP else [[0, 1]])


def test_only_next_step_mode_has_invalid_rows_one_after_each_end(counting_env):
    stepper = counting_stepper(
        counting_env, [(2, True, False), (3, True, False)], AutoresetMode.NEXT_STEP, history=1, chunk=1, num_envs=2
    )
    stepper.reset(0)
    valid = [stepper.step(np.zeros((2, 1, 2), np.float32)).valid.tolist() for _ in range(6)]
    assert valid == [[True, True], [True, True], [False, True], [True, False], [True, True], [True, True]]


def test_a_reset_in_the_middle_leaves_no_row_waiting_to_be_invalid(counting_env):
    stepper = counting_stepper(counting_env, [(1, True, False)], AutoresetMode.NEXT_STEP, history=1, chunk=1)
    stepper.reset(0)
    assert stepper.step(np.zeros((NUM_ENVS, 1, 2), np.float32)).terminated.all()
    stepper.reset(0)
    assert stepper.step(np.zeros((NUM_ENVS, 1, 2), np.float32)).valid.all()


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_not_changed_by_the_next_one_nor_by_changing_another_of_its_arrays(counting_env, mode):
    stepper = counting_stepper(counting_env, [(3, True, False), (4, False, True)], mode, history=2, chunk=2)
    obs = stepper.reset(0)
    kept = obs.copy()
    steps: list[Step] = []
    copies: list[dict[str, np.ndarray]] = []
    for _ in range(6):
        step = stepper.step(np.zeros((NUM_ENVS, 2, 2), np.float32))
        steps.append(step)
        copies.append({name: np.copy(value) for name, value in vars(step).items()})
    stepper.reset(0)
    np.testing.assert_array_equal(obs, kept)
    for step, copy in zip(steps, copies, strict=True):
        assert step.obs.dtype == step.final_obs.dtype == np.float32
        assert not np.shares_memory(step.obs, step.final_obs)
        for name, value in copy.items():
            np.testing.assert_array_equal(getattr(step, name), value)


def test_discrete_actions_are_stepped(counting_env):
    endings = ((2, True, False),)
    stepper = counting_stepper(counting_env, endings, AutoresetMode.SAME_STEP, history=1, chunk=1, discrete=True)
    for i, transitions in enumerate(valid_transitions(stepper, 5)):
        assert transitions == expected_transitions(endings, i, 1, 1, 5)


def test_a_seed_repeats_the_trajectory_and_gives_every_environment_its_own():
    stepper = Stepper(make_vector_env(Task("hopper", "Hopper-v5"), 2, history=1, chunk=4))
    action = np.random.default_rng(0).uniform(-1, 1, (30, 2, 4, 3)).astype(np.float32)
    runs = []
    for _ in range(2):
        runs.append([stepper.reset(7), *(stepper.step(chunk).obs for chunk in action)])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0][0][0] != runs[0][0][1]).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", ["observation", "reward", "huge"])
@pytest.mark.parametrize("length", [9, 3])
def test_an_episode_is_dropped_where_a_value_is_not_finite_and_a_new_one_begins(counting_env, mode, bad, length):
    """Whether the episode would have gone on or not."""
    endings = [(9, True, False), (length, True, False)]
    stepper = counting_stepper(counting_env, endings, mode, history=1, chunk=3, num_envs=2, bad=bad)
    stepper.reset(0)
    step = stepper.step(np.zeros((2, 3, 2), np.float32))
    assert step.dropped.tolist() == step.truncated.tolist() == [False, True]
    assert step.valid.tolist() == [True, False]
    assert not step.terminated.any()
    assert step.steps.tolist() == [3, 0]
    assert step.step_rewards.tolist() == [[1, 2, 3], [0, 0, 0]]
    assert step.obs.tolist() == step.final_obs.tolist() == [[[3, 0]], [[0, 2]]]
    following = stepper.step(np.zeros((2, 3, 2), np.float32))
    assert following.valid.all() and not following.dropped.any()
    assert following.obs.tolist() == [[[6, 0]], [[3, 2]]]


@pytest.mark.parametrize("mode", MODES)
def test_a_first_observation_that_is_not_finite_is_asked_for_again_and_costs_no_episode(counting_env, mode):
    endings = [(9, True, False), (1, True, False)]
    stepper = counting_stepper(counting_env, endings, mode, history=1, chunk=1, num_envs=2, bad="one reset")
    stepper.reset(0)
    steps = [stepper.step(np.zeros((2, 1, 2), np.float32)) for _ in range(3)]
    assert not any(step.dropped.any() for step in steps)
    assert all(np.isfinite(value).all() for step in steps for value in vars(step).values())
    assert steps[0].terminated.tolist() == [False, True]
    episodes = {int(step.obs[1, 0, 1]) for step in steps}
    assert 3 in episodes and 2 not in episodes


@pytest.mark.parametrize("mode", MODES)
def test_an_environment_that_begins_again_and_again_with_what_is_not_finite_is_an_error(counting_env, mode):
    endings = [(9, True, False), (1, True, False)]
    stepper = counting_stepper(counting_env, endings, mode, history=1, chunk=1, bad="reset")
    stepper.reset(0)
    with pytest.raises(
        UserError, match=r"environment 1: non-finite first observation \(inf at index \(0, 0\)\); .* 5 "
    ):
        stepper.step(np.zeros((NUM_ENVS, 1, 2), np.float32))
        assert mode is AutoresetMode.NEXT_STEP, "the other modes reset at once"
        stepper.step(np.zeros((NUM_ENVS, 1, 2), np.float32))


def test_a_simulation_that_becomes_unstable_costs_its_own_episode_alone():
    env = make_vector_env(Task("cheetah", "HalfCheetah-v5"), 2, history=1, chunk=1)
    stepper = Stepper(env)
    stepper.reset(0)
    env.unwrapped._physics.place(1, np.full(9, np.nan), np.zeros(9))  # type: ignore[attr-defined]
    step = stepper.step(np.zeros((2, 1, 6), np.float32))
    assert step.dropped.tolist() == [False, True]
    assert np.isfinite(step.obs).all()
    assert stepper.step(np.zeros((2, 1, 6), np.float32)).valid.all()


def test_an_action_that_is_not_finite_is_blamed_on_the_policy(counting_env):
    stepper = counting_stepper(counting_env, [(9, True, False)], AutoresetMode.SAME_STEP, history=1, chunk=2)
    stepper.reset(0)
    action = np.zeros((NUM_ENVS, 2, 2), np.float32)
    action[2, 1, 0] = np.nan
    with pytest.raises(UserError, match=r"environment 2: non-finite action \(nan at index \(1, 0\)\); the policy"):
        stepper.step(action)


def test_environments_that_are_not_chunked_are_refused(counting_env):
    with pytest.raises(ValueError, match=r"\[To, Do\]"):
        Stepper(SyncVectorEnv([counting_env]))
