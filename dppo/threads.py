"""How many CPU threads compute, and when."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import cache

import torch
from torch import Tensor

from policies import Policy, Sample

PRODUCTS_PER_PART = 100_000_000
"""Multiplications below which a part of a batch is not worth a thread: Python lets only one of them in at a time."""


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread: for many small products, where handing out work costs more than it saves.

    Above all on a machine that others use, too: there, threads that wait for each other at every product take several
    times as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sample_in_parts(policy: Policy, obs: Tensor, noise: Tensor, *, deterministic: bool, threads: int) -> Sample:
    """`Policy.sample` with the rows dealt out to threads, which meet once per batch instead of once per product.

    Args:
        policy: whose chain is long enough, or whose network large enough, for it to pay; others are not dealt out.
        obs: [B, To, Do].
        noise: [B, ...], as of `Policy.draw_noise`, so that the random numbers do not depend on the number of threads.
        deterministic: as of `Policy.sample`.
        threads: at most so many parts.
    """
    parts = min(threads, len(obs), len(obs) * policy.products_per_sample // PRODUCTS_PER_PART)
    if parts < 2 or obs.device.type != "cpu":
        return policy.sample(obs, deterministic=deterministic, noise=noise)

    @torch.inference_mode()
    def sample(obs: Tensor, noise: Tensor) -> Sample:
        return policy.sample(obs, deterministic=deterministic, noise=noise)

    with single_thread():
        samples = list(_pool(threads).map(sample, obs.tensor_split(parts), noise.tensor_split(parts)))
    return Sample(*(torch.cat([getattr(one, field.name) for one in samples]) for field in fields(Sample)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "sample", initializer=torch.set_num_threads, initargs=(1,))
