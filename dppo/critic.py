"""The state-value network; it sees an environment step once, however many inner steps the policy takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from policies.networks.registry import build_head


class Critic(nn.Module):
    """V(o) of the observation history, scaled as the policy scales it."""

    def __init__(self, network: Mapping[str, Any], history: int, obs_dim: int) -> None:
        super().__init__()
        self.network = build_head(network, history * obs_dim, 1, output_gain=1.0)

    def forward(self, normalized_obs: Tensor) -> Tensor:
        """[B, To, Do] -> [B]."""
        return self.network(normalized_obs.flatten(1))[:, 0]
