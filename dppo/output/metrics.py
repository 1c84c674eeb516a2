"""Metrics of a run: one JSON line per row in ``metrics.jsonl``, passed on to whatever else shows them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from dppo.output.run_directory import RunDirectory, jsonable, write_text
from policies.errors import UserError

Row = Mapping[str, float | int | None]
"""One iteration's metrics by name; None (and NaN) where there is nothing to report."""


LONGEST_ROW = 2**16
"""Bytes; far more than a row has."""


class Sink(Protocol):
    """Somewhere else that rows go."""

    def log(self, row: Row) -> None:
        """Take a row without NaN or infinities."""
        ...

    def close(self) -> None:
        """Hand over whatever is still kept back."""
        ...


class MetricsLogger:
    """Appends rows to ``metrics.jsonl``, each flushed, and hands them to the sinks. A context manager."""

    def __init__(self, directory: RunDirectory, sinks: Sequence[Sink] = ()) -> None:
        self._path = directory.metrics_path
        self._file = self._path.open("ab", buffering=0)
        self._sinks = sinks

    def log(self, row: Row) -> None:
        """Write one row; NaN and infinities become null.

        Raises:
            UserError: it cannot be written, since the disk is full or for the like of it.
        """
        plain = jsonable(row)
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for sink in self._sinks:
                sink.log(plain)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"a row of metrics could not be written to {self._path.parent}: {reason}") from error

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardSink:
    """One scalar per key, in ``tensorboard/`` under the run directory."""

    def __init__(self, directory: RunDirectory, *, x_axis: str = "env_steps", done: int | None = None) -> None:
        """``done``: of a run that goes on, where; what was shown beyond that is shown no more."""
        # Imported here: 0.2 s that only those who want it pay.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory.path / "tensorboard"), purge_step=None if done is None else done + 1)
        self._x_axis = x_axis

    def log(self, row: Row) -> None:
        """Write a scalar for each key that has a value."""
        x = row[self._x_axis]
        for key, value in row.items():
            if value is not None and key != self._x_axis:
                self._writer.add_scalar(key, value, global_step=None if x is None else int(x))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run named after the run directory.

    Raises:
        UserError: the package is missing.
    """

    def __init__(
        self, directory: RunDirectory, *, project: str, config: Mapping[str, Any], x_axis: str = "env_steps"
    ) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]  # optional
        except ImportError as error:
            raise UserError("Weights & Biases is not installed: pip install wandb") from error
        name, folder = directory.path.name, str(directory.path)
        # "auto" goes on with the run that was interrupted in this directory, if there is one.
        self._run = wandb.init(project=project, name=name, dir=folder, config=dict(config), resume="auto")
        self._run.define_metric("*", step_metric=x_axis)

    def log(self, row: Row) -> None:
        """Send the keys that have a value."""
        self._run.log({key: value for key, value in row.items() if value is not None})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def cut_back(path: Path, x_axis: str, done: int) -> None:
    """Take those rows away, and a torn last one, that come after a place on the axis: they are to be written again."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row.get(x_axis, 0) <= done]
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a ``metrics.jsonl``, whatever its size; None where there is none yet, or it is damaged."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LONGEST_ROW, 0))
            lines = file.read().split(b"\n")
        return json.loads(lines[-2]) if len(lines) > 1 else None
    except (OSError, ValueError):
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off (a killed run) is left out.

    Raises:
        UserError: no such file, or a line before the last that is no JSON.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read metrics from {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not a JSON object: {line[:60]!r}") from error
    return rows
