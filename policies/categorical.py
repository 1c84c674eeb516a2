"""The categorical policy: discrete actions as a chain of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from policies.base import Policy, PolicyConfig, Sample
from policies.networks.registry import build_head


@dataclass(frozen=True)
class CategoricalConfig(PolicyConfig):
    """Settings of a `CategoricalPolicy`; ``action_dim`` is the number of actions."""

    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    """The network as plain data, see `policies.networks.registry`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk != 1:
            raise ValueError(f"discrete actions come one at a time: chunk must be 1, not {self.chunk}")


class CategoricalPolicy(Policy, type="categorical"):
    """Softmax over discrete actions."""

    Config = CategoricalConfig
    config: CategoricalConfig
    discrete = True
    num_steps = 1

    def __init__(self, config: CategoricalConfig) -> None:
        super().__init__(config)
        self.network = build_head(config.network, config.history * config.obs_dim, config.action_dim, output_gain=0.01)

    def _law(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.network(self.normalize_obs(obs).flatten(1)), validate_args=False)

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard exponential [B, Da]."""
        noise = torch.empty((batch, self.config.action_dim), device=self.network.output.weight.device)
        return noise.exponential_(generator=generator)

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        law = self._law(obs)
        scores = law.logits
        if not deterministic:
            # The Gumbel-max trick: minus the logarithm of a standard exponential variable is a Gumbel one.
            scores = scores - noise.log()
        action = scores.argmax(-1)
        chain = torch.stack([torch.zeros_like(action), action], dim=1)  # [B, 2]; z_0 says nothing
        return Sample(action, chain, law.log_prob(action)[:, None])

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        return self._law(obs)

    def exercise_losses(self, obs: Tensor, action: Tensor) -> Tensor:
        """Cross-entropy against the demonstrated actions, [B]."""
        return -self._law(obs).log_prob(action)
