"""``dppo pretrain``: behaviour cloning of demonstrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dppo.building import build_policy, build_task, load_demonstrations, policy_settings, whole_chain
from dppo.checkpoint import save_checkpoint
from dppo.cloning import Cloner, CloningConfig
from dppo.data.demos import WindowDataset, bounds, split_by_episode
from dppo.envs.vector import space_dims
from dppo.evaluation import evaluate_with_progress, evaluation_settings
from dppo.output.evidence import evidence_kept
from dppo.output.metrics import MetricsLogger, read_metrics
from dppo.output.plots import pretraining_curve
from dppo.output.progress import Progress
from dppo.output.report import final_table
from dppo.output.run_directory import RunDirectory, write_json
from dppo.output.video import record_video
from dppo.randomness import seed_shared
from dppo.resuming import Notes, finished_line, go_on, restore, resumed_run
from dppo.run_setup import begin_run, build_sinks, open_run, prepare_device
from dppo.saving import CheckpointConfig, Checkpoints, checkpoint_settings
from dppo.statistics import EvaluationSummary
from dppo.stopping import Stop
from dppo.task import Task, trust_of
from dppo.threads import threads_in_words
from policies import Policy, UserError
from policies.config import config_from_dict

FREE = ("order", "prepared")
"""Entries of a cloner's state whose form depends on where it is."""


