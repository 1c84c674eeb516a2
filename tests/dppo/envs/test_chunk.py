import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.wrappers import TimeLimit

from dppo.envs.chunk import ChunkEnv
from dppo.envs.vector import make_env
from dppo.task import Task
from policies.errors import UserError

NO_FORCE = np.zeros((4, 2), np.float32)


def test_the_first_observation_fills_the_history(counting_env):
    env = ChunkEnv(counting_env(), history=3, chunk=4)
    obs, info = env.reset(seed=6)
    assert obs.dtype == np.float32
    np.testing.assert_array_equal(obs, [[0, 6], [0, 6], [0, 6]])
    assert info == {}


def test_the_history_moves_at_every_environment_step_of_a_chunk(counting_env):
    env = ChunkEnv(counting_env([(100, True, False)]), history=3, chunk=2)
    env.reset(seed=0)
    histories = [env.step(NO_FORCE[:2])[0][:, 0].tolist() for _ in range(3)]
    assert histories == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]


def test_a_history_longer_than_the_chunk_keeps_older_observations(counting_env):
    env = ChunkEnv(counting_env([(100, True, False)]), history=4, chunk=1)
    env.reset(seed=0)
    histories = [env.step(NO_FORCE[:1])[0][:, 0].tolist() for _ in range(3)]
    assert histories == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]]


def test_a_chunk_keeps_the_reward_of_each_environment_step_and_returns_their_sum(counting_env):
    env = ChunkEnv(counting_env([(100, True, False)]), history=1, chunk=4)
    env.reset(seed=0)
    env.step(NO_FORCE)
    _, reward, terminated, truncated, info = env.step(NO_FORCE)
    assert reward == 5 + 6 + 7 + 8
    assert (terminated, truncated) == (False, False)
    assert set(info) == {"step_rewards", "steps"}
    assert info["steps"] == 4
    assert info["step_rewards"].dtype == np.float64
    np.testing.assert_array_equal(info["step_rewards"], [5, 6, 7, 8])


@pytest.mark.parametrize("ending", [(6, True, False), (6, False, True), (6, True, True)])
def test_a_chunk_that_ends_early_executes_no_further_action(counting_env, ending):
    inner = counting_env([ending])
    env = ChunkEnv(inner, history=2, chunk=4)
    env.reset(seed=0)
    env.step(NO_FORCE)
    obs, reward, terminated, truncated, info = env.step(NO_FORCE)
    assert len(inner.received) == 6
    assert (terminated, truncated) == ending[1:]
    assert info["steps"] == 2
    assert reward == 5 + 6
    np.testing.assert_array_equal(info["step_rewards"], [5, 6, 0, 0])
    np.testing.assert_array_equal(obs[:, 0], [5, 6])


def test_an_episode_starts_with_nothing_of_the_one_before(counting_env):
    env = ChunkEnv(counting_env([(3, True, False)]), history=2, chunk=4)
    env.reset(seed=0)
    env.step(NO_FORCE)
    np.testing.assert_array_equal(env.reset()[0], [[0, 1], [0, 1]])
    obs, _, _, _, info = env.step(NO_FORCE)
    np.testing.assert_array_equal(obs, [[2, 1], [3, 1]])
    np.testing.assert_array_equal(info["step_rewards"], [1, 2, 3, 0])


def test_returned_observations_and_rewards_survive_the_next_step(counting_env):
    env = ChunkEnv(counting_env([(100, True, False)]), history=2, chunk=2)
    first, _ = env.reset(seed=0)
    second, _, _, _, info = env.step(NO_FORCE[:2])
    env.step(NO_FORCE[:2])
    env.reset(seed=9)
    np.testing.assert_array_equal(first, [[0, 0], [0, 0]])
    np.testing.assert_array_equal(second, [[1, 0], [2, 0]])
    np.testing.assert_array_equal(info["step_rewards"], [1, 2])


def test_actions_are_clipped_to_the_bounds_that_exist_and_the_argument_is_left_alone(counting_env):
    inner = counting_env()  # bounds [-1, 1] and [-2, inf]
    env = ChunkEnv(inner, history=1, chunk=3)
    env.reset(seed=0)
    action = np.array([[0.5, 100.0], [9.0, -9.0], [-1.5, 0.25]], np.float32)
    given = action.copy()
    env.step(action)
    np.testing.assert_array_equal(inner.received, np.array([[0.5, 100.0], [1.0, -2.0], [-1.0, 0.25]], np.float32))
    assert inner.received[0].dtype == np.float32
    np.testing.assert_array_equal(action, given)


