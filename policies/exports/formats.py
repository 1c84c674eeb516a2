"""Every format by its name: how a policy is written in it, and how what was written acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from policies.base import Policy
from policies.errors import UserError
from policies.exports.lerobot import export_lerobot, load_lerobot
from policies.exports.onnx import export_onnx, load_onnx
from policies.exports.torch_export import export_torch_export, load_torch_export
from policies.exports.torchscript import export_torchscript, load_torchscript
from policies.normalization import Affine

Act = Callable[[Tensor, Tensor], Tensor]
"""Observations [B, To, Do] and noise, as of `Policy.draw_noise`, to actions."""

TOLERANCE = 1e-3
"""Of the largest action: far more than what another order of float32 sums makes of a chain."""


@dataclass(frozen=True)
class Format:
    """How a policy is written, and loaded again to be tried."""

    write: Callable[[Policy, Path], None]
    load: Callable[[Path], Act]
    directory: bool = False
    """Whether it is one, and not a file."""


FORMATS = {
    "lerobot": Format(export_lerobot, load_lerobot, directory=True),
    "onnx": Format(export_onnx, load_onnx),
    "torch_export": Format(export_torch_export, load_torch_export),
    "torchscript": Format(export_torchscript, load_torchscript),
}


@torch.no_grad()
def largest_difference(policy: Policy, act: Act, batch: int = 3) -> float:
    """Between the actions of a policy in evaluation and of what was exported, on random observations.

    Raises:
        UserError: it is no rounding error.
    """
    generator = torch.Generator().manual_seed(0)
    obs, noise = _observations(policy, batch, generator), policy.draw_noise(batch, generator)
    expected = policy.sample(obs, noise=noise, deterministic=True).action
    difference = float((act(obs, noise) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(f"what was exported does not act as the policy does: actions differ by up to {difference:.2g}")
    return difference


def _observations(policy: Policy, batch: int, generator: torch.Generator) -> Tensor:
    """[B, To, Do], as the policy has seen them, more or less."""
    shape = (batch, policy.config.history, policy.config.obs_dim)
    scaler = policy.obs_scaler
    if isinstance(scaler, Affine):
        return scaler.denormalize(2 * torch.rand(shape, generator=generator) - 1)
    return (scaler.mean + scaler.variance.sqrt() * torch.randn(shape, generator=generator)).float()
