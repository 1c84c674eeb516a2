"""The Gaussian policy, squashed or not: the chain of one step that is plain continuous-control PPO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from policies.base import Explorer, Policy, PolicyConfig, Sample, log_prob_factors
from policies.distributions import SquashedNormal
from policies.networks.mlp import MLP
from policies.networks.registry import build_head
from policies.normalization import Affine

LARGEST = 0.999
"""Demonstrated action, in normalised units, that a squashed Gaussian imitates: the tanh never reaches 1."""


@dataclass(frozen=True)
class GaussianConfig(PolicyConfig):
    """Settings of a `GaussianPolicy`."""

    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    """The network as plain data, see `policies.networks.registry`."""
    std: Literal["free", "state"] = "free"
    """``free``: one learned std per chunk entry, whatever the state; ``state``: the network puts it out."""
    initial_std: float = 1.0
    """The std at the start, in normalised units."""
    min_std: float = 0.01
    """Floor of the std, approached smoothly so that its gradient never vanishes."""
    squash: bool = False
    """Take the tanh of what the Gaussian draws, so that actions keep to their bounds (Haarnoja et al. 2018, app. C)."""

    adjustable: ClassVar[frozenset[str]] = frozenset({"executed", "min_std"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std not in ("free", "state"):
            raise ValueError(f"std must be 'free' or 'state', not {self.std!r}")
        if not 0 < self.min_std < self.initial_std:
            raise ValueError(f"0 < min_std < initial_std must hold, not {self.min_std} and {self.initial_std}")


class GaussianPolicy(Policy, type="gaussian"):
    """A diagonal Gaussian over the action chunk in normalised units; std = min_std + softplus(raw).

    If it is squashed, the latent is the value before the tanh, and its likelihood that of the value after it.
    """

    Config = GaussianConfig
    config: GaussianConfig
    action_scaler: Affine
    num_steps = 1

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__(config)
        self.latent_shape = (config.chunk, config.action_dim)
        size = config.chunk * config.action_dim
        outputs = 2 * size if config.std == "state" else size
        self.network = build_head(config.network, config.history * config.obs_dim, outputs, output_gain=0.01)
        start = math.log(math.expm1(config.initial_std - config.min_std))  # inverse of softplus
        if config.std == "state":
            with torch.no_grad():
                self.network.output.bias[size:] = start
        else:
            self.raw_std = nn.Parameter(torch.full(self.latent_shape, start))

    def _law(self, obs: Tensor) -> Normal:
        out = self.network(self.network_input(self.normalize_obs(obs)))
        if self.config.std == "state":
            out, raw_std = out.chunk(2, dim=1)
            raw_std = raw_std.unflatten(1, self.latent_shape)
        else:
            raw_std = self.raw_std
        std = self._std(raw_std)
        kind = SquashedNormal if self.config.squash else Normal
        return kind(out.unflatten(1, self.latent_shape), std, validate_args=False)

    def _std(self, raw: Tensor) -> Tensor:
        return self.config.min_std + F.softplus(raw)

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal [B, Tp, Da]."""
        device = self.network.output.weight.device if generator is None else generator.device
        return torch.randn((batch, *self.latent_shape), generator=generator, device=device)

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        law = self._law(obs)
        latent = law.mean
        if not deterministic:
            latent = torch.addcmul(latent, law.stddev, noise)
        chain = torch.stack([torch.zeros_like(latent), latent], dim=1)  # z_0 says nothing
        normalized = latent.tanh() if self.config.squash else latent
        return Sample(
            self.action_scaler.denormalize(normalized[:, self.config.executed_part]),
            chain,
            log_prob_factors(law, latent)[:, None],
        )

    def explorer(self) -> Explorer:
        plain = self.config.std == "free" and not self.config.squash and isinstance(self.network, MLP)
        return GaussianExplorer(self) if plain else super().explorer()

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        return Independent(self._law(obs), 2, validate_args=False)

    def chunk_of(self, latent: Tensor) -> Tensor:
        return super().chunk_of(latent.tanh() if self.config.squash else latent)

    def exercise_losses(self, obs: Tensor, action: Tensor) -> Tensor:
        """Negative log-likelihood per action dimension, in normalised units, [B]."""
        latent = self.action_scaler.normalize(action)
        if self.config.squash:
            latent = latent.clamp(-LARGEST, LARGEST).atanh()
        return -self._law(obs).log_prob(latent).flatten(1).mean(1)


class GaussianExplorer(Explorer):
    """Of a Gaussian with the same std in every state, not squashed, whose network is an MLP."""

    @torch.no_grad()
    def __init__(self, policy: GaussianPolicy) -> None:
        self._normalize, self._network = policy.obs_scaler.prepared(), policy.network.plain()
        self._scale, self._shift = policy.action_scaler.scale, policy.action_scaler.shift
        self._unscaled = bool((self._scale == 1).all() and (self._shift == 0).all())
        self._shape, self._executed = policy.latent_shape, policy.config.executed_part
        self._whole = policy.config.executed_chunk == policy.config.chunk
        self._std = policy._std(policy.raw_std)  # [Tp, Da]

    def draw(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mean = self._network(self._normalize(obs).flatten(1)).view(-1, *self._shape)
        latent = torch.addcmul(mean, self._std, noise)
        executed = latent if self._whole else latent[:, self._executed]
        return executed if self._unscaled else executed * self._scale + self._shift, (mean, latent)

    def record(self, calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        mean, latent = (torch.stack(tensors) for tensors in zip(*calls, strict=True))  # [S, B, Tp, Da]
        factors = Normal(mean, self._std, validate_args=False).log_prob(latent)
        return torch.stack([torch.zeros_like(latent), latent], dim=2), factors[:, :, None]
