"""Acting in vectorised environments and keeping what an update needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dppo.envs.restoring import NotRestorable
from dppo.envs.stepper import Step, Stepper
from dppo.threads import explorer_in_parts, sample_in_parts, single_thread
from policies import Policy, UserError
from policies.base import Explorer

KEPT_STEPS = 32
"""Chunk steps that are written into the storage together."""


@dataclass(frozen=True)
class EpisodeResult:
    """A finished episode."""

    env: int
    """Index of the environment it ran in."""
    undiscounted_return: float
    length: int
    """In environment steps."""
    success: bool | None
    """None where the task has no notion of success."""


class EpisodeTracker:
    """Sums up each environment's running episode, across rollout boundaries."""

    def __init__(self, num_envs: int, success_reward: float | None) -> None:
        self.success_reward = success_reward
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)
        self.successes = np.zeros(num_envs, dtype=bool)

    def update(self, step: Step) -> list[EpisodeResult]:
        """Take in one chunk step; the episodes that it ended, without those that were dropped."""
        self.returns += np.add.reduce(step.step_rewards, axis=1)
        self.lengths += step.steps
        if self.success_reward is not None:
            executed = np.arange(step.step_rewards.shape[1]) < step.steps[:, None]  # [N, Ta]
            self.successes |= (executed & (step.step_rewards >= self.success_reward)).any(1)
        finished: list[EpisodeResult] = []
        ended = step.terminated | step.truncated
        for i in np.flatnonzero(ended) if ended.any() else ():
            if not step.dropped[i]:
                success = None if self.success_reward is None else bool(self.successes[i])
                finished.append(EpisodeResult(int(i), float(self.returns[i]), int(self.lengths[i]), success))
            self.returns[i], self.lengths[i], self.successes[i] = 0.0, 0, False
        return finished

    def state_dict(self) -> dict[str, Any]:
        """The running episodes, [N] each."""
        return {name: getattr(self, name).copy() for name in ("returns", "lengths", "successes")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, values in state.items():
            getattr(self, name)[:] = values


@dataclass(frozen=True)
class Storage:
    """Memory for what a rollout keeps of each step, allocated once and filled anew by each rollout."""

    obs: Tensor
    """[T, N, To, Do]"""
    chain: Tensor
    """[T, N, K+1, *latent]"""
    log_prob_factors: Tensor
    """[T, N, K, *F], scored while sampling."""

    @staticmethod
    def of(policy: Policy, steps: int, num_envs: int) -> Storage:
        """For ``steps`` chunk steps of a policy in so many environments, on the policy's device."""
        device = next(policy.parameters()).device
        obs = torch.zeros((1, policy.config.history, policy.config.obs_dim), device=device)
        example = policy.sample(obs, noise=policy.draw_noise(1, torch.Generator(device)))

        def rows(like: Tensor) -> Tensor:
            return torch.empty((steps, num_envs, *like.shape[1:]), dtype=like.dtype, device=device)

        return Storage(rows(obs), rows(example.chain), rows(example.log_prob_factors))

    def write(self, first: int, explored: Sequence[Explored], explorer: Explorer) -> None:
        """Keep chunk steps, the first of them in this place."""
        place = slice(first, first + len(explored))
        self.obs[place] = torch.stack([one.obs for one in explored])
        self.chain[place], self.log_prob_factors[place] = explorer.record([one.drawn for one in explored])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in vars(self).values())


