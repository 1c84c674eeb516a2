"""Value networks; but for one, they see an environment step once, however many inner steps the policy takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from policies import Policy, UserError
from policies.config import config_from_dict
from policies.networks.mlp import MLP
from policies.networks.registry import build_head


class Critic(nn.Module):
    """V(o) of the observation history, scaled as the policy scales it."""

    def __init__(self, network: Mapping[str, Any], history: int, obs_dim: int) -> None:
        super().__init__()
        self.network = build_head(network, history * obs_dim, 1, output_gain=1.0)

    def forward(self, normalized_obs: Tensor) -> Tensor:
        """[B, To, Do] -> [B]."""
        return self.network(normalized_obs.flatten(1))[:, 0]


class LatentCritic(nn.Module):
    """V(o, z_k, k) of every inner step: the latent is part of what is seen, and the step a one-hot row."""

    def __init__(self, network: Mapping[str, Any], policy: Policy) -> None:
        super().__init__()
        device = next(policy.parameters()).device
        obs = torch.zeros((1, policy.config.history, policy.config.obs_dim), device=device)
        latent = policy.sample(obs, noise=policy.draw_noise(1, torch.Generator(device))).chain[0, 0]
        self.num_steps = policy.num_steps
        inputs = obs.numel() + latent.numel() + self.num_steps
        self.network = build_head(network, inputs, 1, output_gain=1.0)

    def forward(self, normalized_obs: Tensor, latent: Tensor, step: Tensor) -> Tensor:
        """[B, To, Do], [B, *latent], [B] -> [B]."""
        which = step[:, None] == torch.arange(self.num_steps, device=step.device)
        parts = normalized_obs, latent.reshape(len(latent), -1), which
        return self.network(torch.cat([part.flatten(1).to(normalized_obs.dtype) for part in parts], 1))[:, 0]


@dataclass(frozen=True)
class LatentConfig:
    """Settings of a `LatentCritic`."""

    network: Mapping[str, Any]


@dataclass(frozen=True)
class SharedConfig:
    """Settings of a `SharedCritic`."""

    coefficient: float = 0.5
    """Of the critic's loss beside the policy's."""

    def __post_init__(self) -> None:
        if not self.coefficient > 0:
            raise ValueError(f"coefficient must be positive, not {self.coefficient}")


class SharedCritic(nn.Module):
    """V(o) as one more output of the policy's own network; it has to learn in the same steps."""

    def __init__(self, config: SharedConfig, policy: Policy) -> None:
        """Raises UserError for a policy that does not see the observation before anything else."""
        super().__init__()
        network = policy.network
        if not isinstance(network, MLP):
            raise UserError(f"a {policy.type} policy has no trunk that a critic could share; choose critic=mlp")
        self.coefficient = config.coefficient
        self.head = nn.Linear(network.output.in_features, 1)
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._policy = (policy,)  # in a tuple, and so no submodule: its weights are the policy's

    def forward(self, normalized_obs: Tensor) -> Tensor:
        """[B, To, Do] -> [B]."""
        (policy,) = self._policy
        return self.head(policy.network.features(policy.network_input(normalized_obs)))[:, 0]


AnyCritic = Critic | LatentCritic | SharedCritic


def make_critic(config: Mapping[str, Any], policy: Policy) -> AnyCritic | None:
    """The critic of a configuration: a network of its own, a ``latent`` or ``shared`` one, or ``none``.

    Raises:
        UserError: wrong settings, or a policy that cannot share.
    """
    settings = {key: value for key, value in config.items() if key != "type"}
    if config.get("type") == "none":
        return None
    if config.get("type") == "shared":
        return SharedCritic(config_from_dict(SharedConfig, settings, "critic"), policy)
    if config.get("type") == "latent":
        return LatentCritic(config_from_dict(LatentConfig, settings, "critic").network, policy)
    return Critic(config, policy.config.history, policy.config.obs_dim)
