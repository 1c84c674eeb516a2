"""Acting in vectorised environments and keeping what an update needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dppo.envs.stepper import Step, Stepper
from dppo.threads import single_thread
from policies import Policy, Sample


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
        """Take in one chunk step; the episodes that it ended."""
        self.returns += step.step_rewards.sum(1)
        self.lengths += step.steps
        if self.success_reward is not None:
            executed = np.arange(step.step_rewards.shape[1]) < step.steps[:, None]  # [N, Ta]
            self.successes |= (executed & (step.step_rewards >= self.success_reward)).any(1)
        finished = []
        for i in np.flatnonzero(step.terminated | step.truncated):
            success = None if self.success_reward is None else bool(self.successes[i])
            finished.append(EpisodeResult(int(i), float(self.returns[i]), int(self.lengths[i]), success))
            self.returns[i], self.lengths[i], self.successes[i] = 0.0, 0, False
        return finished


@dataclass(frozen=True)
class Rollout:
    """T chunk steps of N environments."""

    obs: Tensor
    """[T, N, To, Do]"""
    chain: Tensor
    """[T, N, K+1, *latent]"""
    log_prob_factors: Tensor
    """[T, N, K, *F], scored while sampling."""
    rewards: Tensor
    """[T, N], summed over the executed steps of each chunk."""
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


@dataclass(frozen=True)
class Acted:
    """One chunk step of N environments."""

    obs: Tensor
    """[N, To, Do], what the policy saw."""
    sample: Sample
    step: Step
    episodes: list[EpisodeResult]
    """Those that it ended."""
    environment_s: float
    """Wall-clock that the environments took."""


class Actor:
    """A policy in front of vectorised environments; keeps the observation between calls."""

    def __init__(self, env: Stepper, *, success_reward: float | None, generator: torch.Generator) -> None:
        self.env = env
        self.generator = generator
        self.tracker = EpisodeTracker(env.num_envs, success_reward)
        self.obs: np.ndarray | None = None

    def reset(self, seed: int) -> None:
        """Start new episodes everywhere."""
        self.obs = self.env.reset(seed)
        self.tracker = EpisodeTracker(self.env.num_envs, self.tracker.success_reward)

    def act(self, policy: Policy, *, deterministic: bool = False) -> Acted:
        """One chunk step in every environment."""
        if self.obs is None:
            raise RuntimeError("reset the environments before acting")
        obs = torch.from_numpy(self.obs).to(self.generator.device)
        sample = policy.sample(obs, deterministic=deterministic, generator=self.generator)
        action = sample.action.cpu().numpy()
        sampled = time.perf_counter()
        step = self.env.step(action)
        self.obs = step.obs
        return Acted(obs, sample, step, self.tracker.update(step), time.perf_counter() - sampled)


@single_thread()
def collect_rollout(
    actor: Actor, policy: Policy, steps: int, on_step: Callable[[int], None] = lambda env_steps: None
) -> Rollout:
    """``steps`` chunk steps of the exploring policy; ``on_step`` hears how many environment steps each one took."""
    acted: list[Acted] = []
    for _ in range(steps):
        acted.append(actor.act(policy))
        on_step(int(acted[-1].step.steps.sum()))
    outcomes, samples = [one.step for one in acted], [one.sample for one in acted]
    device = actor.generator.device

    def stacked(name: str) -> np.ndarray:
        return np.stack([getattr(step, name) for step in outcomes])

    truncated_obs = np.concatenate([step.final_obs[step.truncated] for step in outcomes])
    return Rollout(
        obs=torch.stack([one.obs for one in acted]),
        chain=torch.stack([sample.chain for sample in samples]),
        log_prob_factors=torch.stack([sample.log_prob_factors for sample in samples]),
        rewards=torch.from_numpy(stacked("step_rewards").sum(2)).float().to(device),
        terminated=torch.from_numpy(stacked("terminated")).to(device),
        truncated=torch.from_numpy(stacked("truncated")).to(device),
        valid=torch.from_numpy(stacked("valid")).to(device),
        last_obs=torch.from_numpy(outcomes[-1].obs).to(device),
        truncated_obs=torch.from_numpy(truncated_obs).to(device),
        episodes=[episode for one in acted for episode in one.episodes],
        env_steps=int(stacked("steps").sum()),
        environment_s=sum(one.environment_s for one in acted),
    )
