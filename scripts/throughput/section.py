"""Sections by name, each in a process of its own: `python -m throughput.section NAME OPTIONS RESULT`."""

from __future__ import annotations

import dppo  # noqa: F401 - before torch, as in the commands: it decides how torch's threads wait

# isort: split
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from throughput import cloning, dppo_iteration, gaussian, limits
from throughput.memory import PeakMemory
from throughput.options import TASKS, Options
from throughput.turns import environment

SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "limits": limits.measure,
    **{task: partial(dppo_iteration.measure, task) for task in TASKS},
    "gaussian": gaussian.measure,
    "cloning": cloning.measure,
}


def run_section(name: str, options: Options) -> dict[str, Any]:
    """Measure a section in a fresh process: its result, threads, seconds and peak memory.

    Raises:
        subprocess.CalledProcessError: it failed; the process has said why.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        arguments = [name, json.dumps(dataclasses.asdict(options)), str(path)]
        command = [sys.executable, "-m", "throughput.section", *arguments]
        with subprocess.Popen(command, env=environment()) as process, PeakMemory(process.pid) as memory:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, command)
        seconds = time.perf_counter() - began
        return json.loads(path.read_text()) | {"memory_bytes": memory.peak, "seconds": seconds}


def main() -> None:
    """Be that process."""
    name, options, path = sys.argv[1:]
    result = SECTIONS[name](Options(**json.loads(options)))
    Path(path).write_text(json.dumps({"result": result, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
