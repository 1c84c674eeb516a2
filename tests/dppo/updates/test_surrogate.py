import math

import pytest
import torch

from dppo.surrogates import approximate_kl, ratio_of
from dppo.updates.surrogate import ClippedRatio, LogLikelihood, MaskedRatio, PenalisedRatio

NO_STEPS = torch.zeros(1, dtype=torch.int64)


def test_the_clipped_surrogate_says_which_ratios_are_outside_their_own_range():
    ranges = torch.tensor([0.01, 0.2])
    surrogate = ClippedRatio(ranges, ranges, None)
    log_ratios = torch.tensor([1.1, 1.1, 0.7, 1.005]).log()
    losses, outside = surrogate.rows(log_ratios, torch.ones(4), torch.tensor([0, 1, 1, 0]))
    assert outside.tolist() == [1, 0, 1, 0]
    assert losses.tolist() == pytest.approx([-1.01, -1.1, -0.7, -1.005])


def test_outside_is_beyond_the_range_of_the_side_that_a_ratio_is_on():
    surrogate = ClippedRatio(torch.tensor([0.1]), torch.tensor([0.3]), None)
    log_ratios = torch.tensor([0.85, 0.95, 1.2, 1.4]).log()
    _, outside = surrogate.rows(log_ratios, torch.ones(4), torch.zeros(4, dtype=torch.int64))
    assert outside.tolist() == [1, 0, 0, 1]


def test_the_log_likelihood_has_the_policy_gradient_wherever_the_policy_is():
    log_prob = torch.tensor([0.3, -1.0], requires_grad=True)
    advantages = torch.tensor([2.0, -3.0])
    (losses,) = LogLikelihood().rows(log_prob - torch.tensor([5.0, 5.0]), advantages, NO_STEPS)
    losses.sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [-2.0, 3.0]


def test_the_penalty_is_the_kl_times_its_coefficient():
    surrogate = PenalisedRatio(0.5, 0.01, torch.device("cpu"))
    log_ratios, advantages = torch.tensor([0.3, -0.2]), torch.tensor([1.0, -2.0])
    (losses,) = surrogate.rows(log_ratios, advantages, NO_STEPS)
    expected = 0.5 * approximate_kl(log_ratios) - (ratio_of(log_ratios) * advantages).mean()
    torch.testing.assert_close(losses.mean(), expected)


def test_what_is_better_beyond_the_trust_region_is_masked_and_the_rest_is_the_ratio():
    log_ratios = torch.tensor([0.3, -0.2, 0.1, -0.4, -0.1, 0.2], requires_grad=True)
    advantages, kl = torch.tensor([1.0, -2.0, 3.0, -1.0, 2.0, -2.0]), torch.tensor([0.02, 0.03, *[0.04] * 4])
    losses, masked = MaskedRatio(0.03).rows(log_ratios, advantages, NO_STEPS, kl)
    losses.sum().backward()
    assert masked.tolist() == [0, 0, 1, 1, 0, 0]
    inside, back = [-math.exp(0.3), 2 * math.exp(-0.2)], [-2 * math.exp(-0.1), 2 * math.exp(0.2)]
    assert losses.tolist() == pytest.approx([*inside, -3, 1, *back])
    assert log_ratios.grad is not None
    assert log_ratios.grad.tolist() == pytest.approx([*inside, 0, 0, *back])


@pytest.mark.parametrize(("kl", "beta"), [(0.016, 2.0), (0.012, 1.0), (0.01, 1.0), (0.008, 1.0), (0.006, 0.5)])
def test_the_coefficient_follows_the_kl(kl, beta):
    surrogate = PenalisedRatio(1.0, 0.01, torch.device("cpu"))
    assert surrogate.adapt(kl) == {"kl_penalty": 1.0}
    assert surrogate.adapt(0.01) == {"kl_penalty": beta}
    assert surrogate.state_dict()["beta"] == beta


def test_the_coefficient_stays_a_number():
    surrogate = PenalisedRatio(1.0, 0.01, torch.device("cpu"))
    for _ in range(200):
        surrogate.adapt(1.0)
    assert surrogate.beta.isfinite()
    for _ in range(400):
        surrogate.adapt(0.0)
    assert surrogate.beta > 0
