"""Taking turns across processes: a contender times so many of its iterations whenever it is told to, and else waits.

The contenders' side runs in other people's environments too, so nothing but the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

SCRIPTS = Path(__file__).resolve().parent.parent
MARK = "seconds of the turn: "
REPORT = "report: "


def environment() -> dict[str, str]:
    """That of child processes: they find this package, and every library chooses itself how it uses threads.

    Importing dppo sets a variable of OpenMP's as well, which is not to be passed on to others.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    path = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path)}


class Turns:
    """The contender's side: call `ended` after every iteration; it waits between the turns."""

    def __init__(self) -> None:
        self._wanted = 0
        self._seconds: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        """Wait for the next turn; when there is none any more, end the process."""
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self._wanted, self._seconds = int(line), []
        self._began = time.perf_counter()

    def ended(self) -> None:
        """Note an iteration's end."""
        self._seconds.append(time.perf_counter() - self._began)
        if len(self._seconds) == self._wanted:
            print(MARK + json.dumps(self._seconds), flush=True)
            self.begin()
        self._began = time.perf_counter()

    def run(self, iterate: Callable[[], object]) -> None:
        """All turns of a contender whose iterations can be called."""
        self.begin()
        while True:
            iterate()
            self.ended()


def run_and_report(iterate: Callable[[], object], conclude: Callable[[], object], *, iterations: int) -> None:
    """All turns of a contender that iterates so often; one turn more, and it reports what it concludes."""
    turns = Turns()
    turns.begin()
    for _ in range(iterations):
        iterate()
        turns.ended()
    print(REPORT + json.dumps(conclude()), flush=True)
    turns.ended()


def settings() -> dict[str, Any]:
    """What this contender was started with."""
    return json.loads(sys.argv[1])


class Contender:
    """The other side: a process that runs the module ``throughput.workers.<worker>``, in a directory of its own."""

    def __init__(self, python: Path, worker: str, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.report: Any = None
        """What it has reported, if anything."""
        self._directory = tempfile.TemporaryDirectory()
        self._errors = Path(self._directory.name) / "errors.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", f"throughput.workers.{worker}", json.dumps(self.settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self._directory.name,
                env=environment(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def cpu_seconds(self) -> float:
        """Of all threads of the process so far, in hundredths of seconds; what other processes do is not in it."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in user code and in the system

    def turn(self, iterations: int) -> list[float]:
        """Seconds of so many iterations, one after the other.

        Raises:
            RuntimeError: the contender died; with its last words.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{iterations}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # told below
        for line in self._process.stdout:
            if line.startswith(REPORT):
                self.report = json.loads(line.removeprefix(REPORT))
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise RuntimeError(f"{self._process.args} died:\n{self._errors.read_text()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._directory.cleanup()
