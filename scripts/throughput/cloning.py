"""Behaviour-cloning samples per second: the paper's Hopper actor, batch 128, made-up demonstrations."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from dppo.building import build_policy, build_task, whole_chain
from dppo.cloning import Cloner, CloningConfig
from dppo.configuration import compose_config
from dppo.data.demos import Episode, WindowDataset, bounds
from dppo.envs.vector import Spaces, space_dims
from policies.chain import DiffusionPolicy
from policies.config import config_from_dict
from throughput.flops import DenoiserFlops
from throughput.limits import SHAPES, ProductLimit
from throughput.options import Options, medians, say

SETTINGS = (
    "task=hopper",
    "policy=diffusion",
    "network=residual_mlp",
    "network.hidden_dims=[512,512,512]",
    "policy.chunk=4",
    "policy.denoising_steps=20",
    f"batch_size={SHAPES['cloning']}",
    "updates=1000000",  # so many that the schedule of the learning rate never ends
)


def measure(options: Options) -> dict[str, Any]:
    """Medians by precision; precisions and limits take turns."""
    precisions = options.precisions
    cloners = {precision: _cloner(precision) for precision in precisions}
    products = {precision: ProductLimit(SHAPES["cloning"], precision) for precision in precisions}
    updates = 20 if options.quick else 200
    turns: dict[str, list[dict[str, float]]] = defaultdict(list)
    for turn in range(1 + options.turns_or(10)):  # the first one warms up
        for precision, cloner in cloners.items():
            say(f"cloning, {precision}, turn {turn}")
            limit = products[precision].rate()
            rate = float(cloner.run(updates)["updates_per_s"] or 0) * cloner.batch_size
            fraction = rate * _sample_flops(cloner) / limit
            turns[precision].append({"samples_per_s": rate, "limit": limit, "fraction": fraction})
    return {precision: medians(rows[1:]) | {"turns": len(rows) - 1} for precision, rows in turns.items()}


def _cloner(precision: str) -> Cloner:
    config = compose_config("pretrain", [*SETTINGS, f"precision={precision}"])
    names = [field.name for field in dataclasses.fields(CloningConfig)]
    settings = config_from_dict(CloningConfig, {name: config[name] for name in names}, "pretrain")
    spaces = space_dims(build_task(config))
    episodes = _episodes(spaces)
    torch.manual_seed(0)
    policy = build_policy(config, spaces, **whole_chain(config))
    limits = bounds(episodes)
    policy.fit_observations(limits.obs_min, limits.obs_max)
    policy.fit_actions(limits.action_min, limits.action_max)
    return Cloner(policy, WindowDataset(episodes, policy.config.history, policy.config.chunk), None, settings, seed=0)


def _episodes(spaces: Spaces, count: int = 100, length: int = 1000) -> list[Episode]:
    """Noise of the task's dimensions."""
    rng = np.random.default_rng(0)
    return [
        Episode(
            observation=rng.normal(size=(length + 1, spaces.obs_dim)).astype(np.float32),
            action=rng.uniform(spaces.action_low, spaces.action_high, (length, spaces.action_dim)).astype(np.float32),
            reward=np.ones(length, np.float32),
            terminated=False,
            truncated=True,
        )
        for _ in range(count)
    ]


def _sample_flops(cloner: Cloner) -> int:
    policy = cloner.policy
    assert isinstance(policy, DiffusionPolicy)
    return DenoiserFlops.of(policy.network).training
