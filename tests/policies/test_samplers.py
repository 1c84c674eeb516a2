"""The kernel's steps against those of diffusers' own schedulers, and against the process that they invert."""

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from policies.samplers import Kernel, Sampler
from policies.schedules import BetaSchedule, NoiseLevels, Prediction, noise_levels

EPS = torch.finfo(torch.float32).eps
RANGE = (1e-4, 0.02)
PREDICTIONS = get_args(Prediction)
SCHEDULES = list(itertools.product([1, 20, 100], get_args(BetaSchedule)))
each_schedule = pytest.mark.parametrize(("steps", "schedule"), SCHEDULES)
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
DDPM = Sampler()

# One input alone, or one that outweighs the other, so that nothing cancels within x0; some reach the clip.
LATENT = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, -1e-3], dtype=torch.float64)
OUT = torch.tensor([0.0, 0.0, 1.0, -1.0, 1e-3, 1e6, -1e6, 0.0], dtype=torch.float64)


def kernel_of(levels: NoiseLevels, prediction: Prediction, sampler: Sampler, x0_clip: float | None) -> Kernel:
    return Kernel(levels, prediction, sampler, eta=sampler.eta, x0_clip=x0_clip).double()


def tolerance(levels: NoiseLevels) -> Tensor:
    """[S]: the relative error to expect: float32 stores 1 - beta_t and their products, from which beta_t comes back."""
    return EPS * (2 + 1 / levels.beta.double())


def means(kernel: Kernel, out: Tensor, latent: Tensor, eta: float) -> Tensor:
    """[K, n] of every step."""
    rows = range(len(kernel.unit_std))
    return torch.stack([kernel.mean(out, latent, kernel.row(i), eta) for i in rows])


@each_schedule
@each_prediction
@pytest.mark.parametrize("x0_clip", [None, 1.0, 0.25])
def test_the_mean_of_ddpm_is_that_of_a_diffusers_step_at_every_timestep(
    steps: int, schedule: BetaSchedule, prediction: Prediction, x0_clip: float | None, reference_step
) -> None:
    levels = noise_levels(steps, schedule, RANGE)
    kernel = kernel_of(levels, prediction, DDPM, x0_clip)
    step = reference_step(steps, schedule, prediction, x0_clip)
    expected = torch.stack([step(OUT[None], t, LATENT[None])[0] for t in range(steps)])
    c = kernel.columns[:, :, None].unbind(1)
    x0 = c[0] * LATENT + c[1] * OUT
    if x0_clip is not None:
        assert (x0.abs() > x0_clip).any() and (x0.abs() < x0_clip).any()
        x0 = x0.clamp(-x0_clip, x0_clip)
    scale = (c[2] * x0).abs() + (c[3] * LATENT).abs()
    error = (means(kernel, OUT, LATENT, 1.0) - expected).abs()
    assert (error <= tolerance(levels)[:, None] * scale).all(), error.max()


DDIMS = [
    {"steps": steps, "eta": eta, "rederive_noise": rederive_noise}
    for steps, eta, rederive_noise in itertools.product([1, 5, 10, 20], [0.0, 0.3, 1.0], [True, False])
]


