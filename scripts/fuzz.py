"""Damages saved files at random and reads them: an error or the right answer, never a hang, a crash or a silent change.

    python scripts/fuzz.py                        # 1000 inputs of each kind
    python scripts/fuzz.py --inputs 100 dataset   # of one kind

The inputs are read in a process of their own, which a crash ends and a watchdog kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "tests" / "data" / "imports"
PATIENCE_S = 300.0
"""How long one input, or the start of a process, may take; on a machine that is busy with other things, too."""
ERROR, RIGHT, CHANGED, EXCEPTION, CRASH, HANG = OUTCOMES = (
    *("error", "right answer", "silent change"),
    *("other exception", "crash", "hang"),
)
DATASET = "dppo/fuzz/expert-v0"


# --- what is read


@dataclass(frozen=True)
class Kind:
    """A kind of saved files."""

    write: Callable[[Path], None]
    """Make sound ones in a directory."""
    read: Callable[[Path], Any]
    """What they say, as plain data and arrays."""


def content_of(policy: Any) -> list[Any]:
    """All that a policy is."""
    return [repr(policy.config), policy.metadata, *sorted(policy.state_dict().items())]


def small_policy() -> Any:
    """Of a diffusion."""
    import torch

    from policies import Policy

    torch.manual_seed(0)
    network = {"type": "mlp", "hidden_dims": [16, 16, 16], "step_dim": 4}
    sizes = {"obs_dim": 3, "action_dim": 2, "chunk": 2, "denoising_steps": 4}
    policy = Policy.from_config({"type": "diffusion", **sizes, "network": network})
    policy.metadata["task"] = {"name": "hopper", "env_id": "Hopper-v5", "success_reward": 1.5}
    return policy


def write_policy(directory: Path) -> None:
    """A policy alone."""
    small_policy().save_pretrained(directory)


def read_policy(directory: Path) -> list[Any]:
    """What was saved by this project."""
    from policies import Policy

    return content_of(Policy.from_pretrained(directory))


def write_checkpoint(directory: Path) -> None:
    """A policy with a state of its training."""
    import torch

    from dppo.checkpoint import save_checkpoint
    from dppo.task import Task

    moments = torch.randn(50, generator=torch.Generator().manual_seed(0))
    state = {"optimizer": {"moments": moments, "steps": 3}, "seeds": np.arange(5), "notes": [1.5, None, "text"]}
    save_checkpoint(directory / "100", small_policy(), Task("hopper", "Hopper-v5"), state)


def read_checkpoint(directory: Path) -> list[Any]:
    """The newest checkpoint of a run, as a run that goes on reads it."""
    from dppo.checkpoint import POLICY, TRAINER, latest_checkpoint, load_policy
    from dppo.states import read_state
    from policies import UserError

    path = latest_checkpoint(directory)
    if path is None:
        raise UserError("there is no whole checkpoint")
    state = read_state(path / TRAINER)
    optimizer = sorted(state.pop("optimizer").items())
    return [*content_of(load_policy(path / POLICY)[0]), *optimizer, *sorted(state.items())]


def write_dataset(directory: Path) -> None:
    """Four short episodes as `dppo collect` stores them."""
    import gymnasium

    from dppo.data.recording import record

    class Random:
        def __init__(self, space: gymnasium.Space) -> None:
            self.space = space
            space.seed(0)

        def reset(self, obs: np.ndarray) -> None:
            return

        def __call__(self, obs: np.ndarray) -> Any:
            return self.space.sample()

    os.environ["MINARI_DATASETS_PATH"] = str(directory)
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    record(env, Random(env.action_space), DATASET, seed=0, episodes=4)


def write_plain_dataset(directory: Path) -> None:
    """The same as Minari stores them."""
    from dppo.data.minari_store import CHECKSUMS

    write_dataset(directory)
    (directory / DATASET / CHECKSUMS).unlink()


def read_dataset(directory: Path) -> list[Any]:
    """All episodes."""
    from dppo.data.demos import load_episodes

    os.environ["MINARI_DATASETS_PATH"] = str(directory)
    return [list(vars(episode).values()) for episode in load_episodes(DATASET)]


def copied(name: str, *files: str) -> Callable[[Path], None]:
    """Files of the tests."""

    def write(directory: Path) -> None:
        for file in (DATA / name).iterdir():
            if file.name in files or (not files and file.name != "expected.npz"):
                shutil.copy(file, directory)

    return write


def read_lerobot(directory: Path) -> list[Any]:
    """A directory of LeRobot's."""
    from policies.imports.lerobot import import_lerobot

    return content_of(import_lerobot(directory))


def read_diffusion_policy(directory: Path) -> list[Any]:
    """A checkpoint of Diffusion Policy."""
    from policies.imports.diffusion_policy import import_diffusion_policy

    return content_of(import_diffusion_policy(directory / "latest.ckpt"))


def read_original(directory: Path) -> list[Any]:
    """A checkpoint of the original DPPO."""
    from policies.imports.dppo_original import OriginalSettings, import_original

    settings = OriginalSettings(denoising_steps=20, activation="ReLU", chunk=4, history=1)
    return content_of(import_original(directory / "pretrained.pt", directory / "normalization.npz", settings))


