"""A policy runs with torch, safetensors, numpy and pydantic; nothing that takes long to import comes along."""

import subprocess
import sys
from pathlib import Path

from policies import Policy

USE = """
import sys
import numpy, torch
from policies import Policy
from policies.runner import ChunkRunner, plan_with

for directory in sys.argv[1:]:
    policy = Policy.from_pretrained(directory)
    ChunkRunner(plan_with(policy, seed=0), policy.config.history).act(numpy.zeros(3))
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
HEAVY = {"dppo", "gymnasium", "hydra", "minari", "mujoco"}
HEAVY |= {"diffusers", "huggingface_hub", "matplotlib", "onnx", "requests", "scipy", "torchdiffeq", "transformers"}


def test_loading_and_sampling_import_neither_training_nor_simulators_nor_big_libraries(tmp_path: Path) -> None:
    network = {"type": "mlp", "hidden_dims": [8, 8, 8]}
    for name in ("gaussian", "diffusion"):
        policy = Policy.from_config({"type": name, "obs_dim": 3, "action_dim": 2, "network": network})
        policy.save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", USE, tmp_path / "gaussian", tmp_path / "diffusion"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"policies", "torch"} <= imported
    assert not imported & HEAVY
