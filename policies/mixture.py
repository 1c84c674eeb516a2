"""A mixture of Gaussians: several answers to one observation, as a chain of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal
from torch.nn import functional as F

from policies.base import Policy, PolicyConfig, Sample
from policies.networks.registry import build_head
from policies.normalization import Affine


@dataclass(frozen=True)
class MixtureConfig(PolicyConfig):
    """Settings of a `MixturePolicy`."""

    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    """The network as plain data, see `policies.networks.registry`."""
    components: int = 5
    """Gaussians, each over the whole chunk."""
    initial_std: float = 1.0
    """Of every component at the start, in normalised units."""
    min_std: float = 0.01
    """Floor of the std, approached smoothly so that its gradient never vanishes."""
    initial_spread: float = 0.5
    """Standard deviation of the components' means at the start: equal ones would never part."""

    adjustable: ClassVar[frozenset[str]] = frozenset({"min_std"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.components < 1:
            raise ValueError(f"components must be at least 1, not {self.components}")
        if not self.initial_spread >= 0:
            raise ValueError(f"initial_spread must not be negative, but is {self.initial_spread}")
        if not 0 < self.min_std < self.initial_std:
            raise ValueError(f"0 < min_std < initial_std must hold, not {self.min_std} and {self.initial_std}")
        if self.executed_chunk != self.chunk:
            raise ValueError("a mixture scores whole chunks: executed must be the chunk, or null, and first_executed 0")


class MixturePolicy(Policy, type="mixture"):
    """Diagonal Gaussians over the action chunk, in normalised units, each with a weight that depends on the state.

    Their stds are learned, and the same in every state: std = min_std + softplus(raw).
    """

    Config = MixtureConfig
    config: MixtureConfig
    action_scaler: Affine
    num_steps = 1

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.latent_shape = (config.chunk, config.action_dim)
        size = config.components * config.chunk * config.action_dim
        self.network = build_head(
            config.network, config.history * config.obs_dim, config.components + size, output_gain=0.01
        )
        with torch.no_grad():
            self.network.output.bias[config.components :].normal_(0.0, config.initial_spread)
        start = math.log(math.expm1(config.initial_std - config.min_std))  # inverse of softplus
        self.raw_std = nn.Parameter(torch.full((config.components, *self.latent_shape), start))

    def _law(self, obs: Tensor) -> MixtureSameFamily:
        out = self.network(self.network_input(self.normalize_obs(obs)))
        logits, means = out.tensor_split([self.config.components], dim=1)
        std = self.config.min_std + F.softplus(self.raw_std)
        means = means.unflatten(1, (self.config.components, *self.latent_shape))
        parts = Independent(Normal(means, std, validate_args=False), 2, validate_args=False)
        return MixtureSameFamily(Categorical(logits=logits, validate_args=False), parts, validate_args=False)

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """[B, components + Tp * Da]: exponential, to draw a component, then standard normal."""
        device = self.network.output.weight.device
        choice = torch.empty((batch, self.config.components), device=device).exponential_(generator=generator)
        size = self.latent_shape[0] * self.latent_shape[1]
        return torch.cat([choice, torch.randn((batch, size), generator=generator, device=device)], dim=1)

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        law = self._law(obs)
        parts = law.component_distribution
        choice, normal = noise.tensor_split([self.config.components], dim=1)
        scores = law.mixture_distribution.logits
        # The Gumbel-max trick, see the categorical policy. Without noise: the mean of the likeliest component.
        component = (scores if deterministic else scores - choice.log()).argmax(1)
        rows = torch.arange(obs.shape[0], device=obs.device)
        latent = parts.mean[rows, component]
        if not deterministic:
            latent = torch.addcmul(latent, parts.stddev[rows, component], normal.unflatten(1, self.latent_shape))
        chain = torch.stack([torch.zeros_like(latent), latent], dim=1)  # z_0 says nothing
        return Sample(self.action_scaler.denormalize(latent), chain, law.log_prob(latent)[:, None])

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        return self._law(obs)

    def exercise_losses(self, obs: Tensor, action: Tensor) -> Tensor:
        """Negative log-likelihood per action dimension, in normalised units, [B]."""
        size = self.latent_shape[0] * self.latent_shape[1]
        return -self._law(obs).log_prob(self.action_scaler.normalize(action)) / size
