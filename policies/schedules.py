"""Coefficient tables of the denoising kernels, read once off a diffusers scheduler.

| name | symbol (Ho et al. 2020) |
|---|---|
| alpha_bar | cumulative product of alpha_t = 1 - beta_t |
| x0 | predicted clean sample |
| std | sigma_t, square root of the posterior variance |

    x0   = x0_latent[t] z + x0_output[t] out          (then clipped)
    mean = mean_x0[t] x0 + mean_latent[t] z
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclass(frozen=True)
class KernelTable:
    """One row per timestep t = 0 .. S-1; every field [S], float32."""

    x0_latent: Tensor
    x0_output: Tensor
    mean_x0: Tensor
    mean_latent: Tensor
    std: Tensor
    alpha_bar: Tensor

    def mean_coefficients(self) -> Tensor:
        """[S, 4]: x0_latent, x0_output, mean_x0, mean_latent."""
        return torch.stack([self.x0_latent, self.x0_output, self.mean_x0, self.mean_latent], dim=1)


def ddpm_table(num_timesteps: int, beta_schedule: BetaSchedule, prediction: Prediction) -> KernelTable:
    """The ancestral sampler (Ho et al. 2020, eq. 7) with the posterior variance, computed in float64."""
    # diffusers takes seconds to import; only this function needs it.
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=num_timesteps, beta_schedule=beta_schedule)
    beta = scheduler.betas.double()
    alpha_bar = scheduler.alphas_cumprod.double()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    x0_latent, x0_output = _x0_coefficients(alpha_bar, prediction)
    variance = (1 - previous) / (1 - alpha_bar) * beta
    table = KernelTable(
        x0_latent=x0_latent,
        x0_output=x0_output,
        mean_x0=previous.sqrt() * beta / (1 - alpha_bar),
        mean_latent=(1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar),
        std=variance.clamp(min=1e-20).sqrt(),
        alpha_bar=alpha_bar,
    )
    return KernelTable(**{name: column.float() for name, column in vars(table).items()})


def _x0_coefficients(alpha_bar: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "epsilon":
        return 1 / signal, -noise / signal
    if prediction == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    return signal, -noise  # v-prediction (Salimans and Ho 2022)


def training_target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network should output; x0 and noise [B, ...], alpha_bar broadcastable to them."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
