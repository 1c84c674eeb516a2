"""PPO of Stable-Baselines3 at its defaults, turn by turn; runs in an environment of its own."""

from __future__ import annotations

import torch
from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]
from stable_baselines3.common.env_util import make_vec_env  # pyright: ignore[reportMissingImports]
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv  # pyright: ignore[reportMissingImports]

from throughput.turns import Turns, settings


def main() -> None:
    """Iterate as told."""
    chosen = settings()
    if chosen["threads"]:
        torch.set_num_threads(chosen["threads"])
    classes = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}
    envs = make_vec_env(chosen["env_id"], chosen["num_envs"], seed=0, vec_env_cls=classes[chosen["vector"]])
    model = PPO("MlpPolicy", envs, n_steps=chosen["steps"] // chosen["num_envs"], device="cpu", seed=0)
    Turns().run(lambda: model.learn(chosen["steps"], reset_num_timesteps=False))


if __name__ == "__main__":
    main()
