"""Drive a Gymnasium environment with a fine-tuned policy, chunk by chunk: ``policies`` alone, without ``dppo``.

    python examples/deploy.py runs/demo/checkpoints/<env_steps>/policy
    python examples/deploy.py dppo/pretrained/hopper --episodes 3

Printed are the returns and how long an action takes. Most come out of the present chunk; of four, every fourth is the
first of a new one, and the 95th percentile is what that costs.
"""

import argparse
import time

import gymnasium
import numpy as np

from policies import Policy, UserError
from policies.runner import ChunkRunner, plan_with

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("policy", help="a directory with config.json and model.safetensors")
parser.add_argument("env_id", nargs="?", help="of Gymnasium; by default the one that the policy was trained for")
parser.add_argument("--episodes", type=int, default=3)
arguments = parser.parse_args()

try:
    policy = Policy.from_pretrained(arguments.policy)
except UserError as error:
    parser.error(str(error))
task = policy.metadata.get("task", {})
env_id = arguments.env_id or task.get("env_id", "")
if not arguments.env_id and (not env_id or ":" in env_id or env_id.startswith("GymV")):  # which import code
    parser.error(f"the policy asks for the environment {env_id!r}; name the one to be run after the policy")
steps = task.get("max_episode_steps")
env = gymnasium.make(env_id, max_episode_steps=steps, **task.get("env_kwargs", {}))
env = gymnasium.wrappers.FlattenObservation(env)
if isinstance(env.action_space, gymnasium.spaces.Box):
    env = gymnasium.wrappers.ClipAction(env)
runner = ChunkRunner(plan_with(policy, seed=0), policy.config.history)
seconds: list[float] = []
for episode in range(arguments.episodes):
    obs, _ = env.reset(seed=episode)
    runner.reset()
    total, over = 0.0, False
    while not over:
        began = time.perf_counter()
        action = runner.act(obs)
        seconds.append(time.perf_counter() - began)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    print(f"episode {episode}: return {total:,.1f}")
median, slow = np.percentile(seconds, [50, 95]) * 1e3
print(f"latency per action: median {median:.3f} ms, 95th percentile {slow:.3f} ms")
