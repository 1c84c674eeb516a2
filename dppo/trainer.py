"""One iteration of on-policy learning: rollout -> advantages -> update. All that changes during training lives here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dppo.anchors import Anchor, KLReward, anchor_state, load_anchor_state
from dppo.annealing import Annealing
from dppo.critic import LatentCritic, make_critic
from dppo.envs.stepper import Stepper
from dppo.envs.vector import make_vector_env
from dppo.estimators import AdvantageConfig, GAEConfig, Values, make_estimator
from dppo.output.metrics import Row
from dppo.randomness import load_shared_state, shared_state
from dppo.rollout import Actor, EpisodeResult, Rollout, Storage
from dppo.task import Task
from dppo.updates.batch import Batch
from dppo.updates.config import UpdateConfig
from dppo.updates.extra import ExtraLoss
from dppo.updates.first_order_config import FirstOrderConfig
from dppo.updates.rules import make_update_rule
from policies import DiffusionPolicy, Policy, UserError


@dataclass(frozen=True)
class TrainerConfig:
    """The size of an iteration and of the whole training."""

    env_steps: int = 1_000_000
    """Environment steps to train for."""
    num_envs: int = 40
    """N, environments side by side."""
    rollout_steps: int = 100
    """T, chunk steps per environment and iteration."""
    max_minutes: float | None = None
    """Stop after the iteration in which this much wall-clock time was reached; None: no limit."""
    seed: int = 0
    anneal: Annealing = field(default_factory=Annealing)

    def __post_init__(self) -> None:
        if min(self.env_steps, self.num_envs, self.rollout_steps) < 1:
            raise ValueError("env_steps, num_envs and rollout_steps must be at least 1")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes must be positive, or null for no limit, not {self.max_minutes}")


COUNTERS = ("first_steps", "iteration", "env_steps", "wall_clock_s")
"""Numbers that a `Trainer` counts, or remembers from its beginning."""


class Trainer:
    """A policy in training."""

    def __init__(
        self,
        policy: Policy,
        task: Task,
        config: TrainerConfig,
        algo: UpdateConfig,
        critic: Mapping[str, Any],
        advantage: AdvantageConfig | None = None,
        anchor: Anchor | None = None,
    ) -> None:
        """``critic`` is the critic as plain data, see `make_critic`; ``advantage`` is `GAEConfig` unless given.

        What ``anchor`` holds on to is the policy as it was when it was made.

        The policy is trained in place, on its device.

        Raises:
            UserError: settings that do not go together.
        """
        config.anneal.check(policy)
        self.policy = policy.train()
        self.first_steps = policy.num_steps
        """K when training began."""
        self.task = task
        self.config = config
        self.algo = algo
        device = next(policy.parameters()).device
        seeds = [int(seed) for seed in np.random.SeedSequence(config.seed).generate_state(5)]
        torch.manual_seed(seeds[0])  # of the critic's weights
        self.critic = make_critic(critic, policy)
        if self.critic is not None:
            self.critic = self.critic.to(device)
        if config.anneal.finetuned_steps is not None and (isinstance(self.critic, LatentCritic) or anchor is not None):
            raise UserError(
                "anneal.finetuned_steps makes other policies on the way; critic=latent and anchor=... do not follow"
            )
        self.anchor = anchor
        extras = [anchor] if isinstance(anchor, ExtraLoss) else []
        generator = torch.Generator(device).manual_seed(seeds[1])
        self.update_rule = make_update_rule(self._algo_for(policy), policy, self.critic, generator, extras)
        self.estimator = make_estimator(advantage or GAEConfig(), algo, policy, self.critic, config.num_envs, seeds[4])
        self.storage = Storage.of(policy, config.rollout_steps, config.num_envs)
        if self.storage.log_prob_factors.dim() == 3 and isinstance(algo, FirstOrderConfig):
            algo.check_that_factors_are_not_needed(policy.type)
        env = make_vector_env(
            task,
            config.num_envs,
            history=policy.config.history,
            chunk=policy.config.executed_chunk,
            threads=torch.get_num_threads(),
        )
        self.actor = Actor(
            Stepper(env), success_reward=task.success_reward, generator=torch.Generator(device).manual_seed(seeds[2])
        )
        self.actor.reset(seeds[3])
        self.iteration = 0
        self.env_steps = 0
        self.wall_clock_s = 0.0
        """Time spent in `iterate`."""

    @property
    def finished(self) -> bool:
        """Whether the budget of environment steps or of time is spent."""
        limit = self.config.max_minutes
        late = limit is not None and self.wall_clock_s >= 60 * limit
        return late or self.env_steps >= self.config.env_steps

    @property
    def progress(self) -> float:
        """Share of the environment steps that is done, in [0, 1]."""
        return min(self.env_steps / self.config.env_steps, 1.0)

    def iterate(self, on_step: Callable[[int], None] = lambda env_steps: None) -> Row:
        """One iteration; its row of metrics. ``on_step`` hears of environment steps as they happen."""
        began = time.perf_counter()
        self._anneal()
        steps = self.config.rollout_steps
        rollout = self.estimator.collect(self.actor, self.policy, steps, on_step, self.storage)
        if not rollout.valid.any():
            raise UserError(
                f"task {self.task.name}: all {rollout.dropped_episodes} episodes of this iteration were dropped, since "
                f"an observation or a reward was not finite or a process died; there is nothing to learn from"
            )
        collected = time.perf_counter()
        of_anchor: dict[str, float] = {}
        if isinstance(self.anchor, KLReward):
            rollout, of_anchor = self.anchor.adjusted(rollout)
        values = self.estimator.score(self.policy, rollout)
        scored = time.perf_counter()
        batch = self._batch(rollout, values)
        estimated = time.perf_counter()
        metrics = self.update_rule.update(batch, progress=self.progress, iteration=self.iteration)
        obs = rollout.obs[rollout.valid]
        self.policy.observe(obs[:, -1])
        now = time.perf_counter()
        self.iteration += 1
        self.env_steps += rollout.env_steps
        self.wall_clock_s += now - began
        return {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "wall_clock_s": self.wall_clock_s,
            "env_steps_per_s": rollout.env_steps / (now - began),
            **_episode_metrics(rollout.episodes),
            "dropped_episodes": rollout.dropped_episodes,
            "worker_restarts": rollout.worker_restarts,
            **metrics,
            **of_anchor,
            **self.config.anneal.now(self.policy),
            **self.policy.watched(obs),
            "environment_s": rollout.environment_s,
            "sampling_s": collected - began - rollout.environment_s,
            "scoring_s": scored - collected,
            "advantages_s": estimated - scored,
            "update_s": now - estimated,
        }

    def _anneal(self) -> None:
        """What changes with the progress of training. Fewer fine-tuned steps make another policy, trained on alike."""
        self.config.anneal.apply(self.policy, self.progress)
        steps = self.config.anneal.steps_at(self.progress, self.first_steps)
        if steps >= self.policy.num_steps:
            return
        assert isinstance(self.policy, DiffusionPolicy)
        learned, generator = self.update_rule.state_dict(), self.update_rule.generator
        self.policy = self.policy.with_fewer_finetuned_steps(steps)
        self.config.anneal.apply(self.policy, self.progress)
        self.update_rule = make_update_rule(self._algo_for(self.policy), self.policy, self.critic, generator)
        self.update_rule.load_state_dict(learned)
        self.storage = Storage.of(self.policy, self.config.rollout_steps, self.config.num_envs)

    def _algo_for(self, policy: Policy) -> UpdateConfig:
        """The rule's settings; of a policy whose inner steps become fewer, it learns from no more than there are."""
        algo = self.algo
        if self.config.anneal.finetuned_steps is None or not isinstance(algo, FirstOrderConfig) or not algo.inner_steps:
            return algo
        return replace(algo, inner_steps=min(algo.inner_steps, policy.num_steps))

    def _batch(self, rollout: Rollout, values: Values | None) -> Batch:
        estimate = self.estimator.estimate(rollout, values)
        whole = bool(rollout.valid.all())

        def rows(column: Tensor) -> Tensor:
            return column.flatten(0, 1) if whole else column[rollout.valid]

        return Batch(
            obs=rows(rollout.obs),
            chain=rows(rollout.chain),
            log_prob_factors=rows(rollout.log_prob_factors),
            advantages=rows(estimate.advantages).expand(-1, self.policy.num_steps),
            returns=None if estimate.returns is None else rows(estimate.returns),
            values=None if estimate.values is None else rows(estimate.values),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that training has learned beside the policy, as tensors and plain values."""
        return {
            "critic": {} if self.critic is None else self.critic.state_dict(),
            "anchor": anchor_state(self.anchor),
            "estimator": self.estimator.state_dict(),
            "update_rule": self.update_rule.state_dict(),
            "actor": self.actor.state_dict(),
            "randomness": shared_state(),
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Take over what `state_dict` gave, of a trainer of the same settings whose policy was as this one's is now.

        Returns:
            Whether training goes on as if it had never stopped. It does not where environments could not tell their
            state: those start new episodes, with seeds that follow from this trainer's and the iteration.

        Raises:
            UserError: the environments' state does not fit.
        """
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        load_anchor_state(self.anchor, state["anchor"])
        self.estimator.load_state_dict(state["estimator"])
        self.update_rule.load_state_dict(state["update_rule"])
        for name in COUNTERS:
            setattr(self, name, state[name])
        there = self.actor.load_state_dict(state["actor"])
        if not there:
            (seed,) = np.random.SeedSequence([self.config.seed, self.iteration]).generate_state(1)
            self.actor.reset(int(seed))
        load_shared_state(state["randomness"])
        return there or self.estimator.begins_episodes

    def close(self) -> None:
        """Close the environments."""
        self.actor.env.close()


def _episode_metrics(episodes: list[EpisodeResult]) -> dict[str, float | int | None]:
    """Means over the episodes that ended in a rollout; None where none did."""
    successes = [episode.success for episode in episodes if episode.success is not None]
    return {
        "episodes": len(episodes),
        "return_mean": float(np.mean([e.undiscounted_return for e in episodes])) if episodes else None,
        "episode_length": float(np.mean([e.length for e in episodes])) if episodes else None,
        "success_rate": float(np.mean(successes)) if successes else None,
    }
