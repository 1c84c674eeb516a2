"""Locomotion: pay for moving forward and for staying healthy, charge for control and for contact."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dppo.envs.native.rules import Frames, Rules, later, noisy_start

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv


def locomotion(
    env: "MujocoEnv",
    version: int,
    *,
    observe: Callable[[Frames], np.ndarray],
    forward: Callable[[Frames], np.ndarray],
    healthy: Callable[[Frames], np.ndarray] | None = None,
    contact_cost: Callable[[Frames], np.ndarray] | None = None,
    normal_velocity: bool = False,
    fields: tuple[str, ...] = (),
    ctrl_cost_weight: float,
    reset_noise_scale: float,
    forward_reward_weight: float = 1.0,
    healthy_reward: float = 0.0,
    terminate_when_unhealthy: bool = False,
) -> Rules:
    """The rules of a walker.

    Args:
        env: the environment, for its model, first state and time step.
        version: 4 or 5, of Gymnasium's environments.
        observe: frames -> observations.
        forward: frames -> the coordinate [...] along which to move.
        healthy: frames -> bool [...]; None: always.
        contact_cost: frames -> what contact costs [...]; None: nothing.
        normal_velocity: whether the noise on the first velocities is normal.
        fields: those of `MjData` that these functions need; with "ctrl" among them, control is charged in float64.
        ctrl_cost_weight: this and the rest as Gymnasium documents them.
    """
    dt = env.dt
    paid_to_the_end = version < 5 and terminate_when_unhealthy  # version 4 pays for the step that ends the episode too

    def judge(frames: Frames, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        after = later(frames)
        position = forward(frames)  # [N, Ta + 1]
        velocity = (position[:, 1:] - position[:, :-1]) / dt  # [N, Ta]
        fit = np.ones(velocity.shape, bool) if healthy is None else healthy(after)
        paid = healthy_reward if healthy is None or paid_to_the_end else fit * healthy_reward
        rewards = forward_reward_weight * velocity + paid
        costs = ctrl_cost_weight * np.add.reduce(np.square(after.get("ctrl", actions)), axis=-1)
        if contact_cost is not None:
            costs = costs + contact_cost(after)
        return rewards - costs, ~fit if terminate_when_unhealthy else np.zeros_like(fit)

    return Rules(noisy_start(env, reset_noise_scale, normal_velocity=normal_velocity), observe, judge, fields)


def posture(frames: Frames, *, hidden: int, max_speed: float | None = None) -> np.ndarray:
    """Positions but for the first `hidden`, and velocities up to `max_speed`."""
    qvel = frames["qvel"]
    if max_speed is not None:  # np.clip takes several times as long for a single row
        qvel = np.minimum(np.maximum(qvel, -max_speed), max_speed)
    return np.concatenate([frames["qpos"][..., hidden:], qvel], axis=-1)
