"""``dppo finetune``: evaluate, train, evaluate again, and tell what came of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dppo.building import (
    build_advantage,
    build_anchor,
    build_task,
    build_update_rule,
    policy_settings,
    starting_point,
)
from dppo.checkpoint import POLICY, load_policy, save_checkpoint, source_of
from dppo.evaluation import evaluate_with_progress, evaluation_settings
from dppo.output.evidence import evidence_kept
from dppo.output.metrics import MetricsLogger, read_metrics
from dppo.output.plots import learning_curve
from dppo.output.progress import Progress, bar
from dppo.output.report import final_table
from dppo.output.run_directory import RunDirectory, write_json
from dppo.output.video import record_video
from dppo.randomness import seed_shared
from dppo.resuming import NOT_EXACTLY, Notes, finished_line, go_on, restore, resumed_run
from dppo.run_setup import begin_run, build_sinks, open_run, prepare_device
from dppo.saving import CheckpointConfig, Checkpoints, checkpoint_settings
from dppo.statistics import EvaluationSummary
from dppo.stopping import Stop
from dppo.task import trust_of
from dppo.threads import threads_in_words
from dppo.trainer import Trainer, TrainerConfig
from policies.config import config_from_dict

log = logging.getLogger(__name__)

FREE = ("actor/environments",)
"""Entries of a trainer's state whose form depends on where it is."""


