"""What files that need nothing of this project hold: a function of observations and noise, and its description."""

from __future__ import annotations

import copy
import json

import torch
from torch import Tensor, nn

from policies.base import Policy
from policies.errors import UserError
from policies.ode import ODEPolicy

INPUTS, OUTPUT = ("obs", "noise"), "action"
DESCRIPTION = "policy.json"
"""The name under which a file keeps its description."""


class SamplingFunction(nn.Module):
    """A policy as it acts in evaluation: all scaling is inside, and the loop over denoising steps is unrolled."""

    def __init__(self, policy: Policy) -> None:
        """Of a copy, on the CPU.

        Raises:
            UserError: a policy whose sampling cannot be recorded.
        """
        if isinstance(policy, ODEPolicy):
            raise UserError(
                f"a {policy.type} policy cannot be exported: its solver decides in Python, by values that no recording "
                f"has; policies of the types {_exportable()} can"
            )
        super().__init__()
        self.policy = copy.deepcopy(policy).cpu().eval().requires_grad_(False)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """obs [B, To, Do] and noise [B, ...] as of `Policy.draw_noise` -> action [B, Ta, Da] (discrete: [B] or [B, D]).

        In the environment's units.
        """
        return self.policy.sample(obs, noise=noise, deterministic=True).action

    def example(self, batch: int = 2) -> tuple[Tensor, Tensor]:
        """Inputs to record it with."""
        config, generator = self.policy.config, torch.Generator().manual_seed(0)
        return torch.zeros(batch, config.history, config.obs_dim), self.policy.draw_noise(batch, generator)

    @torch.no_grad()
    def description(self) -> str:
        """What one has to know to use the function, as JSON."""
        config, inputs = self.policy.config, self.example()
        shapes = {name: ["batch", *value.shape[1:]] for name, value in zip(INPUTS, inputs, strict=True)}
        content = {
            "policy": self.policy.type,
            "inputs": shapes,
            "outputs": {OUTPUT: ["batch", *self(*inputs).shape[1:]]},
            "history": config.history,
            "executed": config.executed_chunk,
            "discrete": self.policy.discrete,
            "noise": "standard normal; a policy of one step ignores it",
            "metadata": self.policy.metadata,
        }
        return json.dumps(content)


def _exportable() -> str:
    return ", ".join(sorted(set(Policy.registry) - {ODEPolicy.type}))
