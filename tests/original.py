"""The recorded figures of the original DPPO implementation, and its weights in this project's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.chain import DiffusionConfig, DiffusionPolicy
from policies.samplers import Sampler

DATA = Path(__file__).parent / "data" / "original_dppo"
CASES = ("ddpm_partial", "ddpm_full_chain", "ddpm_final_clip_history", "ddim_5_of_100")


class Figures:
    """One recorded case."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as file:
            self.config: dict[str, Any] = json.loads(str(file["config"]))
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}
        for key in self.arrays.keys() & {"noise", "noise_deterministic"}:
            self.arrays[key] = self.arrays[key].transpose(0, 1)  # to [B, 1+K, Ta, Da]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def policy(self, weights: str) -> DiffusionPolicy:
        """The policy of this case, its fine-tuned network with the recorded ``weights``."""
        c = self.config
        policy = DiffusionPolicy(
            DiffusionConfig(
                obs_dim=c["Do"],
                action_dim=c["Da"],
                history=c["To"],
                chunk=c["Ta"],
                executed=c["reward_horizon"],
                network={
                    "type": "mlp",
                    "hidden_dims": c["mlp_dims"],
                    "activation": c["activation"].lower(),
                    "residual": c["residual"],
                    "step_dim": c["time_dim"],
                },
                denoising_steps=c["K"],
                sampler=Sampler(steps=c["ddim_steps"], eta=c["eta"], evaluation_eta=0) if "eta" in c else Sampler(),
                finetuned_steps=c["ft"],
                x0_clip=c["x0_clip"],
                noise_clip=c["randn_clip"],
                final_clip=c["final_clip"],
                exploration_std=c["min_sampling_std"],
                likelihood_std=c["min_logprob_std"],
            )
        )
        policy.network.load_state_dict(self.renamed(weights))
        if policy.frozen is not None:
            policy.frozen.load_state_dict(self.renamed("actor_frozen."))
        return policy

    def renamed(self, prefix: str) -> dict[str, Tensor]:
        """The arrays under ``prefix`` as this project names a denoising MLP's weights."""
        return {
            new_name(key.removeprefix(prefix)): value for key, value in self.arrays.items() if key.startswith(prefix)
        }


def new_name(name: str) -> str:
    """``mlp_mean.layers.1.l1.weight`` -> ``mlp.trunk.0.l1.weight`` and so on."""
    name = name.replace("time_embedding.1.", "step_encoder.0.").replace("time_embedding.3.", "step_encoder.2.")
    if not name.startswith("mlp_mean.layers."):
        return name
    index, rest = name.removeprefix("mlp_mean.layers.").split(".", 1)
    return f"mlp.input.{rest}" if index == "0" else f"mlp.trunk.{int(index) - 1}.{rest}"
