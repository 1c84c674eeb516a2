"""What makes physics a task, as pure functions of moments of a simulation; and the pieces that several tasks share.

N environments, Ta chunk, Nq positions, Nv velocities, Da action dimension, Do observation dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv

Frames = Mapping[str, np.ndarray]
"""Moments of simulations: arrays [..., *shape] of fields of `mujoco.MjData`, by their names there."""

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Rules:
    """A task. All of it must be computed as Gymnasium does, down to types and the order of sums."""

    draw: Draw
    """The first positions [Nq] and velocities [Nv] of an episode."""
    observe: Callable[[Frames], np.ndarray]
    """Frames [..., *shape] -> observations [..., Do] float64."""
    judge: Callable[[Frames, np.ndarray], tuple[np.ndarray, np.ndarray]]
    """Frames [N, Ta + 1, *shape], actions [N, Ta, Da] -> rewards [N, Ta], terminated [N, Ta] bool."""
    fields: tuple[str, ...] = ()
    """Names of the fields of `MjData` that frames must hold besides qpos and qvel."""


def later(frames: Frames) -> Frames:
    """Frames [N, Ta + 1, *shape] without the first, that from before the chunk."""
    return {name: values[:, 1:] for name, values in frames.items()}


def within(values: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """Which values lie strictly between two bounds."""
    low, high = bounds
    return (low < values) & (values < high)


def noisy_start(env: "MujocoEnv", scale: float, *, normal_velocity: bool = False) -> Draw:
    """The model's own state with uniform noise in [-scale, scale], or normal noise on the velocities."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = env.init_qpos + rng.uniform(-scale, scale, env.model.nq)
        if normal_velocity:
            return qpos, env.init_qvel + scale * rng.standard_normal(env.model.nv)
        return qpos, env.init_qvel + rng.uniform(-scale, scale, env.model.nv)

    return draw
