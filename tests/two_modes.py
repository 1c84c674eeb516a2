"""Two Gaussians in the plane, and the denoiser that knows them."""

import torch
from torch import Tensor

MODES, SHARES, SPREAD = torch.tensor([[-0.6, -0.4], [0.6, 0.4]]), torch.tensor([0.7, 0.3]), 0.1


def mixture(size: int, generator: torch.Generator) -> Tensor:
    """Two Gaussians in the plane, [size, 1, 2]."""
    mode = torch.multinomial(SHARES, size, replacement=True, generator=generator)
    return (MODES[mode] + SPREAD * torch.randn(size, 2, generator=generator))[:, None]


def energy_distance(ours: Tensor, theirs: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| >= 0, which is 0 for equal distributions alone (Szekely and Rizzo 2013)."""
    ours, theirs = ours.flatten(1), theirs.flatten(1)
    between, within = torch.cdist(ours, theirs), (torch.cdist(ours, ours), torch.cdist(theirs, theirs))
    return float(2 * between.mean() - within[0].mean() - within[1].mean())


def ideal_output(prediction: str, latent: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a perfect denoiser of `mixture` puts out at latent [B, 1, 2], alpha_bar [B, 1, 1]."""
    variance = alpha_bar * SPREAD**2 + 1 - alpha_bar
    offset = latent - alpha_bar.sqrt() * MODES  # [B, modes, 2]
    weight = (SHARES.log() - (offset.square() / (2 * variance)).sum(-1)).softmax(-1)[..., None]
    x0 = (weight * (MODES + alpha_bar.sqrt() * SPREAD**2 / variance * offset)).sum(1, keepdim=True)
    noise = (latent - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    return {"epsilon": noise, "sample": x0, "v_prediction": v}[prediction]
