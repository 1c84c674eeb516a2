"""The tables against diffusers' own scheduler at every index, and against the process that they invert."""

import itertools
from typing import get_args

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from policies.schedules import BetaSchedule, KernelTable, Prediction, ddpm_table, training_target

EPS = torch.finfo(torch.float32).eps
PREDICTIONS = get_args(Prediction)
SCHEDULES = [(steps, name) for steps, name in itertools.product([1, 20, 100], get_args(BetaSchedule))]
each_schedule = pytest.mark.parametrize(("steps", "schedule"), SCHEDULES)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def tolerance(steps: int, schedule: BetaSchedule) -> Tensor:
    """[S]: the relative error to expect: float32 stores 1 - beta_t and their products, from which beta_t comes back."""
    beta = DDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule).betas.double()
    return EPS * (2 + 1 / beta)


def columns(table: KernelTable) -> KernelTable:
    """The table in float64, each column [S, 1]."""
    return KernelTable(**{name: column.double()[:, None] for name, column in vars(table).items()})


@each_schedule
@each_prediction
@pytest.mark.parametrize("x0_clip", [None, 1.0, 0.25])
def test_the_mean_is_that_of_a_diffusers_step_at_every_index(
    steps: int, schedule: BetaSchedule, prediction: Prediction, x0_clip: float | None, reference_step
) -> None:
    # One input alone, or one that outweighs the other, so that nothing cancels within x0; some reach the clip.
    latent = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, -1e-3], dtype=torch.float64)
    out = torch.tensor([0.0, 0.0, 1.0, -1.0, 1e-3, 1e6, -1e6, 0.0], dtype=torch.float64)
    table = columns(ddpm_table(steps, schedule, prediction))
    x0 = table.x0_latent * latent + table.x0_output * out
    if x0_clip is not None:
        assert (x0.abs() > x0_clip).any() and (x0.abs() < x0_clip).any()
        x0 = x0.clamp(-x0_clip, x0_clip)
    terms = table.mean_x0 * x0, table.mean_latent * latent
    step = reference_step(steps, schedule, prediction, x0_clip)
    expected = torch.stack([step(out[None], t, latent[None])[0] for t in range(steps)])
    error = (sum(terms) - expected).abs()
    assert (error <= tolerance(steps, schedule)[:, None] * sum(term.abs() for term in terms)).all(), error.max()


@each_schedule
def test_the_std_is_that_of_a_diffusers_step_at_every_index(steps: int, schedule: BetaSchedule, reference_step) -> None:
    std = ddpm_table(steps, schedule, "epsilon").std.double()
    step = reference_step(steps, schedule, "epsilon", None)
    zero = torch.zeros(1, 1)
    expected = torch.cat([step(zero, t, zero, noise=1.0)[0] for t in range(steps)])
    assert expected[0] == 0  # diffusers adds nothing at the last step
    assert 0 < std[0] <= 1.0001e-10
    error = (std[1:] - expected[1:]).abs() / expected[1:]
    assert (error <= tolerance(steps, schedule)[1:]).all(), error.max()


@each_schedule
def test_alpha_bar_is_the_one_of_diffusers_bit_for_bit(steps: int, schedule: BetaSchedule) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule)
    assert torch.equal(ddpm_table(steps, schedule, "sample").alpha_bar, scheduler.alphas_cumprod)


@each_schedule
def test_a_step_with_the_true_x0_goes_back_along_the_noising_process(steps: int, schedule: BetaSchedule) -> None:
    """sqrt(alpha_bar) x0 and variance 1 - alpha_bar at t must become those of t - 1."""
    table = columns(ddpm_table(steps, schedule, "sample"))
    alpha_bar = table.alpha_bar[:, 0]
    previous = torch.cat([torch.ones(1), alpha_bar[:-1]])
    signal = (table.mean_x0 + table.mean_latent * table.alpha_bar.sqrt())[:, 0]
    variance = (table.mean_latent.square() * (1 - table.alpha_bar) + table.std.square())[:, 0]
    relative = tolerance(steps, schedule)
    assert ((signal - previous.sqrt()).abs() <= relative).all()
    assert ((variance - (1 - previous)).abs() <= 2 * relative * (1 - previous) + 1e-12).all()


@each_schedule
@each_prediction
def test_the_training_target_and_the_noisy_latent_give_x0_back(
    steps: int, schedule: BetaSchedule, prediction: Prediction
) -> None:
    table = columns(ddpm_table(steps, schedule, prediction))
    x0, noise = torch.randn(2, steps, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent = table.alpha_bar.sqrt() * x0 + (1 - table.alpha_bar).sqrt() * noise
    target = training_target(prediction, x0, noise, table.alpha_bar)
    recovered = table.x0_latent * latent + table.x0_output * target
    scale = (latent.abs() * table.x0_latent.abs() + target.abs() * table.x0_output.abs()).clamp(min=1)
    assert ((recovered - x0).abs() <= EPS * scale).all()


def test_predictions_are_named_as_diffusers_names_them() -> None:
    assert set(PREDICTIONS) == {"epsilon", "sample", "v_prediction"}
    assert set(get_args(BetaSchedule)) == {"linear", "scaled_linear", "squaredcos_cap_v2"}
