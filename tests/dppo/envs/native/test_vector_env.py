import pickle

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from dppo.envs.stepper import Stepper
from dppo.envs.vector import make_vector_env, sync_vector_env
from dppo.task import Task

HOPPER = Task("hopper", "Hopper-v5", max_episode_steps=30)
ANT = Task("ant", "Ant-v5", max_episode_steps=30)
REACHER_V4 = Task("reacher", "Reacher-v4", max_episode_steps=10)  # pays for what was before the step


def outcomes(env, actions) -> list[np.ndarray]:
    """Observations, rewards and flags of every step."""
    return [np.copy(values) for action in actions for values in env.step(action)[:4]]


@pytest.mark.parametrize("task", [HOPPER, ANT, REACHER_V4])
def test_restored_environments_do_again_what_they_did(native_env, chunks, task):
    env = native_env(task)
    env.reset(seed=3)
    actions = chunks(env, 30)
    outcomes(env, actions[:7])
    state = pickle.loads(pickle.dumps(env.get_state()))
    expected = outcomes(env, actions[7:])
    other = native_env(task)
    for again in (env, other):
        again.set_state(state)
        for found, once in zip(outcomes(again, actions[7:]), expected, strict=True):
            np.testing.assert_array_equal(found, once)


def test_a_state_is_a_copy(native_env, chunks):
    env = native_env(ANT)
    env.reset(seed=3)
    state = env.get_state()
    kept = pickle.dumps(state)
    outcomes(env, chunks(env, 10))
    assert pickle.dumps(state) == kept
    env.set_state(state)
    outcomes(env, chunks(env, 10))
    assert pickle.dumps(state) == kept


def test_a_state_of_other_sizes_is_refused(native_env):
    state = native_env(HOPPER, 2).get_state()
    with pytest.raises(ValueError, match=r"\(2, 2, 11\).*\(3, 2, 11\)"):
        native_env(HOPPER, 3).set_state(state)


@pytest.mark.parametrize("task", [HOPPER, ANT])
def test_the_number_of_threads_changes_nothing(native_env, chunks, task):
    envs = [native_env(task, 5, threads=threads) for threads in (1, 2, 4)]
    for env in envs:
        env.reset(seed=0)
    actions = chunks(envs[0], 12)
    expected, *others = (outcomes(env, actions) for env in envs)
    for found in others:
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_there_are_no_more_threads_than_environments(native_env):
    assert len(native_env(HOPPER, 2, threads=16)._physics._workers) == 2
    assert len(native_env(HOPPER, 2, threads=1)._physics._workers) == 1


@pytest.mark.parametrize("seed", [5, [4, 11, 4]])
def test_seeds_are_those_of_gymnasium(native_env, seed):
    native, gym = native_env(HOPPER), sync_vector_env(HOPPER, 3, history=2, chunk=4)
    for again in (seed, None, seed, None):
        np.testing.assert_array_equal(native.reset(seed=again)[0], gym.reset(seed=again)[0])
    gym.close()


def test_without_a_seed_episodes_differ(native_env):
    env = native_env(HOPPER)
    obs, _ = env.reset()
    assert len(np.unique(obs[:, -1, 0])) == 3
    assert not np.isin(env.reset()[0][:, -1, 0], obs[:, -1, 0]).any()


def test_a_mask_resets_some(native_env, chunks):
    native, gym = native_env(HOPPER), sync_vector_env(HOPPER, 3, history=2, chunk=4)
    mask = np.array([True, False, True])
    for env in (native, gym):
        env.reset(seed=0)
        env.step(chunks(native, 1)[0])
    resets = [env.reset(options={"reset_mask": mask.copy()})[0] for env in (native, gym)]
    np.testing.assert_array_equal(*resets)
    steps = [env.step(chunks(native, 1)[0])[0] for env in (native, gym)]
    np.testing.assert_array_equal(*steps)
    gym.close()


def test_what_was_returned_is_not_changed_by_the_next_step(native_env, chunks):
    env = native_env(HOPPER)
    first, _ = env.reset(seed=0)
    kept = [first.copy()]
    returned = [first]
    for action in chunks(env, 20):
        obs, reward, terminated, truncated, infos = env.step(action)
        last = infos.get("final_obs", np.zeros(0))
        returned += [obs, reward, terminated, truncated, *(row for row in last if row is not None)]
        kept += [values.copy() for values in returned[len(kept) :]]
    env.reset(seed=0)
    for found, once in zip(returned, kept, strict=True):
        np.testing.assert_array_equal(found, once)


def test_a_step_before_the_first_reset_is_refused(native_env, chunks):
    env = native_env(HOPPER)
    with pytest.raises(ResetNeeded):
        env.step(chunks(env, 1)[0])


def test_chunks_of_the_wrong_shape_are_refused(native_env):
    env = native_env(HOPPER)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"\(3, 4, 3\).*\(3, 5, 3\)"):
        env.step(np.zeros((3, 5, 3), np.float32))


def test_the_wrong_number_of_seeds_is_refused(native_env):
    with pytest.raises(ValueError, match="expected 3 seeds, got 2"):
        native_env(HOPPER).reset(seed=[1, 2])


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("task", [HOPPER, ANT, REACHER_V4])
def test_steps_without_a_detour_through_infos_are_those_with_it(task, chunk):
    native = make_vector_env(task, 3, history=2, chunk=chunk)
    gym = sync_vector_env(task, 3, history=2, chunk=chunk)
    native.action_space.seed(0)
    steppers = Stepper(native), Stepper(gym)
    assert steppers[0]._directly is not None and steppers[1]._directly is None
    np.testing.assert_array_equal(*(stepper.reset(seed=1) for stepper in steppers))
    ends = 0
    for _ in range(40):
        action = native.action_space.sample()
        ours, theirs = (vars(stepper.step(action)) for stepper in steppers)
        for name, found in ours.items():
            np.testing.assert_array_equal(found, theirs[name], err_msg=name)
        ends += (ours["terminated"] | ours["truncated"]).sum()
    assert ends >= 3
    for stepper in steppers:
        stepper.close()


def test_what_a_step_told_stays_as_it_was():
    env = make_vector_env(HOPPER, 2, history=1, chunk=1)
    stepper = Stepper(env)
    stepper.reset(seed=0)
    told = stepper.step(np.zeros(env.action_space.shape, np.float32))
    kept = {name: np.copy(values) for name, values in vars(told).items()}
    stepper.step(np.ones(env.action_space.shape, np.float32))
    stepper.reset()
    for name, values in kept.items():
        np.testing.assert_array_equal(getattr(told, name), values, err_msg=name)
    stepper.close()
