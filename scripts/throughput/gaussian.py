"""Environment steps per second of Gaussian PPO at the defaults of Stable-Baselines3 and CleanRL.

2,048 steps in all between updates, minibatches of 64, 10 epochs, two networks of 64 x 64; by number of environments.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from dppo.building import build_task, build_update_rule, scratch_policy
from dppo.commands.finetune import trainer_config
from dppo.configuration import compose_config
from dppo.trainer import Trainer
from throughput.dppo_iteration import PHASES
from throughput.options import Options, medians, say

STEPS = 2048
"""Environment steps between updates."""
NUM_ENVS = (1, 2, 4, 8, 16, 32)
WAYS = ("eager", "compiled")
SETTINGS = (
    "policy=gaussian",
    "checkpoint=scratch",
    "network.hidden_dims=[64,64]",
    "network.activation=tanh",
    "critic=mlp",
    "critic.hidden_dims=[64,64]",
    "critic.activation=tanh",
    "algo.batch_size=64",
    "algo.epochs=10",
    "algo.learning_rate=3e-4",
    "algo.critic_learning_rate=3e-4",
    "algo.gamma=0.99",
    "algo.gae_lambda=0.95",
    "algo.clip=0.2",
    "algo.max_grad_norm=0.5",
)


def gaussian_trainer(task: str, num_envs: int, compiled: bool) -> Trainer:
    """A Gaussian policy from scratch, in so many environments, its gradients compiled or not."""
    sizes = [f"num_envs={num_envs}", f"rollout_steps={STEPS // num_envs}"]
    config = compose_config("finetune", [f"task={task}", *SETTINGS, *sizes, f"algo.compile={compiled}"])
    built = build_task(config)
    torch.manual_seed(0)
    return Trainer(
        scratch_policy(config, built), built, trainer_config(config), build_update_rule(config), config["critic"]
    )


def measure(options: Options) -> dict[str, Any]:
    """By task: medians by whether gradients are compiled and by number of environments; they take turns."""
    return {task: _measure(task, options) for task in options.tasks}


def _measure(task: str, options: Options) -> dict[str, Any]:
    counts = (1, 8) if options.quick else NUM_ENVS
    trainers = {(way, count): gaussian_trainer(task, count, way == "compiled") for way in WAYS for count in counts}
    turns: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    names = ["env_steps_per_s", *(f"{phase}_s" for phase in PHASES)]
    for turn in range(1 + options.turns_or(10)):  # the first one warms up, and compiles
        say(f"Gaussian PPO, {task}, iteration {turn}, {', '.join(map(str, counts))} environments")
        for key, trainer in trainers.items():
            row = trainer.iterate()
            turns[key].append({name: float(row[name] or 0) for name in names})
    for trainer in trainers.values():
        trainer.close()
    return {way: {count: medians(turns[way, count][1:]) for count in counts} for way in WAYS}
