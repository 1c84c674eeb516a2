"""Runs of both sides, to the end for returns and turn by turn for speed, as lines of CSV files."""

from __future__ import annotations

import csv
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from dppo.building import build_task
from dppo.configuration import compose_config
from dppo.envs.vector import space_dims
from stable_baselines.settings import STEPS, our_settings, their_settings
from throughput.options import say
from throughput.turns import Contender

SIDES = ("ours", "sb3")


@dataclass(frozen=True)
class Plan:
    """What is run."""

    tasks: Sequence[str]
    rules: Sequence[str]
    seeds: Sequence[int]
    env_steps: int
    """Of a run for its return; whole rollouts, so it may be up to one more."""
    episodes: int
    """Of its evaluation."""
    turns: int
    """Of the measurement of speed."""
    turn_iterations: int
    threads: int
    compiled: bool
    """Whether our side compiles its steps."""

    @property
    def iterations(self) -> int:
        """Of a run for its return."""
        return -(-self.env_steps // STEPS)


@dataclass(frozen=True)
class Return:
    """A line of returns.csv: a whole run."""

    task: str
    rule: str
    side: str
    seed: int
    env_steps: int
    episodes: int
    return_mean: float
    train_s: float
    """Without the first iteration."""
    first_iteration_s: float
    """With what is compiled in it."""
    load: float
    """Of the machine when it ended."""


@dataclass(frozen=True)
class Speed:
    """A line of speed.csv: a turn of one side; sides take turns."""

    task: str
    rule: str
    side: str
    turn: int
    env_steps: int
    seconds: float
    cpu_s: float
    """Of the processor, whatever else it did meanwhile."""
    warm_up_s: float
    """Of the first iteration, which belongs to no turn, and in which things are compiled."""
    load: float


Line = TypeVar("Line", Return, Speed)


def read(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    convert = {"str": str, "int": int, "float": float}
    with path.open(newline="") as file:
        return [
            kind(**{f.name: convert[str(f.type)](row[f.name]) for f in fields(kind)}) for row in csv.DictReader(file)
        ]


def append(path: Path, line: Return | Speed) -> None:
    """Write one more line, and the names of the columns before the first."""
    values = asdict(line)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(values), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


def missing_returns(plan: Plan, done: Sequence[Return]) -> Iterator[tuple[int, str, str, str]]:
    """Seed, task, rule and side of the runs that are still to do: sides alternate, and seeds come last.

    Raises:
        ValueError: a run that is there had another length or evaluation.
    """
    length = plan.iterations * STEPS
    for one in done:
        if (one.env_steps, one.episodes) != (length, plan.episodes):
            raise ValueError(
                f"{one.task}, {one.rule}, {one.side}, seed {one.seed} had {one.env_steps:,} steps and {one.episodes} "
                f"episodes, not {length:,} and {plan.episodes}; choose another --output"
            )
    known = {(one.seed, one.task, one.rule, one.side) for one in done}
    for run in product(plan.seeds, plan.tasks, plan.rules, SIDES):
        if run not in known:
            yield run


def contender_settings(plan: Plan, task: str, rule: str, side: str, seed: int, iterations: int) -> dict[str, Any]:
    """What a worker is started with."""
    built = build_task(compose_config("finetune", [f"task={task}"]))
    if side == "ours":
        own: Any = our_settings(task, rule, space_dims(built).action_dim, compiled=plan.compiled)
    else:
        own = their_settings(rule)
    evaluation = {"episodes": plan.episodes, "num_envs": min(10, plan.episodes), "seed": 100_000}
    return {
        "env_id": built.env_id,
        "rule": rule,
        "seed": seed,
        "iterations": iterations,
        "threads": plan.threads,
        "evaluation": evaluation,
        "settings": own,
    }


def _contender(plan: Plan, theirs: Path, task: str, rule: str, side: str, seed: int, iterations: int) -> Contender:
    python = Path(sys.executable) if side == "ours" else theirs
    return Contender(python, f"learner_{side}", contender_settings(plan, task, rule, side, seed, iterations))


def run_returns(plan: Plan, theirs: Path, path: Path) -> None:
    """Do the runs that ``path`` does not hold yet; ``theirs`` is the Python of Stable-Baselines3."""
    for seed, task, rule, side in list(missing_returns(plan, read(path, Return))):
        say(f"{task}, {rule}, {side}, seed {seed}: {plan.env_steps:,} steps")
        with _contender(plan, theirs, task, rule, side, seed, plan.iterations) as contender:
            seconds = contender.turn(plan.iterations)
            contender.turn(1)
            returns = contender.report
        append(
            path,
            Return(
                task=task,
                rule=rule,
                side=side,
                seed=seed,
                env_steps=plan.iterations * STEPS,
                episodes=plan.episodes,
                return_mean=statistics.mean(returns),
                train_s=sum(seconds[1:]),
                first_iteration_s=seconds[0],
                load=os.getloadavg()[0],
            ),
        )


def run_speed(plan: Plan, theirs: Path, path: Path) -> None:
    """Measure anew what has not all of its turns yet."""
    done = read(path, Speed)
    for task, rule in product(plan.tasks, plan.rules):
        if any((one.task, one.rule) == (task, rule) for one in done):
            continue
        say(f"{task}, {rule}: {plan.turns} turns of {plan.turn_iterations} iterations")
        for line in _speed(plan, theirs, task, rule):
            append(path, line)


def _speed(plan: Plan, theirs: Path, task: str, rule: str) -> list[Speed]:
    iterations = 1 + plan.turns * plan.turn_iterations
    with ExitStack() as stack:
        sides = {side: stack.enter_context(_contender(plan, theirs, task, rule, side, 0, iterations)) for side in SIDES}
        first = {side: contender.turn(1)[0] for side, contender in sides.items()}
        lines = []
        for turn, (side, contender) in product(range(plan.turns), sides.items()):
            before = contender.cpu_seconds
            seconds = sum(contender.turn(plan.turn_iterations))
            cpu_s = contender.cpu_seconds - before
            steps, load = plan.turn_iterations * STEPS, os.getloadavg()[0]
            lines.append(Speed(task, rule, side, turn, steps, seconds, cpu_s, first[side], load))
        return lines
