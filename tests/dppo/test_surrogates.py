import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from dppo.surrogates import (
    approximate_kl,
    clip_ranges,
    clipped_loss,
    divergence_terms,
    entropy_terms,
    kl_terms,
    log_ratio,
    value_losses,
)

CLIP_TABLE = [
    # advantage, ratio, objective at clip 0.2, whether its gradient vanishes
    (2.0, 0.5, 1.0, False),
    (2.0, 0.9, 1.8, False),
    (2.0, 1.0, 2.0, False),
    (2.0, 1.1, 2.2, False),
    (2.0, 1.5, 2.4, True),
    (-2.0, 0.25, -1.6, True),
    (-2.0, 0.9, -1.8, False),
    (-2.0, 1.0, -2.0, False),
    (-2.0, 1.1, -2.2, False),
    (-2.0, 1.5, -3.0, False),
    (0.0, 1.5, 0.0, True),
]


LAWS = {
    "normal": lambda shift: Independent(Normal(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]) + shift, 0.5 + shift), 2),
    "categorical": lambda shift: Categorical(logits=torch.tensor([[0.0, 1.0 + shift, -1e8]])),
    "several": lambda shift: Independent(Categorical(logits=torch.tensor([[[0.0, shift], [1.0, 2.0]]])), 1),
}


@pytest.mark.parametrize("kind", LAWS)
def test_the_divergence_of_laws_is_that_of_torch_wherever_there_is_one(kind):
    old, new = LAWS[kind](0.0), LAWS[kind](0.3)
    found = divergence_terms(old, new, torch.tensor([9.0]))
    torch.testing.assert_close(found, kl_divergence(old, new))
    assert float(found) > 0.005


def test_the_divergence_is_of_the_actions_that_are_executed():
    laws = LAWS["normal"](0.0), LAWS["normal"](0.3)
    first = (Independent(Normal(law.base_dist.loc[:, :1], law.base_dist.scale[:, :1]), 2) for law in laws)
    torch.testing.assert_close(divergence_terms(*laws, torch.tensor([9.0]), executed=slice(1)), kl_divergence(*first))


def test_a_divergence_without_a_closed_form_is_estimated_from_the_ratio():
    mixture = MixtureSameFamily(Categorical(torch.ones(1, 2)), Normal(torch.zeros(1, 2), 1.0))
    assert divergence_terms(mixture, mixture, torch.tensor([0.5])).tolist() == kl_terms(torch.tensor([0.5])).tolist()


@pytest.mark.parametrize(("advantage", "ratio", "objective", "flat"), CLIP_TABLE)
def test_the_clipped_objective_by_hand(advantage, ratio, objective, flat):
    log_ratios = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped_loss(log_ratios, torch.tensor([advantage]), *(torch.tensor([0.2]),) * 2)
    assert loss.item() == pytest.approx(-objective, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, log_ratios)
    assert gradient.item() == pytest.approx(0 if flat else -advantage * ratio, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective", "flat"),
    [(-2.0, 2.5, -5.0, False), (-2.0, 4.0, -6.0, True), (-2.0, 0.25, -1.6, True), (2.0, 9.0, 2.4, True)],
)
def test_a_dual_clip_bounds_what_a_negative_advantage_can_cost(advantage, ratio, objective, flat):
    log_ratios = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped_loss(log_ratios, torch.tensor([advantage]), *(torch.tensor([0.2]),) * 2, dual_clip=3.0)
    assert loss.item() == pytest.approx(-objective, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, log_ratios)
    assert gradient.item() == pytest.approx(0 if flat else -advantage * ratio, abs=1e-5)


def test_each_sample_has_its_own_clip_range():
    ranges = torch.tensor([0.1, 0.4])
    loss = clipped_loss(torch.full((2,), math.log(1.5)), torch.ones(2), ranges, ranges)
    torch.testing.assert_close(loss, torch.tensor([-1.1, -1.4]))


@pytest.mark.parametrize(("ratio", "advantage", "objective"), [(1.5, 1, 1.4), (1.3, 1, 1.3), (0.5, -1, -0.9)])
def test_ratios_above_one_can_have_a_range_of_their_own(ratio, advantage, objective):
    loss = clipped_loss(torch.tensor(math.log(ratio)), torch.tensor(advantage), torch.tensor(0.1), torch.tensor(0.4))
    assert float(loss) == pytest.approx(-objective)


def test_a_ratio_beyond_all_bounds_is_clipped_without_a_gradient_that_is_nan():
    log_ratios = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = clipped_loss(log_ratios, torch.tensor([1.0, -1.0]), *(torch.tensor(0.2),) * 2).sum()
    assert torch.autograd.grad(loss, log_ratios)[0].tolist() == [0.0, 0.0]


def test_factors_are_summed_or_averaged():
    new, old = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.5, 2.0], [2.0, 6.0]]])  # [1, Tp, Da]
    assert log_ratio(new, old, "sum").tolist() == [-0.5]
    assert log_ratio(new, old, "mean").tolist() == [-0.125]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_what_does_not_factorise_is_taken_as_it_is(reduction):
    assert log_ratio(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 4.0]), reduction).tolist() == [-2.0, 1.0]


def test_only_the_executed_actions_of_a_chunk_are_scored():
    new, old = torch.tensor([[[1.0, 2.0], [30.0, 40.0]]]), torch.zeros(1, 2, 2)
    assert log_ratio(new, old, "sum", executed=slice(1)).tolist() == [3.0]
    assert log_ratio(new, old, "mean", executed=slice(1)).tolist() == [1.5]
    assert log_ratio(new, old, "sum", executed=slice(2)).tolist() == [73.0]