@dataclass(frozen=True)
class Rollout:
    """T chunk steps of N environments."""

    obs: Tensor
    """[T, N, To, Do]"""
    chain: Tensor
    """[T, N, K+1, *latent]"""
    log_prob_factors: Tensor
    """[T, N, K, *F], scored while sampling."""
    step_rewards: Tensor
    """[T, N, Ta], of each environment step; zero after the end of an episode."""
    steps: Tensor
    """[T, N], executed environment steps."""
    terminated: Tensor
    """[T, N] bool"""
    truncated: Tensor
    """[T, N] bool; never together with ``terminated``."""
    valid: Tensor
    """[T, N] bool; False where a row is not a transition."""
    last_obs: Tensor
    """[N, To, Do], what follows the last row."""
    truncated_obs: Tensor
    """[M, To, Do], the true final observations of the M truncated rows, in the order of ``truncated.nonzero()``."""
    episodes: list[EpisodeResult]
    """Episodes that ended in this rollout."""
    env_steps: int
    """Environment steps executed."""
    environment_s: float
    """Wall-clock that the environments took."""
    dropped_episodes: int
    """Episodes that were given up, see `Step.dropped`."""
    worker_restarts: int
    """Worker processes that died and were replaced."""

    @property
    def rewards(self) -> Tensor:
        """[T, N], summed over the executed steps of each chunk."""
        return self.step_rewards.sum(2)


@dataclass(frozen=True)
class Acted:
    """One chunk step of N environments."""

    obs: Tensor
    """[N, To, Do], what the policy saw."""
    step: Step
    episodes: list[EpisodeResult]
    """Those that it ended."""
    environment_s: float
    """Wall-clock that the environments took."""


@dataclass(frozen=True)
class Explored(Acted):
    """One chunk step that something is to be learned from."""

    drawn: Any
    """What `Explorer.record` wants to know of it."""


