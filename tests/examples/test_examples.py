"""The examples run, and print what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest

from policies import Policy

EXAMPLES = Path(__file__).parents[2] / "examples"
NETWORK = {"type": "mlp", "hidden_dims": [8], "residual": False}


@pytest.fixture
def pendulum(tmp_path: Path) -> Path:
    policy = Policy.from_config(
        {"type": "gaussian", "obs_dim": 3, "action_dim": 1, "network": NETWORK, "chunk": 4, "history": 2}
    )
    policy.metadata["task"] = {"env_id": "Pendulum-v1", "env_kwargs": {}}
    policy.save_pretrained(tmp_path)
    return tmp_path


def printed(example: str, *arguments: str | Path) -> list[str]:
    command = [sys.executable, EXAMPLES / example, *arguments]
    done = subprocess.run(command, cwd=EXAMPLES.parent, env={"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_deploy_drives_an_environment_and_prints_returns_and_latency(pendulum: Path) -> None:
    lines = printed("deploy.py", pendulum, "--episodes", "2")
    assert [line.split(": return -")[0] for line in lines[:2]] == ["episode 0", "episode 1"]
    assert lines[2].startswith("latency per action: median ")


def test_realtime_acts_at_a_rate_and_prints_what_was_missed(pendulum: Path) -> None:
    lines = printed("realtime.py", pendulum, "--rate", "2000", "--steps", "210")
    assert lines[0].startswith("210 steps at 2000 per second, ")
    assert lines[1].startswith("missed deadlines: ")
    assert lines[2].startswith("latency per chunk: median ")
