"""Peak memory of a process and its descendants, as Linux tells it; elsewhere 0."""

from __future__ import annotations

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


def peak_bytes(pid: int) -> int:
    """The most that a process has had resident since it began; 0 where it is gone.

    Not `getrusage`'s ru_maxrss: that is never less than what the process that started it had.
    """
    return _bytes(pid, "status", "VmHWM:")


def proportional_bytes(pid: int) -> int:
    """What a process has now, with what it shares divided among those that share it; 0 where it is gone."""
    return _bytes(pid, "smaps_rollup", "Pss:")


def _bytes(pid: int, file: str, name: str) -> int:
    try:
        lines = (PROC / str(pid) / file).read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


class PeakMemory:
    """Watches a tree of processes for as long as the block runs: `with PeakMemory(pid) as memory: ...; memory.peak`.

    A single process's peak is the kernel's own figure. Of several, the proportional shares are summed up at each
    sample; only then, because the kernel walks the page tables for them, which slows down whoever is being timed.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        """Bytes."""
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_S):
            tree = descendants(self._pid)
            shares = sum(map(proportional_bytes, tree)) if len(tree) > 1 else 0
            self.peak = max(self.peak, peak_bytes(self._pid), shares)
