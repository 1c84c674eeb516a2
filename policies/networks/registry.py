"""Networks by the name that configurations give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.config import config_from_dict
from policies.errors import UserError
from policies.networks.mlp import MLP, DenoisingMLP, DenoisingMLPConfig, MLPConfig


def _fields(network: Mapping[str, Any], known: tuple[str, ...], where: str) -> dict[str, Any]:
    fields = dict(network)
    name = fields.pop("type", None)
    if name not in known:
        raise UserError(f"{where} cannot use the network type {name!r}; known are {', '.join(known)}")
    return fields


def build_denoiser(
    network: Mapping[str, Any], latent_shape: tuple[int, int], obs_dim: int, num_timesteps: int
) -> DenoisingMLP:
    """A denoising network from plain data ``{"type": "mlp", **fields}``.

    Raises:
        UserError: an unknown type or field.
    """
    fields = _fields(network, ("mlp",), "a diffusion policy")
    config = config_from_dict(DenoisingMLPConfig, fields, "network 'mlp'")
    return DenoisingMLP(latent_shape, obs_dim, num_timesteps, config)


def build_head(network: Mapping[str, Any], in_dim: int, out_dim: int, output_gain: float) -> MLP:
    """A plain network from plain data, orthogonally initialised with ``output_gain`` at its last layer."""
    fields = _fields(network, ("mlp",), "this policy")
    mlp = MLP(in_dim, out_dim, config_from_dict(MLPConfig, fields, "network 'mlp'"))
    mlp.orthogonal_init_(output_gain)
    return mlp
