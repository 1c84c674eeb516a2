"""Gaussian PPO or TRPO of this project, turn by turn; then evaluated."""

from __future__ import annotations

import dppo  # noqa: F401 - before torch, as in the commands: it decides how torch's threads wait

# isort: split
import torch

from dppo.building import build_task, build_update_rule, scratch_policy
from dppo.commands.finetune import trainer_config
from dppo.configuration import compose_config
from dppo.evaluation import EvaluationConfig, evaluate
from dppo.trainer import Trainer
from throughput.turns import run_and_report, settings


def main() -> None:
    """Learn and be evaluated as told."""
    chosen = settings()
    torch.set_num_threads(chosen["threads"])
    config = compose_config("finetune", [*chosen["settings"], f"seed={chosen['seed']}"])
    task = build_task(config)
    torch.manual_seed(chosen["seed"])
    policy = scratch_policy(config, task)
    trainer = Trainer(policy, task, trainer_config(config), build_update_rule(config), config["critic"])

    def episodes() -> list[float]:
        _, found = evaluate(policy, task, EvaluationConfig(**chosen["evaluation"]))
        return [episode.undiscounted_return for episode in found]

    run_and_report(trainer.iterate, episodes, iterations=chosen["iterations"])


if __name__ == "__main__":
    main()
