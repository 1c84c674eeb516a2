"""Noise schedules, those of diffusers, and what a network that denoises is asked to predict.

| code | symbol (Ho et al. 2020) |
|---|---|
| alpha_bar | cumulative product of alpha_t = 1 - beta_t |
| x0 | clean sample |
| noise | epsilon |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

MOST_TIMESTEPS = 100_000
"""Far more than anybody trains on; no weight has a shape that says how many there are."""

Prediction = Literal["epsilon", "sample", "v_prediction"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
LARGEST_BETA = 0.999
"""Of a cosine, whose last one would be 1."""


@dataclass(frozen=True)
class NoiseLevels:
    """Of each timestep t = 0 .. S-1; float32, bit for bit diffusers'."""

    beta: Tensor
    """[S]."""
    alpha_bar: Tensor
    """[S]."""


def check_timesteps(number: int) -> None:
    """Refuse an impossible number of denoising steps.

    Raises:
        ValueError: naming it.
    """
    if number < 1:
        raise ValueError(f"denoising_steps must be at least 1, not {number}")
    if number > MOST_TIMESTEPS:
        raise ValueError(f"denoising_steps must be at most {MOST_TIMESTEPS:,}, not {number:,}")


def noise_levels(num_timesteps: int, beta_schedule: BetaSchedule, beta_range: tuple[float, float]) -> NoiseLevels:
    """Those of a schedule; ``beta_range`` are the first and the last beta, unless it is the cosine.

    Written out, since diffusers takes longer to import than all else that a policy needs.
    """
    beta = _betas(num_timesteps, beta_schedule, beta_range)
    return NoiseLevels(beta, torch.cumprod(1 - beta, 0))


def _betas(num_timesteps: int, beta_schedule: BetaSchedule, beta_range: tuple[float, float]) -> Tensor:
    start, end = beta_range
    if beta_schedule == "linear":
        return torch.linspace(start, end, num_timesteps)
    if beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps) ** 2
    cosines = [_cosine(t / num_timesteps) for t in range(num_timesteps + 1)]
    return torch.tensor([min(1 - after / before, LARGEST_BETA) for before, after in pairwise(cosines)])


def _cosine(share: float) -> float:
    """alpha_bar after that share of the timesteps (Nichol and Dhariwal 2021, eq. 17)."""
    return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2


def x0_coefficients(alpha_bar: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """What the predicted x0 is made of: so much of the latent, and so much of the network's output."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    if prediction == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    return signal, -noise  # v-prediction (Salimans and Ho 2022)


def noise_coefficients(alpha_bar: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """What the predicted noise is made of: so much of the latent, and so much of the network's output."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "epsilon":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "sample":
        return 1 / noise, -signal / noise
    return noise, signal


def training_target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network should output; x0 and noise [B, ...], alpha_bar broadcastable to them."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


def denoising_exercise(
    x0: Tensor, alpha_bar: Tensor, prediction: Prediction, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples [B, ...] at random timesteps of alpha_bar [S]: noisy ones, timesteps [B] and what to predict."""
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    timestep = torch.randint(len(alpha_bar), (len(x0),), generator=generator, device=x0.device)
    level = alpha_bar[timestep].view(-1, *[1] * (x0.dim() - 1))
    latent = level.sqrt() * x0 + (1 - level).sqrt() * noise
    return latent, timestep, training_target(prediction, x0, noise, level)