def test_each_factor_is_clamped_and_not_their_sum():
    new, old = torch.tensor([[-9.0, 1.0, 3.0]]), torch.tensor([[-4.0, -7.0, 0.0]])
    clamped = log_ratio(new, old, "sum", clamp=(-5, 2))
    assert clamped.tolist() == [(-5 + 4) + (1 + 5) + (2 - 0)]


def test_clip_ranges_grow_from_the_base_to_the_full_range():
    ranges = clip_ranges(5, 0.01, 0.2, 3.0)
    assert float(ranges[0]) == pytest.approx(0.01)
    assert float(ranges[-1]) == pytest.approx(0.2)
    assert (ranges.diff() > 0).all()
    middle = 0.01 + 0.19 * (math.exp(1.5) - 1) / (math.exp(3) - 1)
    assert float(ranges[2]) == pytest.approx(middle)
    assert float(ranges[2]) < (0.01 + 0.2) / 2


def test_clip_ranges_fall_where_the_base_is_larger_as_sharply_as_they_would_grow():
    falling, growing = clip_ranges(5, 0.2, 0.01, 3.0), clip_ranges(5, 0.01, 0.2, 3.0)
    torch.testing.assert_close(falling + growing, torch.full((5,), 0.21))
    assert (falling.diff() < 0).all()


def test_clip_ranges_of_rate_zero_are_a_straight_line():
    torch.testing.assert_close(clip_ranges(3, 0.1, 0.3, 0.0), torch.tensor([0.1, 0.2, 0.3]))


def test_a_chain_of_one_step_has_the_full_clip_range():
    assert clip_ranges(1, 0.01, 0.2, 3.0).tolist() == [pytest.approx(0.2)]


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20))
def test_the_kl_estimate_is_never_negative(log_ratios):
    assert float(approximate_kl(torch.tensor(log_ratios))) >= -1e-7


def test_the_kl_estimate_never_pushes_a_ratio_beyond_all_bounds_further_up():
    log_ratios = torch.tensor([200.0, 1.0], requires_grad=True)
    gradient = torch.autograd.grad(kl_terms(log_ratios).sum(), log_ratios)[0]
    assert gradient.tolist() == [0.0, pytest.approx(math.e - 1)]


def test_the_kl_estimate_is_near_the_true_kl_of_two_close_gaussians():
    old, new = Normal(0.0, 1.0), Normal(0.1, 1.1)
    torch.manual_seed(0)
    samples = old.sample((200_000,))
    estimate = float(approximate_kl(new.log_prob(samples) - old.log_prob(samples)))
    assert estimate == pytest.approx(float(kl_divergence(old, new)), rel=0.02)
    assert estimate != pytest.approx(float(kl_divergence(new, old)), rel=0.05)


def test_the_value_losses_are_half_the_squared_errors():
    losses = value_losses(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.zeros(2))
    assert losses.tolist() == [0.5, 2.0]


def test_a_clipped_value_loss_takes_the_worse_of_both_errors():
    values = torch.tensor([1.0, 2.0, 1.0], requires_grad=True)
    returns, old = torch.tensor([2.0, 4.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    losses = value_losses(values, returns, old, clip=0.5)
    # The first value may move to 0.5 only: error 1.5; the second did not move; the third is worse where it is.
    assert losses.tolist() == pytest.approx([0.5 * 1.5**2, 0.5 * 2**2, 0.5 * 1**2])
    losses.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -2.0, 1.0]))


def entropy_and_slope(law_of: object, parameter: Tensor, samples: int) -> tuple[float, float]:
    law = law_of(parameter)
    value = law_of(parameter.detach()).sample((samples,))
    log_prob = law.log_prob(value)
    mean = entropy_terms(law, log_prob, log_prob - log_prob.detach()).mean()
    (slope,) = torch.autograd.grad(mean, parameter)
    return mean.item(), slope.item()


def test_the_entropy_of_a_law_without_a_closed_form_and_its_gradient_are_estimated_without_bias():
    """A mixture whose parts are the same is one Gaussian: H = log sigma + const, with slope 1 by log sigma."""
    torch.manual_seed(0)

    def mixture(log_std: Tensor) -> MixtureSameFamily:
        parts = Independent(Normal(torch.zeros(2, 1), log_std.exp().expand(2, 1)), 1)
        return MixtureSameFamily(Categorical(logits=torch.zeros(2)), parts)

    log_std = torch.tensor(-0.5, requires_grad=True)
    entropy, slope = entropy_and_slope(mixture, log_std, 200_000)
    assert entropy == pytest.approx(0.5 + 0.5 * math.log(2 * math.pi) - 0.5, abs=0.01)
    assert slope == pytest.approx(1.0, abs=0.02)


def test_a_closed_entropy_is_taken_where_there_is_one():
    law = Independent(Normal(torch.zeros(4, 3), 2.0), 1)
    terms = entropy_terms(law, torch.full((4, 3), torch.nan), torch.zeros(4))
    torch.testing.assert_close(terms, law.entropy())


def test_the_entropy_of_actions_that_are_not_executed_is_left_out():
    scale = torch.tensor([1.0, 2.0, 9.0])[:, None].expand(4, 3, 2)
    law = Independent(Normal(torch.zeros(4, 3, 2), scale), 2)
    terms = entropy_terms(law, torch.zeros(4, 3, 2), torch.zeros(4), executed=slice(2))
    expected = 2 * (Normal(0.0, 1.0).entropy() + Normal(0.0, 2.0).entropy())
    torch.testing.assert_close(terms, expected.expand(4))


def test_actions_of_a_chunk_that_belong_to_the_past_are_not_scored() -> None:
    new, old = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.zeros(1, 3, 1)
    assert log_ratio(new, old, "sum", executed=slice(1, 3)).tolist() == [6.0]
