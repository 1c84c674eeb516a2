"""Gaussian PPO here and elsewhere, at the same settings, each at its best number of environments and with one.

First every way of running is tried for a moment; then the best ones of both sides iterate turn by turn, so that they
share the moods of the machine, and those turns are what is compared.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dppo.building import build_task
from dppo.configuration import compose_config
from throughput.gaussian import NUM_ENVS, STEPS
from throughput.memory import PeakMemory
from throughput.opponents import OPPONENTS
from throughput.options import Options, say
from throughput.turns import Contender

Settings = dict[str, Any]
OURS = "ours"
OUR_WAYS = ("native", "native, compiled")
FINALISTS = 2
"""So many ways of running of each side, the fastest ones of the trial: its order is partly luck."""


def compare(opponent: str, python: Path, options: Options) -> dict[str, Any]:
    """By task: the trial, the final, and ratios of the final's medians."""
    return {task: _compare(opponent, python, task, options) for task in options.tasks}


def _compare(opponent: str, python: Path, task: str, options: Options) -> dict[str, Any]:
    pythons = {OURS: Path(sys.executable), opponent: python}
    trial = [_tried(pythons, settings, options) for settings in ways(opponent, task, options)]
    final = _final(pythons, finalists(trial), options)
    return {"trial": trial, "final": final, **ratios(final)}


def ways(opponent: str, task: str, options: Options) -> list[Settings]:
    """Every way of running, both sides side by side."""
    env_id = build_task(compose_config("finetune", [f"task={task}"])).env_id
    found: list[Settings] = []
    for num_envs in (1, 4) if options.quick else NUM_ENVS:
        same = {"task": task, "env_id": env_id, "steps": STEPS, "num_envs": num_envs}
        vectors = OPPONENTS[opponent].vectors[: None if num_envs > 1 else 1]
        # Here, threads are used where they pay; there, one may be better than torch's choice.
        found += [{"who": OURS, **same, "vector": vector, "threads": None} for vector in OUR_WAYS]
        found += [
            {"who": opponent, **same, "vector": vector, "threads": threads}
            for vector in vectors
            for threads in (None, 1)
        ]
    return found


def _tried(pythons: Mapping[str, Path], settings: Settings, options: Options) -> Settings:
    say(describe(settings))
    with Contender(pythons[settings["who"]], settings["who"], settings) as contender:
        contender.turn(1)
        return {**settings, "steps_per_s": _rate(contender.turn(1 if options.quick else 3))}


def describe(settings: Mapping[str, Any]) -> str:
    """A way of running, in words."""
    threads = "torch's choice of threads" if settings["threads"] is None else f"{settings['threads']} thread"
    return f"{settings['task']}, {settings['who']}: {settings['num_envs']} x {settings['vector']}, {threads}"


def _rate(seconds: list[float]) -> float:
    return STEPS / statistics.median(seconds)


def finalists(trial: list[Settings]) -> list[Settings]:
    """Of each side the fastest ways of running, and the fastest with a single environment; ours, compiled and not."""
    ordered = sorted(trial, key=lambda one: -one["steps_per_s"])
    sides = [[one for one in ordered if one["who"] != OURS]]
    sides += [[one for one in ordered if one["who"] == OURS and one["vector"] == way] for way in OUR_WAYS]
    chosen: list[Settings] = []
    for side in sides:
        single = next(one for one in side if one["num_envs"] == 1)
        chosen += [*side[:FINALISTS], *([] if single in side[:FINALISTS] else [single])]
    return chosen


def _final(pythons: Mapping[str, Path], chosen: list[Settings], options: Options) -> list[Settings]:
    """Turn by turn; with each one's median steps per second, those of its turns, and its peak memory."""
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(pythons[one["who"]], one["who"], one)) for one in chosen]
        memory = []
        for contender in contenders:
            with PeakMemory(contender.pid) as peak:
                contender.turn(1)
            memory.append(peak.peak)
        turns: list[list[float]] = [[] for _ in contenders]
        for number in range(options.turns_or(7)):
            say(f"final, turn {number + 1}: {len(contenders)} contenders")
            for rates, contender in zip(turns, contenders, strict=True):
                rates.append(_rate(contender.turn(1 if options.quick else 3)))
    return [
        {**one, "steps_per_s": statistics.median(rates), "turns": rates, "memory_bytes": peak}
        for one, rates, peak in zip(chosen, turns, memory, strict=True)
    ]


def ratios(final: list[Settings]) -> dict[str, Any]:
    """Ours to theirs: each side at its best, compiled and not, and with a single environment."""

    def best(side: list[Settings], single: bool) -> Settings:
        return max((one for one in side if not (single and one["num_envs"] > 1)), key=lambda one: one["steps_per_s"])

    theirs = [one for one in final if one["who"] != OURS]
    found = {}
    for way in OUR_WAYS:
        ours = [one for one in final if one["who"] == OURS and one["vector"] == way]
        for name, single in (("best", False), ("single", True)):
            pair = {"ours": best(ours, single), "theirs": best(theirs, single)}
            ratio = pair["ours"]["steps_per_s"] / pair["theirs"]["steps_per_s"]
            found[f"{way}, {name}"] = {**pair, "ratio": ratio}
    return found
