"""Environments that are put into a state do what the one did that told it, to the last bit."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from equality import assert_same
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics

from dppo.envs.restoring import NotRestorable, generator_of, generator_state, restore, state_of
from dppo.envs.stepper import Stepper
from dppo.envs.vector import make_env, make_vector_env, sync_vector_env, worker_vector_env
from dppo.states import read_state, write_state
from dppo.task import Task

FAMILY = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum")
MUJOCO = [
    *(f"{name}-v{version}" for name in (*FAMILY, "Reacher", "Swimmer", "Walker2d") for version in (4, 5)),
    "Pusher-v5",
]
OTHERS = [
    *("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0"),
    *("FrozenLake-v1", "Blackjack-v1", "gymnasium_robotics:PointMaze_UMaze-v3", "Point-v0"),
]


def task_of(env_id: str) -> Task:
    return Task("restored", env_id, max_episode_steps=13)


def through_a_file(state: Any, folder: Path) -> Any:
    write_state(folder / "state", {"state": state})
    return read_state(folder / "state")["state"]


def assert_goes_on(env: VectorEnv, fresh: VectorEnv, folder: Path) -> None:
    """Put another vector environment, which has gone its own way, where the first is, and step both."""
    steppers = Stepper(env), Stepper(fresh)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(24)]
    steppers[0].reset(seed=3)
    steppers[1].reset(seed=11)
    for action in actions[:7]:
        steppers[0].step(action)
    steppers[1].step(actions[3])
    steppers[1].set_state(through_a_file(steppers[0].get_state(), folder))
    ends = 0
    for action in actions[7:]:
        ours, theirs = (vars(stepper.step(action)) for stepper in steppers)
        assert_same(ours, theirs, "step")
        ends += (ours["terminated"] | ours["truncated"]).sum()
    assert ends >= 2, "new episodes must follow, too"
    for stepper in steppers:
        stepper.close()


@pytest.mark.parametrize("env_id", MUJOCO)
def test_native_environments(tmp_path, env_id):
    assert_goes_on(*(make_vector_env(task_of(env_id), 2, history=2, chunk=3) for _ in range(2)), tmp_path)


@pytest.mark.parametrize("env_id", [*MUJOCO, *OTHERS])
def test_environments_one_after_the_other(tmp_path, env_id):
    assert_goes_on(*(sync_vector_env(task_of(env_id), 2, history=2, chunk=1) for _ in range(2)), tmp_path)


def test_an_environment_that_the_next_step_only_resets(tmp_path):
    """A state is taken after 7 chunks of 2 steps, and the episodes have ended with step 13."""
    make = partial(sync_vector_env, task_of("Pendulum-v1"), 2, history=2, chunk=2)
    assert_goes_on(*(make(autoreset_mode=AutoresetMode.NEXT_STEP) for _ in range(2)), tmp_path)


@pytest.mark.parametrize(
    ("env_id", "places"),
    [
        ("Ant-v5", ("workers", "workers")),
        ("Pendulum-v1", ("workers", "here")),
        ("Pendulum-v1", ("here", "workers")),
    ],
)
def test_environments_in_worker_processes_and_between_there_and_this_one(tmp_path, env_id, places):
    make = {"workers": partial(worker_vector_env, workers=2), "here": sync_vector_env}
    assert_goes_on(*(make[place](task_of(env_id), 3, history=2, chunk=2) for place in places), tmp_path)


def test_a_state_is_a_copy():
    env = make_env(task_of("Point-v0"), history=2, chunk=1)
    env.reset(seed=0)
    state = env.get_state()
    kept = {name: np.copy(state[name]) for name in ("history",)}
    target = state["env"]["layers"][-1]["own"]["target"].copy()
    env.step(np.zeros((1, 2), np.float32))
    np.testing.assert_array_equal(state["history"], kept["history"])
    np.testing.assert_array_equal(state["env"]["layers"][-1]["own"]["target"], target)


def test_a_generator_goes_on_where_it_was():
    for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64):
        generator = np.random.Generator(kind(3))
        generator.normal(size=5)
        state = generator_state(generator)
        np.testing.assert_array_equal(generator_of(state).integers(99, size=9), generator.integers(99, size=9))


def test_a_state_names_no_other_code():
    with pytest.raises(ValueError, match="numpy has no bit generator 'default_rng'"):
        generator_of({"bit_generator": "default_rng"})


# --- what cannot be restored


class Own(gymnasium.Wrapper):
    """Keeps something to itself, and tells it if it is asked in this way."""

    told: Any = None


class Telling(Own):
    def get_state(self) -> Any:
        return self.told

    def set_state(self, state: Any) -> None:
        self.told = state


@pytest.mark.parametrize("wrapper", [Own, RecordEpisodeStatistics])
def test_an_unknown_wrapper_keeps_an_environment_from_being_restored(wrapper):
    env = wrapper(gymnasium.make("CartPole-v1", disable_env_checker=True))
    env.reset(seed=0)
    with pytest.raises(NotRestorable, match=f"{wrapper.__qualname__} has no get_state"):
        state_of(env)


def test_an_unknown_environment_keeps_itself_from_being_restored():
    env = make_env(task_of("Closed-v0"), history=1, chunk=1)
    env.reset(seed=0)
    with pytest.raises(NotRestorable, match="ClosedEnv has no get_state"):
        env.get_state()


def test_a_wrapper_that_tells_its_state_is_restored_with_what_is_inside():
    env, other = (Telling(gymnasium.make("CartPole-v1", disable_env_checker=True)) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=1)
    env.told = {"level": 3, "seen": [1.5, np.zeros(2)]}
    restore(other, state_of(env))
    assert other.told["level"] == 3
    np.testing.assert_array_equal(other.step(1)[0], env.step(1)[0])


@pytest.mark.parametrize("told", [object(), {3: 4}, [np.array([None])]])
def test_a_state_that_is_no_plain_data_is_none(told):
    env = Telling(gymnasium.make("CartPole-v1", disable_env_checker=True))
    env.reset(seed=0)
    env.told = told
    with pytest.raises(NotRestorable, match="gives more than numbers"):
        state_of(env)


def test_a_state_of_other_wrappers_is_refused():
    env = gymnasium.make("CartPole-v1", disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="the state is of an environment in 3 layers"):
        restore(env.unwrapped, state_of(env))


@pytest.mark.parametrize("make", [sync_vector_env, make_vector_env])
def test_a_state_of_another_number_of_environments_is_refused(make):
    task = task_of("Hopper-v5")
    two, three = (Stepper(make(task, count, history=1, chunk=1)) for count in (2, 3))
    two.reset(seed=0)
    three.reset(seed=0)
    with pytest.raises(ValueError, match="2"):
        three.set_state(two.get_state())
    two.close()
    three.close()
