"""Which actions are valid, as part of the observation.

Do observation dimension, Da number of actions.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, flatten, flatten_space

from policies.errors import UserError

INFO_KEY = "action_mask"
"""Where Gymnasium's own environments keep the mask in their info."""


def choices_of(space: gymnasium.Space) -> tuple[int, ...] | None:
    """How many actions there are in each dimension of a discrete action space; None for any other space."""
    if isinstance(space, Discrete):
        return (int(space.n),)
    if isinstance(space, MultiDiscrete) and len(space.shape) == 1:
        return tuple(int(count) for count in space.nvec)
    if isinstance(space, MultiBinary) and len(space.shape) == 1:
        return (2,) * int(space.shape[0])
    return None


class ActionMask(gymnasium.Wrapper[np.ndarray, Any, Any, Any]):
    """Appends the mask [Da] of valid actions (1) to the observation, which is flattened to [Do - Da].

    Where there are several dimensions of actions, their masks follow each other.
    """

    def __init__(self, env: gymnasium.Env, source: str) -> None:
        """Take the mask from a key of the observation, or from ``info["action_mask"]`` where the source is "info".

        Raises:
            UserError: the actions are not discrete, or the observation has no such key.
        """
        super().__init__(env)
        choices = choices_of(env.action_space)
        if choices is None:
            raise UserError(f"{env}: action_mask is for discrete actions, not for {env.action_space}")
        self._size = sum(choices)
        self._key = None if source == "info" else source
        rest = env.observation_space
        if self._key is not None:
            if not isinstance(rest, Dict) or self._key not in rest.spaces:
                keys = ", ".join(rest.spaces) if isinstance(rest, Dict) else f"none, it is {rest}"
                raise UserError(f"{env}: there is no action_mask {self._key!r} in the observation; its keys are {keys}")
            rest = Dict({name: space for name, space in rest.spaces.items() if name != self._key})
        self._rest = rest
        flat = flatten_space(rest)
        assert isinstance(flat, Box)
        mask = np.zeros(self._size), np.ones(self._size)
        low, high = (np.concatenate([flat.low, mask[0]]), np.concatenate([flat.high, mask[1]]))
        self.observation_space = Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._with_mask(obs, info), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take an action."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info.setdefault(INFO_KEY, np.ones(self._size))  # some say nothing where nothing can be done any more
        return self._with_mask(obs, info), float(reward), terminated, truncated, info

    def _with_mask(self, obs: Any, info: dict[str, Any]) -> np.ndarray:
        if self._key is None:
            if INFO_KEY not in info:
                raise UserError(f"{self.env}: its info has no {INFO_KEY!r}, but {', '.join(info) or 'nothing'}")
            mask = info[INFO_KEY]
        else:
            mask = obs[self._key]
            obs = {name: value for name, value in obs.items() if name != self._key}
        parts = mask if isinstance(mask, tuple | list) else (mask,)
        flat = np.concatenate([np.asarray(part, np.float32).ravel() for part in parts])
        if len(flat) != self._size:
            raise UserError(f"{self.env}: its action mask has {len(flat)} entries for {self._size} actions")
        return np.concatenate([np.asarray(flatten(self._rest, obs), np.float32), flat])
