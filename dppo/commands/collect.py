"""``dppo collect``: demonstrations made offline, by an expert trained here or by a scripted controller."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import closing
from typing import Any

import gymnasium
import numpy as np
import torch

from dppo.building import build_advantage, build_task, build_update_rule, demonstrable_spaces, scratch_policy
from dppo.checkpoint import save_checkpoint
from dppo.data import minari_store
from dppo.data.recording import Demonstrator, check_storable, record
from dppo.envs.maze import WaypointController
from dppo.envs.vector import make_plain_env
from dppo.output.evidence import evidence_kept
from dppo.output.metrics import MetricsLogger
from dppo.output.progress import Progress
from dppo.output.report import final_table
from dppo.output.run_directory import RunDirectory, write_json
from dppo.run_setup import build_sinks, open_run, prepare_device
from dppo.statistics import summarize
from dppo.stopping import Stop
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from policies import Policy, UserError
from policies.config import config_from_dict


class PolicyDemonstrator:
    """A policy, with its exploration noise, one environment step at a time."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy = policy
        self.generator = torch.Generator(next(policy.parameters()).device).manual_seed(seed)
        self.recent: list[np.ndarray] = []
        self.planned: list[np.ndarray] = []
        """Actions of the current chunk that are still to be executed."""

    def reset(self, obs: np.ndarray) -> None:
        """Begin an episode: its history is the first observation [Do], repeated."""
        self.recent = [obs] * self.policy.config.history
        self.planned = []

    def __call__(self, obs: np.ndarray) -> Any:
        """The next action for the observation [Do]."""
        self.recent = [*self.recent[1:], obs]
        if self.policy.discrete or not self.planned:
            seen = torch.from_numpy(np.stack(self.recent)).float()[None].to(self.generator.device)
            action = self.policy.sample(seen, generator=self.generator).action[0].cpu().numpy()
            if self.policy.discrete:
                return int(action)
            self.planned = list(action)
        return self.planned.pop(0)


def run(config: Mapping[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Collect as the composed configuration of ``configs/collect.yaml`` says; returns what ``summary.json`` holds."""
    task = build_task(config)
    dataset = config["dataset"] or task.dataset
    if not dataset:
        raise UserError(f"task {task.name} names no dataset to write; set dataset=me/{task.name}/mine-v0")
    if config["steps"] < 1:
        raise UserError(f"steps must be at least 1, not {config['steps']}")
    if minari_store.is_stored(dataset) and not config["overwrite"]:
        raise UserError(f"dataset {dataset} exists already; set another dataset=..., or overwrite=true to replace it")
    prepare_device(config)
    demonstrable_spaces(task)
    with closing(make_plain_env(task)) as env:
        check_storable(env)  # before an expert is trained for hours
        with open_run(config, f"collect-{task.name}-seed{config['seed']}") as directory:
            return _collect(config, task, dataset, directory, env)


def _collect(
    config: Mapping[str, Any], task: Task, dataset: str, directory: RunDirectory, env: gymnasium.Env
) -> dict[str, Any]:
    """Record the dataset, and tell what is in it; the summary."""
    began = time.perf_counter()
    demonstrator, algorithm, env_steps = _demonstrator(config, task, directory, env)
    stored = record(
        env,
        demonstrator,
        dataset,
        seed=int(config["seed"]),
        steps=int(config["steps"]),
        algorithm_name=algorithm,
        overwrite=bool(config["overwrite"]),
    )
    episodes = [np.asarray(episode.rewards) for episode in stored.iterate_episodes()]
    successes = None
    if task.success_reward is not None:
        successes = [bool((rewards >= task.success_reward).any()) for rewards in episodes]
    result = summarize([float(rewards.sum()) for rewards in episodes], successes)
    seconds = time.perf_counter() - began
    summary = {
        "task": task.name,
        "seed": config["seed"],
        "dataset": dataset,
        "demonstrator": algorithm,
        "training_env_steps": env_steps,
        "recorded_env_steps": sum(map(len, episodes)),
        "wall_clock_s": seconds,
        "demonstrations": result.as_dict(),
    }
    write_json(directory.summary_path, summary)
    final_table(
        {"demonstrations": result},
        env_steps=env_steps + summary["recorded_env_steps"],
        seconds=seconds,
        paths={"dataset": minari_store.dataset_path(dataset), "run": directory.path},
    )
    return summary


def _demonstrator(
    config: Mapping[str, Any], task: Task, directory: RunDirectory, env: gymnasium.Env
) -> tuple[Demonstrator, str, int]:
    """Who demonstrates, its name for the dataset, and the environment steps that its training took."""
    kind = config["demonstrator"]["type"]
    settings = config["demonstrator"].get(kind, {})
    if kind == "waypoint":
        return WaypointController(env, seed=int(config["seed"]), **settings), "WaypointController", 0
    if kind == "expert":
        policy, env_steps = _train_expert(config, task, directory, **settings)
        return PolicyDemonstrator(policy, int(config["seed"])), f"PPO, {policy.type} policy", env_steps
    raise UserError(f"unknown demonstrator.type {kind!r}; there are: expert, waypoint")


def _train_expert(
    config: Mapping[str, Any],
    task: Task,
    directory: RunDirectory,
    *,
    target_return: float,
    env_steps: int,
    num_envs: int,
    rollout_steps: int,
) -> tuple[Policy, int]:
    """PPO from scratch until an iteration's mean return reaches ``target_return``; the policy and its training's steps.

    Raises:
        UserError: the environment steps were spent before.
        Stopped: by a signal; what was trained is saved.
    """
    torch.manual_seed(config["seed"])
    policy = scratch_policy(config, task).to(prepare_device(config))
    algo = build_update_rule(config)
    settings = {"env_steps": env_steps, "num_envs": num_envs, "rollout_steps": rollout_steps, "seed": config["seed"]}
    size = config_from_dict(TrainerConfig, settings, "demonstrator.expert")
    trainer = Trainer(policy, task, size, algo, config["critic"], build_advantage(config))
    reached = -np.inf
    try:
        sinks = build_sinks(config, directory, "env_steps")
        logging, bar = MetricsLogger(directory, sinks), Progress(env_steps, "env_steps")
        with Stop() as stop, evidence_kept(directory), logging as logger, bar as progress:
            while not trainer.finished and reached < target_return and stop.asked is None:
                row = trainer.iterate(progress.advance)
                logger.log(row)
                progress.update(row)
                reached = -np.inf if row["return_mean"] is None else row["return_mean"]
        path = directory.checkpoints / str(trainer.env_steps)
        save_checkpoint(path, policy, task, trainer.state_dict())
    finally:
        trainer.close()
    stop.check(f"the expert is saved in {path} as it was, and nothing is recorded")
    if reached < target_return:
        raise UserError(
            f"the expert (saved in {path}) reached a return of {reached:.0f} in {trainer.env_steps:,} steps, not "
            f"demonstrator.expert.target_return={target_return}; lower it, or raise demonstrator.expert.env_steps"
        )
    return policy.eval(), trainer.env_steps