def test_the_spaces_are_those_of_the_environment_once_per_row(counting_env):
    env = ChunkEnv(counting_env(), history=3, chunk=4)
    assert env.observation_space == Box(-np.inf, np.inf, (3, 2), np.float32)
    assert isinstance(env.action_space, Box)
    assert env.action_space.shape == (4, 2)
    np.testing.assert_array_equal(env.action_space.low, np.tile(np.array([-1, -2], np.float32), (4, 1)))
    np.testing.assert_array_equal(env.action_space.high, np.tile(np.array([1, np.inf], np.float32), (4, 1)))


def test_a_discrete_action_reaches_the_environment_unchanged(counting_env):
    inner = counting_env(discrete=True)
    env = ChunkEnv(inner, history=2, chunk=1)
    assert env.action_space == Discrete(3)
    env.reset(seed=0)
    obs, reward, _, _, info = env.step(np.int64(2))
    assert inner.received == [2]
    assert (reward, info["steps"], info["step_rewards"].tolist()) == (1.0, 1, [1.0])
    np.testing.assert_array_equal(obs[:, 0], [0, 1])


def test_a_chunk_of_the_wrong_shape_is_refused(counting_env):
    env = ChunkEnv(counting_env(), history=1, chunk=4)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(8, 2\)"):
        env.step(np.zeros((8, 2), np.float32))


def test_a_chunk_of_discrete_actions_is_refused(counting_env):
    with pytest.raises(UserError, match="set the chunk to 1, got 2"):
        ChunkEnv(counting_env(discrete=True), history=1, chunk=2)


@pytest.mark.parametrize(("history", "chunk"), [(0, 1), (1, 0)])
def test_an_empty_history_or_chunk_is_refused(counting_env, history, chunk):
    with pytest.raises(UserError, match="at least 1"):
        ChunkEnv(counting_env(), history=history, chunk=chunk)


def test_a_chunk_longer_than_an_episode_is_refused_with_both_numbers():
    make_env(Task("cart", "Pendulum-v1", max_episode_steps=8), history=1, chunk=8).close()
    with pytest.raises(UserError, match=r"chunk of 9 .*max_episode_steps 8"):
        make_env(Task("cart", "Pendulum-v1", max_episode_steps=8), history=1, chunk=9)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (Discrete(5), "Discrete"),
        (MultiDiscrete([2, 2]), "MultiDiscrete"),
        (Box(0, 255, (8, 8, 3), np.uint8), "8, 8, 3"),
    ],
)
def test_observations_that_are_not_vectors_are_refused(counting_env, space, says):
    inner = counting_env()
    inner.observation_space = space
    with pytest.raises(UserError, match=says):
        ChunkEnv(inner, history=1, chunk=1)


@pytest.mark.parametrize(
    "space",
    [
        MultiDiscrete([2, 2], start=[0, 1]),
        MultiDiscrete([[2], [2]]),
        Discrete(3, start=1),
        Box(-1, 1, (2, 2)),
        Box(0, 9, (2,), np.int64),
    ],
)
def test_actions_that_are_neither_float_vectors_nor_counted_from_zero_are_refused(counting_env, space):
    inner = counting_env()
    inner.action_space = space
    with pytest.raises(UserError, match="action"):
        ChunkEnv(inner, history=1, chunk=1)


def test_hopper_in_chunks_is_bitwise_hopper_step_by_step():
    chunked = make_env(Task("hopper", "Hopper-v5"), history=2, chunk=4)
    plain = TimeLimit(gymnasium.make("Hopper-v5").unwrapped, 1000)
    obs, _ = chunked.reset(seed=3)
    plain_obs, _ = plain.reset(seed=3)
    rng = np.random.default_rng(0)
    ended = early = 0
    for _ in range(60):
        np.testing.assert_array_equal(obs[-1], plain_obs.astype(np.float32))
        action = rng.normal(0, 1.5, (4, 3)).astype(np.float32)
        obs, reward, terminated, truncated, info = chunked.step(action)
        steps, seen = [], [plain_obs.astype(np.float32)]
        for row in np.clip(action, -1, 1):
            plain_obs, plain_reward, plain_terminated, plain_truncated, _ = plain.step(row)
            steps.append(plain_reward)
            seen.append(plain_obs.astype(np.float32))
            if plain_terminated or plain_truncated:
                break
        assert info["steps"] == len(steps)
        np.testing.assert_array_equal(info["step_rewards"][: len(steps)], steps)
        assert reward == sum(steps)
        assert (terminated, truncated) == (plain_terminated, plain_truncated)
        np.testing.assert_array_equal(obs[-1], seen[-1])
        if len(steps) > 1:
            np.testing.assert_array_equal(obs[-2], seen[-2])
        if terminated or truncated:
            ended, early = ended + 1, early + (len(steps) < 4)
            obs, _ = chunked.reset()
            plain_obs, _ = plain.reset()
    assert ended > 2, "the comparison must have met ends of episodes"
    assert early > 0, "and some of them inside a chunk"
