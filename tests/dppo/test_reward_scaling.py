import numpy as np
import pytest
import torch
from torch import Tensor

from dppo.reward_scaling import RewardScaler

GAMMA = 0.9


def rollouts(count: int, steps: int = 25, num_envs: int = 3, valid_share: float = 1.0) -> list[tuple[Tensor, ...]]:
    """Rewards, ends and valid rows, [T, N] each; a row that is not valid pays nothing and ends nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (steps, num_envs)
    made = []
    for _ in range(count):
        valid = torch.rand(shape, generator=generator) < valid_share
        ended = (torch.rand(shape, generator=generator) < 0.2) & valid
        made.append((torch.randn(shape, generator=generator) * valid + valid, ended, valid))
    return made


def reimplemented(made: list[tuple[Tensor, ...]], gamma: float) -> list[np.ndarray]:
    """Scaled rewards by loops, from all discounted sums so far."""
    running = np.zeros(made[0][0].shape[1])
    sums: list[float] = []
    scaled = []
    for rewards, ended, valid in (tuple(part.numpy() for part in one) for one in made):
        for t in range(len(rewards)):
            for n in range(len(running)):
                running[n] = gamma * running[n] + rewards[t, n]
                if valid[t, n]:
                    sums.append(running[n])
                if ended[t, n]:
                    running[n] = 0.0
        scaled.append(np.clip(rewards / np.sqrt(np.var(sums) + 1e-8), -10, 10))
    return scaled


def test_rewards_are_divided_by_the_deviation_of_all_discounted_returns_so_far():
    made = rollouts(4)
    scaler = RewardScaler(3, GAMMA)
    for one, expected in zip(made, reimplemented(made, GAMMA), strict=True):
        np.testing.assert_allclose(scaler(*one), expected, rtol=1e-5)


def test_rows_that_are_not_valid_are_not_counted():
    made = rollouts(3, valid_share=0.7)
    scaler = RewardScaler(3, GAMMA)
    for one, expected in zip(made, reimplemented(made, GAMMA), strict=True):
        np.testing.assert_allclose(scaler(*one), expected, rtol=1e-5)
    assert scaler.statistics.count == sum(int(valid.sum()) for _, _, valid in made)


def test_a_return_begins_at_zero_in_every_episode():
    rewards, ended = torch.ones(4, 1), torch.tensor([[False], [True], [False], [False]])
    scaler = RewardScaler(1, 0.5)
    scaler(rewards, ended, torch.ones_like(ended))
    assert float(scaler.statistics.mean) == pytest.approx(np.mean([1, 1.5, 1, 1.5]))
    assert float(scaler.discounted) == 1.5, "the running episode is carried over"


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_the_scale_of_all_rewards_does_not_matter(factor):
    plain, multiplied = RewardScaler(3, GAMMA), RewardScaler(3, GAMMA)
    for rewards, ended, valid in rollouts(3):
        scaled, expected = multiplied(factor * rewards, ended, valid), plain(rewards, ended, valid)
        torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-6)


def test_the_sign_and_the_zero_of_rewards_are_kept():
    rewards, ended, valid = rollouts(1)[0]
    rewards[0] = 0.0
    scaled = RewardScaler(3, GAMMA)(rewards, ended, valid)
    assert torch.equal(scaled.sign(), rewards.sign())


def test_a_rare_huge_reward_is_clipped():
    rewards = torch.zeros(1000, 1)
    rewards[500] = 1e4
    flags = torch.zeros(1000, 1, dtype=torch.bool)
    scaled = RewardScaler(1, 0.0)(rewards, flags, ~flags)
    assert float(scaled.max()) == 10.0


def test_rewards_that_are_all_zero_stay_zero():
    flags = torch.zeros(5, 2, dtype=torch.bool)
    assert torch.equal(RewardScaler(2, GAMMA)(torch.zeros(5, 2), flags, ~flags), torch.zeros(5, 2))


def test_a_saved_scaler_goes_on_as_the_one_it_was():
    made = rollouts(2)
    scaler, again = RewardScaler(3, GAMMA), RewardScaler(3, GAMMA)
    scaler(*made[0])
    again.load_state_dict(scaler.state_dict())
    assert torch.equal(again(*made[1]), scaler(*made[1]))
