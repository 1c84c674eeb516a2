"""The state of one environment as plain data, see `dppo.plain`.

Of an environment that has `get_state()` and `set_state(state)`, that is what they give and take; of Gymnasium's own
kinds below, what their objects hold. Random generators of `gymnasium.Env` are taken care of for all of them.
"""

import sys
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import FlattenObservation, OrderEnforcing, TimeLimit

from dppo.envs.action_mask import ActionMask
from dppo.plain import is_plain

State = dict[str, Any]

_TRANSPARENT = (OrderEnforcing, TimeLimit, FlattenObservation, ActionMask)
"""Wrappers of which is known what they hold."""
_OPEN = (
    "gymnasium.envs.classic_control.",
    "gymnasium.envs.toy_text.",
    "gymnasium.envs.mujoco.",
    "gymnasium_robotics.envs.maze.point",
)
"""Modules of environments whose attributes are all there is to know: plain data, simulations, environments inside."""
_GENERATOR, _SIMULATION, _INSIDE = "generator", "simulation", "inside"


class NotRestorable(Exception):
    """An environment whose state nobody can tell; the message says which."""


def state_of(env: gymnasium.Env) -> State:
    """All that the future of an environment depends on, besides the actions; a copy.

    Raises:
        NotRestorable: it, or one of its wrappers, is of no known kind and offers no state of its own.
    """
    return {"layers": [_state_of_layer(layer) for layer in _layers(env)]}


def restore(env: gymnasium.Env, state: State) -> None:
    """Go on from what `state_of` gave of an environment that was made alike.

    Raises:
        NotRestorable: as of `state_of`.
        ValueError: the state is of an environment that was made in another way.
    """
    layers = list(_layers(env))
    if len(layers) != len(state["layers"]):
        raise ValueError(
            f"the state is of an environment in {len(state['layers'])} layers, but {env} has {len(layers)}"
        )
    for layer, of_layer in zip(layers, state["layers"], strict=True):
        _restore_layer(layer, of_layer)


def envs_of(state: State, num_envs: int) -> list[State]:
    """The single states of a vector environment's.

    Raises:
        ValueError: there are more or fewer.
    """
    if len(state["envs"]) != num_envs:
        raise ValueError(f"the state is of {len(state['envs'])} environments, but there are {num_envs}")
    return state["envs"]


def generator_state(generator: np.random.Generator) -> State:
    """Of a generator as `np_random` makes them."""
    return dict(generator.bit_generator.state)


def generator_of(state: State) -> np.random.Generator:
    """A generator in this state."""
    generator = np.random.Generator(getattr(np.random, _known_bit_generator(state["bit_generator"]))())
    generator.bit_generator.state = state
    return generator


def _known_bit_generator(name: str) -> str:
    if name not in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"):
        raise ValueError(f"numpy has no bit generator {name!r}")
    return name


def _layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The environment's wrappers, from the outside, and itself."""
    yield env
    while isinstance(env, gymnasium.Wrapper):
        env = env.env
        yield env


def _offers_state(env: gymnasium.Env) -> bool:
    return all(callable(getattr(type(env), name, None)) for name in ("get_state", "set_state"))


def _is_open(env: gymnasium.Env) -> bool:
    return type(env) in _TRANSPARENT or f"{type(env).__module__}.".startswith(_OPEN)


def _state_of_layer(env: Any) -> State:
    state: State = {}
    if env is env.unwrapped and env._np_random is not None:
        state[_GENERATOR] = generator_state(env._np_random)
    if _offers_state(env):
        state["own"] = env.get_state()
        if not is_plain(state["own"]):
            raise NotRestorable(f"get_state() of {env} gives more than numbers, text, arrays, lists and dictionaries")
        return state
    if not _is_open(env):
        kind = f"{type(env).__module__}.{type(env).__qualname__}"
        raise NotRestorable(f"{kind} has no get_state() and set_state(state)")
    attributes = {name: value for name, value in vars(env).items() if name not in ("env", "spec", "_cached_spec")}
    state["attributes"] = {name: _copy(value) for name, value in attributes.items() if is_plain(value)}
    inside = {name: value for name, value in attributes.items() if isinstance(value, gymnasium.Env)}
    state[_INSIDE] = {name: state_of(value) for name, value in inside.items()}
    state[_SIMULATION] = {name: _simulation(env, value) for name, value in attributes.items() if _is_simulation(value)}
    return state


def _restore_layer(env: Any, state: State) -> None:
    if _GENERATOR in state:
        env._np_random = generator_of(state[_GENERATOR])
    if "own" in state:
        if not _offers_state(env):
            raise NotRestorable(f"{env} has no get_state() and set_state(state) any more")
        env.set_state(state["own"])
        return
    for name, value in state["attributes"].items():
        setattr(env, name, _copy(value))
    for name, inside in state[_INSIDE].items():
        restore(getattr(env, name), inside)
    for name, fields in state[_SIMULATION].items():
        data = getattr(env, name)
        for field, value in fields["data"].items():
            _put(data, field, value)
        _put(env.model, "site_pos", fields["site_pos"])


def _copy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return type(value)(map(_copy, value)) if isinstance(value, list | tuple) else value


def _is_simulation(value: Any) -> bool:
    mujoco = sys.modules.get("mujoco")  # who has no simulation has not imported it
    return mujoco is not None and isinstance(value, mujoco.MjData)


def _simulation(env: Any, data: Any) -> State:
    """The whole of `MjData` but for what each step makes anew of constraints and contacts.

    Also what lags behind the positions: some observations are made of it. And where the maze shows its goal.
    """
    fresh = type(data)(env.model)
    names = [name for name in dir(data) if not name.startswith("_") and isinstance(getattr(data, name), np.ndarray)]
    same = [name for name in names if getattr(data, name).shape == getattr(fresh, name).shape]
    fields = {name: getattr(data, name).copy() for name in same if not name.startswith(("efc_", "iefc_"))}
    kept = {name: value for name, value in fields.items() if value.size and is_plain(value)}
    return {"data": {"time": float(data.time), **kept}, "site_pos": env.model.site_pos.copy()}


def _put(target: Any, name: str, value: Any) -> None:
    if not isinstance(value, np.ndarray):
        setattr(target, name, value)
        return
    place = getattr(target, name)
    if place.shape != value.shape:
        raise ValueError(f"the state has {name} of shape {value.shape}, but this simulation {place.shape}")
    place[:] = value
