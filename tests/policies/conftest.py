"""The diffusers library as a reference: what its own scheduler does in one step."""

from collections.abc import Callable

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from policies.schedules import BetaSchedule, Prediction

ReferenceStep = Callable[..., Tensor]


@pytest.fixture
def reference_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ReferenceStep]:
    """Make a step from timestep t to t - 1; all noise that it adds has one value, and its arithmetic is in float64."""

    def added_noise(shape: torch.Size, dtype: torch.dtype, **_: object) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    value = 0.0
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", added_noise)

    def make(
        num_timesteps: int, beta_schedule: BetaSchedule, prediction: Prediction, x0_clip: float | None
    ) -> ReferenceStep:
        scheduler = DDPMScheduler(
            num_train_timesteps=num_timesteps,
            beta_schedule=beta_schedule,
            prediction_type=prediction,
            clip_sample=x0_clip is not None,
            clip_sample_range=x0_clip or 1.0,
        )
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()

        def step(out: Tensor, timestep: int, latent: Tensor, noise: float = 0.0) -> Tensor:
            nonlocal value
            value = noise
            return scheduler.step(out.double(), timestep, latent.double(), return_dict=False)[0]

        return step

    return make
