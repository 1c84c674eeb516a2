"""Walkers in a plane: everything follows from their positions and velocities."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.envs.native.locomotion import locomotion, posture
from dppo.envs.native.rules import Frames, Rules, within

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv

Range = tuple[float, float]


def hopper(
    env: "MujocoEnv",
    version: int,
    *,
    healthy_state_range: Range,
    healthy_z_range: Range,
    healthy_angle_range: Range,
    exclude_current_positions_from_observation: bool,
    **settings: Any,
) -> Rules:
    """Hopper: one leg."""

    def healthy(frames: Frames) -> np.ndarray:
        rest = posture(frames, hidden=2)
        steady = np.logical_and.reduce(within(rest, healthy_state_range), axis=-1)
        return _upright(frames, healthy_z_range, healthy_angle_range) & steady

    observe = partial(posture, hidden=1 if exclude_current_positions_from_observation else 0, max_speed=10)
    return locomotion(env, version, observe=observe, forward=_x, healthy=healthy, **settings)


def walker2d(
    env: "MujocoEnv",
    version: int,
    *,
    healthy_z_range: Range,
    healthy_angle_range: Range,
    exclude_current_positions_from_observation: bool,
    **settings: Any,
) -> Rules:
    """Walker2d: two legs."""
    observe = partial(posture, hidden=1 if exclude_current_positions_from_observation else 0, max_speed=10)
    healthy = partial(_upright, z_range=healthy_z_range, angle_range=healthy_angle_range)
    return locomotion(env, version, observe=observe, forward=_x, healthy=healthy, **settings)


def half_cheetah(
    env: "MujocoEnv", version: int, *, exclude_current_positions_from_observation: bool, **settings: Any
) -> Rules:
    """HalfCheetah: two legs and no end."""
    observe = partial(posture, hidden=1 if exclude_current_positions_from_observation else 0)
    return locomotion(env, version, observe=observe, forward=_x, normal_velocity=True, **settings)


def swimmer(
    env: "MujocoEnv", version: int, *, exclude_current_positions_from_observation: bool, **settings: Any
) -> Rules:
    """Swimmer: no legs and no end."""
    observe = partial(posture, hidden=2 if exclude_current_positions_from_observation else 0)
    return locomotion(env, version, observe=observe, forward=_x, **settings)


def _x(frames: Frames) -> np.ndarray:
    return frames["qpos"][..., 0]


def _upright(frames: Frames, z_range: Range, angle_range: Range) -> np.ndarray:
    return within(frames["qpos"][..., 1], z_range) & within(frames["qpos"][..., 2], angle_range)
