"""``dppo finetune``: evaluate, train, evaluate again, and tell what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dppo.building import build_update_rule, starting_point
from dppo.checkpoint import save_checkpoint
from dppo.evaluation import EvaluationConfig, evaluate_with_progress
from dppo.metrics import MetricsLogger, read_metrics
from dppo.plots import learning_curve
from dppo.report import Progress, final_table
from dppo.run_directory import RunDirectory, write_json
from dppo.run_setup import build_sinks, open_run, prepare_device
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.video import record_video
from policies import Policy
from policies.config import config_from_dict


def run(config: Mapping[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Fine-tune as the composed configuration says; returns what ``summary.json`` holds.

    Args:
        config: of ``configs/finetune.yaml``.
        overridden: keys and groups that the user set explicitly.
    """
    device = prepare_device(config)
    algo = build_update_rule(config)
    evaluation = dict(config["evaluation"])
    interval = int(evaluation.pop("interval"))
    evaluation = config_from_dict(EvaluationConfig, evaluation, "evaluation")
    torch.manual_seed(config["seed"])  # of the weights of a policy from scratch
    policy, task = starting_point(config, overridden)
    policy = policy.to(device)
    config = {**config, "task": dataclasses.asdict(task)}
    trainer = Trainer(policy, task, trainer_config(config), algo, config["critic"])
    try:
        directory = open_run(
            config, f"finetune-{task.name}-{policy.type}-{config['algo']['type']}-seed{config['seed']}"
        )
        sinks = build_sinks(config, directory, "env_steps")
        with MetricsLogger(directory, sinks) as logger:
            before = evaluate_with_progress(policy, task, evaluation, "before")
            videos = _videos(config, directory, policy, task, "before")
            checkpoint = _train(trainer, directory, logger, evaluation, interval, int(config["checkpoint_interval"]))
            wall_clock_s = trainer.wall_clock_s
            after = evaluate_with_progress(policy, task, evaluation, "after")
        videos |= _videos(config, directory, policy, task, "after")
    finally:
        trainer.close()
    summary = {
        "task": task.name,
        "policy": policy.type,
        "algo": config["algo"]["type"],
        "seed": config["seed"],
        "env_steps": trainer.env_steps,
        "wall_clock_s": wall_clock_s,
        "env_steps_per_s": trainer.env_steps / wall_clock_s,
        "before": before.as_dict(),
        "after": after.as_dict(),
    }
    write_json(directory.summary_path, summary)
    curve = learning_curve(
        read_metrics(directory.metrics_path),
        directory.plots / "learning_curve.png",
        title=f"{task.name}: {policy.type} policy, {config['algo']['type'].upper()}",
        before=before,
        after=after,
    )
    final_table(
        {"before": before, "after": after},
        env_steps=trainer.env_steps,
        seconds=wall_clock_s,
        paths={"learning curve": curve, **videos, "checkpoint": checkpoint},
    )
    return summary


def trainer_config(config: Mapping[str, Any]) -> TrainerConfig:
    """The trainer's part of a composed configuration."""
    names = ("env_steps", "num_envs", "rollout_steps", "max_minutes", "seed")
    return config_from_dict(TrainerConfig, {name: config[name] for name in names}, "finetune")


def _train(
    trainer: Trainer,
    directory: RunDirectory,
    logger: MetricsLogger,
    evaluation: EvaluationConfig,
    evaluation_interval: int,
    checkpoint_interval: int,
) -> Path:
    """Iterate until the budget is spent; the path of the last checkpoint."""

    def save() -> Path:
        path = directory.checkpoints / str(trainer.env_steps)
        return save_checkpoint(path, trainer.policy, trainer.task, trainer.state_dict())

    saved_at = -1
    checkpoint = directory.checkpoints
    with Progress(trainer.config.env_steps, "env_steps") as progress:
        while not trainer.finished:
            row = trainer.iterate(progress.advance)
            if evaluation_interval and trainer.iteration % evaluation_interval == 0:
                summary = evaluate_with_progress(trainer.policy, trainer.task, evaluation, None)
                row = {**row, "eval_return_mean": summary.return_mean, "eval_success_rate": summary.success_rate}
            logger.log(row)
            progress.update(row)
            if checkpoint_interval and trainer.iteration % checkpoint_interval == 0:
                checkpoint, saved_at = save(), trainer.iteration
        if saved_at != trainer.iteration:
            checkpoint = save()
    return checkpoint


def _videos(
    config: Mapping[str, Any], directory: RunDirectory, policy: Policy, task: Task, name: str
) -> dict[str, Path]:
    if not config["video"]:
        return {}
    seed = int(config["evaluation"]["seed"])
    path = record_video(policy, task, directory.videos / f"{name}.mp4", seed=seed, caption=f"{task.name}, {name}")
    return {} if path is None else {f"video {name}": path}
