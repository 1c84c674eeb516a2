"""Running what is not finished yet, several runs at a time, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from dppo.comparison.plan import PlannedRun

PATIENCE_S = 300.0
"""How long an interrupted run may take to end its iteration, or an evaluation, and to save what it learned."""
POLL_S = 0.2


def run_all(
    runs: Sequence[PlannedRun],
    *,
    processes: int,
    threads: int,
    extra: Path | None,
    on_end: Callable[[PlannedRun, int, float], None],
    on_wait: Callable[[Collection[PlannedRun]], None],
) -> list[PlannedRun]:
    """Run them; those that failed.

    Args:
        runs: none of them finished.
        processes: how many at a time.
        threads: of each.
        extra: a directory with more choices, as of `compose_config`.
        on_end: hears of each run that ended, its exit status, and the seconds that it took.
        on_wait: hears now and then which runs are going on.
    """
    waiting, failed = list(runs), []
    running: dict[PlannedRun, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                run = waiting.pop(0)
                running[run] = _start(run, threads, extra), time.perf_counter()
            time.sleep(POLL_S)
            on_wait(running)
            for run, (process, began) in list(running.items()):
                status = process.poll()
                if status is not None:
                    del running[run]
                    if status:
                        failed.append(run)
                    on_end(run, status, time.perf_counter() - began)
    finally:
        _stop([process for process, _ in running.values()])
    return failed


def _start(run: PlannedRun, threads: int, extra: Path | None) -> subprocess.Popen[bytes]:
    """Start a run, or go on with it where it was stopped."""
    goes_on = run.can_go_on
    run.note_settings()
    where = [] if extra is None else ["--config-dir", str(extra)]
    path = str(run.path).replace("\\", "\\\\").replace("'", "\\'")
    what = [f"resume='{path}'", *run.trust(extra)] if goes_on else [*run.overrides, f"run='{path}'", "overwrite=true"]
    with run.log_path.open("ab" if goes_on else "wb") as log:
        command = [sys.executable, "-m", "dppo.cli", "finetune", *where, *what, f"threads={threads}"]
        # In a session of its own: Ctrl-C is for the comparison, which then asks its runs to end, once.
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask them to end, and end them if they do not, or if there is no more time to wait for them."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE_S
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.wait()
