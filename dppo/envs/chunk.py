"""Observation histories and action chunks around one environment.

To history, Ta executed chunk, Da action dimension, Do observation dimension.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from dppo.envs.restoring import restore, state_of
from policies.errors import UserError


class ChunkEnv(gymnasium.Wrapper[np.ndarray, Any, np.ndarray, Any]):
    """Executes a chunk of Ta actions per step and returns the last To observations.

    The observation is [To, Do] float32 in the environment's units; the history moves at every environment step, also
    inside the chunk, and is filled with the first observation at a reset. The action is [Ta, Da] (discrete action
    spaces stay as they are and need Ta = 1); it is clipped to the bounds of the environment's action space. A chunk
    stops where the episode ends. The reward of a step is the plain sum over the chunk.

    The info of a step holds these two entries and nothing of the environment's own:
        step_rewards: float64 [Ta], the reward of each environment step, zero after the end of the episode
        steps: int, how many environment steps were executed

    Raises:
        UserError: on construction, if a space is not supported or the chunk is longer than an episode may be.
    """

    def __init__(self, env: gymnasium.Env, *, history: int, chunk: int) -> None:
        """Wrap `env`, whose observations are vectors [Do]."""
        super().__init__(env)
        _check_sizes(env, history, chunk)
        low, high = _observation_bounds(env)  # [Do], [Do]
        self.observation_space = Box(np.tile(low, (history, 1)), np.tile(high, (history, 1)), dtype=np.float32)
        self.action_space = _chunk_space(env, chunk)
        self._history = history
        self._chunk = chunk
        # Row To + i is the observation after environment step i of the current chunk, the To rows before the chunk's
        # own are the history at its start. So the history after n steps is rows n to n + To.
        self._recent = np.zeros((history + chunk, low.shape[0]), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode.

        Returns:
            The first observation repeated To times [To, Do], and an empty info.
        """
        obs, _ = self.env.reset(seed=seed, options=options)
        self._recent[: self._history] = obs
        return self._recent[: self._history].copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Execute one chunk.

        Args:
            action: [Ta, Da] (Discrete: one integer; MultiDiscrete and MultiBinary: one of each dimension).

        Returns:
            Observation history [To, Do], summed reward, terminated, truncated, info (see the class).
        """
        first = self._history
        steps, total, terminated, truncated = 0, 0.0, False, False
        step_rewards = np.zeros(self._chunk)  # [Ta]
        for env_action in self._env_actions(action):
            obs, reward, terminated, truncated, _ = self.env.step(env_action)
            self._recent[first + steps] = obs
            step_rewards[steps] = reward
            total += float(reward)
            steps += 1
            if terminated or truncated:
                break
        recent = self._recent[steps : steps + first].copy()  # [To, Do]
        self._recent[:first] = recent
        info = {"step_rewards": step_rewards, "steps": steps}
        return recent, total, bool(terminated), bool(truncated), info

    def get_state(self) -> dict[str, Any]:
        """All that the future depends on besides the actions, as plain data.

        Raises:
            NotRestorable: see `restoring.state_of`.
        """
        return {"history": self._recent[: self._history].copy(), "env": state_of(self.env)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`, of this or another instance that was made alike.

        Raises:
            ValueError: it was made in another way.
        """
        restore(self.env, state["env"])
        self._recent[: self._history] = state["history"]

    def _env_actions(self, action: Any) -> Any:
        """The actions to execute, one after the other."""
        space = self.action_space
        if isinstance(space, Discrete):
            return (int(action),)
        if not isinstance(space, Box):
            return (np.asarray(action, space.dtype),)
        action = np.asarray(action, space.dtype)
        if action.shape != space.shape:
            raise ValueError(f"expected an action chunk of shape {space.shape}, got {action.shape}")
        # One call for the whole chunk, not one per environment step. Infinite bounds clip nothing.
        return np.minimum(np.maximum(action, space.low), space.high)  # [Ta, Da]


def _check_sizes(env: gymnasium.Env, history: int, chunk: int) -> None:
    if history < 1 or chunk < 1:
        raise UserError(f"{_name(env)}: history and chunk must be at least 1, got history {history}, chunk {chunk}")
    limit = env.spec.max_episode_steps if env.spec is not None else None
    if limit is not None and chunk > limit:
        raise UserError(
            f"{_name(env)}: a chunk of {chunk} actions is longer than an episode (max_episode_steps {limit}); "
            "shorten the chunk or raise the limit"
        )


def _observation_bounds(env: gymnasium.Env) -> tuple[np.ndarray, np.ndarray]:
    space = env.observation_space
    if not isinstance(space, Box):
        raise UserError(
            f"{_name(env)}: observations of type {type(space).__name__} are not supported, only what can be flattened"
        )
    if len(space.shape) != 1:
        raise UserError(f"{_name(env)}: observations of shape {space.shape} are not supported, only vectors")
    with np.errstate(over="ignore"):  # a float64 bound beyond float32 becomes infinite
        return space.low.astype(np.float32), space.high.astype(np.float32)


def _chunk_space(env: gymnasium.Env, chunk: int) -> Box | Discrete | MultiDiscrete | MultiBinary:
    space = env.action_space
    if isinstance(space, Discrete | MultiDiscrete | MultiBinary) and len(space.shape or ()) <= 1:
        if chunk != 1:
            raise UserError(f"{_name(env)}: discrete actions cannot be chunked; set the chunk to 1, got {chunk}")
        start = getattr(space, "start", 0)
        if np.any(start):
            raise UserError(f"{_name(env)}: discrete actions must be counted from 0, but start at {start}")
        return space
    if isinstance(space, Box) and len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
        tiles = (chunk, 1)
        return Box(np.tile(space.low, tiles), np.tile(space.high, tiles), dtype=space.dtype.type)
    supported = "a vector of floats, Discrete, MultiDiscrete and MultiBinary"
    raise UserError(f"{_name(env)}: the action space {space} is not supported, only {supported}")


def _name(env: gymnasium.Env) -> str:
    return env.spec.id if env.spec is not None else str(env.unwrapped)
