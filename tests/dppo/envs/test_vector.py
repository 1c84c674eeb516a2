import pickle
import subprocess
import sys
from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from dppo.envs.vector import make_env, make_vector_env, space_dims
from dppo.task import Task
from policies.errors import UserError

UMAZE = Task("umaze", "gymnasium_robotics:PointMaze_UMaze-v3", {"continuing_task": False}, 150, 1.0)


def test_the_dimensions_of_a_continuous_task():
    spaces = space_dims(Task("hopper", "Hopper-v5"))
    assert (spaces.obs_dim, spaces.action_dim, spaces.discrete) == (11, 3, False)
    assert spaces.action_low.dtype == spaces.action_high.dtype == np.float32
    np.testing.assert_array_equal(spaces.action_low, [-1, -1, -1])
    np.testing.assert_array_equal(spaces.action_high, [1, 1, 1])


def test_the_dimensions_of_a_discrete_task():
    spaces = space_dims(Task("cart", "CartPole-v1"))
    assert (spaces.obs_dim, spaces.action_dim, spaces.discrete) == (4, 2, True)
    assert spaces.action_low.size == spaces.action_high.size == 0


def test_a_missing_bound_is_infinite(counting_task):
    spaces = space_dims(counting_task)
    np.testing.assert_array_equal(spaces.action_low, [-1, -2])
    np.testing.assert_array_equal(spaces.action_high, [1, np.inf])


def test_a_dict_observation_is_flattened_in_the_order_of_its_keys():
    env = make_env(UMAZE, history=2, chunk=1)
    obs, _ = env.reset(seed=0)
    raw, _ = env.unwrapped.reset(seed=0)
    assert obs.shape == (2, 8)
    flat = np.concatenate([raw["achieved_goal"], raw["desired_goal"], raw["observation"]])
    np.testing.assert_array_equal(obs[1], flat.astype(np.float32))
    assert space_dims(UMAZE).obs_dim == 8
    env.close()


def test_a_vector_environment_has_the_shapes_and_mode_asked_for():
    env = make_vector_env(Task("hopper", "Hopper-v5"), 3, history=2, chunk=4, autoreset_mode=AutoresetMode.NEXT_STEP)
    obs, _ = env.reset(seed=0)
    assert env.num_envs == 3
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert (obs.shape, obs.dtype) == ((3, 2, 11), np.float32)
    assert env.action_space.shape == (3, 4, 3)
    env.close()


def test_the_episode_limit_of_the_task_replaces_the_registered_one():
    env = make_env(Task("pendulum", "Pendulum-v1", max_episode_steps=6), history=1, chunk=4)
    env.reset(seed=0)
    assert env.step(np.zeros((4, 1), np.float32))[3] is False
    _, _, terminated, truncated, info = env.step(np.zeros((4, 1), np.float32))
    assert (terminated, truncated, info["steps"]) == (False, True, 2)


def test_an_environment_can_be_built_in_another_process():
    build = pickle.loads(pickle.dumps(partial(make_env, Task("pendulum", "Pendulum-v1"), history=1, chunk=2)))
    assert build().action_space.shape == (2, 1)


def test_a_misspelt_environment_is_named_with_near_misses():
    with pytest.raises(UserError, match=r"task hop: .*'Hoper-v5'; did you mean .*Hopper-v5"):
        make_env(Task("hop", "Hoper-v5"), history=1, chunk=1)


def test_an_environment_like_no_other_gets_a_hint_about_modules():
    with pytest.raises(UserError, match="'Qqqqqqqqqqqqqq-v0'; an environment from another package"):
        make_env(Task("q", "Qqqqqqqqqqqqqq-v0"), history=1, chunk=1)


def test_a_misspelt_environment_of_a_module_gets_near_misses_from_that_module():
    with pytest.raises(UserError, match=r"did you mean gymnasium_robotics:PointMaze_UMaze-v3"):
        make_env(Task("maze", "gymnasium_robotics:PointMaze_UMaz-v3"), history=1, chunk=1)


def test_a_missing_module_says_how_to_make_it_importable():
    with pytest.raises(UserError, match=r"'no_such_envs:Foo-v0' needs the Python module 'no_such_envs'; .* PYTHONPATH"):
        make_env(Task("foo", "no_such_envs:Foo-v0"), history=1, chunk=1)


def test_a_module_that_fails_on_import_says_so(tmp_path, monkeypatch):
    (tmp_path / "half_an_env.py").write_text("from gymnasium import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing 'half_an_env' failed: cannot import name 'no_such_name'"):
        make_env(Task("half", "half_an_env:Half-v0"), history=1, chunk=1)


def test_an_environment_without_its_dependency_says_so():
    with pytest.raises(UserError, match="Hopper-v3 cannot be built"):
        make_env(Task("old", "Hopper-v3"), history=1, chunk=1)


def test_an_unknown_keyword_argument_is_named():
    with pytest.raises(UserError, match=r"env_kwargs: .*'gravitee'"):
        make_env(Task("hop", "Hopper-v5", {"gravitee": 1}), history=1, chunk=1)


def test_a_type_error_of_the_environment_itself_keeps_its_traceback(monkeypatch):
    def broken(**_):
        raise TypeError("a bug of the environment")

    monkeypatch.setitem(gymnasium.registry, "Broken-v0", EnvSpec("Broken-v0", broken))
    with pytest.raises(TypeError, match="a bug of the environment"):
        make_env(Task("broken", "Broken-v0"), history=1, chunk=1)


@pytest.mark.parametrize("name", ["max_episode_steps", "render_mode"])
def test_a_keyword_argument_that_is_set_elsewhere_is_refused(name):
    with pytest.raises(UserError, match=f"task pendulum: env_kwargs cannot set {name}"):
        Task("pendulum", "Pendulum-v1", {name: 100})


@pytest.mark.parametrize("limit", [0, -1])
def test_an_episode_limit_below_one_is_refused(limit):
    with pytest.raises(UserError, match=f"max_episode_steps must be at least 1, got {limit}"):
        Task("pendulum", "Pendulum-v1", max_episode_steps=limit)


def test_no_environments_are_refused(counting_task):
    with pytest.raises(UserError, match="num_envs must be at least 1, got 0"):
        make_vector_env(counting_task, 0, history=1, chunk=1)


def test_the_notice_of_gymnasium_robotics_does_not_reach_the_terminal():
    code = "from dppo.task import Task\nprint(Task('umaze', 'gymnasium_robotics:PointMaze_UMaze-v3').env_spec().id)\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "PointMaze_UMaze-v3\n"
    assert result.stderr == ""
