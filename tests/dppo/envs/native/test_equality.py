"""Every native environment does what Gymnasium's own one does, to the last bit."""

import gymnasium
import numpy as np
import pytest
from equality import assert_same

from dppo.envs.vector import sync_vector_env
from dppo.task import Task

FAMILY = (
    "Ant",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Pusher",
    "Reacher",
    "Swimmer",
    "Walker2d",
)
IDS = [f"{name}-v{version}" for name in FAMILY for version in (4, 5) if f"{name}-v{version}" != "Pusher-v4"]

SETTINGS = [
    ("Hopper-v5", {"frame_skip": 2, "healthy_angle_range": (-0.05, 0.05), "healthy_state_range": (-4.0, 3.0)}),
    ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 2, "healthy_z_range": (1.2, 1.3)}),
    ("Hopper-v4", {"terminate_when_unhealthy": False, "healthy_z_range": (1.2, 1.3)}),
    ("Walker2d-v5", {"exclude_current_positions_from_observation": False, "reset_noise_scale": 0.1}),
    ("Walker2d-v5", {"xml_file": "walker2d.xml", "healthy_z_range": (0.9, 1.4), "healthy_angle_range": (-0.2, 0.2)}),
    ("HalfCheetah-v5", {"forward_reward_weight": 3, "ctrl_cost_weight": 0.7, "frame_skip": 1}),
    ("HalfCheetah-v4", {"exclude_current_positions_from_observation": False}),
    ("Swimmer-v5", {"exclude_current_positions_from_observation": False, "forward_reward_weight": 0.5}),
    ("Ant-v5", {"main_body": "aux_1", "contact_cost_weight": 0.3, "contact_force_range": (-0.2, 0.1)}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "exclude_current_positions_from_observation": False}),
    ("Ant-v4", {"use_contact_forces": True, "healthy_z_range": (0.4, 0.7)}),
    ("Humanoid-v5", {"contact_cost_weight": 1e-3, "contact_cost_range": (0.1, 0.4), "healthy_z_range": (1.2, 2.0)}),
    ("Humanoid-v5", {"include_cinert_in_observation": False, "include_cfrc_ext_in_observation": False}),
    ("HumanoidStandup-v5", {"impact_cost_weight": 0.1, "impact_cost_range": (0.2, 1.0), "uph_cost_weight": 2.0}),
    ("InvertedPendulum-v5", {"reset_noise_scale": 0.1, "frame_skip": 1}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0, "reset_noise_scale": 0.3}),
    ("Reacher-v5", {"reward_dist_weight": 2.0, "reward_control_weight": 0.3}),
    ("Pusher-v5", {"reward_near_weight": 2, "reward_dist_weight": 0.3, "reward_control_weight": 0.7}),
    ("Hopper-v5", {"width": 64, "camera_id": 0}),
]


def assert_equal_to_gymnasium(native_env, chunks, task: Task, steps: int, **sizes: int) -> tuple[int, int, int]:
    """Step both; how many episodes were terminated, truncated, and ended inside a chunk."""
    native = native_env(task, threads=2, **sizes)
    gym = sync_vector_env(task, native.num_envs, **{"history": 2, "chunk": 4, **sizes})
    assert native.single_observation_space == gym.single_observation_space
    assert native.observation_space == gym.observation_space
    assert native.action_space == gym.action_space
    assert native.metadata == gym.metadata
    (found, infos), (expected, expected_infos) = native.reset(seed=7), gym.reset(seed=7)
    assert_same(found, expected, "reset")
    assert infos == expected_infos == {}
    terminated = truncated = early = 0
    for k, action in enumerate(chunks(native, steps)):
        found, expected = native.step(action), gym.step(action)
        for name, ours, theirs in zip(
            ("obs", "reward", "terminated", "truncated", "info"), found, expected, strict=True
        ):
            assert_same(ours, theirs, f"step {k}: {name}")
        terminated, truncated = terminated + found[2].sum(), truncated + found[3].sum()
        last = found[4].get("final_info", {"steps": np.zeros(0), "_steps": np.zeros(0, bool)})
        early += (last["steps"][last["_steps"]] < action.shape[1]).sum()
    gym.close()
    return int(terminated), int(truncated), int(early)


@pytest.mark.parametrize("env_id", IDS)
def test_an_environment_is_gymnasiums_to_the_last_bit(native_env, chunks, env_id):
    task = Task("native", env_id, max_episode_steps=27)
    terminated, truncated, early = assert_equal_to_gymnasium(native_env, chunks, task, 20)
    assert terminated + truncated >= 6
    assert early >= 3, "some episodes must end inside a chunk"


@pytest.mark.slow
@pytest.mark.parametrize("env_id", IDS)
def test_an_environment_is_gymnasiums_for_thousands_of_steps(native_env, chunks, env_id):
    assert_equal_to_gymnasium(native_env, chunks, Task("native", env_id), 700)


@pytest.mark.parametrize(("env_id", "settings"), SETTINGS)
def test_settings_mean_what_they_mean_to_gymnasium(native_env, chunks, env_id, settings):
    task = Task("native", env_id, settings, max_episode_steps=11)
    assert_equal_to_gymnasium(native_env, chunks, task, 8)


@pytest.mark.parametrize(("history", "chunk"), [(1, 1), (1, 12), (5, 1), (3, 2), (2, 8)])
def test_any_history_and_chunk(native_env, chunks, history, chunk):
    task = Task("native", "Hopper-v5", max_episode_steps=13)
    assert_equal_to_gymnasium(native_env, chunks, task, 30, history=history, chunk=chunk)


def test_an_unstable_simulation_goes_on_as_gymnasiums_does(native_env, chunks, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    task = Task("native", "HalfCheetah-v5", {"reset_noise_scale": 30.0}, max_episode_steps=20)
    assert_equal_to_gymnasium(native_env, chunks, task, 15)
    assert "The simulation is unstable" in capfd.readouterr().out


def test_a_task_without_an_episode_limit(native_env, chunks, monkeypatch):
    spec = gymnasium.envs.registration.EnvSpec("Endless-v0", "gymnasium.envs.mujoco.swimmer_v5:SwimmerEnv")
    monkeypatch.setitem(gymnasium.registry, "Endless-v0", spec)
    assert assert_equal_to_gymnasium(native_env, chunks, Task("native", "Endless-v0"), 20) == (0, 0, 0)
