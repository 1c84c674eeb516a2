"""CleanRL's ``ppo_continuous_action`` at its defaults, turn by turn; runs in an environment of its own.

The script runs as it is published. It was written for an older Gymnasium, so two things are lent to it: a
`TransformObservation` without the argument that Gymnasium has added since, and a `print` that hears of every
iteration's end, which the script announces with its steps per second.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable

import gymnasium
import numpy as np
import torch

from throughput.turns import Turns, settings


class TransformObservation(gymnasium.wrappers.TransformObservation):
    """With the signature of Gymnasium 0.29: what is transformed stays in its space."""

    def __init__(self, env: gymnasium.Env, func: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(env, func, env.observation_space)


def main() -> None:
    """Run the script, and let it go on as told."""
    chosen = settings()
    if chosen["threads"]:
        torch.set_num_threads(chosen["threads"])
    turns = Turns()

    def listen(*words: object) -> None:
        if words[0] == "SPS:":
            turns.ended()

    gymnasium.wrappers.TransformObservation = TransformObservation
    sys.argv = [
        "ppo_continuous_action.py",
        f"--env-id={chosen['env_id']}",
        f"--num-envs={chosen['num_envs']}",
        f"--num-steps={chosen['steps'] // chosen['num_envs']}",
        "--total-timesteps=1000000000",
        "--cuda=False",
    ]
    turns.begin()
    runpy.run_module("cleanrl.ppo_continuous_action", init_globals={"print": listen}, run_name="__main__")


if __name__ == "__main__":
    main()
