import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo.advantages import clipped_to_quantiles, explained_variance, gae, group_advantages, inner_discount, normalized

FLAGS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=24)


def random_inputs(flags: list[tuple[bool, bool]], num_envs: int, seed: int) -> dict[str, Tensor]:
    """Rewards and values that have nothing to do with each other, [T, N] float64, and the flags dealt out in rows."""
    flags = flags[: len(flags) // num_envs * num_envs] or [(False, False)] * num_envs
    shape = (-1, num_envs)
    generator = torch.Generator().manual_seed(seed)
    inputs = {"terminated": torch.tensor([t for t, _ in flags]).view(shape)}
    inputs["truncated"] = torch.tensor([t for _, t in flags]).view(shape)
    for name in ("rewards", "values", "next_values"):
        inputs[name] = torch.randn(inputs["terminated"].shape, generator=generator, dtype=torch.float64)
    return inputs


def brute_force(
    rewards: np.ndarray, values: np.ndarray, next_values: np.ndarray, terminated: bool, gamma: float, lam: float
) -> list[float]:
    """Advantages of one episode, from arguments [L], by the definition: the sum over l of (gamma lambda)^l delta."""
    last = len(rewards) - 1
    successor = [0.0 if terminated and t == last else next_values[t] for t in range(len(rewards))]
    delta = [rewards[t] + gamma * successor[t] - values[t] for t in range(len(rewards))]
    return [sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, len(rewards))) for t in range(len(rewards))]


@settings(deadline=None)
@given(
    flags=FLAGS,
    num_envs=st.integers(1, 3),
    seed=st.integers(0, 1000),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
)
def test_advantages_are_those_of_each_episode_alone(flags, num_envs, seed, gamma, lam):
    inputs = random_inputs(flags, num_envs, seed)
    advantages, returns = gae(**inputs, gamma=gamma, gae_lambda=lam)
    for env in range(num_envs):
        column = {name: value[:, env].numpy() for name, value in inputs.items()}
        ends = [t for t, end in enumerate(column["terminated"] | column["truncated"]) if end]
        expected, start = [], 0
        for end in [*ends, len(column["rewards"]) - 1]:
            episode = {name: column[name][start : end + 1] for name in ("rewards", "values", "next_values")}
            if start <= end:
                expected += brute_force(**episode, terminated=column["terminated"][end], gamma=gamma, lam=lam)
            start = end + 1
        np.testing.assert_allclose(advantages[:, env], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(returns, advantages + inputs["values"])


@pytest.mark.parametrize(("terminated", "truncated"), [(True, False), (False, True), (True, True)])
def test_nothing_of_the_next_episode_reaches_the_one_before(terminated, truncated):
    inputs = {name: value.float() for name, value in random_inputs([(False, False)] * 8, 1, 0).items()}
    flags = {name: torch.zeros(8, 1, dtype=torch.bool) for name in ("terminated", "truncated")}
    flags["terminated"][3], flags["truncated"][3] = terminated, truncated
    before, _ = gae(**{**inputs, **flags}, gamma=0.99, gae_lambda=0.95)
    for name in ("rewards", "values", "next_values"):
        inputs[name] = inputs[name].clone()
        inputs[name][4:] += 7.0
    after, _ = gae(**{**inputs, **flags}, gamma=0.99, gae_lambda=0.95)
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).all()


def one_row(**changes: bool) -> float:
    flags = {"terminated": False, "truncated": False, **changes}
    rows = {name: torch.tensor([[value]]) for name, value in flags.items()}
    numbers = {"rewards": 1.0, "values": 0.5, "next_values": 10.0}
    rows |= {name: torch.tensor([[value]]) for name, value in numbers.items()}
    return float(gae(**rows, gamma=0.9, gae_lambda=0.95)[0])


def test_only_a_termination_stops_the_bootstrap():
    assert one_row() == pytest.approx(1 + 9 - 0.5)
    assert one_row(truncated=True) == pytest.approx(1 + 9 - 0.5)
    assert one_row(terminated=True) == pytest.approx(1 - 0.5)


def test_a_termination_wins_over_a_truncation():
    assert one_row(terminated=True, truncated=True) == pytest.approx(1 - 0.5)


def test_the_value_after_a_termination_may_be_anything():
    inputs = random_inputs([(False, False), (True, False), (False, False)], 1, 0)
    inputs["next_values"][1] = torch.nan
    advantages, returns = gae(**inputs, gamma=0.99, gae_lambda=0.95)
    assert advantages.isfinite().all()
    assert returns.isfinite().all()


