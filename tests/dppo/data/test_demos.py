import json
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

from dppo.data import demos
from dppo.data.demos import Episode, WindowDataset
from policies.errors import UserError

BOX = spaces.Box(-10, 10, (2,), np.float32)


@pytest.fixture(autouse=True)
def datasets_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def episode(length, obs_dim=3, action_dim=2, seed=0, discrete=False):
    rng = np.random.default_rng(seed)
    shape = (length,) if discrete else (length, action_dim)
    return Episode(
        observation=rng.normal(size=(length + 1, obs_dim)).astype(np.float32),
        action=rng.integers(action_dim, size=shape) if discrete else rng.normal(size=shape).astype(np.float32),
        reward=np.zeros(length, np.float32),
        terminated=True,
        truncated=False,
    )


@pytest.mark.filterwarnings("ignore")
def store(dataset="dppo/made-v0", observation_space=BOX, action_space=BOX, **changes):
    """Store a dataset of one three-step episode, with some of its arrays changed."""
    arrays = dict(
        observations=np.arange(8, dtype=np.float64).reshape(4, 2),
        actions=np.arange(6, dtype=np.float32).reshape(3, 2),
        rewards=[0.5, 0.25, 1.0],
        terminations=[False, False, False],
        truncations=[False, False, True],
        infos={},
    )
    return minari.create_dataset_from_buffers(
        dataset,
        [EpisodeBuffer(**{**arrays, **changes})],
        observation_space=observation_space,
        action_space=action_space,
    )


