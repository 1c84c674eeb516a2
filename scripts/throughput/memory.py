"""Peak memory of a process and its descendants (Linux; elsewhere the kernel's own figure for the process alone)."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

PROC = Path("/proc")
INTERVAL_S = 0.1


def descendants(pid: int) -> list[int]:
    """The process itself and all that descend from it."""
    children = []
    for path in PROC.glob(f"{pid}/task/*/children"):
        try:
            children += [int(child) for child in path.read_text().split()]
        except OSError:  # gone meanwhile
            continue
    return [pid, *(process for child in children for process in descendants(child))]


def proportional_bytes(pid: int) -> int:
    """A process's memory, with what it shares divided among those that share it; 0 where it is gone."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


class PeakMemory:
    """Samples a tree of processes for as long as the block runs: `with PeakMemory(pid) as memory: ...; memory.peak`.

    Asking the kernel for shares walks the page tables, which would slow a process down that is being timed; so it is
    asked only about real trees, unless ``always``. A single process's peak comes with its end, from `os.wait4`.
    """

    def __init__(self, pid: int, *, always: bool = False) -> None:
        self.peak = 0
        """Bytes."""
        self._pid = pid
        self._always = always
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(INTERVAL_S):
            tree = descendants(self._pid)
            if self._always or len(tree) > 1:
                self.peak = max(self.peak, sum(map(proportional_bytes, tree)))


def run_measured(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; its peak memory in bytes, descendants included.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with PeakMemory(process.pid) as memory:
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return max(memory.peak, 1024 * usage.ru_maxrss)
