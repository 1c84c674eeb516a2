import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dppo.surrogates import approximate_kl, clipped_loss, entropy_terms, ratio_of
from dppo.updates.surrogate import ClippedRatio, LogLikelihood, PenalisedRatio

NO_STEPS = torch.zeros(1, dtype=torch.int64)


def clipped(advantage: float, ratio: float, dual_clip: float | None = None) -> tuple[float, float]:
    """Objective and its slope by the ratio."""
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    objective = -clipped_loss(log_ratio, torch.tensor([advantage]), torch.tensor(0.2), dual_clip)
    (slope,) = torch.autograd.grad(objective.sum(), log_ratio)
    return objective.item(), slope.item() / ratio


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective", "slope"),
    [
        (2.0, 0.5, 1.0, 2.0),  # below the range, and it should rise: it may
        (2.0, 1.0, 2.0, 2.0),
        (2.0, 1.5, 2.4, 0.0),  # above the range, and it has risen enough
        (-2.0, 0.25, -1.6, 0.0),  # below the range, and it has fallen enough
        (-2.0, 1.0, -2.0, -2.0),
        (-2.0, 1.5, -3.0, -2.0),  # above the range, and it should fall: it may
    ],
)
def test_the_clipped_objective_in_all_cases(advantage, ratio, objective, slope):
    assert clipped(advantage, ratio) == (pytest.approx(objective), pytest.approx(slope))


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective", "slope"),
    [(-2.0, 2.5, -5.0, -2.0), (-2.0, 4.0, -6.0, 0.0), (-2.0, 0.25, -1.6, 0.0), (2.0, 9.0, 2.4, 0.0)],
)
def test_a_dual_clip_bounds_what_a_negative_advantage_can_cost(advantage, ratio, objective, slope):
    assert clipped(advantage, ratio, 3.0) == (pytest.approx(objective), pytest.approx(slope))


def test_the_clipped_surrogate_says_which_ratios_are_outside_their_own_range():
    surrogate = ClippedRatio(torch.tensor([0.01, 0.2]), None)
    log_ratios = torch.tensor([1.1, 1.1, 0.7, 1.005]).log()
    losses, outside = surrogate.rows(log_ratios, torch.ones(4), torch.tensor([0, 1, 1, 0]))
    assert outside.tolist() == [1, 0, 1, 0]
    assert losses.tolist() == pytest.approx([-1.01, -1.1, -0.7, -1.005])


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
