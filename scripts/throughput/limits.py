"""What the machine could do at best: MuJoCo alone, and matrix products alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco as _mujoco
import numpy as np
import torch
from mujoco.rollout import Rollout
from torch.nn import functional as F

from dppo.building import build_task
from dppo.configuration import compose_config
from dppo.envs.native.vector_env import NativeVectorEnv
from dppo.envs.vector import make_plain_env, make_vector_env
from dppo.processors import usable_processors
from dppo.task import Task
from throughput.options import PRECISIONS, Options, say

mujoco: Any = _mujoco

WIDTH = 512
"""Of the paper's actor for Hopper."""
SHAPES = {"sampling": 40, "cloning": 128, "update": 5000}
"""Rows of a matrix product: environments, a minibatch, and two threads' parts of one."""


class Limit:
    """MuJoCo alone: one call of `mujoco.rollout` for all environments, that looks at nothing."""

    def __init__(self, task: Task, native: NativeVectorEnv, threads: int) -> None:
        env: Any = make_plain_env(task).unwrapped
        self._model, self._frame_skip = env.model, env.frame_skip
        self._native = native
        self._datas = [mujoco.MjData(env.model) for _ in range(threads)]
        self._rollout = Rollout(nthread=threads if threads > 1 else 0)

    def seconds(self, action: np.ndarray) -> tuple[int, float]:
        """Environment steps, and how long they took."""
        physics = self._native.get_state()["physics"]
        controls = np.repeat(action.astype(np.float64), self._frame_skip, axis=1)
        state = np.empty((*controls.shape[:2], physics["state"].shape[1]))
        began = time.perf_counter()
        self._rollout.rollout(
            [self._model] * len(controls),
            self._datas,
            physics["state"],
            controls,
            initial_warmstart=physics["warmstart"],
            nstep=controls.shape[1],
            state=state,
            skip_checks=True,
        )
        return action.shape[0] * action.shape[1], time.perf_counter() - began


def random_actions(env: NativeVectorEnv, rng: np.random.Generator, count: int) -> np.ndarray:
    """Action chunks for all environments, [count, N, Ta, Da]."""
    space: Any = env.action_space
    draws = rng.normal(0, 0.7, (count, *space.shape)) * space.high
    return np.clip(draws, space.low, space.high).astype(np.float32)


class SimulationLimit:
    """Environment steps per second of MuJoCo alone on all cores, from the states that random actions lead to."""

    def __init__(self, task: Task, num_envs: int = 40, chunk: int = 4) -> None:
        threads = usable_processors()
        native = make_vector_env(task, num_envs, history=1, chunk=chunk, threads=threads)
        assert isinstance(native, NativeVectorEnv)
        self._native = native
        self._limit = Limit(task, native, threads)
        self._rng = np.random.default_rng(0)
        native.reset(seed=0)

    def rate(self, repeats: int = 20) -> float:
        """The median over some chunk steps."""
        rates = []
        for action in random_actions(self._native, self._rng, repeats):
            steps, seconds = self._limit.seconds(action)
            rates.append(steps / seconds)
            self._native.step(action)
        return statistics.median(rates)


class ProductLimit:
    """Floating-point operations per second of a linear layer of some rows, [rows, 512] x [512, 512]."""

    def __init__(self, rows: int, precision: str) -> None:
        dtype = getattr(torch, precision)
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(rows, WIDTH, generator=generator).to(dtype)
        self._weight = torch.randn(WIDTH, WIDTH, generator=generator).to(dtype)
        self._calls = max(1, 2000 // rows)  # enough for the clock
        self._flops = self._calls * 2 * rows * WIDTH * WIDTH

    def rates(self, repeats: int = 15) -> dict[str, float]:
        """The median over some repeats, by use of threads.

        One thread; torch's choice of threads, which meet at every product; and the rows dealt out to as many threads,
        each with products of its own.
        """
        threads = torch.get_num_threads()
        shares = self._inputs.tensor_split(threads)
        try:
            torch.set_num_threads(1)
            rates = {"1": self._rate(lambda: self._multiply(self._inputs), repeats)}
            if threads > 1:
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    rates[f"{threads} apart"] = self._rate(lambda: list(pool.map(self._multiply, shares)), repeats)
                torch.set_num_threads(threads)
                rates[f"{threads} together"] = self._rate(lambda: self._multiply(self._inputs), repeats)
        finally:
            torch.set_num_threads(threads)
        return rates

    def rate(self, repeats: int = 15) -> float:
        """The best of `rates`."""
        return max(self.rates(repeats).values())

    @torch.inference_mode()
    def _multiply(self, inputs: torch.Tensor) -> None:
        for _ in range(self._calls):
            F.linear(inputs, self._weight)

    def _rate(self, work: Callable[[], object], repeats: int) -> float:
        seconds = []
        for _ in range(1 + repeats):  # the first one warms up
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return self._flops / statistics.median(seconds[1:])


def measure(options: Options) -> dict[str, Any]:
    """Steps per second by task, and operations per second by precision, shape and use of threads."""
    repeats = 5 if options.quick else 200
    simulation = {}
    for name in options.tasks:
        say(f"MuJoCo alone, {name}")
        task = build_task(compose_config("finetune", [f"task={name}"]))
        simulation[name] = SimulationLimit(task).rate(repeats)
    products: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        say(f"matrix products, {precision}")
        products[precision] = {
            use: {"rows": rows, "flops_per_s": ProductLimit(rows, precision).rates(repeats)}
            for use, rows in SHAPES.items()
        }
    return {"simulation": simulation, "products": products}
