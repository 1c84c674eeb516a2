"""Noise levels as diffusers has them, and what a network is asked to predict."""

import itertools
from typing import get_args

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from policies.schedules import (
    BetaSchedule,
    Prediction,
    noise_coefficients,
    noise_levels,
    training_target,
    x0_coefficients,
)

EPS = torch.finfo(torch.float32).eps
PREDICTIONS = get_args(Prediction)
RANGES = [(1e-4, 0.02), (0.001, 0.3)]


@pytest.mark.parametrize(("steps", "schedule"), itertools.product([1, 2, 5, 20, 100, 1000], get_args(BetaSchedule)))
@pytest.mark.parametrize("beta_range", RANGES)
def test_the_levels_are_those_of_diffusers_bit_for_bit(
    steps: int, schedule: BetaSchedule, beta_range: tuple[float, float]
) -> None:
    start, end = beta_range
    scheduler = DDPMScheduler(steps, beta_start=start, beta_end=end, beta_schedule=schedule)
    levels = noise_levels(steps, schedule, beta_range)
    assert torch.equal(levels.beta, scheduler.betas)
    assert torch.equal(levels.alpha_bar, scheduler.alphas_cumprod)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_training_target_and_the_noisy_latent_give_x0_and_the_noise_back(prediction: Prediction) -> None:
    alpha_bar = noise_levels(20, "squaredcos_cap_v2", RANGES[0]).alpha_bar.double()[:, None]
    x0, noise = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    target = training_target(prediction, x0, noise, alpha_bar)
    for truth, (of_latent, of_output) in [
        (x0, x0_coefficients(alpha_bar, prediction)),
        (noise, noise_coefficients(alpha_bar, prediction)),
    ]:
        scale = (latent.abs() * of_latent.abs() + target.abs() * of_output.abs()).clamp(min=1)
        assert ((of_latent * latent + of_output * target - truth).abs() <= EPS * scale).all()


def test_predictions_are_named_as_diffusers_names_them() -> None:
    assert set(PREDICTIONS) == {"epsilon", "sample", "v_prediction"}
    assert set(get_args(BetaSchedule)) == {"linear", "scaled_linear", "squaredcos_cap_v2"}
