"""Networks by the name that configurations give them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from policies.config import config_from_dict, near_misses
from policies.errors import UserError
from policies.networks.denoiser import Denoiser
from policies.networks.mlp import MLP, DenoisingMLP, MLPConfig
from policies.networks.transformer import DenoisingTransformer
from policies.networks.unet1d import DenoisingUNet

DENOISERS = {"mlp": DenoisingMLP, "transformer": DenoisingTransformer, "unet": DenoisingUNet}
"""Denoising networks; each names the record of its settings `Config`."""


def _type_and_fields(network: Mapping[str, Any], known: Collection[str], where: str) -> tuple[str, dict[str, Any]]:
    fields = dict(network)
    name = fields.pop("type", None)
    if not isinstance(name, str) or name not in known:
        close = near_misses(name, known) if isinstance(name, str) else ""
        raise UserError(f"{where} cannot use the network type {name!r}{close}; known are {', '.join(known)}")
    return name, fields


def build_denoiser(
    network: Mapping[str, Any], latent_shape: tuple[int, int], obs_shape: tuple[int, int], num_timesteps: int
) -> Denoiser:
    """A denoising network from plain data ``{"type": "mlp", **fields}``.

    Args:
        network: its type, one of `DENOISERS`, and any of its settings.
        latent_shape: (Tp, Da).
        obs_shape: (To, Do).
        num_timesteps: S.

    Raises:
        UserError: an unknown type or field.
    """
    name, fields = _type_and_fields(network, DENOISERS, "a diffusion policy")
    cls: Any = DENOISERS[name]
    return cls(latent_shape, obs_shape, num_timesteps, config_from_dict(cls.Config, fields, f"network {name!r}"))


def build_head(network: Mapping[str, Any], in_dim: int, out_dim: int, output_gain: float) -> MLP:
    """A plain network from plain data, orthogonally initialised with ``output_gain`` at its last layer."""
    _, fields = _type_and_fields(network, ("mlp",), "this policy")
    mlp = MLP(in_dim, out_dim, config_from_dict(MLPConfig, fields, "network 'mlp'"))
    mlp.orthogonal_init_(output_gain)
    return mlp
