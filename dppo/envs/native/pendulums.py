"""Pendulums on a cart."""

from typing import TYPE_CHECKING

import numpy as np

from dppo.envs.native.locomotion import posture
from dppo.envs.native.rules import Frames, Rules, later, noisy_start

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv


def inverted_pendulum(env: "MujocoEnv", version: int, *, reset_noise_scale: float = 0.01) -> Rules:
    """InvertedPendulum: pays 1 for every step; since version 5 not for the one that falls."""

    def observe(frames: Frames) -> np.ndarray:
        return posture(frames, hidden=0)

    def judge(frames: Frames, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        obs = observe(later(frames))
        fallen = ~np.isfinite(obs).all(-1) | (np.abs(obs[..., 1]) > 0.2)
        return (~fallen if version >= 5 else np.ones(fallen.shape)).astype(np.float64), fallen

    return Rules(noisy_start(env, reset_noise_scale), observe, judge)


def inverted_double_pendulum(
    env: "MujocoEnv", version: int, *, healthy_reward: float = 10.0, reset_noise_scale: float = 0.1
) -> Rules:
    """InvertedDoublePendulum: pays for a tip that is high, still and in the middle."""
    forces = 1 if version >= 5 else env.model.nv

    def observe(frames: Frames) -> np.ndarray:
        cart, angles = frames["qpos"][..., :1], frames["qpos"][..., 1:]
        qvel, force = (np.clip(frames[name], -10, 10) for name in ("qvel", "qfrc_constraint"))
        return np.concatenate([cart, np.sin(angles), np.cos(angles), qvel, force[..., :forces]], axis=-1)

    def judge(frames: Frames, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        after = later(frames)
        x, y = after["site_xpos"][..., 0, 0], after["site_xpos"][..., 0, 2]
        first, second = after["qvel"][..., 1], after["qvel"][..., 2]
        fallen = y <= 1
        alive = healthy_reward * (~fallen if version >= 5 else np.ones(y.shape))
        return alive - (0.01 * x**2 + (y - 2) ** 2) - (1e-3 * first**2 + 5e-3 * second**2), fallen

    draw = noisy_start(env, reset_noise_scale, normal_velocity=True)
    return Rules(draw, observe, judge, ("site_xpos", "qfrc_constraint"))
