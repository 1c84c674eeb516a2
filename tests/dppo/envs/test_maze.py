from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest

from dppo.envs.chunk import ChunkEnv
from dppo.envs.maze import WaypointController, shortest_path
from dppo.envs.vector import make_env
from dppo.task import Task
from policies.errors import UserError

UMAZE = Task("umaze", "gymnasium_robotics:PointMaze_UMaze-v3", {"continuing_task": False}, 200, 1.0)
U_MAP = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
OPEN_MAP = [[1, 1, 1, 1], [1, "r", 0, 1], [1, 0, "g", 1], [1, 1, 1, 1]]


@pytest.fixture(scope="module")
def umaze() -> Iterator[ChunkEnv]:
    env = make_env(UMAZE, history=1, chunk=1)
    yield env
    env.close()


def episode(env: ChunkEnv, controller: WaypointController, seed: int) -> tuple[np.ndarray, bool]:
    """Actions [T, 2] and whether the goal was reached."""
    obs, _ = env.reset(seed=seed)
    controller.reset(obs[-1])
    actions, terminated, truncated = [], False, False
    while not terminated and not truncated:
        actions.append(controller(obs[-1]))
        obs, reward, terminated, truncated, _ = env.step(actions[-1][None])
        assert reward == (1.0 if terminated else 0.0)
    return np.array(actions), terminated


def test_the_shortest_path_walks_round_the_wall():
    path = shortest_path(U_MAP, (1, 1), (3, 1), np.random.default_rng(0))
    assert path == [(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]


def test_equally_short_paths_are_each_taken():
    rng = np.random.default_rng(0)
    paths = {tuple(shortest_path(OPEN_MAP, (1, 1), (2, 2), rng)) for _ in range(40)}
    assert paths == {((1, 1), (1, 2), (2, 2)), ((1, 1), (2, 1), (2, 2))}


def test_a_goal_in_the_cell_of_the_start_is_a_path_of_one_cell():
    assert shortest_path(U_MAP, (1, 1), (1, 1), np.random.default_rng(0)) == [(1, 1)]


def test_a_goal_behind_a_wall_has_no_path():
    with pytest.raises(ValueError, match="no path"):
        shortest_path([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], (1, 1), (1, 3), np.random.default_rng(0))


def test_the_controller_reaches_every_goal_without_noise(umaze):
    controller = WaypointController(umaze, noise=0.0)
    assert all(episode(umaze, controller, seed)[1] for seed in range(8))


def test_noise_makes_demonstrations_differ_and_slower(umaze):
    exact, noisy = (WaypointController(umaze, noise=noise, seed=1) for noise in (0.0, 2.0))
    lengths = [[len(episode(umaze, controller, seed)[0]) for seed in range(10)] for controller in (exact, noisy)]
    assert np.mean(lengths[1]) > 1.1 * np.mean(lengths[0])


def test_actions_are_float32_and_within_the_bounds(umaze):
    actions, _ = episode(umaze, WaypointController(umaze, noise=3.0), 0)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() == 1.0


def test_a_seed_repeats_the_demonstration(umaze):
    first, again, other = (episode(umaze, WaypointController(umaze, noise=1.0, seed=seed), 2)[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(other, first)


def test_an_environment_that_is_no_maze_is_refused():
    env = gymnasium.make("Pendulum-v1")
    with pytest.raises(UserError, match="only knows PointMaze"):
        WaypointController(env)
