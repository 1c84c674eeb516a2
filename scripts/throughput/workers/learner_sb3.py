"""PPO of Stable-Baselines3 or TRPO of SB3-contrib, with normalisation, turn by turn; then evaluated.

Runs in an environment of its own.
"""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from sb3_contrib import TRPO  # pyright: ignore[reportMissingImports]
from stable_baselines3 import PPO  # pyright: ignore[reportMissingImports]
from stable_baselines3.common.env_util import make_vec_env  # pyright: ignore[reportMissingImports]
from stable_baselines3.common.vec_env import VecNormalize  # pyright: ignore[reportMissingImports]

from throughput.turns import run_and_report, settings


def main() -> None:
    """Learn and be evaluated as told."""
    chosen = settings()
    torch.set_num_threads(chosen["threads"])
    own = chosen["settings"]
    env = VecNormalize(make_vec_env(chosen["env_id"], 1, seed=chosen["seed"]), gamma=own["gamma"])
    rules = {"ppo": PPO, "trpo": TRPO}
    model = rules[chosen["rule"]]("MlpPolicy", env, device="cpu", seed=chosen["seed"], **own)

    def learn() -> None:
        model.learn(own["n_steps"], reset_num_timesteps=False)

    def episodes() -> list[float]:
        count = chosen["evaluation"]["num_envs"]
        quota = -(-chosen["evaluation"]["episodes"] // count)
        first = chosen["evaluation"]["seed"]
        return [total for i in range(count) for total in returns(chosen["env_id"], model, env, first + i, quota)]

    run_and_report(learn, episodes, iterations=chosen["iterations"])


def returns(env_id: str, model: PPO | TRPO, scaling: VecNormalize, seed: int, episodes: int) -> list[float]:
    """Of so many episodes, one after the other, without exploration noise and with the scaling as it is."""
    env = gymnasium.make(env_id)
    obs, _ = env.reset(seed=seed)
    totals = []
    for _ in range(episodes):
        total, ended = 0.0, False
        while not ended:
            action, _ = model.predict(scaling.normalize_obs(np.asarray(obs)), deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            ended = terminated or truncated
        totals.append(total)
        obs, _ = env.reset()
    env.close()
    return totals


if __name__ == "__main__":
    main()
