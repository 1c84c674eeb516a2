"""One directory per run: what was asked, where it ran, what came out.

config.yaml         the resolved configuration, and a ``provenance`` block: versions, source, machine, command
metrics.jsonl       one line per iteration
summary.json        the closing numbers
checkpoints/  plots/  videos/
debug/              tensors, if training stopped because they were not finite
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dppo.durable import flush, write_flushed
from dppo.locking import held
from dppo.processors import usable_processors
from policies.errors import UserError

HEADER = "# Written by dppo: the resolved configuration of this run, and where it ran."
PROVENANCE = "provenance"
"""Of ``config.yaml``: where and when it ran, beside the configuration."""
PACKAGES = ("dppo", "torch", "diffusers", "gymnasium", "mujoco", "numpy", "hydra-core", "minari")


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Folders are made by whoever first writes into them."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, overwrite: bool, config: Mapping[str, Any]) -> RunDirectory:
        """Make the directory and write ``config.yaml``; whoever may meet another process there must hold it.

        Args:
            path: the directory; it may exist if it is empty.
            overwrite: empty it first, if it is an earlier run of ours.
            config: the resolved configuration, plain data.

        Raises:
            UserError: it exists and may not be overwritten, or cannot be written.
        """
        directory = cls(Path(path))
        try:
            if directory.path.exists():
                directory._clear(overwrite)
            directory.path.mkdir(parents=True, exist_ok=True)
            directory._write_config(config, provenance())
        except OSError as error:
            raise UserError(f"cannot write to the run directory {path}: {error.strerror or error}") from error
        return directory

    def read_config(self) -> dict[str, Any]:
        """The configuration that it began with, as plain data.

        Raises:
            UserError: it is no run, or the file is damaged.
        """
        return {key: value for key, value in self._read_content().items() if key != PROVENANCE}

    def read_provenance(self) -> dict[str, Any]:
        """When, where and with what it began, as of `provenance`.

        Raises:
            UserError: it is no run, or the file is damaged.
        """
        found = self._read_content().get(PROVENANCE)
        if not isinstance(found, dict):
            raise UserError(f"{self.config_path} has no {PROVENANCE}")
        return found

    def go_on(self, config: Mapping[str, Any], *, steps: int) -> None:
        """Write down that the run goes on after so many steps, with a configuration that may have been changed."""
        began = self.read_provenance()
        again = {"started": _now(), "command": command_line(), "after": steps}
        self._write_config(config, {**began, "resumed": [*began.get("resumed", []), again]})
        for left in self.path.glob(".*.tmp"):
            left.unlink()

    def _read_content(self) -> dict[str, Any]:
        if not self._is_ours():
            run = self.path.parent.parent
            hint = f"; it is a checkpoint of the run {run}" if self.path.parent.name == "checkpoints" else ""
            what = f"has no {self.config_path.name} of it" if self.path.exists() else "does not exist"
            raise UserError(f"{self.path} is no run of dppo: it {what}{hint}")
        try:
            content = OmegaConf.to_container(OmegaConf.load(self.config_path))
        except Exception as error:  # YAML's and OmegaConf's own kinds
            raise UserError(f"{self.config_path} is damaged: {' '.join(str(error).split())[:200]}") from error
        assert isinstance(content, dict)  # the first line of ours is followed by nothing else
        return {str(key): value for key, value in content.items()}

    def _write_config(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        content = OmegaConf.create({**config, PROVENANCE: dict(provenance)})
        write_text(self.config_path, f"{HEADER}\n{OmegaConf.to_yaml(content)}")

    def held(self) -> AbstractContextManager[None]:
        """Keep other processes out of the run while this context lasts, see `dppo.locking.held`."""
        return held(self.path, f"another process is at work in {self.path}; end it first, or choose another run")

    def read_summary(self) -> dict[str, Any] | None:
        """The closing numbers, or those so far; None where there are none yet, or they are damaged."""
        try:
            content = json.loads(self.summary_path.read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    @property
    def config_path(self) -> Path:
        """The resolved configuration and the provenance."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One line of metrics per iteration."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """The closing numbers."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """A folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """Pictures of the metrics."""
        return self.path / "plots"

    @property
    def videos(self) -> Path:
        """Recorded episodes."""
        return self.path / "videos"

    @property
    def debug(self) -> Path:
        """What is left of a run whose numbers were not finite."""
        return self.path / "debug"

    def _clear(self, overwrite: bool) -> None:
        """Empty the directory if it is ours and we may; nothing is removed otherwise."""
        if not self.path.is_dir():
            raise UserError(f"{self.path} exists and is not a directory; choose another run=...")
        children = list(self.path.iterdir())
        if not children:
            return
        if not overwrite:
            raise UserError(f"{self.path} exists; choose another run=..., or overwrite=true")
        if not self._is_ours():
            raise UserError(f"{self.path} exists and is no run of dppo, so overwrite=true leaves it alone; remove it")
        # config.yaml goes last: a removal that is interrupted leaves a directory that can still be overwritten.
        for child in sorted(children, key=lambda child: child == self.config_path):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()

    def _is_ours(self) -> bool:
        if not self.config_path.is_file():
            return False
        with self.config_path.open(errors="replace") as file:
            return file.readline().rstrip("\n") == HEADER


def free_path(base: Path) -> Path:
    """The first of ``base``, ``base-2``, ``base-3``, ... that does not exist."""
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in count(1))
    return next(path for path in candidates if not path.exists())


# --- provenance -----------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Where this process runs: plain data, never fails. The host's name is left out on purpose."""
    return {
        "started": _now(),
        "command": command_line(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": _git(),
        "machine": _machine(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> str:
    """How this process was called."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Revision of the source tree this file is tracked in, if any, and whether tracked files were changed."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()

    try:
        # Installed into an environment that lies inside some other repository, this file is not tracked there.
        git("ls-files", "--error-unmatch", str(source))
        return {"revision": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain", "-uno") != ""}
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": usable_processors(),
        "memory_gb": _memory_gb(),
        "platform": platform.platform(),
    } | {"gpu": _gpu_name()}


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine() or None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (AttributeError, OSError, ValueError):  # not POSIX
        return None


def _gpu_name() -> str | None:
    import torch

    try:
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    except RuntimeError:  # a driver that is there but does not work
        return None


# --- writing --------------------------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """``value`` as strict JSON can hold it: dataclasses as objects, paths as text, NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Write `jsonable` data, whole or not at all."""
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_flushed(temporary, text.encode())
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
