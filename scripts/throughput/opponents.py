"""Other people's PPO and TRPO, installed into a virtual environment apart from this project's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

CACHE = Path("~/.cache/dppo-benchmark").expanduser()
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Opponent:
    """A library to compare with."""

    title: str
    requirements: tuple[tuple[str, ...], ...]
    """What pip is told to install, call by call, after PyTorch and Gymnasium."""
    vectors: tuple[str, ...]
    """Its ways to run several environments; the first is also that of a single one."""


OPPONENTS = {
    # SB3-contrib has its TRPO, for `benchmark_stable_baselines.py`.
    "sb3": Opponent(
        "Stable-Baselines3 2.9.2", (("stable-baselines3==2.9.2", "sb3-contrib==2.9.2"),), ("dummy", "subproc")
    ),
    # Its last release asks for Python below 3.11 and pins libraries that the one script used here does not import; the
    # script itself runs on newer ones. It imports distutils, which setuptools keeps for Python 3.12 and later.
    "cleanrl": Opponent(
        "CleanRL 1.2.0",
        (("tensorboard", "setuptools"), ("--no-deps", "--ignore-requires-python", "cleanrl==1.2.0")),
        ("sync",),
    ),
}


def install(name: str, directory: Path) -> Path:
    """Make the environment where it is not there yet, with the versions of this interpreter; its Python.

    Raises:
        subprocess.CalledProcessError: it could not be made; pip has said why.
    """
    place = directory / name
    python, done = place / "bin" / "python", place / "installed.json"
    calls = [_torch(), _shared(), *map(list, OPPONENTS[name].requirements)]
    if done.is_file() and json.loads(done.read_text()) == calls:
        return python
    print(f"installing {OPPONENTS[name].title} into {place}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    for call in calls:
        index = _index() if call == _torch() else []
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
        subprocess.run([*pip, *index, *call], check=True)
    done.write_text(json.dumps(calls))
    return python


def _torch() -> list[str]:
    return [f"torch=={_release('torch')}"]


def _shared() -> list[str]:
    """What both sides must have in common for their environments to be the same."""
    packages = {"gymnasium[mujoco]": "gymnasium", "mujoco": "mujoco", "numpy": "numpy"}
    return [f"{asked}=={_release(name)}" for asked, name in packages.items()]


def _release(package: str) -> str:
    """The version without what a build adds to it ("+cpu")."""
    return version(package).split("+")[0]


def _index() -> list[str]:
    """Where there is no NVIDIA GPU, PyTorch without CUDA, as in the Makefile."""
    if shutil.which("nvidia-smi"):
        return []
    try:
        urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
    except (URLError, OSError):
        return []
    return ["--extra-index-url", CPU_INDEX]