def test_lambda_zero_is_the_one_step_temporal_difference():
    inputs = random_inputs([(False, False), (False, True), (False, False), (True, False)], 1, 1)
    advantages, _ = gae(**inputs, gamma=0.9, gae_lambda=0.0)
    successor = inputs["next_values"] * ~inputs["terminated"]
    torch.testing.assert_close(advantages, inputs["rewards"] + 0.9 * successor - inputs["values"])


def test_lambda_one_is_the_discounted_sum_of_rewards_when_the_successors_values_are_the_next_rows():
    inputs = random_inputs([(False, False)] * 3 + [(True, False)], 1, 2)
    inputs["next_values"] = inputs["values"].roll(-1, 0)
    _, returns = gae(**inputs, gamma=0.9, gae_lambda=1.0)
    rewards = inputs["rewards"][:, 0].tolist()
    expected = [sum(0.9 ** (j - t) * rewards[j] for j in range(t, 4)) for t in range(4)]
    torch.testing.assert_close(returns[:, 0], torch.tensor(expected, dtype=torch.float64))


def test_without_a_discount_of_the_future_only_the_reward_counts():
    inputs = random_inputs([(False, False)] * 6, 2, 3)
    advantages, returns = gae(**inputs, gamma=0.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages, inputs["rewards"] - inputs["values"])
    torch.testing.assert_close(returns, inputs["rewards"])


def test_the_inner_discount_is_one_next_to_the_action_and_shrinks_away_from_it():
    torch.testing.assert_close(inner_discount(4, 0.5), torch.tensor([0.125, 0.25, 0.5, 1.0]))
    assert inner_discount(1, 0.3).tolist() == [1.0]
    assert inner_discount(3, 1.0).tolist() == [1.0, 1.0, 1.0]
    assert inner_discount(3, 0.0).tolist() == [0.0, 0.0, 1.0]


def test_normalized_advantages_have_mean_zero_and_deviation_one():
    advantages = 5 + 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    result = normalized(advantages)
    assert float(result.mean()) == pytest.approx(0, abs=1e-5)
    assert float(result.std()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(result.argsort(), advantages.argsort())


def test_one_advantage_or_equal_ones_become_zero_and_not_nan():
    assert normalized(torch.tensor([3.0])).tolist() == [0.0]
    assert normalized(torch.full((5,), 3.0)).tolist() == [0.0] * 5


def test_advantages_beyond_their_quantiles_are_moved_to_them():
    values = torch.tensor([[9.0, -4.0, 0.0], [1.0, 2.0, 50.0]])  # sorted: -4 0 1 2 9 50
    clipped = clipped_to_quantiles(values, 0.2, 0.9)  # between 9 and 50, halfway
    torch.testing.assert_close(clipped, torch.tensor([[9.0, 0.0, 0.0], [1.0, 2.0, 29.5]]))
    assert torch.equal(clipped_to_quantiles(values, 0.0, 1.0), values)


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ([1.0, 2.0, 3.0], 1.0),
        ([11.0, 12.0, 13.0], 1.0),  # an offset is not variance
        ([2.0, 2.0, 2.0], 0.0),
        ([3.0, 2.0, 1.0], -3.0),
    ],
)
def test_explained_variance_by_hand(predictions, expected):
    assert explained_variance(torch.tensor(predictions), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(expected)


@pytest.mark.parametrize("targets", [[2.0], [2.0, 2.0]])
def test_explained_variance_says_nothing_where_the_targets_do_not_vary(targets):
    assert explained_variance(torch.zeros(len(targets)), torch.tensor(targets)) is None


def test_a_row_that_is_no_transition_adds_nothing_to_those_before_it():
    ones = torch.ones(3, 1)
    no = torch.zeros(3, 1, dtype=torch.bool)
    dropped = torch.tensor([[False], [True], [False]])
    settings = {"gamma": 0.5, "gae_lambda": 1.0}
    found, _ = gae(ones, ones, 3 * ones, no, dropped, valid=~dropped, **settings)
    assert found.tolist() == [[1.5], [0.0], [1.5]], "1 + 0.5 * 3 - 1, and nothing else"


def test_what_is_not_known_of_a_group_is_left_out_of_it():
    returns = torch.tensor([1.0, 3.0, torch.nan, 5.0, torch.nan, torch.nan])
    known = torch.tensor([True, True, False, True, False, False])
    advantages = group_advantages(returns, 3, known)
    root = 0.5**0.5
    torch.testing.assert_close(advantages, torch.tensor([-root, root, 0, 0, 0, 0]))


def test_returns_that_are_the_same_but_for_rounding_tell_a_group_nothing():
    returns = torch.tensor([1000.0, 1000.0001, 999.9999, 1000.0, 1.0, 1.001])
    advantages = group_advantages(returns, 2, torch.ones(6, dtype=torch.bool))
    assert advantages[:4].tolist() == [0, 0, 0, 0]
    assert advantages[4] < 0 < advantages[5]