KINDS = {
    "policy": Kind(write_policy, read_policy),
    "checkpoint": Kind(write_checkpoint, read_checkpoint),
    "dataset": Kind(write_dataset, read_dataset),
    "dataset-without-checksums": Kind(write_plain_dataset, read_dataset),
    "lerobot": Kind(copied("lerobot_ddim"), read_lerobot),
    "diffusion_policy": Kind(copied("diffusion_policy_unet_ddim", "latest.ckpt"), read_diffusion_policy),
    "original": Kind(copied("original_mlp_ddpm", "pretrained.pt", "normalization.npz"), read_original),
}


def digest(value: Any) -> str:
    """Of what was read."""
    import torch

    found = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, list | tuple):
            for item in part:
                take(item)
        elif isinstance(part, torch.Tensor | np.ndarray):
            array = np.ascontiguousarray(np.asarray(part))
            found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            found.update(repr(part).encode())

    take(value)
    return found.hexdigest()


# --- damage


def damage(directory: Path, rng: np.random.Generator) -> str:
    """Damage one file of a directory in one way; what was done."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    size = len(content)
    # Half of it near the ends, where formats keep what they are about.
    near = int(rng.integers(min(size, 2048)))
    at = (near, size - 1 - near, int(rng.integers(size)), int(rng.integers(size)))[rng.integers(4)]
    how = rng.choice(["bit", "bits", "cut", "zeros", "noise", "swap"])
    length = int(rng.integers(1, 257))
    if how == "bit":
        content[at] ^= 1 << int(rng.integers(8))
    elif how == "bits":
        for _ in range(int(rng.integers(2, 17))):
            content[(at + int(rng.integers(length))) % size] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del content[at:]
    elif how == "zeros":
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif how == "noise":
        content[at : at + length] = rng.bytes(len(content[at : at + length]))
    else:
        other = int(rng.integers(size))
        content[at : at + length], content[other : other + length] = (
            content[other : other + length],
            content[at : at + length],
        )
    path.write_bytes(content)
    return f"{how} at {at} of {path.relative_to(directory)} ({size} bytes)"


def read_damaged(kind: Kind, sound: Path, number: int, expected: str) -> dict[str, str]:
    """The outcome of one input."""
    from policies import UserError

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "damaged"
        shutil.copytree(sound, directory)
        what = damage(directory, np.random.default_rng([1, number]))
        try:
            outcome, detail = (RIGHT, "") if digest(kind.read(directory)) == expected else (CHANGED, "")
        except UserError as error:
            outcome, detail = ERROR, str(error)
        except Exception as error:
            outcome, detail = EXCEPTION, f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "what": what, "detail": detail[:300]}


def work(name: str, sound: Path, first: int, last: int) -> None:
    """Read inputs one after the other, a line about each."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kind = KINDS[name]
    expected = digest(kind.read(sound))
    print(json.dumps({"outcome": "ready"}), flush=True)
    for number in range(first, last):
        print(json.dumps(read_damaged(kind, sound, number, expected)), flush=True)


# --- the watchdog


def outcomes(name: str, sound: Path, inputs: int) -> Iterator[dict[str, str]]:
    """Of so many inputs, in as many processes as crashes and hangs make necessary."""
    number = 0
    while number < inputs:
        command = [sys.executable, __file__, "--work", name, str(sound), str(number), str(inputs)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
            assert process.stdout is not None
            for line in _lines(process.stdout):
                if line is None:
                    process.kill()
                    yield {"outcome": HANG, "what": f"input {number}", "detail": ""}
                    number += 1
                    break
                found = json.loads(line)
                if found["outcome"] != "ready":
                    yield found
                    number += 1
            else:
                if number < inputs:
                    yield {"outcome": CRASH, "what": f"input {number}", "detail": f"status {process.wait()}"}
                    number += 1


def _lines(stream: Any) -> Iterator[bytes | None]:
    """Lines until the stream ends; None where the next one takes longer than `PATIENCE_S`."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(PATIENCE_S):
                yield None
                return
            chunk = stream.read(65_536)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines


def main() -> None:
    """Print a table of what became of the inputs of each kind."""
    if sys.argv[1:2] == ["--work"]:
        name, sound, first, last = sys.argv[2:]
        return work(name, Path(sound), int(first), int(last))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="how many of each kind")
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[], help="which; all of them by default")
    options = parser.parse_args()
    print("|", " | ".join(["", "inputs", *OUTCOMES]), "|", flush=True)
    for name in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            sound = Path(folder)
            KINDS[name].write(sound)
            found = list(outcomes(name, sound, options.inputs))
        counts = Counter(one["outcome"] for one in found)
        print(
            "|", " | ".join([name, str(len(found)), *(str(counts[outcome]) for outcome in OUTCOMES)]), "|", flush=True
        )
        for one in [one for one in found if one["outcome"] in (EXCEPTION, CRASH, HANG)][:5]:
            print("   ", one["outcome"], one["what"], one["detail"], file=sys.stderr, flush=True)
    return None


if __name__ == "__main__":
    main()