@each_prediction
@pytest.mark.parametrize("settings", [*DDIMS, {"steps": 5, "offset": 3, "eta": 0.5}])
@pytest.mark.parametrize("x0_clip", [None, 0.25])
def test_the_mean_and_the_std_of_ddim_are_those_of_a_diffusers_step(
    settings: dict[str, Any], prediction: Prediction, x0_clip: float | None, reference_step
) -> None:
    sampler = Sampler(**settings)
    latent, out = torch.randn(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = noise_levels(20, "squaredcos_cap_v2", RANGE)
    step = reference_step(20, "squaredcos_cap_v2", prediction, x0_clip, sampler)
    timesteps = list(sampler.timesteps(20))
    assert timesteps == step.timesteps
    kernel = kernel_of(levels, prediction, sampler, x0_clip)
    expected = torch.stack([step(out[None], t, latent[None])[0] for t in timesteps])
    # Next to pure noise, x0 is the difference of numbers a thousand times as large.
    torch.testing.assert_close(means(kernel, out, latent, sampler.eta), expected, rtol=1e-4, atol=1e-5)
    if sampler.eta > 0:
        moved = torch.stack([step(out[None], t, latent[None], noise=1.0)[0] for t in timesteps])
        std = sampler.eta * kernel.unit_std
        torch.testing.assert_close((moved - expected)[:, 0], std, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", DDIMS)
@each_prediction
def test_a_mean_with_the_noise_written_out_is_the_fused_one(settings: dict[str, Any], prediction: Prediction) -> None:
    latent, out = torch.randn(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, sampler = noise_levels(20, "squaredcos_cap_v2", RANGE), Sampler(**settings)
    fused = kernel_of(levels, prediction, sampler, 1.0)
    written_out = kernel_of(levels, prediction, Sampler(**settings, epsilon_clip=1e9), 1.0)
    assert fused.fused and not written_out.fused
    ours, theirs = (means(kernel, out, latent, sampler.eta) for kernel in (written_out, fused))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_predicted_noise_is_clipped_before_it_is_used() -> None:
    levels, sampler = noise_levels(20, "linear", RANGE), Sampler(steps=5, eta=0.0, epsilon_clip=0.5)
    kernel = kernel_of(levels, "epsilon", sampler, None)
    out, latent = torch.tensor([3.0, 0.2], dtype=torch.float64), torch.tensor([0.1, 0.1], dtype=torch.float64)
    for i, t in enumerate(sampler.timesteps(20)):
        now, before = levels.alpha_bar[t].double(), levels.alpha_bar[t - 4].double() if t >= 4 else torch.tensor(1.0)
        x0 = (latent - (1 - now).sqrt() * out) / now.sqrt()
        expected = before.sqrt() * x0 + (1 - before).sqrt() * torch.tensor([0.5, 0.2], dtype=torch.float64)
        torch.testing.assert_close(kernel.mean(out, latent, kernel.row(i), 0.0), expected, rtol=1e-5, atol=1e-6)


@each_schedule
def test_the_std_of_ddpm_is_that_of_a_diffusers_step(steps: int, schedule: BetaSchedule, reference_step) -> None:
    levels = noise_levels(steps, schedule, RANGE)
    std = Kernel(levels, "epsilon", DDPM, eta=1.0, x0_clip=None).unit_std.double()
    step = reference_step(steps, schedule, "epsilon", None)
    zero = torch.zeros(1, 1)
    expected = torch.cat([step(zero, t, zero, noise=1.0)[0] for t in range(steps)])
    assert expected[0] == 0  # diffusers adds nothing at the last step
    assert 0 < std[0] <= 1.0001e-10
    error = (std[1:] - expected[1:]).abs() / expected[1:]
    assert (error <= tolerance(levels)[1:]).all(), error.max()


@pytest.mark.parametrize("settings", [{}, *({"steps": 5, "eta": eta} for eta in (0.0, 0.5, 1.0))])
@pytest.mark.parametrize("schedule", get_args(BetaSchedule))
def test_a_step_with_the_true_x0_goes_back_along_the_noising_process(
    schedule: BetaSchedule, settings: dict[str, Any]
) -> None:
    """sqrt(alpha_bar) x0 and variance 1 - alpha_bar at a timestep must become those of the one before."""
    levels, sampler = noise_levels(100, schedule, RANGE), Sampler(**settings)
    kernel = kernel_of(levels, "sample", sampler, None)
    of_x0, of_latent = kernel.columns[:, 2], kernel.columns[:, 3]
    alpha_bar = levels.alpha_bar.double()[list(sampler.timesteps(100))]
    previous = torch.cat([torch.ones(1), alpha_bar[:-1]])
    signal = of_x0 + of_latent * alpha_bar.sqrt()
    variance = of_latent.square() * (1 - alpha_bar) + (sampler.eta * kernel.unit_std).square()
    torch.testing.assert_close(signal, previous.sqrt(), rtol=0, atol=2e-3 if schedule != "squaredcos_cap_v2" else 1e-3)
    torch.testing.assert_close(variance, 1 - previous, rtol=3e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"offset": -1}, "offset must not be negative"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], not 1.5"),
        ({"evaluation_eta": -0.1}, r"evaluation_eta must lie in \[0, 1\], not -0.1"),
        ({"eta_range": (0.5, 0.5)}, "eta_range must be two numbers that grow"),
        ({"learned_eta": "scalar", "eta": 0.05}, r"eta = 0.05 must lie in eta_range = \[0.1, 1.0\]"),
        ({"epsilon_clip": 0.0}, "epsilon_clip must be positive, or null"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Sampler(**settings)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"steps": 21}, "sampler.steps must not exceed denoising_steps = 20, but is 21"),
        ({"steps": 20, "offset": 1}, "sampler.offset = 1 leads beyond the last of 20 timesteps"),
    ],
)
def test_more_steps_than_timesteps_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Sampler(**settings).timesteps(20)


@pytest.mark.parametrize("settings", [{}, {"steps": 5}, {"rederive_noise": False}])
@pytest.mark.parametrize("eta", [0.1, 0.7, 1.0])
def test_a_learned_eta_has_finite_derivatives_that_are_those_of_a_fixed_one(
    settings: dict[str, Any], eta: float
) -> None:
    """The second ones, too, which natural gradients need; also next to the chunk, where all noise is removed."""
    latent, out = torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = noise_levels(20, "squaredcos_cap_v2", RANGE)
    learned = Kernel(levels, "epsilon", Sampler(**settings, learned_eta="scalar"), eta=None, x0_clip=1.0).double()

    def fixed(value: float, i: int) -> Tensor:
        kernel = Kernel(levels, "epsilon", Sampler(**settings), eta=value, x0_clip=1.0).double()
        return kernel.mean(out, latent, kernel.row(i), 0.0)

    for i in range(len(learned.unit_std)):
        number = torch.tensor(eta, dtype=torch.float64, requires_grad=True)
        mean = learned.mean(out, latent, learned.row(i), number)
        torch.testing.assert_close(mean.detach(), fixed(eta, i), rtol=1e-5, atol=1e-5)
        (slope,) = torch.autograd.grad(mean.sum(), number, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, number)
        assert slope.isfinite() and curvature.isfinite()
        if eta < 1:
            step = 1e-2
            expected = (fixed(eta + step, i) - fixed(eta - step, i)).sum() / (2 * step)
            torch.testing.assert_close(slope.detach(), expected, rtol=2e-2, atol=2e-4)
