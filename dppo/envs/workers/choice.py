"""How many worker processes pay."""

import time
from contextlib import suppress

from dppo.envs.chunk import ChunkEnv

LEAST_WORK_S = 0.5e-3
"""Seconds of work per step that make a worker process worth having: several times what an exchange with it takes."""


def worthwhile_workers(env: ChunkEnv, num_envs: int, processors: int) -> int:
    """The number of processes that `num_envs` environments like `env` can keep busy, not above `processors`.

    Steps `env` at random for at most a tenth of a second, or one step, to find out. Less than 2 means none.
    """
    most = min(num_envs, processors)
    if most < 2:
        return most
    seconds: list[float] = []
    with suppress(Exception):  # an environment that fails is to do so where it is used
        env.reset(seed=0)
        env.action_space.seed(0)
        while len(seconds) < 10 and sum(seconds) < 0.1:
            began = time.perf_counter()
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            seconds.append(time.perf_counter() - began)
            if terminated or truncated:
                env.reset()
    return min(most, int(num_envs * min(seconds, default=0.0) / LEAST_WORK_S))  # the rest of the machine only adds