def run(config: Mapping[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Fine-tune as the composed configuration says; returns what ``summary.json`` holds.

    Args:
        config: of ``configs/finetune.yaml``.
        overridden: keys and groups that the user set explicitly.

    Raises:
        Stopped: by a signal; all is saved.
    """
    with ExitStack() as held:
        resumed = resumed_run("finetune", config, overridden, held)
        if resumed is not None:
            config, overridden = resumed.config, resumed.overridden
        checkpoint = None if resumed is None else resumed.checkpoint
        device = prepare_device(config)
        settings = checkpoint_settings(config, "finetune")
        evaluation_settings(config)  # so that nothing is built for wrong ones
        trainer, config = _build(config, overridden, device, checkpoint)
        held.callback(trainer.close)
        if resumed is not None and checkpoint is not None:
            exactly, notes = restore(checkpoint, trainer, device, FREE)
            last = resumed.last_evaluation("after", "env_steps", trainer.env_steps)
            if trainer.finished and last is not None:
                print(finished_line(resumed.directory, "env_steps", trainer.env_steps), flush=True)
                return resumed.directory.read_summary() or {}
            go_on(resumed, config, "env_steps", trainer.env_steps)
            if not exactly:
                print(NOT_EXACTLY, flush=True)
            training = Finetuning(config, trainer, resumed.directory, settings)
            training.before = notes.before
            training.checkpoints.go_on(checkpoint, notes.best, last)
        else:
            name = f"finetune-{trainer.task.name}-{trainer.policy.type}-{config['algo']['type']}-seed{config['seed']}"
            if resumed is None:
                directory = held.enter_context(open_run(config, name, source_of(config["checkpoint"])))
            else:
                directory = begin_run(resumed.directory.path, config)
            training = Finetuning(config, trainer, directory, settings)
        print(_plan(config, trainer, device), flush=True)
        with training.checkpoints.told_on_failure():
            return training.run()


def _build(
    config: Mapping[str, Any], overridden: Collection[str], device: torch.device, checkpoint: Path | None
) -> tuple[Trainer, dict[str, Any]]:
    """The trainer, of a policy at its beginning or as it is in a checkpoint of the run; and the whole configuration."""
    algo = build_update_rule(config)
    seed_shared(config["seed"])  # of the weights of a policy from scratch
    if checkpoint is None:
        policy, task = starting_point(config, overridden)
        config = {**config, "task": dataclasses.asdict(task), **policy_settings(policy)}
    else:
        policy, task = load_policy(checkpoint / POLICY)[0], build_task(config)
    policy.metadata.pop("evaluation", None)  # of what it will no longer be
    policy = policy.to(device)
    anchor = build_anchor(config, policy, task)
    trainer = Trainer(policy, task, trainer_config(config), algo, config["critic"], build_advantage(config), anchor)
    return trainer, dict(config)


class Finetuning:
    """A run between its beginning, or the checkpoint that it goes on from, and its end."""

    def __init__(
        self, config: Mapping[str, Any], trainer: Trainer, directory: RunDirectory, settings: CheckpointConfig
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.directory = directory
        self.evaluation, self.evaluation_interval = evaluation_settings(config)
        self.before: EvaluationSummary | None = None
        """None: it has not begun."""
        self._warned = False
        self.command = f"dppo finetune resume={directory.path}{trust_of(trainer.task)}"
        """That goes on with it."""
        self.checkpoints = Checkpoints(directory.checkpoints, settings, self._save, go_on=self.command)

    def run(self) -> dict[str, Any]:
        """Evaluate, train, evaluate again; the summary.

        Raises:
            Stopped: by a signal, between two iterations or after an evaluation.
        """
        began = None if self.before is None else self.trainer.env_steps
        sinks = build_sinks(self.config, self.directory, "env_steps", began)
        with Stop() as stop, evidence_kept(self.directory), MetricsLogger(self.directory, sinks) as logger:
            videos: dict[str, Path] = {}
            if self.before is None:
                self.before = self._evaluate("before")
                self.checkpoints.judge(0, self.before)
                self.checkpoints.save(0)
                videos = {} if stop.asked else self._videos("before")
            self._write_summary(None)
            self._train(logger, stop)
            self._write_summary(None)
            stop.check(f"all is saved, and `{self.command}` goes on")
            after = self._evaluate("after")
            videos |= {} if stop.asked else self._videos("after")
        self.checkpoints.judge(self.trainer.env_steps, after)
        self.trainer.policy.metadata["evaluation"] = after.as_dict()
        self.checkpoints.save(self.trainer.env_steps, again=True)  # for its model card
        summary = self._write_summary(after)
        self._tell(after, videos)
        return summary

    def _train(self, logger: MetricsLogger, stop: Stop) -> None:
        """Iterate until the budget is spent or a signal comes, and save."""
        trainer, interval = self.trainer, self.evaluation_interval
        with Progress(trainer.config.env_steps, "env_steps", done=trainer.env_steps) as progress:
            while not trainer.finished and stop.asked is None:
                row = trainer.iterate(progress.advance)
                result = None
                if interval and trainer.iteration % interval == 0:
                    result = self._evaluate()
                    row = {**row, "eval_return_mean": result.return_mean, "eval_success_rate": result.success_rate}
                logger.log(row)
                progress.update(row)
                self.checkpoints.after(trainer.iteration, trainer.env_steps, result)
        self.checkpoints.save(trainer.env_steps)

    def _evaluate(self, name: str | None = None) -> EvaluationSummary:
        return evaluate_with_progress(self.trainer.policy, self.trainer.task, self.evaluation, name)[0]

    def _save(self, path: Path) -> None:
        trainer, state = self.trainer, self.trainer.state_dict()
        notes = Notes(next(trainer.policy.parameters()).device.type, self.checkpoints.best, self.before)
        save_checkpoint(path, trainer.policy, trainer.task, {**state, "notes": dataclasses.asdict(notes)})
        if not self._warned and state["actor"]["environments"] is None and not trainer.estimator.begins_episodes:
            log.warning("%s: if this run is resumed, its environments start new episodes", trainer.actor.not_restorable)
            self._warned = True

    def _write_summary(self, after: EvaluationSummary | None) -> dict[str, Any]:
        """Write ``summary.json``; ``after`` is None while the run goes on."""
        trainer, seconds = self.trainer, self.trainer.wall_clock_s
        summary = {
            "task": trainer.task.name,
            "policy": trainer.policy.type,
            "algo": self.config["algo"]["type"],
            "seed": self.config["seed"],
            "env_steps": trainer.env_steps,
            "wall_clock_s": seconds,
            "env_steps_per_s": trainer.env_steps / seconds if seconds else None,
            "before": None if self.before is None else self.before.as_dict(),
            "after": None if after is None else after.as_dict(),
            "best_checkpoint": self.checkpoints.best_as_dict(),
        }
        write_json(self.directory.summary_path, summary)
        return summary

    def _videos(self, name: str) -> dict[str, Path]:
        if not self.config["video"]:
            return {}
        task, seed = self.trainer.task, int(self.config["evaluation"]["seed"])
        path, caption = self.directory.videos / f"{name}.mp4", f"{task.name}, {name}"
        with bar(f"recording a video ({name})", 1):
            found = record_video(self.trainer.policy, task, path, seed=seed, caption=caption)
        return {} if found is None else {f"video {name}": found}

    def _tell(self, after: EvaluationSummary, videos: Mapping[str, Path]) -> None:
        """Draw the learning curve, and print how the run ended."""
        assert self.before is not None
        trainer, directory = self.trainer, self.directory
        curve = learning_curve(
            read_metrics(directory.metrics_path),
            directory.plots / "learning_curve.png",
            title=f"{trainer.task.name}: {trainer.policy.type} policy, {self.config['algo']['type'].upper()}",
            before=self.before,
            after=after,
        )
        final_table(
            {"before": self.before, "after": after},
            env_steps=trainer.env_steps,
            seconds=trainer.wall_clock_s,
            paths={"learning curve": curve, **videos, "checkpoint": directory.checkpoints / str(trainer.env_steps)},
        )


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


def trainer_config(config: Mapping[str, Any]) -> TrainerConfig:
    """The trainer's part of a composed configuration."""
    names = ("env_steps", "num_envs", "rollout_steps", "max_minutes", "seed", "anneal")
    return config_from_dict(TrainerConfig, {name: config[name] for name in names}, "finetune")
