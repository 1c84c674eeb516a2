"""The categorical policy: discrete actions, one or several at a time, as a chain of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent
from torch.nn import functional as F

from policies.base import Policy, PolicyConfig, Sample, log_prob_factors
from policies.networks.registry import build_head

NEVER = -1e8
"""Logit of an action that is not valid, or that there is not, in a dimension that has fewer than another: its
probability is 0, and its gradient too, where minus infinity had none."""


@dataclass(frozen=True)
class CategoricalConfig(PolicyConfig):
    """Settings of a `CategoricalPolicy`; ``action_dim`` is the number of actions, of all dimensions together."""

    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    """The network as plain data, see `policies.networks.registry`."""
    choices: tuple[int, ...] | None = None
    """Number of actions in each of several dimensions (MultiDiscrete, MultiBinary); None: there is one (Discrete)."""
    masked: bool = False
    """The last ``action_dim`` entries of an observation say which actions are valid (1) and which are not (0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk != 1:
            raise ValueError(f"discrete actions come one at a time: chunk must be 1, not {self.chunk}")
        if self.choices is not None and (not self.choices or min(self.choices) < 1):
            raise ValueError(f"choices must be positive, not {list(self.choices)}")
        if self.choices is not None and sum(self.choices) != self.action_dim:
            raise ValueError(f"choices {list(self.choices)} must add up to action_dim, {self.action_dim}")
        if self.masked and self.obs_dim <= self.action_dim:
            raise ValueError(f"an observation of {self.obs_dim} entries holds no mask of {self.action_dim} actions")


class CategoricalPolicy(Policy, type="categorical"):
    """Softmax over discrete actions; independent ones where there are several dimensions."""

    Config = CategoricalConfig
    config: CategoricalConfig
    discrete = True
    num_steps = 1

    def __init__(self, config: CategoricalConfig) -> None:
        super().__init__(config)
        self._obs_dim = config.obs_dim - (config.action_dim if config.masked else 0)
        self.network = build_head(config.network, config.history * self._obs_dim, config.action_dim, output_gain=0.01)

    def network_input(self, normalized_obs: Tensor) -> Tensor:
        """Without the mask."""
        return normalized_obs[..., : self._obs_dim].flatten(1)

    def _law(self, obs: Tensor) -> Categorical:
        """Of actions [B], or [B, D] where there are several dimensions."""
        logits = self._apart(self.network(self.network_input(self.normalize_obs(obs))), NEVER)
        if self.config.masked:
            valid = self._apart(obs[:, -1, self._obs_dim :], 0.0) > 0.5
            # Where no action is valid, the mask says nothing.
            logits = torch.where(valid | ~valid.any(-1, keepdim=True), logits, NEVER)
        return Categorical(logits=logits, validate_args=False)

    def _apart(self, flat: Tensor, filler: float) -> Tensor:
        """[B, action_dim] -> [B, D, most], the dimensions filled up to the longest; as it is if there is but one."""
        if self.config.choices is None:
            return flat
        parts = flat.split(list(self.config.choices), dim=1)
        most = max(self.config.choices)
        return torch.stack([F.pad(part, (0, most - part.shape[1]), value=filler) for part in parts], 1)

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard exponential [B, Da]."""
        noise = torch.empty((batch, self.config.action_dim), device=self.network.output.weight.device)
        return noise.exponential_(generator=generator)

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        law = self._law(obs)
        scores = law.logits
        if not deterministic:
            # The Gumbel-max trick: minus the logarithm of a standard exponential variable is a Gumbel one.
            scores = scores - self._apart(noise, 1.0).log()
        action = scores.argmax(-1)
        chain = torch.stack([torch.zeros_like(action), action], dim=1)  # [B, 2, *D]; z_0 says nothing
        return Sample(action, chain, log_prob_factors(law, action)[:, None])

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        law = self._law(obs)
        return law if self.config.choices is None else Independent(law, 1, validate_args=False)

    def exercise_losses(self, obs: Tensor, action: Tensor) -> Tensor:
        """Cross-entropy against the demonstrated actions, [B]; its mean over their dimensions."""
        losses = -self._law(obs).log_prob(action)
        return losses if self.config.choices is None else losses.mean(1)