def run(config: Mapping[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Clone as the composed configuration of ``configs/pretrain.yaml`` says; returns what ``summary.json`` holds.

    Raises:
        Stopped: by a signal; all is saved.
    """
    if "policy.finetuned_steps" in overridden:
        raise UserError("policy.finetuned_steps is chosen when fine-tuning; pretraining trains the whole chain")
    with ExitStack() as held:
        resumed = resumed_run("pretrain", config, overridden, held)
        config = config if resumed is None else resumed.config
        device = prepare_device(config)
        task = build_task(config)
        evaluation_settings(config)  # so that nothing is loaded for wrong ones
        settings = checkpoint_settings(config, "pretrain")
        if config["log_interval"] < 1:
            raise UserError(f"log_interval must be at least 1, not {config['log_interval']}")
        cloner = _build(config, task, device)
        if resumed is not None and resumed.checkpoint is not None:
            _, notes = restore(resumed.checkpoint, cloner, device, FREE)
            last = resumed.last_evaluation("evaluation", "updates", cloner.updates)
            if cloner.finished and last is not None:
                print(finished_line(resumed.directory, "updates", cloner.updates), flush=True)
                return resumed.directory.read_summary() or {}
            go_on(resumed, config, "updates", cloner.updates)
            cloning = Cloning(config, cloner, task, resumed.directory, settings)
            cloning.checkpoints.go_on(resumed.checkpoint, notes.best, last)
        else:
            config = {**config, **policy_settings(cloner.policy)}
            name = f"pretrain-{task.name}-{cloner.policy.type}-seed{config['seed']}"
            if resumed is None:
                directory = held.enter_context(open_run(config, name))
            else:
                directory = begin_run(resumed.directory.path, config)
            cloning = Cloning(config, cloner, task, directory, settings)
        print(_plan(cloner, task, str(config["dataset"] or task.dataset), device), flush=True)
        with cloning.checkpoints.told_on_failure():
            return cloning.run()


def _build(config: Mapping[str, Any], task: Task, device: torch.device) -> Cloner:
    """The cloner of a configuration, at its beginning."""
    names = [field.name for field in dataclasses.fields(CloningConfig)]
    settings = config_from_dict(CloningConfig, {name: config[name] for name in names}, "pretrain")
    seed_shared(config["seed"])
    policy, train, validation = _prepare(config, task)
    return Cloner(policy.to(device), train.to(device), validation, settings, seed=int(config["seed"]))


class Cloning:
    """A run between its beginning, or the checkpoint that it goes on from, and its end."""

    def __init__(
        self,
        config: Mapping[str, Any],
        cloner: Cloner,
        task: Task,
        directory: RunDirectory,
        settings: CheckpointConfig,
    ) -> None:
        self.config = config
        self.cloner = cloner
        self.task = task
        self.directory = directory
        self.evaluation, self.evaluation_interval = evaluation_settings(config)
        self.command = f"dppo pretrain resume={directory.path}{trust_of(task)}"
        """That goes on with it."""
        self.checkpoints = Checkpoints(directory.checkpoints, settings, self._save, go_on=self.command)

    def run(self) -> dict[str, Any]:
        """Clone and evaluate; the summary.

        Raises:
            Stopped: by a signal, between two rows of metrics.
        """
        sinks = build_sinks(self.config, self.directory, "updates", self.cloner.updates or None)
        with Stop() as stop, evidence_kept(self.directory), MetricsLogger(self.directory, sinks) as logger:
            self._train(logger, stop)
            stop.check(f"all is saved, and `{self.command}` goes on")
            result = self._evaluate()
            videos = {} if stop.asked else self._video()
        self.checkpoints.judge(self.cloner.updates, result)
        summary = {
            "task": self.task.name,
            "policy": self.cloner.policy.type,
            "seed": self.config["seed"],
            "dataset": self.config["dataset"] or self.task.dataset,
            "updates": self.cloner.updates,
            "wall_clock_s": self.cloner.wall_clock_s,
            "evaluation": result.as_dict(),
            "best_checkpoint": self.checkpoints.best_as_dict(),
        }
        write_json(self.directory.summary_path, summary)
        self._tell(result, videos)
        return summary

    def _train(self, logger: MetricsLogger, stop: Stop) -> None:
        """Clone until the updates are done or a signal comes, and save."""
        cloner, log_interval, interval = self.cloner, self.config["log_interval"], self.evaluation_interval
        with Progress(cloner.config.updates, "updates", done=cloner.updates) as progress:
            while not cloner.finished and stop.asked is None:
                row = cloner.run(log_interval, progress.advance)
                rows = -(-cloner.updates // log_interval)
                result = None
                if interval and rows % interval == 0 and not cloner.finished:
                    result = self._evaluate()
                    row = {**row, "return_mean": result.return_mean, "success_rate": result.success_rate}
                logger.log(row)
                progress.update(row)
                self.checkpoints.after(rows, cloner.updates, result)
        self.checkpoints.save(cloner.updates)

    def _evaluate(self) -> EvaluationSummary:
        return evaluate_with_progress(self.cloner.averaged, self.task, self.evaluation)[0]

    def _save(self, path: Path) -> None:
        notes = dataclasses.asdict(Notes(self.cloner.device.type, self.checkpoints.best))
        save_checkpoint(path, self.cloner.averaged, self.task, {**self.cloner.state_dict(), "notes": notes})

    def _video(self) -> dict[str, Path]:
        if not self.config["video"]:
            return {}
        seed, path = int(self.config["evaluation"]["seed"]), self.directory.videos / "pretrained.mp4"
        found = record_video(self.cloner.averaged, self.task, path, seed=seed)
        return {} if found is None else {"video": found}

    def _tell(self, result: EvaluationSummary, videos: Mapping[str, Path]) -> None:
        """Draw the learning curve, and print how the run ended."""
        cloner, directory = self.cloner, self.directory
        title = f"{self.task.name}: {cloner.policy.type} policy, behaviour cloning"
        rows = read_metrics(directory.metrics_path)
        curve = pretraining_curve(rows, directory.plots / "learning_curve.png", title=title)
        paths = {"learning curve": curve, **videos, "checkpoint": directory.checkpoints / str(cloner.updates)}
        final_table({"pretrained": result}, updates=cloner.updates, seconds=cloner.wall_clock_s, paths=paths)


def _plan(cloner: Cloner, task: Task, dataset: str, device: torch.device) -> str:
    """What is about to be done, in a line."""
    data = f"{len(cloner.train):,} windows of {dataset} ({cloner.train.nbytes / 2**20:,.1f} MiB on {device})"
    updates = f"{cloner.config.updates:,} updates of {cloner.batch_size} windows"
    how = f"{threads_in_words()}, in {cloner.config.precision}"
    return f"cloning {data} into a {cloner.policy.type} policy for {task.name}: {updates}, {how}"


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
