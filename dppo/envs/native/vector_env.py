"""Physics and rules, with episodes, chunks and histories: a vector environment.

N environments, To history, Ta executed chunk, Da action dimension, Do observation dimension.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dppo.envs.chunk import ChunkEnv
from dppo.envs.infos import same_step_infos
from dppo.envs.native.physics import Physics
from dppo.envs.native.rules import Rules, later
from dppo.envs.restoring import generator_of, generator_state
from dppo.envs.seeds import seeds_of
from dppo.envs.stepper import Step


class NativeVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N environments as `SyncVectorEnv` would step N `ChunkEnv`s in SAME_STEP mode, and the same to the last bit.

    All N execute their whole chunk before anyone asks where an episode ended. What a simulation did after that is
    thrown away: at the end of an episode a few steps are wasted, in exchange for observing and judging all at once.
    """

    def __init__(self, env: ChunkEnv, rules: Rules, num_envs: int, *, threads: int) -> None:
        """`num_envs` copies of `env`, which closes with them.

        Args:
            env: a MuJoCo environment of Gymnasium; gives the model, spaces, sizes and the episode limit.
            rules: its rules.
            num_envs: N.
            threads: how many simulate at once.
        """
        self.stepped = "natively"
        """How, for people to read."""
        inner: Any = env.unwrapped
        assert isinstance(env.action_space, Box) and env.observation_space.shape is not None
        self.num_envs = num_envs
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.render_mode = None
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        self._env = env
        self._rules = rules
        self._limit = _episode_limit(env)
        self._physics = Physics(
            inner.model,
            inner.frame_skip,
            num_envs,
            fields=rules.fields,
            threads=min(threads, num_envs),
        )
        self._generators: list[np.random.Generator] = []
        self._elapsed = np.zeros(num_envs, np.int64)
        self._history = np.zeros((num_envs, *env.observation_space.shape), np.float32)  # [N, To, Do]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode everywhere, or where `options["reset_mask"]` [N] says so.

        Environment i is seeded with seed + i; without a seed its generator goes on.

        Returns:
            First observations, repeated To times [N, To, Do], and an empty info.
        """
        seeds = seeds_of(seed, self.num_envs)
        rows = np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        if not self._generators:
            self._generators = [np_random(own)[0] for own in seeds]
        for row in rows:
            if seeds[row] is not None:
                self._generators[row] = np_random(seeds[row])[0]
        self._history = self._history.copy()  # the last step's observations keep what they say
        self._begin(rows)
        return self._history.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Execute a chunk everywhere.

        Args:
            actions: [N, Ta, Da], clipped to the bounds.

        Returns:
            Observations [N, To, Do], summed rewards [N], terminated [N], truncated [N], and infos in the layout of
            Gymnasium's SAME_STEP mode.
        """
        final, step_rewards, steps, terminated, truncated = self._execute(actions)
        infos = same_step_infos(step_rewards, steps, final, terminated | truncated)
        # Summed one after the other, as the environments do, not in pairs.
        return self._history.copy(), step_rewards.cumsum(1)[:, -1], terminated, truncated, infos

    def advance(self, actions: np.ndarray) -> Step:
        """Execute a chunk everywhere; as `step`, without a detour through infos.

        Args:
            actions: [N, Ta, Da], clipped to the bounds.
        """
        final, step_rewards, steps, terminated, truncated = self._execute(actions)
        truncated = truncated & ~terminated
        dropped = np.zeros(self.num_envs, bool)
        return Step(self._history.copy(), final, step_rewards, steps, terminated, truncated, ~dropped, dropped)

    def _execute(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Move on; the last observations [N, To, Do], rewards [N, Ta], steps [N], terminated [N] and truncated [N]."""
        if not self._generators:
            raise ResetNeeded("reset the environments before the first step")
        actions = self._clipped(actions)
        num_envs, chunk = actions.shape[:2]
        frames = self._physics.advance(actions)
        with np.errstate(over="ignore", invalid="ignore"):  # what follows the end of an episode may be anything
            rewards, terminated = self._rules.judge(frames, actions)  # [N, Ta] each
            seen = self._rules.observe(later(frames)).astype(np.float32)  # [N, Ta, Do]
        if chunk == 1:  # nothing follows the end of an episode: the same as below, of one step
            steps, step_rewards = np.ones(num_envs, np.int64), rewards
            terminated, truncated = terminated[:, 0], self._elapsed + 1 >= self._limit
            ended = terminated | truncated
            self._history = np.concatenate([self._history[:, 1:], seen], axis=1)
        else:
            recent = np.concatenate([self._history, seen], axis=1)  # [N, To + Ta, Do]
            truncated = self._elapsed[:, None] + np.arange(1, chunk + 1) >= self._limit  # [N, Ta]
            steps, ended = _until_first(terminated | truncated)  # [N], [N]
            step_rewards = np.where(np.arange(chunk) < steps[:, None], rewards, 0.0)  # [N, Ta]
            everyone = np.arange(num_envs)
            terminated, truncated = (flags[everyone, steps - 1] & ended for flags in (terminated, truncated))
            # Row To + i of `recent` is the observation after step i, so the history after n steps is rows n to n + To.
            self._history = recent[everyone[:, None], steps[:, None] + np.arange(self._history.shape[1])]
        self._elapsed += steps
        final = self._history
        if ended.any():
            self._history = self._history.copy()
            self._begin(np.flatnonzero(ended))
        return final, step_rewards, steps, terminated, truncated

    def get_state(self) -> dict[str, Any]:
        """A copy of the whole state, as plain data; put back, the environments do again what they did.

        Returns:
            physics: [N, ...] each, see `Physics.save`.
            elapsed: [N] int64, environment steps of the running episodes.
            history: [N, To, Do] float32, the last observations.
            generators: N states of random generators.
        """
        return {
            "physics": self._physics.save(),
            "elapsed": self._elapsed.copy(),
            "history": self._history.copy(),
            "generators": [generator_state(generator) for generator in self._generators],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`, of this or another instance for the same task and sizes.

        Raises:
            ValueError: the sizes are others.
        """
        theirs, ours = state["history"].shape, self._history.shape
        if theirs != ours:
            raise ValueError(f"the state has histories {theirs}, these environments {ours}")
        self._physics.restore(state["physics"])
        self._elapsed = state["elapsed"].copy()
        self._history = state["history"].copy()
        self._generators = [generator_of(bits) for bits in state["generators"]]

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads and close the environment that was copied."""
        self._physics.close()
        self._env.close()

    def _begin(self, rows: np.ndarray) -> None:
        """Start an episode in some environments."""
        for row in rows:
            self._physics.place(row, *self._rules.draw(self._generators[row]))
        self._elapsed[rows] = 0
        self._history[rows] = self._rules.observe(self._physics.now(rows))[:, None]

    def _clipped(self, actions: np.ndarray) -> np.ndarray:
        space = self.action_space
        assert isinstance(space, Box)
        actions = np.asarray(actions, space.dtype)
        if actions.shape != space.shape:
            raise ValueError(f"expected action chunks of shape {space.shape}, got {actions.shape}")
        return np.minimum(np.maximum(actions, space.low), space.high)


def _until_first(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of each row's flags [N, Ta] there are up to the first that is set, or at all; and whether one is."""
    ended = np.any(flags, axis=1)
    return np.where(ended, flags.argmax(1) + 1, flags.shape[1]), ended


def _episode_limit(env: gymnasium.Env) -> int:
    limit = env.spec.max_episode_steps if env.spec is not None else None
    return np.iinfo(np.int64).max if limit is None else limit
