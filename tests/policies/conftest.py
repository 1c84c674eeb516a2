"""The diffusers library as a reference: what its own schedulers do in one step."""

from collections.abc import Callable

import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from policies.samplers import Sampler
from policies.schedules import BetaSchedule, Prediction

ReferenceStep = Callable[..., Tensor]


@pytest.fixture
def reference_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ReferenceStep]:
    """Make one step of a chain; all noise that it adds has one value, and its arithmetic is in float64."""

    def added_noise(shape: torch.Size, dtype: torch.dtype, **_: object) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    value = 0.0
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", added_noise)
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", added_noise)

    def make(
        num_timesteps: int,
        beta_schedule: BetaSchedule,
        prediction: Prediction,
        x0_clip: float | None,
        sampler: Sampler | None = None,
    ) -> ReferenceStep:
        """``sampler``: that of a DDIM chain; None: DDPM."""
        kind = DDPMScheduler if sampler is None else DDIMScheduler
        scheduler = kind(
            num_train_timesteps=num_timesteps,
            beta_schedule=beta_schedule,
            prediction_type=prediction,
            clip_sample=x0_clip is not None,
            clip_sample_range=x0_clip or 1.0,
            **({} if sampler is None else {"timestep_spacing": "leading", "steps_offset": sampler.offset}),
        )
        extra = {}
        if sampler is not None:
            scheduler.set_timesteps(sampler.steps)
            extra = {"eta": sampler.eta, "use_clipped_model_output": sampler.rederive_noise}
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()

        def step(out: Tensor, timestep: int, latent: Tensor, noise: float = 0.0) -> Tensor:
            nonlocal value
            value = noise
            return scheduler.step(out.double(), timestep, latent.double(), return_dict=False, **extra)[0]

        step.timesteps = sorted(scheduler.timesteps.tolist())  # type: ignore[attr-defined]
        return step

    return make
