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
    policy.metadata["task"] = {"env_id": "Pendulum-v1", "env_kwargs": {}, "max_episode_steps": 30}
    policy.save_pretrained(tmp_path)
    return tmp_path


def ran(example: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / example, *arguments]
    return subprocess.run(command, cwd=EXAMPLES.parent, env={"PYTHONPATH": "."}, capture_output=True, text=True)


def printed(example: str, *arguments: str | Path) -> list[str]:
    done = ran(example, *arguments)
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


@pytest.mark.parametrize("example", ["deploy.py", "realtime.py"])
def test_no_module_is_imported_because_a_policy_says_so(pendulum: Path, example: str) -> None:
    policy = Policy.from_pretrained(pendulum)
    policy.metadata["task"]["env_id"] = "no_such_module:Pendulum-v1"
    policy.save_pretrained(pendulum)
    refused = ran(example, pendulum)
    assert refused.returncode == 2
    assert "asks for the environment 'no_such_module:Pendulum-v1'; name the one to be run" in refused.stderr
    assert ran(example, pendulum, "no_such_module:Pendulum-v1").returncode == 1, "named, it is imported"
