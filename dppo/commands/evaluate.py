"""``dppo evaluate``: what a checkpoint is worth, with nothing to pass again by hand."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dppo.building import task_for, with_sampler
from dppo.checkpoint import find_policy, load_policy
from dppo.evaluation import EvaluationConfig, evaluate_with_progress
from dppo.fitting import fitted
from dppo.output.report import final_table
from dppo.output.run_directory import RunDirectory, write_json
from dppo.output.video import record_video
from dppo.run_setup import open_run, prepare_device
from dppo.sources import Foreign
from dppo.task import Task
from policies import DiffusionPolicy, Policy
from policies.config import config_from_dict


def run(config: Mapping[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Evaluate as the composed configuration of ``configs/evaluate.yaml`` says; returns what ``summary.json`` holds."""
    device = prepare_device(config)
    foreign = Foreign.of(config)
    source = find_policy(str(config["checkpoint"]))
    policy, task = load_policy(source, device, foreign)
    task = task_for(config, str(config["checkpoint"]), task, named=config.get("task") is not None)
    policy = fitted(policy, task, str(source), foreign.map)
    if config.get("sampler") is not None:
        policy = with_sampler(policy, config["sampler"])
    settings = {name: config[name] for name in ("episodes", "num_envs", "seed")}
    evaluation = config_from_dict(EvaluationConfig, settings, "evaluate")
    with open_run(config, f"evaluate-{task.name}-{policy.type}", source) as directory:
        return _evaluate(config, policy, task, evaluation, source, directory)


def _evaluate(
    config: Mapping[str, Any],
    policy: Policy,
    task: Task,
    evaluation: EvaluationConfig,
    source: Path,
    directory: RunDirectory,
) -> dict[str, Any]:
    """Evaluate, and tell what came of it; the summary."""
    print(_plan(config, policy, task, evaluation), flush=True)
    began = time.perf_counter()
    summary, episodes = evaluate_with_progress(policy, task, evaluation)
    seconds = time.perf_counter() - began
    paths = {"checkpoint": source, "results": directory.summary_path}
    if config["save_policy"]:
        policy.metadata |= {"task": dataclasses.asdict(task), "evaluation": summary.as_dict()}
        policy.save_pretrained(directory.path / "policy")
        paths |= {"policy": directory.path / "policy"}
    if config["video"]:
        video = record_video(policy, task, directory.videos / "evaluation.mp4", seed=evaluation.seed)
        paths |= {} if video is None else {"video": video}
    content = {
        "task": task.name,
        "policy": policy.type,
        "checkpoint": str(source),
        "evaluation": summary.as_dict(),
        "episodes": episodes,
    }
    write_json(directory.summary_path, content)
    env_steps = sum(episode.length for episode in episodes)
    final_table({task.name: summary}, env_steps=env_steps, seconds=seconds, paths=paths)
    return content


def _plan(config: Mapping[str, Any], policy: Policy, task: Task, evaluation: EvaluationConfig) -> str:
    """What is about to be done, in a line."""
    chain = ""
    if isinstance(policy, DiffusionPolicy):
        steps, eta = len(policy.timesteps), policy.config.sampler.evaluation_eta
        chain = f", {steps} of {policy.config.denoising_steps} denoising steps with eta = {eta:g}"
    episodes = evaluation.episodes_each * evaluation.environments
    return (
        f"evaluating a {policy.type} policy ({config['checkpoint']}) on {task.name}: {episodes} episodes in "
        f"{evaluation.environments} environments{chain}"
    )
