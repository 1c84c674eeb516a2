"""One view of a vector environment, whatever it does when an episode ends.

N environments, To history, Ta executed chunk, Da action dimension, Do observation dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv

from dppo.envs.restoring import NotRestorable
from policies.errors import UserError


@dataclass(frozen=True)
class Step:
    """What one step of N environments led to. Every array is fresh: the next step does not change it."""

    obs: np.ndarray
    """[N, To, Do] float32, what the policy acts on next. Where an episode ended it is the first observation of the
    next one; only in NEXT_STEP mode is it still the last one, and the action taken on it is ignored."""
    final_obs: np.ndarray
    """[N, To, Do] float32, the true successor observation: where an episode ended, its last one."""
    step_rewards: np.ndarray
    """[N, Ta] float64, the reward of each environment step, zero after the end of an episode."""
    steps: np.ndarray
    """[N] int64, executed environment steps."""
    terminated: np.ndarray
    """[N] bool."""
    truncated: np.ndarray
    """[N] bool, False where terminated is True."""
    valid: np.ndarray
    """[N] bool. False where NEXT_STEP mode only reset the environment, or where the episode was dropped: no transition
    happened there, its rewards and steps are zero, and its row belongs in no buffer."""
    dropped: np.ndarray
    """[N] bool. True where an episode was given up, because a value was not finite or its process died. It is cut
    before this step, at the observation that the action was taken on, which is the last good one: so ``truncated`` is
    set, but ``valid`` is not, and what came of the action is nowhere."""


LARGEST = float(np.finfo(np.float32).max)
RESETS = 5
"""How often an environment may begin with an observation that is not finite, in a row."""


class Stepper:
    """Steps a vector environment of `ChunkEnv`s and reports the same transitions in every autoreset mode.

    An episode in which an observation or a reward is not finite is dropped (see `Step.dropped`), and a new one begins.

    Raises:
        ValueError: on construction, if the environments are not `ChunkEnv`s or the autoreset mode is not declared.
    """

    def __init__(self, env: VectorEnv) -> None:
        """Step `env`; `close` closes it."""
        shape = env.single_observation_space.shape
        if shape is None or len(shape) != 2:
            raise ValueError(f"expected observations of shape [To, Do] as ChunkEnv has them, got {shape}")
        if "autoreset_mode" not in env.metadata:
            raise ValueError(f"{env} does not say in its metadata which autoreset_mode it follows")
        self.env = env
        self._mode = AutoresetMode(env.metadata["autoreset_mode"])
        action = env.single_action_space
        self._chunk = action.shape[0] if isinstance(action, Box) else 1
        self._resets_next = np.zeros(env.num_envs, bool)
        self._directly: Callable[[np.ndarray], Step] | None = getattr(env, "advance", None)

    @property
    def num_envs(self) -> int:
        """N."""
        return self.env.num_envs

    @property
    def restarts(self) -> int:
        """How often a worker process of the environments has died and been replaced."""
        return getattr(self.env, "restarts", 0)

    @property
    def stepped(self) -> str:
        """How the environments are stepped, for people to read."""
        return getattr(self.env, "stepped", "one after the other")

    def reset(self, seed: int | list[int] | None = None) -> np.ndarray:
        """Start an episode in every environment; environment i is seeded with seed + i, or with its own of a list.

        Returns:
            Observations [N, To, Do] float32.

        Raises:
            UserError: an environment begins with an observation that is not finite, again and again.
        """
        obs, _ = self.env.reset(seed=seed)  # type: ignore[arg-type]  # all vector environments take a list, too
        self._resets_next = np.zeros(self.num_envs, bool)
        return self._begun(np.array(obs, np.float32), np.zeros(self.num_envs, bool))

    def step(self, action: np.ndarray) -> Step:
        """Execute one chunk in every environment.

        Args:
            action: [N, Ta, Da] in environment units (Discrete: [N] integers).

        Raises:
            UserError: an action is not finite, or an environment begins with an observation that is not, again and
                again.
        """
        _require_finite(action, "action")
        step = self._through_gymnasium(action) if self._directly is None else self._directly(action)
        fine = _all_finite(step.final_obs) and _all_finite(step.step_rewards)
        if fine and (not (step.terminated | step.truncated).any() or _all_finite(step.obs)):
            return step
        return self._without_broken(step)

    def _without_broken(self, step: Step) -> Step:
        """The step with those episodes dropped in which something is not finite."""
        broken = ~(_finite_rows(step.final_obs) & _finite_rows(step.step_rewards))  # [N]
        goes_on = ~(step.terminated | step.truncated) | (self._mode is AutoresetMode.NEXT_STEP)  # [N]
        obs = self._begun(step.obs, broken & goes_on)
        self._resets_next = self._resets_next & ~broken
        dropped = broken & step.valid  # what was only reset has no episode to lose
        return Step(
            obs,
            np.where(broken[:, None, None], obs, step.final_obs),
            np.where(broken[:, None], 0.0, step.step_rewards),
            np.where(broken, 0, step.steps),
            step.terminated & ~broken,
            (step.truncated & ~broken) | dropped,
            step.valid & ~broken,
            step.dropped | dropped,
        )

    def _begun(self, obs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Observations [N, To, Do] with new episodes in these rows [N], and where one is not finite.

        Raises:
            UserError: one is still not finite after `RESETS`.
        """
        for _ in range(RESETS):
            rows = rows | ~_finite_rows(obs)
            if not rows.any():
                return obs
            fresh, _ = self.env.reset(options={"reset_mask": rows})
            obs = np.where(rows[:, None, None], np.asarray(fresh, np.float32), obs)
            rows = np.zeros_like(rows)
        _require_finite(obs, "first observation")
        return obs

    def _through_gymnasium(self, action: np.ndarray) -> Step:
        """`step` where an environment has no more to offer than what Gymnasium asks for."""
        obs, _, terminated, truncated, infos = self.env.step(action)
        ended = terminated | truncated  # [N]
        step_rewards, steps = self._executed(infos)  # [N, Ta], [N]
        final_obs = np.array(obs, np.float32)  # [N, To, Do]
        next_obs = final_obs.copy()  # [N, To, Do]
        if self._mode is AutoresetMode.SAME_STEP:
            for index in np.flatnonzero(ended):
                final_obs[index] = infos["final_obs"][index]
        if self._mode is AutoresetMode.DISABLED and ended.any():
            next_obs[:] = self.env.reset(options={"reset_mask": ended})[0]
        dropped = infos.get("dropped", np.zeros(self.num_envs, bool))  # [N]
        valid = ~(self._resets_next | dropped)  # [N]
        if self._mode is AutoresetMode.NEXT_STEP:
            self._resets_next = ended
        return Step(next_obs, final_obs, step_rewards, steps, terminated, truncated & ~terminated, valid, dropped)

    def get_state(self) -> dict[str, Any]:
        """A copy of the whole state of the environments, as plain data.

        Raises:
            NotRestorable: they have none, see `restoring.state_of`.
        """
        if not hasattr(self.env, "get_state"):
            raise NotRestorable(f"{type(self.env).__qualname__} has no get_state() and set_state(state)")
        return {"env": self.env.get_state(), "resets_next": self._resets_next.copy()}  # type: ignore[attr-defined]

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of `get_state`, of environments that were made alike.

        Raises:
            ValueError: they were made in another way.
        """
        self.env.set_state(state["env"])  # type: ignore[attr-defined]
        self._resets_next = state["resets_next"].copy()

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def _executed(self, infos: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Rewards [N, Ta] and number [N] of the environment steps.

        Gymnasium masks each info entry with the environments that gave it. An episode's last step has its info in
        "final_info" in SAME_STEP mode, and a row that was only reset has none at all.
        """
        step_rewards = np.zeros((self.num_envs, self._chunk))
        steps = np.zeros(self.num_envs, np.int64)
        for info in (infos, infos.get("final_info", {})):
            if "steps" in info:
                given = info["_steps"]  # [N]
                step_rewards[given] = info["step_rewards"][given]
                steps[given] = info["steps"][given]
        return step_rewards, steps


def _all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN, infinite, or beyond what float32 can hold, in which everything is learned."""
    return bool(np.logical_and.reduce(np.abs(values) <= LARGEST, axis=None))


def _finite_rows(values: np.ndarray) -> np.ndarray:
    """As `_all_finite`, of each row [N] of values [N, ...]."""
    return np.logical_and.reduce(np.abs(values) <= LARGEST, axis=tuple(range(1, values.ndim)))


def _require_finite(values: np.ndarray, quantity: str) -> None:
    """Raise if any of values [N, ...] is NaN or infinite."""
    if _all_finite(values):
        return
    env, *index = (int(i) for i in np.argwhere(~(np.abs(values) <= LARGEST))[0])
    value = values[(env, *index)]
    if quantity == "action":
        advice = "the policy has diverged: lower the learning rate"
    else:
        advice = f"it was reset {RESETS} times; the environment is at fault"
    raise UserError(f"environment {env}: non-finite {quantity} ({value} at index {tuple(index)}); {advice}")
