"""Gaussian PPO of this project, turn by turn; see `throughput.turns`."""

from __future__ import annotations

import dppo  # noqa: F401 - before torch, as in the commands: it decides how torch's threads wait

# isort: split
import torch

from throughput.gaussian import gaussian_trainer
from throughput.turns import Turns, settings


def main() -> None:
    """Iterate as told."""
    chosen = settings()
    if chosen["threads"]:
        torch.set_num_threads(chosen["threads"])
    Turns().run(gaussian_trainer(chosen["task"], chosen["num_envs"], chosen["vector"] == "native, compiled").iterate)


if __name__ == "__main__":
    main()
