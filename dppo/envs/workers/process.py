"""One worker process, as seen from the process that trains: started, asked, ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from typing import Any

from dppo.envs.workers.worker import Failure, States
from policies.errors import UserError

GRACE_S = 3.0
"""How long a worker may take to finish what it does and to close its environments."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""The cores are shared out by starting workers, not by threads of theirs."""


class WorkerDiedError(UserError):
    """A worker process has ended, or cannot be started, without anybody having wanted that."""


class WorkerProcess:
    """A fresh Python interpreter that runs `worker.serve`, and the channel to it.

    It is neither forked, nor started by `multiprocessing`: a fork of a process in which torch's threads run may find
    their locks taken forever, and the other ways import the main module once more, so that a script without
    `if __name__ == "__main__"` would start all over in each worker. What the worker needs of the main module travels by
    value instead (cloudpickle), and everything else is imported there from the same folders as here.
    """

    def __init__(self, rows: range, memory: int) -> None:
        """Start it, without waiting for it.

        Args:
            rows: the environments it is for.
            memory: file descriptor of the records.

        Raises:
            WorkerDiedError: the system starts no more processes.
        """
        self._rows = rows
        self._channel, theirs = Pipe()
        folders = [os.path.abspath(folder) for folder in sys.path]
        serve = f"from dppo.envs.workers.worker import serve; serve({theirs.fileno()}, {memory})"
        try:
            self._process = subprocess.Popen(
                # A crash in native code prints where it happened.
                [sys.executable, "-P", "-X", "faulthandler", "-c", f"import sys; sys.path[:] = {folders!r}; {serve}"],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
                pass_fds=(theirs.fileno(), memory),
                process_group=0,  # Ctrl-C in the terminal is for the process that trains; it ends its workers itself
            )
        except OSError as error:
            self._channel.close()
            raise WorkerDiedError(f"the worker process of {self._whose()} cannot be started: {error}") from error
        finally:
            theirs.close()

    def send(self, message: Any) -> None:
        """Give it something to do.

        Raises:
            WorkerDiedError: it has died.
        """
        try:
            self._channel.send(message)
        except ConnectionError:
            raise WorkerDiedError(self._obituary()) from None

    def receive(self) -> Failure | States | None:
        """Wait for what it has to say about the last message.

        Raises:
            WorkerDiedError: it has died.
        """
        try:
            return self._channel.recv()
        except (EOFError, ConnectionError):
            raise WorkerDiedError(self._obituary()) from None

    def hang_up(self) -> None:
        """Let it close its environments and end, once it has done what it is doing."""
        self._channel.close()

    def end(self, timeout: float) -> None:
        """Wait for its end, and bring it about after `timeout` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._process.kill()  # does nothing to a process that has ended
            self._process.wait()

    def _obituary(self) -> str:
        try:
            code = self._process.wait(GRACE_S)
            cause = f"has died (killed: {signal.strsignal(-code)})" if code < 0 else f"has died (exit status {code})"
        except subprocess.TimeoutExpired:
            cause = "does not answer any more"
        return f"the worker process of {self._whose()} {cause}"

    def _whose(self) -> str:
        first, last = self._rows[0], self._rows[-1]
        return f"environments {first} to {last}" if first < last else f"environment {first}"


def end_all(workers: Sequence[WorkerProcess]) -> None:
    """End processes: at once if they are idle, else after `GRACE_S` at the latest."""
    for worker in workers:
        worker.hang_up()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        worker.end(max(0.0, deadline - time.monotonic()))
