"""Seconds per phase of one DPPO iteration at the paper's Hopper setting, and how near each phase comes to its limit.

40 environments, 500 chunk steps, Ta = 4, K = 20, K' = 10, actor 3 x 512, critic 3 x 256, batch 50,000, 5 epochs; for
other tasks too. Random weights: they change what the robot does, not what an iteration costs, except that Hopper falls
often and resets.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dppo.building import build_task, build_update_rule, scratch_policy
from dppo.commands.finetune import trainer_config
from dppo.configuration import compose_config
from dppo.output.metrics import Row
from dppo.trainer import Trainer
from dppo.updates.first_order_config import PPOConfig
from policies.chain import DiffusionPolicy
from policies.networks.mlp import MLP
from throughput.flops import DenoiserFlops, chain_flops, forward_flops, training_flops
from throughput.limits import SHAPES, ProductLimit, SimulationLimit
from throughput.options import Options, medians, say

PHASES = ("environment", "sampling", "scoring", "advantages", "update")
QUICK = ("rollout_steps=25", "algo.batch_size=5000")


def measure(task: str, options: Options) -> dict[str, Any]:
    """Medians by precision. Precisions and limits take turns, so that they share the moods of the machine."""
    settings = ["experiment=paper_hopper", f"task={task}", "checkpoint=scratch", *(QUICK if options.quick else ())]
    precisions = options.precisions
    overrides = {precision: [*settings, f"algo.precision={precision}"] for precision in precisions}
    for precision in precisions:
        warm_up = build_trainer([*overrides[precision], "rollout_steps=10"])
        warm_up.iterate()
        warm_up.close()
    trainers = {precision: build_trainer(overrides[precision]) for precision in precisions}
    limits = _limits(compose_config("finetune", settings), precisions)
    turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for turn in range(options.turns_or(3)):
        for precision, trainer in trainers.items():
            say(f"{task}, {precision}, iteration {turn + 1}")
            turns[precision].append(_turn(trainer, {phase: rate() for phase, rate in limits[precision].items()}))
    for trainer in trainers.values():
        trainer.close()
    return {precision: _summary(rows) for precision, rows in turns.items()}


def _limits(config: dict[str, Any], precisions: Sequence[str]) -> dict[str, dict[str, Callable[[], float]]]:
    """By precision and phase, what measures the phase's limit."""
    simulation = SimulationLimit(build_task(config), config["num_envs"], config["policy"]["chunk"])
    shared = {
        "environment": simulation.rate,
        "sampling": ProductLimit(SHAPES["sampling"], "float32").rate,
        "scoring": ProductLimit(SHAPES["update"], "float32").rate,
    }
    return {precision: {**shared, "update": ProductLimit(SHAPES["update"], precision).rate} for precision in precisions}


def build_trainer(overrides: list[str]) -> Trainer:
    """A policy from scratch with these settings of `dppo finetune`."""
    config = compose_config("finetune", overrides)
    task = build_task(config)
    torch.manual_seed(0)
    policy = scratch_policy(config, task, ["policy.finetuned_steps"])
    return Trainer(policy, task, trainer_config(config), build_update_rule(config), config["critic"])


def _turn(trainer: Trainer, limits: dict[str, float]) -> dict[str, Any]:
    """One iteration: seconds by phase, and the share of its limit that each phase reaches."""
    before = trainer.env_steps
    row = trainer.iterate()
    env_steps = trainer.env_steps - before
    seconds = {phase: float(row[f"{phase}_s"] or 0) for phase in PHASES}
    work = {"environment": env_steps, **useful_flops(trainer, row)}
    fractions = {phase: work[phase] / seconds[phase] / limits[phase] for phase in limits}
    total = sum(seconds.values())
    whole = {"total_s": total, "env_steps": env_steps, "env_steps_per_s": env_steps / total}
    return {"seconds": seconds, "whole": whole, "work": work, "limits": limits, "fractions": fractions}


def useful_flops(trainer: Trainer, row: Row) -> dict[str, float]:
    """Floating-point operations that the phases of an iteration need.

    Every row of the rollout counts as a transition, as it is with native environments.
    """
    policy, config = trainer.policy, trainer.algo
    assert isinstance(policy, DiffusionPolicy) and isinstance(config, PPOConfig) and config.batch_size is not None
    rows = trainer.config.num_envs * trainer.config.rollout_steps
    pairs = rows * policy.num_steps
    minibatches = math.ceil(pairs / config.batch_size)
    actor_passes = float(row["actor_steps"] or 0) / minibatches  # fewer than epochs where the target KL ended them
    assert trainer.critic is not None
    critic = trainer.critic.network
    assert isinstance(critic, MLP)
    actor = DenoiserFlops.of(policy.network)
    return {
        "sampling": rows * chain_flops(policy),
        "scoring": rows * forward_flops(critic),
        "update": actor_passes * pairs * actor.training + config.epochs * rows * training_flops(critic),
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: medians([row[name] for row in rows]) for name in rows[0]} | {"turns": len(rows)}
