"""The comparison as a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from dppo.output.report import number
from dppo.statistics import mean_ci95
from stable_baselines.runs import SIDES, Plan, Return, Speed
from stable_baselines.settings import DIFFERENCES, STEPS, our_settings, their_settings
from throughput.opponents import OPPONENTS
from throughput.report import table

NAMES = {"ours": "ours", "sb3": "theirs"}


def report(plan: Plan, returns: Sequence[Return], speeds: Sequence[Speed], machine: dict[str, Any]) -> str:
    """Markdown: returns, speeds, settings, and what differs."""
    return "\n\n".join(_sections(plan, returns, speeds, machine)) + "\n"


def _sections(plan: Plan, returns: Sequence[Return], speeds: Sequence[Speed], machine: dict[str, Any]) -> Iterable[str]:
    title = OPPONENTS["sb3"].title
    yield f"# {title} and SB3-contrib beside ours, at equal settings"
    yield "    python scripts/benchmark_stable_baselines.py"
    versions = ", ".join(f"{name} {release}" for name, release in machine["versions"].items())
    threads = f"{plan.threads} thread{'' if plan.threads == 1 else 's'} a process"
    yield f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, {threads}; {versions}."
    yield "## Returns"
    yield (
        f"Mean return of {plan.episodes} episodes without exploration noise, in environments with the same seeds on "
        f"both sides, after {plan.iterations * STEPS:,} steps; mean over runs with its 95 % bootstrap interval, and the"
        f" lowest and highest run. Every run is in `returns.csv`."
    )
    yield table(["", "runs", "ours", "theirs", "ours / theirs"], _return_rows(plan, returns))
    yield "## Environment steps per second"
    yield (
        f"One environment. Both sides take turns of {plan.turn_iterations} iterations, acting and learning; medians of "
        f"{plan.turns} turns. The first iteration, with imports' last work and, on our side, compiling, counts apart. "
        f"Other work on the machine slows both sides, so the ratio tells more than its parts (in brackets, of the "
        f"lowest and the highest pair of turns), and that of the time on the processor most. Every turn is in "
        f"`speed.csv`."
    )
    header = ["", "ours", "theirs", "ratio", "ratio by processor time", "first iteration, ours", "theirs"]
    yield table(header, _speed_rows(plan, speeds))
    if speeds:
        loads = [one.load for one in speeds]
        yield f"The machine's load was {min(loads):.1f} to {max(loads):.1f} meanwhile; on a quiet one it is 1."
    yield "## Settings"
    yield "Stable-Baselines3's defaults, and normalisation of observations and rewards on both sides."
    for rule in plan.rules:
        theirs = ", ".join(f"{name}={value}" for name, value in their_settings(rule).items())
        ours = " ".join(our_settings(plan.tasks[0], rule, 1, compiled=plan.compiled)[4:])
        yield f"{rule.upper()}, theirs: `{theirs}`"
        note = " (`max_kl` and `damping` times the number of action dimensions)" if rule == "trpo" else ""
        yield f"{rule.upper()}, ours{note}: `{ours}`"
    yield "## What could not be made equal"
    yield DIFFERENCES


def _return_rows(plan: Plan, returns: Sequence[Return]) -> list[list[str]]:
    rows = []
    for task, rule in product(plan.tasks, plan.rules):
        of_side = {
            side: [one.return_mean for one in returns if (one.task, one.rule, one.side) == (task, rule, side)]
            for side in SIDES
        }
        if all(of_side.values()):
            means = [statistics.mean(of_side[side]) for side in SIDES]
            counts = "/".join(dict.fromkeys(str(len(found)) for found in of_side.values()))
            cells = [_with_interval(of_side[side]) for side in SIDES]
            rows.append([f"{task}, {rule}", counts, *cells, f"{means[0] / means[1]:.2f}"])
    return rows


def _with_interval(values: Sequence[float]) -> str:
    mean, low, high = mean_ci95(values)
    interval = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
    return f"{number(mean)}{interval} ({number(min(values))} to {number(max(values))})"


def _speed_rows(plan: Plan, speeds: Sequence[Speed]) -> list[list[str]]:
    rows = []
    for task, rule in product(plan.tasks, plan.rules):
        found = {
            side: [one for one in speeds if (one.task, one.rule, one.side) == (task, rule, side)] for side in SIDES
        }
        if all(found.values()):
            cells = [f"{statistics.median(_rates(found[side], 'seconds')):,.0f}" for side in SIDES]
            ratios = [_ratio(found["ours"], found["sb3"], clock) for clock in ("seconds", "cpu_s")]
            firsts = [f"{found[side][0].warm_up_s:.1f} s" for side in SIDES]
            rows.append([f"{task}, {rule}", *cells, *ratios, *firsts])
    return rows


def _rates(turns: Sequence[Speed], clock: str) -> list[float]:
    return [one.env_steps / getattr(one, clock) for one in turns]


def _ratio(ours: Sequence[Speed], theirs: Sequence[Speed], clock: str) -> str:
    """Of pairs of turns, one right after the other."""
    pairs = [mine / other for mine, other in zip(_rates(ours, clock), _rates(theirs, clock), strict=True)]
    return f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