def refusal(dataset="dppo/made-v0", **kwargs):
    with pytest.raises(UserError) as caught:
        demos.load_episodes(dataset, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- reading


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestLoading:
    def test_an_episode_is_read_as_it_was_stored(self):
        store()
        (one,) = demos.load_episodes("dppo/made-v0")
        assert len(one) == 3 and not one.discrete
        assert (one.observation.dtype, one.action.dtype, one.reward.dtype) == (np.float32,) * 3
        np.testing.assert_array_equal(one.observation, np.arange(8).reshape(4, 2))
        np.testing.assert_array_equal(one.action, np.arange(6).reshape(3, 2))
        np.testing.assert_array_equal(one.reward, [0.5, 0.25, 1.0])
        assert (one.terminated, one.truncated) == (False, True)

    def test_discrete_actions_become_a_row_of_int64(self):
        store(action_space=spaces.Discrete(5), actions=np.array([4, 0, 2]))
        (one,) = demos.load_episodes("dppo/made-v0")
        assert one.discrete and one.action.dtype == np.int64 and one.action.tolist() == [4, 0, 2]

    def test_dict_observations_are_flattened_as_gymnasium_does_in_the_environments_own_key_order(self):
        space = spaces.Dict(
            [  # not sorted, and with a kind that becomes one-hot
                ("zeta", spaces.Box(-1, 1, (2,))),
                ("alpha", spaces.Dict([("y", spaces.Box(-1, 1, (1, 2))), ("b", spaces.MultiBinary(2))])),
                ("kind", spaces.Discrete(3, start=1)),
            ]
        )
        steps = [space.sample() for _ in range(4)]

        def stack(*keys):
            values = steps
            for key in keys:
                values = [value[key] for value in values]
            return np.stack(values)

        inner = {"y": stack("alpha", "y"), "b": stack("alpha", "b")}
        store(observation_space=space, observations={"zeta": stack("zeta"), "alpha": inner, "kind": stack("kind")})
        (one,) = demos.load_episodes("dppo/made-v0")
        np.testing.assert_array_equal(one.observation, np.stack([spaces.flatten(space, step) for step in steps]))

    def test_tuple_observations_are_flattened_in_order(self):
        space = spaces.Tuple([BOX, spaces.Box(-1, 1, (1,))])
        store(observation_space=space, observations=(np.ones((4, 2)), np.zeros((4, 1))))
        (one,) = demos.load_episodes("dppo/made-v0")
        np.testing.assert_array_equal(one.observation, [[1, 1, 0]] * 4)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_is_refused_with_its_place(self, value):
        bad = np.zeros((4, 2))
        bad[2, 1] = value
        store(observations=bad)
        assert refusal() == "dataset dppo/made-v0: NaN or inf in the observation of episode 0, step 2"

    def test_a_nan_action_is_refused_with_its_place(self):
        store(actions=np.array([[0, 0], [0, np.nan], [0, 0]], np.float32))
        assert refusal() == "dataset dppo/made-v0: NaN or inf in the action of episode 0, step 1"

    def test_pixels_are_refused(self):
        image = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        store(observation_space=image, observations=np.zeros((4, 64, 64, 3), np.uint8))
        assert "pixel observations (64, 64, 3)" in refusal()

    def test_observations_of_text_are_refused(self):
        store(observation_space=spaces.Text(5), observations=["a", "b", "c", "d"])
        assert "observations of kind Text" in refusal()

    def test_actions_of_an_unknown_kind_are_refused(self):
        store(action_space=spaces.MultiDiscrete([2, 3]), actions=np.zeros((3, 2), int))
        assert "actions of kind MultiDiscrete" in refusal()

    def test_a_missing_last_observation_is_refused(self):
        store(observations=np.zeros((3, 2)))
        assert "3 rewards, 3 actions and 3 observations" in refusal()

    def test_an_episode_without_steps_is_refused(self, datasets_folder):
        store()
        with h5py.File(datasets_folder / "dppo/made-v0/data/main_data.hdf5", "a") as file:
            for name in ("actions", "rewards", "terminations", "truncations"):
                file["episode_0"][name].resize(0, axis=0)
        assert refusal() == "dataset dppo/made-v0: episode 0 has no steps"

    def test_a_dataset_without_episodes_is_refused(self, datasets_folder):
        store()
        path = datasets_folder / "dppo/made-v0/data/metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "total_episodes": 0, "total_steps": 0}))
        assert "holds no episodes" in refusal()


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestBrokenFiles:
    def cut_short(self, data: Path):
        content = (data / "main_data.hdf5").read_bytes()
        (data / "main_data.hdf5").write_bytes(content[: len(content) // 2])

    def empty(self, data: Path):
        (data / "main_data.hdf5").write_bytes(b"")

    def no_hdf5(self, data: Path):
        (data / "main_data.hdf5").unlink()

    def no_metadata(self, data: Path):
        (data / "metadata.json").unlink()

    def half_metadata(self, data: Path):
        (data / "metadata.json").write_text((data / "metadata.json").read_text()[:40])

    def no_identity(self, data: Path):
        metadata = json.loads((data / "metadata.json").read_text())
        del metadata["dataset_id"]  # as minari leaves it where a recording was interrupted
        (data / "metadata.json").write_text(json.dumps(metadata))

    def too_few_episodes(self, data: Path):
        metadata = json.loads((data / "metadata.json").read_text())
        (data / "metadata.json").write_text(json.dumps({**metadata, "total_episodes": 2}))

    @pytest.mark.parametrize(
        "damage",
        ["cut_short", "empty", "no_hdf5", "no_metadata", "half_metadata", "no_identity", "too_few_episodes"],
    )
    def test_a_half_written_dataset_is_refused_in_one_line(self, damage, datasets_folder):
        store()
        getattr(self, damage)(datasets_folder / "dppo/made-v0/data")
        message = refusal(hint="build it with `dppo collect task=made`")
        assert message.startswith(f"dataset dppo/made-v0 at {datasets_folder}/dppo/made-v0 cannot be read (")
        assert message.endswith("delete that folder, then build it with `dppo collect task=made`")

    def test_a_folder_that_is_no_dataset_is_refused(self, datasets_folder):
        (datasets_folder / "dppo/made-v0").mkdir(parents=True)
        assert "is no Minari dataset" in refusal()

    def test_a_missing_dataset_of_our_own_is_not_looked_for_on_the_hub(self, monkeypatch, datasets_folder):
        monkeypatch.setattr(minari, "download_dataset", lambda _: pytest.fail("asked the hub"))
        message = refusal("dppo/gone-v0", hint="build it with `dppo collect task=gone`")
        assert message == f"dataset dppo/gone-v0 is not in {datasets_folder}; build it with `dppo collect task=gone`"

    @pytest.mark.parametrize("dataset", ["hopper", "mujoco/hopper/medium", "a b-v0", "../x-v0", ""])
    def test_a_malformed_id_is_refused(self, dataset):
        assert "is not of the form namespace/name-v0" in refusal(dataset)


# --- dimensions


def test_demonstrations_of_the_task_pass():
    demos.check_dimensions([episode(4), episode(1)], 3, 2, discrete=False)
    demos.check_dimensions([episode(4, discrete=True)], 3, 2, discrete=True)


@pytest.mark.parametrize(
    ("obs_dim", "action_dim", "discrete", "expected"),
    [
        (4, 2, False, "has 3-dimensional observations and 2-dimensional actions, but the task has 4-dimensional"),
        (3, 5, False, "2-dimensional actions, but the task has 3-dimensional observations and 5-dimensional actions"),
        (3, 2, True, "2-dimensional actions, but the task has 3-dimensional observations and discrete actions"),
    ],
)
def test_demonstrations_of_another_task_are_refused_with_both_dimensions(obs_dim, action_dim, discrete, expected):
    with pytest.raises(UserError, match=expected):
        demos.check_dimensions([episode(4)], obs_dim, action_dim, discrete)


def test_a_discrete_action_that_the_task_does_not_have_is_refused():
    with pytest.raises(UserError, match="actions from 0 to 4, but the task has the 3 actions 0 to 2"):
        one = episode(40, action_dim=5, discrete=True)
        demos.check_dimensions([one], 3, 3, discrete=True)


# --- windows


def brute_force(episodes, history, chunk):
    """Every window by a loop over time, as the definition reads."""
    obs, action = [], []
    for one in episodes:
        for t in range(len(one)):
            obs.append([one.observation[max(t + i, 0)] for i in range(1 - history, 1)])
            action.append([one.action[min(t + i, len(one) - 1)] for i in range(chunk)])
    return torch.tensor(np.array(obs)), torch.tensor(np.array(action))


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    history=st.integers(1, 4),
    chunk=st.integers(1, 8),
)
def test_windows_equal_those_of_a_loop_over_time(lengths, history, chunk):
    episodes = [episode(length, seed=seed) for seed, length in enumerate(lengths)]
    windows = WindowDataset(episodes, history, chunk)
    assert len(windows) == sum(lengths)
    obs, action = windows.batch(torch.arange(len(windows)))
    expected_obs, expected_action = brute_force(episodes, history, chunk)
    assert obs.dtype == action.dtype == torch.float32
    assert torch.equal(obs, expected_obs) and torch.equal(action, expected_action)


def test_a_batch_follows_the_order_of_its_indices_and_may_repeat_them():
    windows = WindowDataset([episode(5), episode(7, seed=1)], 2, 4)
    everything = windows.batch(torch.arange(12))
    indices = torch.tensor([11, 0, 5, 5, 4])
    assert torch.equal(windows.batch(indices).obs, everything.obs[indices])
    assert torch.equal(windows.batch(indices).action, everything.action[indices])


def test_windows_of_discrete_actions_hold_one_integer_each():
    one = episode(6, action_dim=4, discrete=True)
    obs, action = WindowDataset([one], 3, 1).batch(torch.tensor([0, 5]))
    assert obs.shape == (2, 3, 3)
    assert action.dtype == torch.int64 and action.tolist() == [one.action[0], one.action[5]]
    with pytest.raises(ValueError, match="not chunked"):
        WindowDataset([one], 1, 2)


def test_moving_windows_leaves_the_original_where_it_was():
    windows = WindowDataset([episode(4)], 2, 2)
    moved = windows.to("meta")
    assert (windows.device.type, moved.device.type) == ("cpu", "meta")
    assert moved.batch(torch.arange(3)).obs.shape == (3, 2, 3)
    assert windows.batch(torch.arange(3)).obs.device.type == "cpu"


# --- splitting and ranges


@given(total=st.integers(0, 30), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 3))
def test_a_split_gives_each_episode_to_one_side_and_leaves_neither_side_empty(total, fraction, seed):
    episodes = [episode(1, seed=i) for i in range(total)]
    train, validation = demos.split_by_episode(episodes, fraction, seed)
    assert sorted(map(id, train + validation)) == sorted(map(id, episodes))
    assert abs(len(validation) - fraction * total) <= 1 or total < 2
    if total >= 2:
        assert train and validation
    else:
        assert validation == []
    again = demos.split_by_episode(episodes, fraction, seed)
    assert (list(map(id, train)), list(map(id, validation))) == tuple(list(map(id, side)) for side in again)


def test_the_split_depends_on_the_seed():
    episodes = [episode(1, seed=i) for i in range(20)]
    first, second = (demos.split_by_episode(episodes, 0.3, seed)[1] for seed in (0, 1))
    assert list(map(id, first)) != list(map(id, second))


def test_a_fraction_of_zero_keeps_every_episode_for_training():
    episodes = [episode(1), episode(2)]
    assert demos.split_by_episode(episodes, 0.0, 0) == (episodes, [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(UserError, match="validation fraction"):
        demos.split_by_episode([episode(1)], fraction, 0)


def test_bounds_are_the_extremes_over_all_episodes_and_steps():
    episodes = [episode(9), episode(2, seed=1)]
    episodes[1].observation[-1, 0] = 99.0  # the final observation counts too
    low_obs, high_obs, low_action, high_action = demos.bounds(episodes)
    observation = np.concatenate([e.observation for e in episodes])
    action = np.concatenate([e.action for e in episodes])
    assert low_obs.dtype == low_action.dtype == torch.float32
    assert high_obs[0] == 99.0
    np.testing.assert_array_equal(low_obs, observation.min(0))
    np.testing.assert_array_equal(high_obs, observation.max(0))
    np.testing.assert_array_equal(low_action, action.min(0))
    np.testing.assert_array_equal(high_action, action.max(0))


def test_bounds_of_discrete_actions_are_the_smallest_and_largest():
    one = episode(50, action_dim=4, discrete=True)
    *_, low, high = demos.bounds([one])
    assert (low.tolist(), high.tolist()) == ([0.0], [3.0])


def test_gymnasiums_flatten_wrapper_agrees_with_what_is_loaded():
    """The policy meets FlattenObservation's order in the environment, and this module's in the demonstrations."""
    space = spaces.Dict({"b": spaces.Box(-1, 1, (2,)), "a": spaces.Box(-1, 1, (1,))})
    sample = space.sample()
    batch = {key: value[None] for key, value in sample.items()}
    np.testing.assert_array_equal(demos._flatten_steps(space, batch)[0], gym.spaces.flatten(space, sample))


def test_a_chunk_that_begins_in_the_past_repeats_the_first_action_before_the_episode() -> None:
    actions = np.arange(4, dtype=np.float32)[:, None]
    windows = WindowDataset(
        [Episode(np.zeros((5, 2), np.float32), actions, np.zeros(4, np.float32), True, False)],
        history=2,
        chunk=4,
        past=1,
    )
    expected = [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 3], [2, 3, 3, 3]]
    assert windows.batch(torch.arange(4)).action.squeeze(2).tolist() == expected
