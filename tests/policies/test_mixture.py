from typing import Any

import pytest
import torch

from policies import GaussianPolicy, MixturePolicy
from policies.gaussian import GaussianConfig
from policies.mixture import MixtureConfig

STEP = torch.zeros(1, dtype=torch.int64)
NETWORK = {"type": "mlp", "hidden_dims": [8, 8], "activation": "tanh"}


def mixture(**changes: Any) -> MixturePolicy:
    torch.manual_seed(0)
    return MixturePolicy(MixtureConfig(**{"obs_dim": 3, "action_dim": 1, "network": NETWORK, **changes}))


def test_the_density_integrates_to_one() -> None:
    policy = mixture(components=4, initial_std=0.3, initial_spread=2.0)
    grid = torch.linspace(-10, 10, 20_001)
    rows = len(grid)
    law = policy.transition(torch.ones(rows, 1, 3), torch.zeros(rows, 1, 1), STEP.expand(rows))
    density = law.log_prob(grid[:, None, None]).exp().detach()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)
    peaks = (density[1:-1] > density[:-2]) & (density[1:-1] > density[2:])
    assert peaks.sum() >= 2, "not one Gaussian"


def test_samples_are_of_that_density() -> None:
    """By a chi-square test over 20 bins."""
    policy = mixture(components=3, initial_std=0.2)
    with torch.no_grad():
        policy.network.output.weight.zero_()
        policy.network.output.bias.copy_(torch.tensor([0.0, 1.0, -1.0, -0.8, 0.1, 0.9]))
    draws = 20_000
    sample = policy.sample(torch.zeros(draws, 1, 3), generator=torch.Generator().manual_seed(0))
    edges = torch.linspace(-1.6, 1.6, 21)
    grid = torch.linspace(-1.6, 1.6, 20_001)
    law = policy.transition(torch.zeros(len(grid), 1, 3), torch.zeros(len(grid), 1, 1), STEP.expand(len(grid)))
    mass = law.log_prob(grid[:, None, None]).exp().detach()[:-1].view(20, -1).sum(1) * (grid[1] - grid[0])
    counts = torch.histc(sample.chain[:, 1].flatten(), 20, float(edges[0]), float(edges[-1]))
    expected = mass * draws
    chi_square = float(((counts - expected).square() / expected).sum())
    assert chi_square < 45.3  # 0.1 % of 20 degrees of freedom


def test_a_mixture_of_one_is_the_gaussian() -> None:
    one = mixture(components=1, action_dim=2, chunk=3)
    torch.manual_seed(0)
    gaussian = GaussianPolicy(GaussianConfig(obs_dim=3, action_dim=2, chunk=3, network=NETWORK))
    with torch.no_grad():
        for ours, theirs in zip(gaussian.network.parameters(), one.network.parameters(), strict=True):
            ours.copy_(theirs[1:] if ours.shape != theirs.shape else theirs)
    obs, latent = torch.randn(9, 1, 3), torch.randn(9, 3, 2)
    laws = [policy.transition(obs, latent, STEP.expand(9)) for policy in (one, gaussian)]
    torch.testing.assert_close(laws[0].log_prob(latent), laws[1].log_prob(latent))


def test_imitation_finds_two_answers_to_one_observation() -> None:
    policy = mixture(components=3)
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(1024, 1, 3, generator=generator)
    sign = torch.randint(2, (1024, 1, 1), generator=generator) * 2.0 - 1
    action = 0.6 * sign + 0.05 * torch.randn(1024, 1, 1, generator=generator)
    optimizer = torch.optim.Adam(policy.parameters(), 2e-2)
    for _ in range(300):
        optimizer.zero_grad()
        policy.imitation_loss(obs, action).backward()
        optimizer.step()
    drawn = policy.sample(obs, generator=generator).action.flatten()
    assert (drawn.abs() - 0.6).abs().quantile(0.95) < 0.2
    assert 0.4 < (drawn > 0).float().mean() < 0.6


@pytest.mark.parametrize(
    "settings",
    [{"components": 0}, {"min_std": 0.0}, {"min_std": 2.0}, {"initial_spread": -1.0}, {"chunk": 3, "executed": 2}],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"components|min_std|executed|initial_spread"):
        mixture(**settings)
