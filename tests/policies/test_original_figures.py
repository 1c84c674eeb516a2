"""The chain reproduces the figures that the original DPPO implementation was recorded with."""

import pytest
import torch
from original import CASES, Figures

from policies import log_prob_factors


@pytest.fixture(params=["ddpm_partial", "ddim_5_of_100"])
def sampled(request: pytest.FixtureRequest) -> Figures:
    """The cases of which the weights that sampled were kept."""
    return Figures(request.param)


def test_the_recorded_noise_gives_the_recorded_chain_and_action(sampled: Figures) -> None:
    sample = sampled.policy("actor_ft.").sample(sampled["obs"], noise=sampled["noise"])
    torch.testing.assert_close(sample.chain, sampled["chain"], rtol=0, atol=2e-6)
    torch.testing.assert_close(sample.action, sampled["action"], rtol=0, atol=2e-6)


def test_the_recorded_noise_gives_the_recorded_deterministic_action(sampled: Figures) -> None:
    policy = sampled.policy("actor_ft.")
    sample = policy.sample(sampled["obs"], noise=sampled["noise_deterministic"], deterministic=True)
    torch.testing.assert_close(sample.action, sampled["action_deterministic"], rtol=0, atol=2e-6)


def test_every_dimension_of_the_recorded_chain_has_the_recorded_log_likelihood(sampled: Figures) -> None:
    chain, steps = sampled["chain"], sampled.config["ft"]
    batch = len(chain)
    law = sampled.policy("actor_ft.").transition(
        sampled["obs"].repeat_interleave(steps, 0), chain[:, :-1].flatten(0, 1), torch.arange(steps).repeat(batch)
    )
    factors = log_prob_factors(law, chain[:, 1:].flatten(0, 1))
    torch.testing.assert_close(factors.view_as(sampled["log_prob"]), sampled["log_prob"], rtol=0, atol=5e-6)


def test_frozen_steps_lead_to_the_recorded_start_of_the_finetuned_ones() -> None:
    figures = Figures("ddpm_final_clip_history")
    sample = figures.policy("actor_moved.").sample(figures["obs"], noise=figures["noise"])
    torch.testing.assert_close(sample.chain[:, 0], figures["chain"][:, 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_noise_schedule_is_the_recorded_one_bit_for_bit(case: str) -> None:
    figures = Figures(case)
    assert torch.equal(figures.policy("actor_moved.").alpha_bar, figures["alphas_cumprod"])
