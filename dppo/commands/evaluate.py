"""``dppo evaluate``: what a checkpoint is worth, with nothing to pass again by hand."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from dppo.building import check_spaces, with_sampler
from dppo.checkpoint import find_policy, load_policy
from dppo.envs.vector import space_dims
from dppo.evaluation import EvaluationConfig, evaluate_with_progress
from dppo.output.report import final_table
from dppo.output.run_directory import write_json
from dppo.output.video import record_video
from dppo.run_setup import open_run, prepare_device
from dppo.task import permitted
from policies import UserError
from policies.config import config_from_dict


def run(config: Mapping[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Evaluate as the composed configuration of ``configs/evaluate.yaml`` says; returns what ``summary.json`` holds."""
    device = prepare_device(config)
    source = find_policy(str(config["checkpoint"]))
    policy, task = load_policy(source, device)
    if task is None:
        raise UserError(f"{source} does not say which task it was trained for")
    task = permitted(task, str(source), [config["trust"]])
    if config.get("sampler") is not None:
        policy = with_sampler(policy, config["sampler"])
    check_spaces(policy, space_dims(task), str(source), task.name)
    settings = {name: config[name] for name in ("episodes", "num_envs", "seed")}
    evaluation = config_from_dict(EvaluationConfig, settings, "evaluate")
    directory = open_run(config, f"evaluate-{task.name}-{policy.type}", source)
    began = time.perf_counter()
    summary, episodes = evaluate_with_progress(policy, task, evaluation)
    seconds = time.perf_counter() - began
    paths = {"checkpoint": source, "results": directory.summary_path}
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
