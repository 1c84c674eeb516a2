"""Arms that reach for something."""

from typing import TYPE_CHECKING

import numpy as np

from dppo.envs.native.rules import Frames, Rules, later

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv


def reacher(
    env: "MujocoEnv", version: int, *, reward_dist_weight: float = 1.0, reward_control_weight: float = 1.0
) -> Rules:
    """Reacher: a fingertip and a target. Version 4 pays for the distance before the step, later ones for that after."""
    tip, target = (env.model.body(name).id for name in ("fingertip", "target"))
    shown = 2 if version >= 5 else 3

    def gap(frames: Frames) -> np.ndarray:
        return frames["xpos"][..., tip, :] - frames["xpos"][..., target, :]

    def observe(frames: Frames) -> np.ndarray:
        joints, goal = frames["qpos"][..., :2], frames["qpos"][..., 2:]
        parts = [np.cos(joints), np.sin(joints), goal, frames["qvel"][..., :2], gap(frames)[..., :shown]]
        return np.concatenate(parts, axis=-1)

    def judge(frames: Frames, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distance = _norm(gap(frames))
        paid = distance[:, 1:] if version >= 5 else distance[:, :-1]
        control = np.square(actions).sum(-1)
        return -paid * reward_dist_weight + -control * reward_control_weight, np.zeros(paid.shape, bool)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = rng.uniform(-0.1, 0.1, env.model.nq) + env.init_qpos
        while True:
            goal = rng.uniform(-0.2, 0.2, 2)
            if np.linalg.norm(goal) < 0.2:
                break
        qpos[-2:] = goal
        qvel = env.init_qvel + rng.uniform(-0.005, 0.005, env.model.nv)
        qvel[-2:] = 0
        return qpos, qvel

    return Rules(draw, observe, judge, ("xpos",))


def pusher(
    env: "MujocoEnv",
    version: int,
    *,
    reward_near_weight: float,
    reward_dist_weight: float,
    reward_control_weight: float,
) -> Rules:
    """Pusher: a gripper, an object and where it belongs. Version 4 does not run on MuJoCo 3."""
    tip, thing, goal = (env.model.body(name).id for name in ("tips_arm", "object", "goal"))

    def observe(frames: Frames) -> np.ndarray:
        places = [frames["xpos"][..., body, :] for body in (tip, thing, goal)]
        return np.concatenate([frames["qpos"][..., :7], frames["qvel"][..., :7], *places], axis=-1)

    def judge(frames: Frames, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        xpos = later(frames)["xpos"]
        near = -_norm(xpos[..., thing, :] - xpos[..., tip, :]) * reward_near_weight
        far = -_norm(xpos[..., thing, :] - xpos[..., goal, :]) * reward_dist_weight
        control = -np.square(actions).sum(-1) * reward_control_weight
        return far + control + near, np.zeros(near.shape, bool)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = env.init_qpos.copy()
        while True:
            cylinder = np.concatenate([rng.uniform(-0.3, 0, 1), rng.uniform(-0.2, 0.2, 1)])
            if np.linalg.norm(cylinder) > 0.17:
                break
        qpos[-4:-2], qpos[-2:] = cylinder, 0
        qvel = env.init_qvel + rng.uniform(-0.005, 0.005, env.model.nv)
        qvel[-4:] = 0
        return qpos, qvel

    return Rules(draw, observe, judge, ("xpos",))


def _norm(vectors: np.ndarray) -> np.ndarray:
    """Lengths of vectors [..., 3], summed as `np.linalg.norm` sums a single one."""
    return np.sqrt(np.vecdot(vectors, vectors))
