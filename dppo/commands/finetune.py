"""``dppo finetune``: evaluate, train, evaluate again, and tell what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dppo.building import build_advantage, build_anchor, build_update_rule, policy_settings, starting_point
from dppo.checkpoint import save_checkpoint, source_of
from dppo.evaluation import EvaluationConfig, evaluate_with_progress, evaluation_settings
from dppo.output.evidence import evidence_kept
from dppo.output.metrics import MetricsLogger, read_metrics
from dppo.output.plots import learning_curve
from dppo.output.report import Progress, bar, final_table
from dppo.output.run_directory import RunDirectory, write_json
from dppo.output.video import record_video
from dppo.run_setup import build_sinks, open_run, prepare_device
from dppo.statistics import EvaluationSummary
from dppo.task import Task
from dppo.threads import threads_in_words
from dppo.trainer import Trainer, TrainerConfig
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
    evaluation, interval = evaluation_settings(config)
    torch.manual_seed(config["seed"])  # of the weights of a policy from scratch
    policy, task = starting_point(config, overridden)
    policy = policy.to(device)
    config = {**config, "task": dataclasses.asdict(task), **policy_settings(policy)}
    anchor = build_anchor(config, policy, task)
    trainer = Trainer(policy, task, trainer_config(config), algo, config["critic"], build_advantage(config), anchor)
    try:
        name = f"finetune-{task.name}-{policy.type}-{config['algo']['type']}-seed{config['seed']}"
        directory = open_run(config, name, source_of(config["checkpoint"]))
        print(_plan(config, trainer, device), flush=True)
        with evidence_kept(directory), MetricsLogger(directory, build_sinks(config, directory, "env_steps")) as logger:
            before, _ = evaluate_with_progress(policy, task, evaluation, "before")
            videos = _videos(config, directory, policy, task, "before")
            try:
                checkpoint = _train(trainer, directory, logger, evaluation, interval, config["checkpoint_interval"])
            finally:
                write_json(directory.summary_path, _summary(config, trainer, before, None))
            after, _ = evaluate_with_progress(trainer.policy, task, evaluation, "after")
        videos |= _videos(config, directory, trainer.policy, task, "after")
    finally:
        trainer.close()
    summary = _summary(config, trainer, before, after)
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
        seconds=trainer.wall_clock_s,
        paths={"learning curve": curve, **videos, "checkpoint": checkpoint},
    )
    return summary


def _plan(config: Mapping[str, Any], trainer: Trainer, device: torch.device) -> str:
    """What is about to be done, in a line."""
    size, policy = trainer.config, trainer.policy
    per_iteration = size.num_envs * size.rollout_steps * policy.config.executed_chunk
    compiled = ", compiled (the first iteration takes a while longer)" if trainer.algo.compile else ""
    steps = f"the last {policy.num_steps} steps of a " if policy.num_steps > 1 else "a "
    return (
        f"fine-tuning {steps}{policy.type} policy ({config['checkpoint']}) on {trainer.task.name}: {size.env_steps:,} "
        f"environment steps in iterations of {per_iteration:,} (kept in {trainer.storage.nbytes / 2**20:,.1f} MiB), "
        f"{size.num_envs} environments stepped {trainer.actor.env.stepped}, {device}, {threads_in_words()}, update in "
        f"{trainer.algo.precision}{compiled}"
    )


def _summary(
    config: Mapping[str, Any], trainer: Trainer, before: EvaluationSummary, after: EvaluationSummary | None
) -> dict[str, Any]:
    """What ``summary.json`` holds; ``after`` is None while the run goes on."""
    return {
        "task": trainer.task.name,
        "policy": trainer.policy.type,
        "algo": config["algo"]["type"],
        "seed": config["seed"],
        "env_steps": trainer.env_steps,
        "wall_clock_s": trainer.wall_clock_s,
        "env_steps_per_s": trainer.env_steps / trainer.wall_clock_s if trainer.wall_clock_s else None,
        "before": before.as_dict(),
        "after": None if after is None else after.as_dict(),
    }


def trainer_config(config: Mapping[str, Any]) -> TrainerConfig:
    """The trainer's part of a composed configuration."""
    names = ("env_steps", "num_envs", "rollout_steps", "max_minutes", "seed", "anneal")
    return config_from_dict(TrainerConfig, {name: config[name] for name in names}, "finetune")


def _train(
    trainer: Trainer,
    directory: RunDirectory,
    logger: MetricsLogger,
    evaluation: EvaluationConfig,
    evaluation_interval: int,
    checkpoint_interval: int,
) -> Path:
    """Iterate until the budget is spent; the path of the last checkpoint. What was learned is saved however it ends."""
    saved: dict[int, Path] = {}

    def save() -> None:
        if trainer.iteration not in saved:
            path = directory.checkpoints / str(trainer.env_steps)
            saved[trainer.iteration] = save_checkpoint(path, trainer.policy, trainer.task, trainer.state_dict())

    try:
        with Progress(trainer.config.env_steps, "env_steps") as progress:
            while not trainer.finished:
                row = trainer.iterate(progress.advance)
                if evaluation_interval and trainer.iteration % evaluation_interval == 0:
                    result, _ = evaluate_with_progress(trainer.policy, trainer.task, evaluation)
                    row = {**row, "eval_return_mean": result.return_mean, "eval_success_rate": result.success_rate}
                logger.log(row)
                progress.update(row)
                if checkpoint_interval and trainer.iteration % checkpoint_interval == 0:
                    save()
    except BaseException:
        if trainer.iteration:
            save()
            print(f"stopped; what was learned until then is in {saved[trainer.iteration]}", flush=True)
        raise
    save()
    return saved[trainer.iteration]


def _videos(
    config: Mapping[str, Any], directory: RunDirectory, policy: Policy, task: Task, name: str
) -> dict[str, Path]:
    if not config["video"]:
        return {}
    seed = int(config["evaluation"]["seed"])
    with bar(f"recording a video ({name})", 1):
        path = record_video(policy, task, directory.videos / f"{name}.mp4", seed=seed, caption=f"{task.name}, {name}")
    return {} if path is None else {f"video {name}": path}
