import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from policies import CategoricalPolicy, log_prob_factors
from policies.categorical import CategoricalConfig

STEP = torch.zeros(1, dtype=torch.int64)


def categorical(actions: int = 3) -> CategoricalPolicy:
    torch.manual_seed(0)
    network = {"type": "mlp", "hidden_dims": [8, 8], "activation": "tanh"}
    return CategoricalPolicy(CategoricalConfig(obs_dim=2, action_dim=actions, network=network))


def test_all_actions_are_about_equally_likely_at_the_start() -> None:
    law = categorical(4).transition(torch.randn(50, 1, 2), torch.zeros(50), STEP.expand(50))
    every = torch.arange(4)[:, None].expand(4, 50)
    torch.testing.assert_close(law.log_prob(every).exp(), torch.full((4, 50), 0.25), rtol=0.05, atol=0)


def test_the_probabilities_of_all_actions_sum_to_one() -> None:
    policy = categorical()
    with torch.no_grad():
        policy.network.output.weight.mul_(300)
    law = policy.transition(torch.randn(5, 1, 2), torch.zeros(5), STEP.expand(5))
    total = sum(law.log_prob(torch.full((5,), action)).exp() for action in range(3))
    torch.testing.assert_close(total, torch.ones(5))


def test_actions_come_as_often_as_their_probability_says_and_the_best_one_when_deterministic() -> None:
    policy = categorical()
    with torch.no_grad():
        policy.network.output.weight.zero_()
        policy.network.output.bias.copy_(torch.tensor([0.2, 0.7, 0.1]).log())
    obs = torch.zeros(20_000, 1, 2)
    action = policy.sample(obs, generator=torch.Generator().manual_seed(0)).action
    shares = torch.bincount(action, minlength=3) / len(action)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.7, 0.1]), rtol=0, atol=0.02)
    assert (policy.sample(obs, deterministic=True).action == 1).all()


def test_frequencies_pass_a_chi_square_test_down_to_rare_actions_and_rows_are_independent() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.009, 0.001])
    policy = categorical(6)
    with torch.no_grad():
        policy.network.output.weight.zero_()
        policy.network.output.bias.copy_(probabilities.log() + 3)  # logits need not be normalised
    draws = 20_000
    noise = policy.draw_noise(draws, torch.Generator().manual_seed(0))
    action = policy.sample(torch.zeros(draws, 1, 2), noise=noise).action

    def chi_square(counts: Tensor, shares: Tensor) -> float:
        expected = shares * counts.sum()
        return float(((counts - expected).square() / expected).sum())

    assert chi_square(torch.bincount(action, minlength=6), probabilities) < 20.5  # 0.1 % of 5 degrees of freedom
    common = probabilities[:3] / probabilities[:3].sum()
    pairs = action.view(-1, 2)[(action.view(-1, 2) < 3).all(1)]
    together = torch.bincount(3 * pairs[:, 0] + pairs[:, 1], minlength=9)
    assert chi_square(together, torch.outer(common, common).flatten()) < 26.1  # 0.1 % of 8


def test_imitation_is_the_cross_entropy_of_the_demonstrated_actions() -> None:
    policy = categorical()
    obs, action = torch.randn(5, 1, 2), torch.tensor([0, 2, 1, 1, 0])
    logits = policy.network(obs.flatten(1))
    torch.testing.assert_close(policy.imitation_loss(obs, action), torch.nn.functional.cross_entropy(logits, action))


def test_a_chunk_of_discrete_actions_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk must be 1, not 2"):
        CategoricalConfig(obs_dim=2, action_dim=3, chunk=2)


# --- several dimensions, and masks


def several(**changes: Any) -> CategoricalPolicy:
    torch.manual_seed(0)
    network = {"type": "mlp", "hidden_dims": [8, 8], "activation": "tanh"}
    settings = {"obs_dim": 2, "action_dim": 6, "choices": (3, 1, 2), "network": network, **changes}
    policy = CategoricalPolicy(CategoricalConfig(**settings))
    with torch.no_grad():
        policy.network.output.weight.mul_(200)
    return policy


