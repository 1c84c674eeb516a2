"""Environment steps per second: Gymnasium's own environments, what this package makes of them, and what else there is.

Random actions, through a `Stepper`. MuJoCo environments of Gymnasium have a native one here. Their limit is one call of
`mujoco.rollout` for all environments that looks at nothing, with the states and actions of the native ones. All others
are compared with worker processes, Gymnasium's (one per environment) and those of this package (`--threads` of them).
Whatever is compared takes turns, so that it shares the moods of the machine. The tables have medians of the turns, for
the ratios too, and the seconds until the first step could be made.

    python scripts/benchmark_environments.py [--envs N] [--chunk N] [--threads N] [--turns N] [ID ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv

from dppo.envs.native.vector_env import NativeVectorEnv
from dppo.envs.stepper import Stepper
from dppo.envs.vector import (
    make_env,
    make_vector_env,
    space_dims,
    sync_vector_env,
    worker_vector_env,
)
from dppo.task import Task
from throughput.limits import Limit, random_actions
from throughput.options import positive


def seconds(stepper: Stepper, action: np.ndarray) -> tuple[int, float]:
    """Environment steps, and how long they took."""
    began = time.perf_counter()
    steps = stepper.step(action).steps.sum()
    return int(steps), time.perf_counter() - began


Rates = dict[str, list[float]]
"""Steps per second in every turn."""


def measure_native(task: Task, native: NativeVectorEnv, threads: int, turns: int, **sizes: Any) -> Rates:
    """Gymnasium one after the other, native, and the limit."""
    steppers = {
        "sync": Stepper(sync_vector_env(task, native.num_envs, **sizes)),
        "native": Stepper(native),
    }
    for stepper in steppers.values():
        stepper.reset(0)
    limit = Limit(task, native, threads)
    rng = np.random.default_rng(0)
    rates: Rates = {"limit": [], **{name: [] for name in steppers}}
    for _ in range(turns):
        actions = random_actions(native, rng, 3)
        rates["limit"].append(rate(limit.seconds(action) for action in actions))
        for name, stepper in steppers.items():
            rates[name].append(rate(seconds(stepper, action) for action in actions))
    for stepper in steppers.values():
        stepper.close()
    return rates


def measure_workers(
    task: Task, num_envs: int, threads: int, turns: int, **sizes: Any
) -> tuple[Rates, dict[str, float]]:
    """Gymnasium one after the other and in processes, and workers; and how many seconds each took to start."""
    build: dict[str, Callable[[], VectorEnv]] = {
        "sync": lambda: sync_vector_env(task, num_envs, **sizes),
        "async": lambda: AsyncVectorEnv(
            [partial(make_env, task, **sizes)] * num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
        ),
        "workers": lambda: worker_vector_env(task, num_envs, workers=threads, **sizes),
    }
    starts: dict[str, float] = {}
    steppers: dict[str, Stepper] = {}
    for name, make in build.items():
        began = time.perf_counter()
        steppers[name] = Stepper(make())
        steppers[name].reset(0)
        starts[name] = time.perf_counter() - began
    space = steppers["sync"].env.action_space
    space.seed(0)
    rates: Rates = {name: [] for name in steppers}
    for _ in range(turns):
        actions = [space.sample() for _ in range(20)]
        for name, stepper in steppers.items():
            rates[name].append(rate(seconds(stepper, action) for action in actions))
    for stepper in steppers.values():
        stepper.close()
    return rates, starts


def rate(results: Iterable[tuple[int, float]]) -> float:
    """Steps per second, from the steps and seconds of each call."""
    steps, taken = np.sum(list(results), axis=0)
    return float(steps / taken)


def print_row(title: str, columns: Iterable[str]) -> None:
    """A row of a table."""
    print(f"{title:44}" + "".join(f"{column:>18}" for column in columns))


def medians(rates: Rates, subject: str, others: Sequence[str]) -> list[str]:
    """Of the rates, and of the ratios of `subject` to the others."""
    values = [f"{statistics.median(rates[name]):.0f}" for name in (*others, subject)]
    return values + [f"{statistics.median(np.divide(rates[subject], rates[name]).tolist()):.2f}" for name in others]


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "CartPole-v1", "gymnasium_robotics:PointMaze_Medium-v3"]
    parser.add_argument("ids", nargs="*", default=defaults)
    for name, default in (("envs", 40), ("chunk", 4), ("threads", 2), ("turns", 20)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    args = parser.parse_args()
    others = []
    print_row("MuJoCo, steps per second", ["Gymnasium", "limit", "native", "native/Gymnasium", "native/limit"])
    for env_id in args.ids:
        task = Task("benchmark", env_id)
        sizes = {"history": 1, "chunk": 1 if space_dims(task).discrete else args.chunk}
        native = make_vector_env(task, args.envs, threads=args.threads, **sizes)
        if not isinstance(native, NativeVectorEnv):
            native.close()
            others.append((task, sizes))
            continue
        rates = measure_native(task, native, args.threads, args.turns, **sizes)
        print_row(env_id, medians(rates, "native", ("sync", "limit")))
    print()
    titles = ["sync", "async", "workers", "workers/sync", "workers/async", "start: sync", "async", "workers"]
    print_row("others, steps per second", titles)
    for task, sizes in others:
        rates, starts = measure_workers(task, args.envs, args.threads, args.turns, **sizes)
        columns = medians(rates, "workers", ("sync", "async")) + [f"{start:.1f} s" for start in starts.values()]
        print_row(task.env_id, columns)


if __name__ == "__main__":
    main()
