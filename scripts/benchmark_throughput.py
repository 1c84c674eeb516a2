"""Environment steps per second, and seconds per phase, of one DPPO iteration at the paper's Hopper setting.

40 environments, 500 chunk steps, Ta = 4, K = 20, K' = 10, actor 3 x 512, critic 3 x 256, batch 50,000, 5 epochs.
Random weights: they change what the robot does, not what an iteration costs, except that Hopper falls often and resets.

    python scripts/benchmark_throughput.py [--iterations N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from dppo.building import build_task, build_update_rule, scratch_policy
from dppo.commands.finetune import trainer_config
from dppo.configuration import compose_config
from dppo.output.metrics import Row
from dppo.trainer import Trainer

PHASES = ("environment", "sampling", "scoring", "advantages", "update")


def measure(iterations: int, overrides: list[str]) -> list[Row]:
    """The metrics of that many iterations, after a small one to warm up."""
    config = compose_config("finetune", ["experiment=paper_hopper", "checkpoint=scratch", *overrides])
    task = build_task(config)
    algo = build_update_rule(config)

    def trainer(rollout_steps: int) -> Trainer:
        torch.manual_seed(0)
        size = trainer_config({**config, "rollout_steps": rollout_steps})
        policy = scratch_policy(config, task, ["policy.finetuned_steps"])
        return Trainer(policy, task, size, algo, config["critic"])

    trainer(10).iterate()
    measured = trainer(config["rollout_steps"])
    return [measured.iterate() for _ in range(iterations)]


def summarize(rows: list[Row]) -> dict[str, object]:
    """Medians over the iterations."""

    def median(name: str) -> float:
        return statistics.median(float(row[name] or 0) for row in rows)

    phases = {phase: median(f"{phase}_s") for phase in PHASES}
    steps = [int(row["env_steps"] or 0) for row in rows]
    per_iteration = [after - before for before, after in zip([0, *steps[:-1]], steps, strict=True)]
    return {
        "total_s": sum(phases.values()),
        "env_steps": round(statistics.median(per_iteration)),
        "phases_s": phases,
        "iterations": len(rows),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1, help="iterations to take the median of")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("overrides", nargs="*", help="settings as of `dppo finetune`, e.g. num_envs=80")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = summarize(measure(arguments.iterations, arguments.overrides))
    phases, total, env_steps = result["phases_s"], result["total_s"], result["env_steps"]
    assert isinstance(phases, dict) and isinstance(total, float) and isinstance(env_steps, int)
    for phase, seconds in phases.items():
        print(f"{phase:12}{seconds:8.2f} s{seconds / total:8.0%}")
    print(f"{'total':12}{total:8.2f} s for {env_steps:,} environment steps: {env_steps / total:,.0f} steps/s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