class Actor:
    """A policy in front of vectorised environments; keeps the observation between calls."""

    def __init__(self, env: Stepper, *, success_reward: float | None, generator: torch.Generator) -> None:
        self.env = env
        self.generator = generator
        self.threads = torch.get_num_threads()
        self.tracker = EpisodeTracker(env.num_envs, success_reward)
        self.obs: np.ndarray | None = None
        self.not_restorable: str | None = None
        """Why the environments' state cannot be told, as far as is known."""

    def reset(self, seed: int | list[int]) -> None:
        """Start new episodes everywhere; environment i with seed + i, or with its own of a list."""
        self.obs = self.env.reset(seed)
        self.tracker = EpisodeTracker(self.env.num_envs, self.tracker.success_reward)

    def state_dict(self) -> dict[str, Any]:
        """The generator, and where the environments and their episodes are; that is None where they cannot tell it."""
        return {"generator": self.generator.get_state(), "environments": self._situation()}

    def _situation(self) -> dict[str, Any] | None:
        try:
            state = self.env.get_state()
        except NotRestorable as error:
            self.not_restorable = str(error)
            return None
        assert self.obs is not None
        return {"state": state, "obs": self.obs.copy(), "episodes": self.tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Take over what `state_dict` gave; whether the environments are where they were. If not, they want a `reset`.

        Raises:
            UserError: the environments' state is not of such as these.
        """
        self.generator.set_state(state["generator"])
        situation = state["environments"]
        if situation is None:
            return False
        try:
            self.env.set_state(situation["state"])
            self.obs = situation["obs"].copy()
            self.tracker.load_state_dict(situation["episodes"])
        except NotRestorable:
            return False
        except Exception as error:  # also of an environment of the user's, which may raise anything
            raise UserError(f"its environments' state does not fit the task's environments: {error}") from error
        return True

    def act(self, policy: Policy, *, deterministic: bool = False) -> Acted:
        """One chunk step in every environment."""
        obs, noise = self._look(policy)
        sample = sample_in_parts(policy, obs, noise, deterministic=deterministic, threads=self.threads)
        return Acted(obs, *self._execute(sample.action))

    def explore(self, policy: Policy, explorer: Explorer) -> Explored:
        """As `act`, with the policy's explorer."""
        obs, noise = self._look(policy)
        action, drawn = explorer.draw(obs, noise)
        return Explored(obs, *self._execute(action), drawn)

    def _look(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """What there is to see, and the noise to act with."""
        if self.obs is None:
            raise RuntimeError("reset the environments before acting")
        obs = torch.from_numpy(self.obs).to(self.generator.device)
        return obs, policy.draw_noise(len(self.obs), self.generator)

    def _execute(self, action: Tensor) -> tuple[Step, list[EpisodeResult], float]:
        """What came of it, as `Acted` holds it."""
        array = action.cpu().numpy()
        began = time.perf_counter()
        step = self.env.step(array)
        self.obs = step.obs
        return step, self.tracker.update(step), time.perf_counter() - began


def collect_rollout(
    actor: Actor,
    policy: Policy,
    steps: int,
    on_step: Callable[[int], None] = lambda env_steps: None,
    storage: Storage | None = None,
) -> Rollout:
    """Act for ``steps`` chunk steps with the exploring policy.

    Args:
        actor: goes on where it is.
        policy: on the device of the actor's generator.
        steps: T.
        on_step: hears how many environment steps each chunk step took.
        storage: memory of T steps, whose former content is overwritten; None: fresh memory.
    """
    storage = Storage.of(policy, steps, actor.env.num_envs) if storage is None else storage
    if len(storage.obs) != steps:
        raise ValueError(f"a rollout of {steps} steps does not fit a storage of {len(storage.obs)}")
    explorer = explorer_in_parts(policy, actor.env.num_envs, actor.threads)
    return _collect(actor, (actor.explore(policy, explorer) for _ in range(steps)), explorer, on_step, storage)


def collect_episodes(
    actor: Actor, policy: Policy, steps: int, on_step: Callable[[int], None], storage: Storage
) -> Rollout:
    """The episode of each environment until its end, or until ``steps`` chunk steps are over; the rest is not valid.

    Nor is an episode that was dropped: what it would have come to is not known. See `collect_rollout`; there are fewer
    steps where all of the episodes are shorter.
    """
    explorer = explorer_in_parts(policy, actor.env.num_envs, actor.threads)

    whole = np.ones(actor.env.num_envs, dtype=bool)

    def acts() -> Iterator[Explored]:
        running = np.ones(actor.env.num_envs, dtype=bool)
        for _ in range(steps):
            acted = actor.explore(policy, explorer)
            step = replace(acted.step, valid=acted.step.valid & running, dropped=acted.step.dropped & running)
            yield replace(acted, step=step, episodes=[each for each in acted.episodes if running[each.env]])
            np.logical_and(whole, ~step.dropped, out=whole)
            running = running & ~(step.terminated | step.truncated)
            if not running.any():
                return

    rollout = _collect(actor, acts(), explorer, on_step, storage)
    return replace(rollout, valid=rollout.valid & torch.from_numpy(whole).to(rollout.valid.device))


@single_thread()
def _collect(
    actor: Actor, acts: Iterable[Explored], explorer: Explorer, on_step: Callable[[int], None], storage: Storage
) -> Rollout:
    outcomes: list[Step] = []
    episodes: list[EpisodeResult] = []
    environment_s = 0.0
    restarts = actor.env.restarts
    waiting: list[Explored] = []
    with torch.inference_mode():
        for acted in acts:
            waiting.append(acted)
            outcomes.append(acted.step)
            episodes += acted.episodes
            environment_s += acted.environment_s
            on_step(int(np.add.reduce(acted.step.steps)))
            if len(waiting) == KEPT_STEPS:
                storage.write(len(outcomes) - len(waiting), waiting, explorer)
                waiting.clear()
        if waiting:
            storage.write(len(outcomes) - len(waiting), waiting, explorer)
    device = actor.generator.device

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(step, name) for step in outcomes])).to(device)

    truncated_obs = np.concatenate([step.final_obs[step.truncated] for step in outcomes])
    steps = stacked("steps")
    return Rollout(
        **{name: kept[: len(outcomes)] for name, kept in vars(storage).items()},
        step_rewards=stacked("step_rewards").float(),
        steps=steps,
        terminated=stacked("terminated"),
        truncated=stacked("truncated"),
        valid=stacked("valid"),
        last_obs=torch.from_numpy(outcomes[-1].obs).to(device),
        truncated_obs=torch.from_numpy(truncated_obs).to(device),
        episodes=episodes,
        env_steps=int(steps.sum()),
        environment_s=environment_s,
        dropped_episodes=sum(int(step.dropped.sum()) for step in outcomes),
        worker_restarts=actor.env.restarts - restarts,
    )
