"""How many CPU threads torch uses, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread: for the many small products of acting, where handing out work costs more than it saves.

    Above all on a machine that others use, too: there, threads that wait for each other at every product take several
    times as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
