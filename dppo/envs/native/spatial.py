"""Walkers in space: they also see, and pay for, forces that only the simulation knows."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.envs.native.locomotion import locomotion, posture
from dppo.envs.native.planar import Range
from dppo.envs.native.rules import Frames, Rules, later, noisy_start, within

if TYPE_CHECKING:
    from gymnasium.envs.mujoco import MujocoEnv

HUMANOID_FIELDS = ("xipos", "ctrl", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")


def ant(
    env: "MujocoEnv",
    version: int,
    *,
    healthy_z_range: Range,
    contact_cost_weight: float,
    contact_force_range: Range,
    exclude_current_positions_from_observation: bool,
    main_body: int | str = 1,
    include_cfrc_ext_in_observation: bool = False,
    use_contact_forces: bool = True,
    **settings: Any,
) -> Rules:
    """Ant: four legs. Version 4 has `use_contact_forces`, for cost and observation, and shows the world's body too."""
    body = env.model.body(main_body).id
    hidden = 2 if exclude_current_positions_from_observation else 0
    seen = include_cfrc_ext_in_observation if version >= 5 else use_contact_forces
    first_body = 1 if version >= 5 else 0

    def contact_forces(frames: Frames) -> np.ndarray:
        return np.clip(frames["cfrc_ext"], *contact_force_range)  # [..., bodies, 6]

    def contact_cost(frames: Frames) -> np.ndarray:
        return contact_cost_weight * np.square(_flat(contact_forces(frames))).sum(-1)

    def observe(frames: Frames) -> np.ndarray:
        parts = [_flat(contact_forces(frames)[..., first_body:, :])] if seen else []
        return np.concatenate([posture(frames, hidden=hidden), *parts], axis=-1)

    def healthy(frames: Frames) -> np.ndarray:
        low, high = healthy_z_range
        z = frames["qpos"][..., 2]
        return np.isfinite(posture(frames, hidden=0)).all(-1) & (low <= z) & (z <= high)

    return locomotion(
        env,
        version,
        observe=observe,
        forward=lambda frames: frames["xpos"][..., body, 0],
        healthy=healthy,
        contact_cost=contact_cost if use_contact_forces else None,
        normal_velocity=True,
        fields=("xpos", "cfrc_ext"),
        **settings,
    )


def humanoid(
    env: "MujocoEnv",
    version: int,
    *,
    healthy_z_range: Range,
    exclude_current_positions_from_observation: bool,
    include_cinert_in_observation: bool = True,
    include_cvel_in_observation: bool = True,
    include_qfrc_actuator_in_observation: bool = True,
    include_cfrc_ext_in_observation: bool = True,
    contact_cost_weight: float = 0.0,
    contact_cost_range: Range = (0.0, 0.0),
    **settings: Any,
) -> Rules:
    """Humanoid. Version 4 has no contact cost."""
    mass = env.model.body_mass

    def contact_cost(frames: Frames) -> np.ndarray:
        return np.clip(contact_cost_weight * np.square(_flat(frames["cfrc_ext"])).sum(-1), *contact_cost_range)

    return locomotion(
        env,
        version,
        observe=_body_view(
            version,
            exclude_current_positions_from_observation,
            cinert=include_cinert_in_observation,
            cvel=include_cvel_in_observation,
            qfrc_actuator=include_qfrc_actuator_in_observation,
            cfrc_ext=include_cfrc_ext_in_observation,
        ),
        forward=lambda frames: np.einsum("b,...b->...", mass, frames["xipos"][..., 0]) / mass.sum(),
        healthy=lambda frames: within(frames["qpos"][..., 2], healthy_z_range),
        contact_cost=contact_cost if version >= 5 else None,
        fields=HUMANOID_FIELDS,
        **settings,
    )


def humanoid_standup(
    env: "MujocoEnv",
    version: int,
    *,
    uph_cost_weight: float = 1.0,
    ctrl_cost_weight: float = 0.1,
    impact_cost_weight: float = 0.5e-6,
    impact_cost_range: Range = (-np.inf, 10.0),
    reset_noise_scale: float = 0.01,
    exclude_current_positions_from_observation: bool = True,
    include_cinert_in_observation: bool = True,
    include_cvel_in_observation: bool = True,
    include_qfrc_actuator_in_observation: bool = True,
    include_cfrc_ext_in_observation: bool = True,
) -> Rules:
    """HumanoidStandup: pays for height. Gymnasium takes `uph_cost_weight` and ignores it."""

    def judge(frames: Frames, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        after = later(frames)
        height = after["qpos"][..., 2] / env.model.opt.timestep
        control = ctrl_cost_weight * np.square(after["ctrl"]).sum(-1)
        impact = np.clip(impact_cost_weight * np.square(_flat(after["cfrc_ext"])).sum(-1), *impact_cost_range)
        return height - control - impact + 1, np.zeros(height.shape, bool)

    observe = _body_view(
        version,
        exclude_current_positions_from_observation,
        cinert=include_cinert_in_observation,
        cvel=include_cvel_in_observation,
        qfrc_actuator=include_qfrc_actuator_in_observation,
        cfrc_ext=include_cfrc_ext_in_observation,
    )
    return Rules(noisy_start(env, reset_noise_scale), observe, judge, HUMANOID_FIELDS)


def _body_view(version: int, exclude_positions: bool, **include: bool) -> Callable[[Frames], np.ndarray]:
    """Posture and the chosen fields; since version 5 without what is always zero: the world and the root's joints."""
    hidden = 2 if exclude_positions else 0
    skipped = {"qfrc_actuator": 6} if version >= 5 else {}
    default = 1 if version >= 5 else 0

    def observe(frames: Frames) -> np.ndarray:
        parts = [posture(frames, hidden=hidden)]
        for name, included in include.items():
            if included:
                first = skipped.get(name, default)
                values = frames[name]
                parts.append(values[..., first:] if name == "qfrc_actuator" else _flat(values[..., first:, :]))
        return np.concatenate(parts, axis=-1)

    return observe


def _flat(values: np.ndarray) -> np.ndarray:
    """[..., bodies, n] -> [..., bodies * n]."""
    return values.reshape(*values.shape[:-2], -1)
