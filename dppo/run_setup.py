"""What the commands share at their start: device, seeds, run directory, loggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dppo.output.metrics import Sink, TensorBoardSink, WandbSink
from dppo.output.run_directory import RunDirectory, free_path
from policies import UserError

RUNS = Path("runs")
MOST_THREADS = 1024
"""Far more than any machine's processors; with very many, the libraries below crash."""


def prepare_device(config: Mapping[str, Any]) -> torch.device:
    """Set the number of threads and resolve ``device``.

    Raises:
        UserError: a device that is not there, or an impossible number of threads or seed.
    """
    threads, seed = config["threads"], config["seed"]
    if seed < 0:
        raise UserError(f"seed must not be negative, but is {seed}")
    if threads is not None:
        if not isinstance(threads, int) or threads < 1:
            raise UserError(f"threads must be a positive number, or null for torch's own choice, not {threads!r}")
        if threads > MOST_THREADS:
            raise UserError(
                f"threads={threads} is more than {MOST_THREADS}; choose as many as this run may use processors"
            )
        torch.set_num_threads(threads)
    name = str(config["device"])
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        detail = str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used: {detail}") from error


@contextmanager
def open_run(config: Mapping[str, Any], default_name: str, source: Path | None = None) -> Iterator[RunDirectory]:
    """A new run directory: ``run``, or ``runs/<default_name>``, numbered where that exists and is to be kept.

    Other processes are kept out of it while this context lasts.

    Raises:
        UserError: it exists and may not be overwritten, another process is at work in it, or it holds ``source``, the
            checkpoint that the run starts from.
    """
    overwrite = bool(config["overwrite"])
    path = RUNS / default_name
    if config["run"] is not None:
        path = Path(str(config["run"])).expanduser()
    elif not overwrite:
        path = free_path(path)
    if source is not None and overwrite and source.resolve().is_relative_to(path.resolve()):
        raise UserError(f"overwriting {path} would delete the checkpoint {source}; choose another run=...")
    check_logger(config)  # before anything is written
    with RunDirectory(path).held():  # before anything is removed
        yield begin_run(path, config)


def begin_run(path: Path, config: Mapping[str, Any]) -> RunDirectory:
    """Let a run begin in a directory that this process holds; what may be overwritten there goes.

    Raises:
        UserError: it may not be overwritten, or not be written.
    """
    directory = RunDirectory.create(path, overwrite=bool(config["overwrite"]), config=config)
    print(f"writing to {directory.path}", flush=True)
    return directory


def check_logger(config: Mapping[str, Any]) -> None:
    """Refuse a logger that is unknown or not installed.

    Raises:
        UserError: naming it.
    """
    kind = config.get("logger", {"type": "none"}).get("type")
    if kind not in ("tensorboard", "wandb", "none"):
        raise UserError(f"unknown logger.type {kind!r}; there are: tensorboard, wandb, none")
    if kind == "wandb" and find_spec("wandb") is None:
        raise UserError("Weights & Biases is not installed: pip install wandb, or choose logger=tensorboard")


def build_sinks(config: Mapping[str, Any], run: RunDirectory, x_axis: str, done: int | None = None) -> list[Sink]:
    """Where rows of metrics go besides ``metrics.jsonl``; ``done``: of a run that goes on, where."""
    logger = dict(config["logger"])
    kind = logger.pop("type")
    if kind == "tensorboard":
        return [TensorBoardSink(run, x_axis=x_axis, done=done)]
    if kind == "wandb":
        return [WandbSink(run, config=config, x_axis=x_axis, **logger)]
    return []
