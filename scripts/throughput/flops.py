"""Floating-point operations that an iteration cannot do without, counted from the layers of its networks.

A multiplication and an addition are two operations. Only matrix products count: no biases, activations or optimisers.
What can be computed once and kept counts once: the denoising step's share of a first layer is a table and does not
count at all, and the observation's share counts once for a whole chain. Gradients of a network's inputs are of no use
either.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from policies.chain import DiffusionPolicy
from policies.networks.mlp import MLP, DenoisingMLP


def forward_flops(module: nn.Module) -> int:
    """Of one row through every linear layer of the module."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(2 * layer.in_features * layer.out_features for layer in layers)


def training_flops(network: MLP) -> int:
    """Of one row forward, and of the gradients of all weights and of all activations but the network's input."""
    return 2 * forward_flops(network.input) + 3 * forward_flops(network.trunk)


@dataclass(frozen=True)
class DenoiserFlops:
    """Of one row forward through a denoising network, by parts: shares of the first layer, and what follows it."""

    latent: int
    obs: int
    trunk: int

    @classmethod
    def of(cls, network: DenoisingMLP) -> DenoiserFlops:
        """Count a network's."""
        first = network.mlp.input
        obs_dim = first.in_features - network.latent_dim - network.steps.shape[1]
        latent, obs = (2 * dim * first.out_features for dim in (network.latent_dim, obs_dim))
        return cls(latent, obs, forward_flops(network.mlp.trunk))

    @property
    def training(self) -> int:
        """As `training_flops`."""
        return 2 * (self.latent + self.obs) + 3 * self.trunk


def chain_flops(policy: DiffusionPolicy) -> int:
    """Of one action chunk: K steps, and the observation's share once for each of the networks."""
    flops = DenoiserFlops.of(policy.network)
    networks = 1 if policy.frozen is None else 2
    return networks * flops.obs + policy.config.denoising_steps * (flops.latent + flops.trunk)
