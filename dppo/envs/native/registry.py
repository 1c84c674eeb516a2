"""From an environment of Gymnasium to its rules."""

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from dppo.envs.native.arms import pusher, reacher
from dppo.envs.native.pendulums import inverted_double_pendulum, inverted_pendulum
from dppo.envs.native.planar import half_cheetah, hopper, swimmer, walker2d
from dppo.envs.native.rules import Rules
from dppo.envs.native.spatial import ant, humanoid, humanoid_standup

_RULES: dict[str, Callable[..., Rules]] = {
    "hopper:HopperEnv": hopper,
    "walker2d:Walker2dEnv": walker2d,
    "half_cheetah:HalfCheetahEnv": half_cheetah,
    "swimmer:SwimmerEnv": swimmer,
    "ant:AntEnv": ant,
    "humanoid:HumanoidEnv": humanoid,
    "humanoidstandup:HumanoidStandupEnv": humanoid_standup,
    "reacher:ReacherEnv": reacher,
    "pusher:PusherEnv": pusher,
    "inverted_pendulum:InvertedPendulumEnv": inverted_pendulum,
    "inverted_double_pendulum:InvertedDoublePendulumEnv": inverted_double_pendulum,
}
"""By module and class, without gymnasium.envs.mujoco before and _v4 or _v5 in between."""

_OF_THE_MODEL = {"xml_file", "frame_skip"}
"""Settings that the environment's model and frame_skip already follow."""

_OF_PICTURES = {
    "camera_id",
    "camera_name",
    "default_camera_config",
    "height",
    "max_geom",
    "render_mode",
    "visual_options",
    "width",
}


def rules_of(env: gymnasium.Env) -> Rules | None:
    """The rules of an environment as `gymnasium.make` made it; None if they are not known, or not with its settings.

    The class decides, not the id, so an id registered for one of these classes has its rules too, and what replaces
    one of Gymnasium's ids by something else has not.
    """
    inner = _without_episodes(env)
    if inner is None or inner.spec is None:
        return None
    package, _, module = type(inner).__module__.rpartition(".")
    name, _, version = module.rpartition("_v")
    rules = _RULES.get(f"{name}:{type(inner).__qualname__}")
    if rules is None or package != "gymnasium.envs.mujoco" or version not in ("4", "5") or inner.model.nplugin:
        return None
    parameters = inspect.signature(type(inner)).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.kind is not each.VAR_KEYWORD}
    settings = defaults | inner.spec.kwargs
    for name in _OF_THE_MODEL & defaults.keys() | _OF_PICTURES & settings.keys():
        del settings[name]
    try:
        return rules(inner, int(version), **settings)
    except TypeError as error:  # a setting that only a later Gymnasium knows, or only MujocoEnv
        if "unexpected keyword argument" not in str(error):
            raise
        return None


def _without_episodes(env: gymnasium.Env) -> Any:
    """The environment inside those wrappers that only keep account of episodes; None if there are others."""
    while isinstance(env, gymnasium.Wrapper):
        if type(env) not in (OrderEnforcing, TimeLimit):
            return None
        env = env.env
    return env