def test_the_probabilities_of_all_combinations_sum_to_one_and_factorise() -> None:
    policy = several()
    obs = torch.randn(4, 1, 2)
    law = policy.transition(obs, torch.zeros(4, 3, dtype=torch.int64), STEP.expand(4))
    every = [torch.tensor(one) for one in itertools.product(range(3), range(1), range(2))]
    total = sum(law.log_prob(one.expand(4, 3)).exp() for one in every)
    torch.testing.assert_close(total, torch.ones(4))
    logits = policy.network(policy.normalize_obs(obs).flatten(1)).split([3, 1, 2], dim=1)
    one = torch.tensor([2, 0, 1])
    expected = sum(part.log_softmax(1)[:, action] for part, action in zip(logits, one.tolist(), strict=True))
    torch.testing.assert_close(law.log_prob(one.expand(4, 3)), expected)
    entropies = [torch.distributions.Categorical(logits=part).entropy() for part in logits]
    torch.testing.assert_close(law.entropy(), sum(entropies))


def test_no_action_is_drawn_that_a_dimension_does_not_have() -> None:
    action = several().sample(torch.randn(5000, 1, 2), generator=torch.Generator().manual_seed(0)).action
    assert action.amin(0).tolist() == [0, 0, 0]
    assert action.amax(0).tolist() == [2, 0, 1]


def masked_obs(rows: int, mask: list[int]) -> Tensor:
    return torch.cat([torch.randn(rows, 1, 2), torch.tensor(mask).float().expand(rows, 1, -1)], dim=2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_action_that_is_not_valid_is_never_taken(deterministic: bool) -> None:
    policy = several(obs_dim=5, action_dim=3, choices=None, masked=True)
    obs = masked_obs(2000, [1, 0, 1])
    sample = policy.sample(obs, deterministic=deterministic, generator=torch.Generator().manual_seed(0))
    assert set(sample.action.unique().tolist()) == {0, 2}
    assert sample.log_prob.isfinite().all()


def test_a_mask_renormalises_what_is_left_and_leaves_no_trace_in_gradients() -> None:
    policy = several(obs_dim=5, action_dim=3, choices=None, masked=True)
    obs = masked_obs(50, [1, 0, 1])
    law, free = (policy.transition(o, torch.zeros(50), STEP.expand(50)) for o in (obs, masked_obs(50, [1, 1, 1])))
    with torch.no_grad():
        logits = policy.network(policy.normalize_obs(obs)[..., :2].flatten(1))
    expected = logits[:, [0, 2]].log_softmax(1)
    torch.testing.assert_close(law.log_prob(torch.full((50,), 2)), expected[:, 1])
    assert law.entropy().isfinite().all()
    assert (law.entropy() < 0.7).all() and (free.entropy() > law.entropy()).any()
    loss = law.entropy().sum() + law.log_prob(torch.zeros(50)).sum() + kl_divergence(law, law).sum()
    loss.backward()
    assert policy.network.output.bias.grad is not None
    assert policy.network.output.bias.grad.isfinite().all()
    assert policy.network.output.bias.grad[1] == 0


def test_the_network_does_not_see_the_mask() -> None:
    policy = several(obs_dim=5, action_dim=3, choices=None, masked=True)
    assert policy.network.input.in_features == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choices": (3, 4)}, "must add up to action_dim, 6"),
        ({"choices": (7, -1)}, "must be positive"),
        ({"masked": True}, "holds no mask of 6 actions"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        several(**settings)


def test_each_dimension_has_its_part_of_a_mask() -> None:
    policy = several(obs_dim=8, masked=True)
    obs = masked_obs(2000, [0, 1, 1, 1, 1, 0])
    action = policy.sample(obs, generator=torch.Generator().manual_seed(0)).action
    assert [set(column.tolist()) for column in action.T] == [{1, 2}, {0}, {0}]


def test_a_dimension_without_any_valid_action_still_takes_one_that_it_has() -> None:
    policy = several(obs_dim=8, masked=True)
    obs = masked_obs(3000, [1, 1, 1, 1, 0, 0])
    sample = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    assert sample.action.amax(0).tolist() == [2, 0, 1]
    everything = torch.cat([obs[..., :2], torch.ones(3000, 1, 6)], dim=2)
    free = policy.transition(everything, sample.chain[:, 0], STEP.expand(3000))
    torch.testing.assert_close(sample.log_prob_factors[:, 0], log_prob_factors(free, sample.action))
