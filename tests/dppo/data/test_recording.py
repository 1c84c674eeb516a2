import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces

from dppo.data import demos, recording
from policies.errors import UserError

DATASET = "dppo/recorded-v0"


class Reuses(gym.Env):
    """Counts its steps in arrays that it returns again and again; Dict observations that are not sorted by key."""

    def __init__(self, length=4, broken_step=None):
        self.observation_space = spaces.Dict([("time", spaces.Box(-1, 99, (1,))), ("action", spaces.Box(-1, 1, (2,)))])
        self.action_space = spaces.Box(-1, 1, (2,))
        self.length, self.broken_step = length, broken_step
        self.obs = {"time": np.zeros(1, np.float32), "action": np.zeros(2, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs["time"][:] = 0
        self.obs["action"][:] = self.np_random.uniform(-1, 1, 2)
        return self.obs, {}

    def step(self, action):
        self.obs["time"] += 1
        self.obs["action"][:] = action
        reward = np.nan if self.obs["time"][0] == self.broken_step else 0.5
        return self.obs, reward, bool(self.obs["time"][0] == self.length), False, {}


class Follows:
    """Wraps an environment's random actions and keeps what passed by."""

    def __init__(self, space, scale=1.0):
        self.space, self.scale = space, scale
        space.seed(0)
        self.first, self.seen, self.actions = [], [], []

    def reset(self, obs):
        self.first.append(obs)

    def __call__(self, obs):
        self.seen.append(obs)
        sample = self.space.sample()
        self.actions.append(sample if isinstance(self.space, spaces.Discrete) else self.scale * sample)
        return self.actions[-1]


@pytest.fixture(autouse=True)
def datasets_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    gym.register("Reuses-v0", f"{__name__}:Reuses", disable_env_checker=True)
    yield tmp_path
    del gym.registry["Reuses-v0"]


def test_a_mujoco_dataset_holds_what_was_stepped_and_recovers_its_environment():
    env = gym.make("InvertedPendulum-v5", max_episode_steps=20)
    act = Follows(env.action_space, scale=3.0)  # beyond the bounds now and then
    dataset = recording.record(env, act, DATASET, seed=3, steps=50, algorithm_name="random")

    assert dataset.total_steps == len(act.seen) >= 50
    assert dataset.total_steps - len(dataset[-1]) < 50, "no episode more than needed"
    episodes = demos.load_episodes(DATASET)
    np.testing.assert_array_equal(np.concatenate([e.observation[:-1] for e in episodes]), act.seen)
    np.testing.assert_array_equal([e.observation[0] for e in episodes], act.first)
    clipped = np.clip(act.actions, env.action_space.low, env.action_space.high)
    assert (clipped != np.array(act.actions)).any()
    np.testing.assert_array_equal(np.concatenate([e.action for e in episodes]), clipped)

    again = dataset.recover_environment()
    assert again.spec == env.spec
    metadata = dataset.storage.get_episode_metadata(dataset.episode_indices)
    for stored, about in zip(dataset, metadata, strict=True):
        obs, _ = again.reset(seed=about["seed"])
        replayed = [obs] + [again.step(action)[0] for action in stored.actions]
        np.testing.assert_array_equal(replayed, stored.observations)
        assert stored.terminations[-1] or stored.truncations[-1]
        assert not (stored.terminations[:-1].any() or stored.truncations[:-1].any())


def test_discrete_actions_and_a_number_of_episodes_can_be_recorded():
    env = gym.make("CartPole-v1")
    act = Follows(env.action_space)
    dataset = recording.record(env, act, DATASET, seed=0, episodes=3)
    assert dataset.total_episodes == 3
    episodes = demos.load_episodes(DATASET)
    assert np.concatenate([e.action for e in episodes]).tolist() == [int(action) for action in act.actions]
    demos.check_dimensions(episodes, 4, 2, discrete=True)


def test_dict_observations_survive_an_environment_that_reuses_its_arrays():
    env = gym.make("Reuses-v0", max_episode_steps=3)
    act = Follows(env.action_space)
    dataset = recording.record(env, act, DATASET, seed=0, episodes=2)
    assert dataset[1].observations["time"].ravel().tolist() == [0, 1, 2, 3]
    one, two = demos.load_episodes(DATASET)
    assert (two.terminated, two.truncated) == (False, True)
    np.testing.assert_array_equal(two.observation[:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(two.observation[1:, 1:], two.action)
    np.testing.assert_array_equal(np.concatenate([one.observation[:-1], two.observation[:-1]]), act.seen)


def test_episodes_that_are_written_in_several_goes_stay_in_order(monkeypatch):
    monkeypatch.setattr(recording, "STEPS_IN_MEMORY", 8)  # two episodes at a time
    env = gym.make("Reuses-v0")
    act = Follows(env.action_space)
    dataset = recording.record(env, act, DATASET, seed=0, episodes=5)
    assert (dataset.total_episodes, dataset.total_steps) == (5, 20)
    np.testing.assert_array_equal(np.concatenate([e.actions for e in dataset]), act.actions)


def test_the_seed_decides_every_reset():
    firsts = []
    for seed in (0, 0, 1):
        env = gym.make("Reuses-v0")
        act = Follows(env.action_space)
        recording.record(env, act, DATASET, seed=seed, episodes=3, overwrite=True)
        firsts.append(np.array(act.first))
    np.testing.assert_array_equal(firsts[0], firsts[1])
    assert (firsts[0][:, 1:] != firsts[2][:, 1:]).all()
    assert len(np.unique(firsts[0][:, 1])) == 3


def test_metadata_say_what_was_given_and_nothing_else():
    env = gym.make("Reuses-v0")
    said = recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=1, algorithm_name="random")
    assert said.storage.metadata["algorithm_name"] == "random" and said.storage.metadata["dataset_id"] == DATASET

    unsaid = recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=1, overwrite=True)
    assert not {"algorithm_name", "description", "author", "eval_env_spec"} & set(unsaid.storage.metadata)


def test_an_existing_dataset_is_kept_unless_overwritten():
    env = gym.make("Reuses-v0")
    recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=1)
    act = Follows(env.action_space)
    with pytest.raises(UserError, match="exists already; add overwrite=true"):
        recording.record(env, act, DATASET, seed=0, episodes=2)
    assert act.first == [], "refused before any work was done"
    assert minari.load_dataset(DATASET).total_episodes == 1
    assert recording.record(env, act, DATASET, seed=0, episodes=2, overwrite=True).total_episodes == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_recording_leaves_everything_as_it_was(overwrite, datasets_folder, monkeypatch):
    monkeypatch.setattr(recording, "STEPS_IN_MEMORY", 1)  # so that something has been written by then
    env = gym.make("Reuses-v0")
    if overwrite:
        recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=1)

    class Interrupted(Follows):
        def reset(self, obs):
            if len(self.actions) == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recording.record(env, Interrupted(env.action_space), DATASET, seed=0, episodes=5, overwrite=overwrite)
    assert [path.name for path in datasets_folder.iterdir()] == (["dppo"] if overwrite else [])
    if overwrite:
        assert minari.load_dataset(DATASET).total_episodes == 1


