"""PPO and TRPO beside those of Stable-Baselines3 and SB3-contrib at equal settings: returns, and steps per second.

Installs both from PyPI into an environment of their own. Every run and every turn is written as soon as it is over, and
what is there already is not run again; remove speed.csv to measure the speed anew.

    python scripts/benchmark_stable_baselines.py
    python scripts/benchmark_stable_baselines.py --only speed --rules trpo --turns 9
    python scripts/benchmark_stable_baselines.py --env-steps 1_000_000 --seeds 0 1 2 3 4 --output comparisons/long
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stable_baselines.report import report
from stable_baselines.runs import Plan, Return, Speed, read, run_returns, run_speed
from stable_baselines.settings import RULES
from throughput.machine import describe_machine
from throughput.opponents import CACHE, install
from throughput.options import TASKS, positive

OUTPUT = Path(__file__).resolve().parent.parent / "benchmarks" / "stable_baselines"
PARTS = ("speed", "returns")


def arguments() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="nothing: write the report anew")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs for their returns")
    parser.add_argument("--env-steps", type=positive, default=200_000, help="of each of them (default: 200,000)")
    parser.add_argument("--episodes", type=positive, default=50, help="of its evaluation (default: 50)")
    parser.add_argument("--turns", type=positive, default=7, help="of either side's speed (default: 7)")
    parser.add_argument("--turn-iterations", type=positive, default=3, help="in each (default: 3)")
    parser.add_argument("--threads", type=positive, default=1, help="of either side (default: 1)")
    parser.add_argument("--eager", action="store_true", help="our side without algo.compile")
    parser.add_argument("--environments", type=Path, default=CACHE, help=f"theirs (default: {CACHE})")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="of report.md, returns.csv and speed.csv")
    return parser.parse_args()


def main() -> None:
    """Run, and write the report after each part."""
    args = arguments()
    plan = Plan(
        tasks=args.tasks,
        rules=args.rules,
        seeds=args.seeds,
        env_steps=args.env_steps,
        episodes=args.episodes,
        turns=args.turns,
        turn_iterations=args.turn_iterations,
        threads=args.threads,
        compiled=not args.eager,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    paths = {part: args.output / f"{part}.csv" for part in PARTS}

    def write() -> None:
        text = report(plan, read(paths["returns"], Return), read(paths["speed"], Speed), machine)
        (args.output / "report.md").write_text(text)

    theirs = install("sb3", args.environments) if args.only else None
    for part in args.only:
        assert theirs is not None
        print(f"{part} ...", flush=True)
        (run_speed if part == "speed" else run_returns)(plan, theirs, paths[part])
        write()
    write()
    print((args.output / "report.md").read_text())


if __name__ == "__main__":
    main()
