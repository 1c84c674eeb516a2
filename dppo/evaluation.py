"""Evaluation: the same function, seeds and policy wherever a policy is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dppo.envs.stepper import Stepper
from dppo.envs.vector import make_vector_env
from dppo.output.progress import bar
from dppo.rollout import Actor, EpisodeResult
from dppo.statistics import EvaluationSummary, summarize
from dppo.task import Task
from dppo.threads import single_thread
from policies import Policy, UserError
from policies.config import config_from_dict

log = logging.getLogger(__name__)

LONGEST_EPISODE = 100_000
"""Environment steps after which an episode without an end is given up."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How a policy is evaluated."""

    episodes: int = 50
    """How many episodes; rounded up to a multiple of ``num_envs``."""
    num_envs: int = 10
    """Environments side by side. Each contributes equally many episodes, so short ones are not over-represented."""
    seed: int = 100_000
    """Of the environments and of the policy's noise."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.num_envs < 1:
            raise ValueError("evaluation needs at least one episode and one environment")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, but is {self.seed}")

    @property
    def environments(self) -> int:
        """Side by side: no more than episodes."""
        return min(self.num_envs, self.episodes)

    @property
    def episodes_each(self) -> int:
        """Of every environment."""
        return -(-self.episodes // self.environments)


def evaluation_settings(config: Mapping[str, Any]) -> tuple[EvaluationConfig, int]:
    """The ``evaluation`` block of a configuration: how to evaluate, and how often.

    Raises:
        UserError: an unknown or impossible setting.
    """
    settings = dict(config["evaluation"])
    interval = settings.pop("interval")
    if interval < 0:
        raise UserError(f"evaluation.interval must not be negative, but is {interval}")
    return config_from_dict(EvaluationConfig, settings, "evaluation"), interval


def evaluate(
    policy: Policy,
    task: Task,
    config: EvaluationConfig,
    on_episode: Callable[[EpisodeResult], None] = lambda episode: None,
) -> tuple[EvaluationSummary, list[EpisodeResult]]:
    """Run the deterministic policy; its summary and the episodes, in order of environment, then time.

    An episode that had to be dropped (see `dppo.envs.stepper.Step.dropped`) is neither a failure nor a success, since
    what it would have come to is not known: another one takes its place, and the summary says how many there were.

    Raises:
        UserError: an episode goes on forever, or more episodes were dropped than are wanted.
    """
    num_envs, quota = config.environments, config.episodes_each
    device = next(policy.parameters()).device
    history, chunk = policy.config.history, policy.config.executed_chunk
    env = make_vector_env(task, num_envs, history=history, chunk=chunk, threads=torch.get_num_threads())
    actor = Actor(
        Stepper(env),
        success_reward=task.success_reward,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    episodes: list[list[EpisodeResult]] = [[] for _ in range(num_envs)]
    dropped = 0
    with closing(actor.env), single_thread():
        actor.reset(config.seed)
        while any(len(of_env) < quota for of_env in episodes):
            if actor.tracker.lengths.max() > LONGEST_EPISODE:
                raise UserError(
                    f"task {task.name}: an episode has gone on for more than {LONGEST_EPISODE:,} steps; set "
                    f"task.max_episode_steps"
                )
            acted = actor.act(policy, deterministic=True)
            dropped += sum(len(episodes[env]) < quota for env in np.flatnonzero(acted.step.dropped))
            if dropped > num_envs * quota:
                raise UserError(
                    f"task {task.name}: {dropped} episodes were dropped, since an observation or a reward was not "
                    f"finite or a process died; that is more than are to be evaluated"
                )
            for episode in acted.episodes:
                if len(episodes[episode.env]) < quota:
                    episodes[episode.env].append(episode)
                    on_episode(episode)
    ordered = [episode for of_env in episodes for episode in of_env]
    successes = None if task.success_reward is None else np.array([episode.success for episode in ordered])
    if dropped:
        log.warning("task %s: %d further episodes were dropped, and replaced by others", task.name, dropped)
    return summarize(np.array([episode.undiscounted_return for episode in ordered]), successes, dropped), ordered


def evaluate_with_progress(
    policy: Policy, task: Task, config: EvaluationConfig, name: str | None = None
) -> tuple[EvaluationSummary, list[EpisodeResult]]:
    """`evaluate`, with a progress bar named after what is evaluated."""
    with bar(f"evaluating{f' ({name})' if name else ''}", config.episodes) as advance:
        return evaluate(policy, task, config, lambda episode: advance(1))