def test_nan_from_the_environment_is_refused_with_its_place(datasets_folder):
    env = gym.make("Reuses-v0", broken_step=2)
    with pytest.raises(UserError, match=r"Reuses-v0 returned a reward that is NaN or inf in step 1 after a reset with"):
        recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=1)
    assert list(datasets_folder.iterdir()) == []


def test_a_nan_action_is_refused():
    env = gym.make("Reuses-v0")
    with pytest.raises(UserError, match="NaN or inf in the action for environment Reuses-v0"):
        recording.record(env, Follows(env.action_space, scale=np.nan), DATASET, seed=0, episodes=1)


def test_an_environment_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(recording, "LONGEST_EPISODE", 50)
    env = gym.make("Reuses-v0", length=-1)
    with pytest.raises(UserError, match="has not ended an episode in 50 steps; set max_episode_steps"):
        recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=1)


def test_an_environment_that_a_dataset_could_not_recover_is_refused():
    gym.register("ByClass-v0", Reuses)
    try:
        for env in (gym.make("ByClass-v0"), Reuses()):
            with pytest.raises(UserError, match="cannot be stored in a dataset: register it under the name"):
                recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=1)
    finally:
        del gym.registry["ByClass-v0"]


@pytest.mark.parametrize("amount", [{}, {"steps": 1, "episodes": 1}, {"steps": 0}])
def test_exactly_one_positive_amount_must_be_given(amount):
    env = gym.make("Reuses-v0")
    with pytest.raises(UserError, match="give one of steps and episodes"):
        recording.record(env, Follows(env.action_space), DATASET, seed=0, **amount)


@pytest.mark.parametrize("file", ["data/main_data.hdf5", "data/metadata.json", "sha256.json"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_flipped_bit_in_what_was_recorded_is_noticed(datasets_folder, file, share):
    env = gym.make("Reuses-v0")
    recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=2)
    assert len(demos.load_episodes(DATASET)) == 2
    path = datasets_folder / DATASET / file
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged"):
        demos.load_episodes(DATASET)


def test_a_recording_that_was_changed_on_purpose_is_read_without_its_checksums(datasets_folder):
    env = gym.make("Reuses-v0")
    recording.record(env, Follows(env.action_space), DATASET, seed=0, episodes=2)
    path = datasets_folder / DATASET / "data" / "metadata.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"metadata.json is damaged or was changed: .* or remove .*sha256.json"):
        demos.load_episodes(DATASET)
    (datasets_folder / DATASET / "sha256.json").unlink()
    assert len(demos.load_episodes(DATASET)) == 2
