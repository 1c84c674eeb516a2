import pytest
import torch
from torch import Tensor

from policies import CategoricalPolicy
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
