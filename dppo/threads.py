"""How many CPU threads compute, and on what.

Torch's own threads share every single product and wait for each other after it. That is a waste where the products are
small, and a disaster on a machine that others use, too. So rows of a batch are dealt out to threads instead, each of
which runs torch on one thread, and which meet once all is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from policies import Policy, Sample
from policies.base import Explorer

PRODUCTS_PER_SAMPLE_PART = 100_000_000
"""Multiplications below which a part of a batch to sample is not worth a thread: it takes many small steps, and Python
lets only one thread in at a time."""
PRODUCTS_PER_GRADIENT_PART = 30_000_000
"""Multiplications of a forward pass below which a part of a minibatch is not worth a thread."""
ROWS_PER_GRADIENT_PART = 2500
"""Rows above which a part is cut further. What lies between its layers then stays in the processor's cache, and memory
is not returned to the system and fetched again each time."""
MOST_PARTS = 8
"""Into which a minibatch of fewer rows is cut."""

Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_in_words() -> str:
    """How many threads torch has, as "1 thread" or "4 threads"."""
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def map_in_threads(function: Callable[[Part], Result], parts: Sequence[Part], threads: int) -> list[Result]:
    """The function's results in the order of the parts, so many of them at a time, torch on one thread in each."""
    with single_thread():
        if len(parts) == 1 or threads == 1:
            return [function(part) for part in parts]
        futures = [_pool(threads).submit(function, part) for part in parts]
        wait(futures)  # also for those after one that failed: they may write where the next call does
        return [future.result() for future in futures]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "dppo", initializer=torch.set_num_threads, initargs=(1,))


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has the pool, but not its threads


def explorer_in_parts(policy: Policy, rows: int, threads: int) -> Explorer:
    """`Policy.explorer` for batches of so many rows, dealt out to threads where that pays."""
    device = next(policy.parameters()).device
    if _parts_to_sample(policy, rows, threads, device) < 2:
        return policy.explorer()
    return Explorer(partial(sample_in_parts, policy, deterministic=False, threads=threads))


def sample_in_parts(policy: Policy, obs: Tensor, noise: Tensor, *, deterministic: bool, threads: int) -> Sample:
    """`Policy.sample`, the rows dealt out to threads where that pays.

    Args:
        policy: any.
        obs: [B, To, Do].
        noise: [B, ...], as of `Policy.draw_noise`, so that the random numbers do not depend on the number of threads.
        deterministic: as of `Policy.sample`.
        threads: at most so many parts.
    """
    count = _parts_to_sample(policy, len(obs), threads, obs.device)
    if count < 2:
        return policy.sample(obs, deterministic=deterministic, noise=noise)

    @torch.inference_mode()
    def sample(part: tuple[Tensor, Tensor]) -> Sample:
        obs, noise = part
        return policy.sample(obs, deterministic=deterministic, noise=noise)

    parts = list(zip(obs.tensor_split(count), noise.tensor_split(count), strict=True))
    samples = map_in_threads(sample, parts, threads)
    return Sample(*(torch.cat([getattr(one, field.name) for one in samples]) for field in fields(Sample)))


def _parts_to_sample(policy: Policy, rows: int, threads: int, device: torch.device) -> int:
    if threads < 2 or rows < 2 or device.type != "cpu":
        return 1
    return min(threads, rows, rows * policy.products_per_sample // PRODUCTS_PER_SAMPLE_PART)


def rows_per_part(rows: int, products_per_row: int, device: torch.device) -> int:
    """Into parts of how many rows a minibatch is cut to compute its gradient.

    It does not depend on the number of threads, and so nor does what is learned.
    """
    if device.type != "cpu":
        return rows
    worth = rows * products_per_row // PRODUCTS_PER_GRADIENT_PART
    count = max(-(-rows // ROWS_PER_GRADIENT_PART), min(worth, MOST_PARTS), 1)
    return -(-rows // count)
