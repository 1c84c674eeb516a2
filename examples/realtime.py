"""Act at a fixed rate: the next chunk is computed in a background thread while the present one is executed.

    python examples/realtime.py dppo/pretrained/hopper --rate 50 --lead 2

``--lead`` actions before the end of a chunk the next one is asked for, so that it may take so many periods. Printed are
the steps of the loop that took longer than their period, those that got no action in time and repeated the last one,
and the actions that were past when their chunk arrived, beside the latency of a chunk.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import numpy as np
import torch

from policies import Policy, UserError
from policies.realtime import BackgroundRunner, Pace, Timed
from policies.runner import plan_with

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("policy", help="a directory with config.json and model.safetensors, of continuous actions")
parser.add_argument("env_id", nargs="?", help="of Gymnasium; by default the one that the policy was trained for")
parser.add_argument("--rate", type=float, default=50.0, help="actions per second")
parser.add_argument("--lead", type=int, default=2, help="ask for the next chunk with so many actions left")
parser.add_argument("--steps", type=int, default=500)
arguments = parser.parse_args()

torch.set_num_threads(1)  # the other cores are for what moves the robot
try:
    policy = Policy.from_pretrained(arguments.policy)
except UserError as error:
    parser.error(str(error))
task, history = policy.metadata.get("task", {}), policy.config.history
env_id = arguments.env_id or task.get("env_id", "")
if not arguments.env_id and (not env_id or ":" in env_id or env_id.startswith("GymV")):  # which import code
    parser.error(f"the policy asks for the environment {env_id!r}; name the one to be run after the policy")
steps = task.get("max_episode_steps")
env = gymnasium.make(env_id, max_episode_steps=steps, **task.get("env_kwargs", {}))
env = gymnasium.wrappers.FlattenObservation(env)
env = gymnasium.wrappers.ClipAction(env)
plan_with(policy)(np.zeros((history, policy.config.obs_dim), np.float32))  # the first call takes longer than others
plan, pace = Timed(plan_with(policy, seed=0)), Pace(1 / arguments.rate)
obs, _ = env.reset(seed=0)
with ThreadPoolExecutor(1) as executor:
    runner = BackgroundRunner(plan, history, arguments.lead, executor)
    for _ in range(arguments.steps):
        pace.wait()
        action = runner.act(obs)
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            obs, _ = env.reset()
            runner.reset()
median, slow = np.percentile(plan.seconds, [50, 95]) * 1e3
print(f"{arguments.steps} steps at {arguments.rate:g} per second, {pace.late} of them late")
print(f"missed deadlines: {runner.missed}; actions that were past on arrival: {runner.skipped}")
print(f"latency per chunk: median {median:.2f} ms, 95th percentile {slow:.2f} ms, of {len(plan.seconds)} chunks")
