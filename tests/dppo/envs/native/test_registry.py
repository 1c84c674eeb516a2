import inspect

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from dppo.envs.native import registry
from dppo.envs.native.vector_env import NativeVectorEnv
from dppo.envs.vector import make_vector_env
from dppo.task import Task
from policies.errors import UserError

HOPPER = Task("hopper", "Hopper-v5")


class LowGravityHopper(HopperEnv):
    """Not the environment that its parent is."""


def is_native(task: Task, **settings) -> bool:
    env = make_vector_env(task, 2, history=1, chunk=2, **settings)
    env.reset(seed=0)
    env.step(np.zeros(env.action_space.shape, np.float32))
    env.close()
    assert isinstance(env, NativeVectorEnv | SyncVectorEnv)
    return isinstance(env, NativeVectorEnv)


def test_an_id_of_ones_own_for_a_known_class_is_native(monkeypatch):
    spec = EnvSpec(
        "Mine-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=9, kwargs={"frame_skip": 2}
    )
    monkeypatch.setitem(gymnasium.registry, "Mine-v0", spec)
    assert is_native(Task("mine", "Mine-v0"))


def test_another_class_under_a_known_id_is_not(monkeypatch):
    monkeypatch.setitem(gymnasium.registry, "Hopper-v5", EnvSpec("Hopper-v5", LowGravityHopper))
    assert not is_native(HOPPER)


def test_an_environment_in_further_wrappers_is_not(monkeypatch):
    wrapper = WrapperSpec("clip", "gymnasium.wrappers:ClipAction", {})
    spec = EnvSpec("Hopper-v5", "gymnasium.envs.mujoco.hopper_v5:HopperEnv", additional_wrappers=(wrapper,))
    monkeypatch.setitem(gymnasium.registry, "Hopper-v5", spec)
    assert not is_native(HOPPER)


def test_a_setting_that_no_rule_knows_is_left_to_gymnasium(monkeypatch):
    assert is_native(HOPPER)
    signature = inspect.signature(HopperEnv)
    wind = inspect.Parameter("wind", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    *known, rest = signature.parameters.values()
    monkeypatch.setattr(HopperEnv, "__signature__", signature.replace(parameters=[*known, wind, rest]), raising=False)
    assert not is_native(HOPPER)


def test_an_error_of_a_rule_itself_is_not_taken_for_an_unknown_setting(monkeypatch):
    def broken(*_, **__):
        raise TypeError("a bug of the rule")

    monkeypatch.setitem(registry._RULES, "hopper:HopperEnv", broken)
    with pytest.raises(TypeError, match="a bug of the rule"):
        make_vector_env(HOPPER, 2, history=1, chunk=2)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_left_to_gymnasium(mode):
    assert not is_native(HOPPER, autoreset_mode=mode)


def test_other_environments_are_left_to_gymnasium():
    assert not is_native(Task("pendulum", "Pendulum-v1"))


def test_errors_are_those_of_a_single_environment():
    with pytest.raises(UserError, match="Pusher-v4 cannot be built"):
        make_vector_env(Task("old", "Pusher-v4"), 2, history=1, chunk=1)
    with pytest.raises(UserError, match=r"env_kwargs: .*'gravitee'"):
        make_vector_env(Task("hop", "Hopper-v5", {"gravitee": 1}), 2, history=1, chunk=1)
