"""Environment steps per second of MuJoCo environments: Gymnasium's own, native, and what MuJoCo alone would allow.

Random actions, through a `Stepper`. The limit is one call of `mujoco.rollout` for all environments that looks at
nothing, with the states and actions of the native ones. The three take turns, so that they share the moods of the
machine. The table has medians of the turns, for the ratios too.

    python scripts/benchmark_environments.py [--envs N] [--chunk N] [--threads N] [--turns N] [ID ...]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from dppo.envs.native.vector_env import NativeVectorEnv
from dppo.envs.stepper import Stepper
from dppo.envs.vector import make_vector_env, sync_vector_env
from dppo.task import Task
from throughput.limits import Limit, random_actions


def seconds(stepper: Stepper, action: np.ndarray) -> tuple[int, float]:
    """Environment steps, and how long they took."""
    began = time.perf_counter()
    steps = stepper.step(action).steps.sum()
    return int(steps), time.perf_counter() - began


def measure(env_id: str, num_envs: int, chunk: int, threads: int, turns: int) -> dict[str, list[float]]:
    """Steps per second in every turn."""
    task = Task("benchmark", env_id)
    native = make_vector_env(task, num_envs, history=1, chunk=chunk, threads=threads)
    if not isinstance(native, NativeVectorEnv):
        raise SystemExit(f"{env_id} has no native environment")
    steppers = [Stepper(sync_vector_env(task, num_envs, history=1, chunk=chunk)), Stepper(native)]
    for stepper in steppers:
        stepper.reset(0)
    limit = Limit(task, native, threads)
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"limit": [], "sync": [], "native": []}
    for _ in range(turns):
        actions = random_actions(native, rng, 3)
        for name, results in (
            ("limit", [limit.seconds(action) for action in actions]),
            *(
                (name, [seconds(each, a) for a in actions])
                for name, each in zip(("sync", "native"), steppers, strict=True)
            ),
        ):
            steps, taken = np.sum(results, axis=0)
            rates[name].append(float(steps / taken))
    for stepper in steppers:
        stepper.close()
    return rates


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", default=["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"])
    for name, default in (("envs", 40), ("chunk", 4), ("threads", 2), ("turns", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"{'':26}{'Gymnasium':>10}{'native':>10}{'limit':>10}{'native/Gymnasium':>18}{'native/limit':>14}")
    for env_id in args.ids:
        rates = measure(env_id, args.envs, args.chunk, args.threads, args.turns)
        medians = [statistics.median(rates[name]) for name in ("sync", "native", "limit")]
        ratios = [statistics.median(np.divide(rates["native"], rates[name]).tolist()) for name in ("sync", "limit")]
        print(f"{env_id:26}" + "".join(f"{rate:10.0f}" for rate in medians) + f"{ratios[0]:18.2f}{ratios[1]:14.2f}")


if __name__ == "__main__":
    main()
