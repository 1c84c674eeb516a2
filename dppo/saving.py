"""The checkpoints of a run: when one is due, which of them are kept, and which is the best."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dppo.checkpoint import checkpoints_in
from dppo.statistics import EvaluationSummary
from dppo.stopping import Stopped
from policies.config import config_from_dict

BEST = "best"
"""The link to the best of a run's checkpoints, among them."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay."""

    checkpoint_interval: int
    """Iterations (or rows of metrics) from one to the next; 0: however many."""
    checkpoint_minutes: float
    """Wall-clock time from one to the next, to the end of the iteration; 0: however much."""
    keep_checkpoints: int
    """So many of the newest stay, and the best; 0: all."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, but is {value}")


def checkpoint_settings(config: Mapping[str, Any], where: str) -> CheckpointConfig:
    """Those of a command's composed configuration.

    Raises:
        UserError: an impossible setting.
    """
    names = ("checkpoint_interval", "checkpoint_minutes", "keep_checkpoints")
    return config_from_dict(CheckpointConfig, {name: config[name] for name in names}, where)


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far: of the highest success rate, and of those the highest return."""

    steps: int
    """Its name."""
    success_rate: float | None
    return_mean: float

    def is_beaten_by(self, result: EvaluationSummary) -> bool:
        """Whether an evaluation gave more."""
        return (result.success_rate or 0.0, result.return_mean) > (self.success_rate or 0.0, self.return_mean)


class Checkpoints:
    """Writes them, and removes old ones only once a newer one is on the disk."""

    def __init__(self, folder: Path, config: CheckpointConfig, write: Callable[[Path], object], *, go_on: str) -> None:
        """Checkpoints of a run.

        Args:
            folder: of the run's checkpoints.
            config: when, and how many.
            write: writes the present state of the run to a path, whole or not at all.
            go_on: the command that continues the run, to be told if it fails.
        """
        self.folder = folder
        self.config = config
        self.best: Best | None = None
        """As far as is known."""
        self.latest: Path | None = None
        """The newest one."""
        self._write = write
        self._go_on = go_on
        self._saved_at = time.monotonic()

    @contextmanager
    def told_on_failure(self) -> Iterator[None]:
        """Whatever ends what is done in this context, but `Stopped`, which says so itself: tell how to go on."""
        try:
            yield
        except Stopped:
            raise
        except BaseException:
            if self.latest is None:
                print(f"there is no checkpoint yet; `{self._go_on}` starts anew", flush=True)
            else:
                print(f"the last checkpoint is {self.latest}; `{self._go_on}` goes on from it", flush=True)
            raise

    def go_on(self, path: Path, best: Best | None, last: EvaluationSummary | None) -> None:
        """The state is that of this checkpoint; those that claim to be newer go.

        Args:
            path: the checkpoint.
            best: the best one when it was written.
            last: its own evaluation after that, if the run had ended with it.
        """
        self.latest, self.best = path, best
        self._note(int(path.name), last)
        for newer in checkpoints_in(self.folder):
            if int(newer.name) > int(path.name):
                shutil.rmtree(newer)
        self._link()

    def after(self, iteration: int, steps: int, result: EvaluationSummary | None) -> None:
        """An iteration is over, after so many steps, and perhaps evaluated: save what is due to be, or is the best."""
        config = self.config
        minutes = (time.monotonic() - self._saved_at) / 60
        due = config.checkpoint_interval > 0 and iteration % config.checkpoint_interval == 0
        late = config.checkpoint_minutes > 0 and minutes >= config.checkpoint_minutes
        if self._note(steps, result) or due or late:
            self.save(steps)

    def judge(self, steps: int, result: EvaluationSummary) -> None:
        """An evaluation of what was saved after so many steps."""
        if self._note(steps, result):
            self._link()

    def save(self, steps: int, *, again: bool = False) -> Path:
        """Write the present state, after so many steps, unless that is done and not to be done again.

        Raises:
            UserError: it cannot be written; earlier checkpoints are as they were.
        """
        path = self.folder / str(steps)
        if again or path != self.latest:
            self._write(path)
            self.latest, self._saved_at = path, time.monotonic()
        self._link()
        self._remove_old()
        return path

    def best_as_dict(self) -> dict[str, Any] | None:
        """The best one, as plain data."""
        return None if self.best is None else asdict(self.best)

    def _note(self, steps: int, result: EvaluationSummary | None) -> bool:
        better = result is not None and (self.best is None or self.best.is_beaten_by(result))
        if better:
            assert result is not None
            self.best = Best(steps, result.success_rate, result.return_mean)
        return better

    def _link(self) -> None:
        """Let the link name the best one, if it is there."""
        if self.best is None or not (self.folder / str(self.best.steps)).is_dir():
            return
        temporary = self.folder / f"{BEST}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(str(self.best.steps), target_is_directory=True)
        temporary.replace(self.folder / BEST)

    def _remove_old(self) -> None:
        if self.config.keep_checkpoints == 0:
            return
        for path in checkpoints_in(self.folder)[self.config.keep_checkpoints :]:
            if self.best is None or path.name != str(self.best.steps):
                shutil.rmtree(path)
