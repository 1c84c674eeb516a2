"""``dppo pretrain``: behaviour cloning of demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dppo.building import build_policy, build_task, load_demonstrations, policy_settings, whole_chain
from dppo.checkpoint import save_checkpoint
from dppo.cloning import Cloner, CloningConfig
from dppo.data.demos import WindowDataset, bounds, split_by_episode
from dppo.envs.vector import space_dims
from dppo.evaluation import EvaluationConfig, evaluate_with_progress, evaluation_settings
from dppo.output.evidence import evidence_kept
from dppo.output.metrics import MetricsLogger, read_metrics
from dppo.output.plots import pretraining_curve
from dppo.output.report import Progress, final_table
from dppo.output.run_directory import RunDirectory, write_json
from dppo.output.video import record_video
from dppo.run_setup import build_sinks, open_run, prepare_device
from dppo.task import Task
from dppo.threads import threads_in_words
from policies import Policy, UserError
from policies.config import config_from_dict


def run(config: Mapping[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Clone as the composed configuration of ``configs/pretrain.yaml`` says; returns what ``summary.json`` holds."""
    device = prepare_device(config)
    task = build_task(config)
    evaluation, interval = evaluation_settings(config)
    names = [field.name for field in dataclasses.fields(CloningConfig)]
    settings = config_from_dict(CloningConfig, {name: config[name] for name in names}, "pretrain")
    log_interval = config["log_interval"]
    if log_interval < 1:
        raise UserError(f"log_interval must be at least 1, not {log_interval}")
    if "policy.finetuned_steps" in overridden:
        raise UserError("policy.finetuned_steps is chosen when fine-tuning; pretraining trains the whole chain")
    torch.manual_seed(config["seed"])
    policy, train, validation = _prepare(config, task)
    cloner = Cloner(policy.to(device), train.to(device), validation, settings, seed=int(config["seed"]))
    config = {**config, **policy_settings(policy)}
    directory = open_run(config, f"pretrain-{task.name}-{policy.type}-seed{config['seed']}")
    print(_plan(cloner, task, str(config["dataset"] or task.dataset), device), flush=True)
    with evidence_kept(directory), MetricsLogger(directory, build_sinks(config, directory, "updates")) as logger:
        checkpoint = _train(cloner, task, directory, logger, evaluation, interval, log_interval)
    result, _ = evaluate_with_progress(cloner.averaged, task, evaluation)
    summary = {
        "task": task.name,
        "policy": policy.type,
        "seed": config["seed"],
        "dataset": config["dataset"] or task.dataset,
        "updates": cloner.updates,
        "wall_clock_s": cloner.wall_clock_s,
        "evaluation": result.as_dict(),
    }
    write_json(directory.summary_path, summary)
    title = f"{task.name}: {policy.type} policy, behaviour cloning"
    curve = pretraining_curve(read_metrics(directory.metrics_path), directory.plots / "learning_curve.png", title=title)
    paths = {"learning curve": curve}
    if config["video"]:
        seed = int(config["evaluation"]["seed"])
        video = record_video(cloner.averaged, task, directory.videos / "pretrained.mp4", seed=seed)
        paths |= {} if video is None else {"video": video}
    paths["checkpoint"] = checkpoint
    final_table({"pretrained": result}, updates=cloner.updates, seconds=cloner.wall_clock_s, paths=paths)
    return summary


def _plan(cloner: Cloner, task: Task, dataset: str, device: torch.device) -> str:
    """What is about to be done, in a line."""
    data = f"{len(cloner.train):,} windows of {dataset} ({cloner.train.nbytes / 2**20:,.1f} MiB on {device})"
    updates = f"{cloner.config.updates:,} updates of {cloner.batch_size} windows"
    how = f"{threads_in_words()}, in {cloner.config.precision}"
    return f"cloning {data} into a {cloner.policy.type} policy for {task.name}: {updates}, {how}"


def _train(
    cloner: Cloner,
    task: Task,
    directory: RunDirectory,
    logger: MetricsLogger,
    evaluation: EvaluationConfig,
    evaluation_interval: int,
    log_interval: int,
) -> Path:
    """Clone until the updates are done; the path of the checkpoint. What was learned is saved however it ends."""
    rows = 0
    try:
        with Progress(cloner.config.updates, "updates") as progress:
            while cloner.updates < cloner.config.updates:
                row = cloner.run(log_interval, progress.advance)
                rows += 1
                if evaluation_interval and rows % evaluation_interval == 0 and cloner.updates < cloner.config.updates:
                    result, _ = evaluate_with_progress(cloner.averaged, task, evaluation)
                    row = {**row, "return_mean": result.return_mean, "success_rate": result.success_rate}
                logger.log(row)
                progress.update(row)
    finally:
        path = directory.checkpoints / str(cloner.updates)
        if cloner.updates and all(parameter.isfinite().all() for parameter in cloner.averaged.parameters()):
            save_checkpoint(path, cloner.averaged, task, cloner.state_dict())
    return path


def _prepare(config: Mapping[str, Any], task: Task) -> tuple[Policy, WindowDataset, WindowDataset | None]:
    """The untrained policy, scaled by the demonstrations, and their training and validation windows."""
    episodes = load_demonstrations(task, config["dataset"])
    policy = build_policy(config, space_dims(task), **whole_chain(config))
    train, validation = split_by_episode(episodes, config["validation_fraction"], config["seed"])
    limits = bounds(train)
    policy.fit_observations(limits.obs_min, limits.obs_max)
    policy.fit_actions(limits.action_min, limits.action_max)
    shape = policy.config.history, policy.config.chunk, policy.config.first_executed
    windows = WindowDataset(train, *shape)
    policy.observe(windows.observation)
    return policy, windows, WindowDataset(validation, *shape) if validation else None
