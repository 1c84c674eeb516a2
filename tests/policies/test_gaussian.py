from typing import Any

import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence

from policies import GaussianPolicy
from policies.distributions import SquashedNormal
from policies.gaussian import GaussianConfig

each_std = pytest.mark.parametrize("std", ["free", "state"])


def gaussian(**changes: Any) -> GaussianPolicy:
    torch.manual_seed(0)
    network = {"type": "mlp", "hidden_dims": [8, 8], "activation": "tanh"}
    return GaussianPolicy(GaussianConfig(**{"obs_dim": 3, "action_dim": 2, "network": network, **changes}))


STEP = torch.zeros(1, dtype=torch.int64)


@each_std
def test_the_std_starts_where_the_configuration_says_and_the_mean_near_zero(std: Any) -> None:
    policy = gaussian(std=std, initial_std=0.4, chunk=2)
    obs = torch.randn(50, 1, 3)
    law = policy.transition(obs, torch.zeros(50, 2, 2), STEP.expand(50))
    torch.testing.assert_close(law.stddev, torch.full((50, 2, 2), 0.4), rtol=0.05, atol=0)
    assert law.mean.abs().max() < 0.1


@each_std
def test_the_std_never_falls_below_its_floor_and_can_always_grow_again(std: Any) -> None:
    policy = gaussian(std=std, min_std=0.05)
    raw = policy.network.output.bias if std == "state" else policy.raw_std
    with torch.no_grad():
        raw[-2:] = -20.0
    law = policy.transition(torch.randn(1, 1, 3), torch.zeros(1, 1, 2), STEP)
    torch.testing.assert_close(law.stddev, torch.full((1, 1, 2), 0.05), rtol=1e-4, atol=0)
    law.stddev.sum().backward()
    assert raw.grad is not None and (raw.grad.flatten()[-2:] > 0).all()


def test_only_the_std_that_the_network_puts_out_depends_on_the_observation() -> None:
    obs = torch.randn(2, 1, 3)
    for std, differs in [("free", False), ("state", True)]:
        first, second = gaussian(std=std).transition(obs, torch.zeros(2, 1, 2), STEP.expand(2)).stddev
        assert torch.equal(first, second) != differs


@each_std
def test_samples_have_the_mean_and_std_of_the_law(std: Any) -> None:
    policy = gaussian(std=std, initial_std=0.4)
    with torch.no_grad():
        policy.network.output.bias[:2] = torch.tensor([0.5, -2.0])
    policy.fit_actions(torch.tensor([0.0, -1.0]), torch.tensor([10.0, 1.0]))
    obs = torch.full((20_000, 1, 3), 0.3)
    law = policy.transition(obs[:1], torch.zeros(1, 1, 2), STEP)
    sample = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.chain[:, 1].mean(0), law.mean[0], rtol=0, atol=0.02)
    torch.testing.assert_close(sample.chain[:, 1].std(0), law.stddev[0], rtol=0.03, atol=0)
    torch.testing.assert_close(sample.action.std(0), law.stddev[0] * torch.tensor([5.0, 1.0]), rtol=0.03, atol=0)


@each_std
@pytest.mark.parametrize("initial_std", [0.05, 1.0])
def test_the_density_integrates_to_one(std: Any, initial_std: float) -> None:
    policy = gaussian(std=std, initial_std=initial_std, action_dim=1)
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.1 * torch.randn(weights.shape))
    grid = torch.linspace(-10, 10, 20_001)
    rows = len(grid)
    law = policy.transition(torch.ones(rows, 1, 3), torch.zeros(rows, 1, 1), STEP.expand(rows))
    density = law.log_prob(grid[:, None, None]).exp().detach()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)


def test_imitation_finds_the_mean_and_the_spread_of_the_demonstrations() -> None:
    policy = gaussian()
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(512, 1, 3, generator=generator)
    spread = torch.tensor([0.3, 0.1])
    action = obs[..., :2] * 0.5 + spread * torch.randn(512, 1, 2, generator=generator)
    optimizer = torch.optim.Adam(policy.parameters(), 2e-2)
    for _ in range(250):
        optimizer.zero_grad()
        policy.imitation_loss(obs, action).backward()
        optimizer.step()
    law = policy.transition(obs, torch.zeros(512, 1, 2), STEP.expand(512))
    assert (law.mean - obs[..., :2] * 0.5).square().mean().sqrt() < 0.1
    torch.testing.assert_close(law.stddev[0, 0], spread, rtol=0.15, atol=0)


@pytest.mark.parametrize(
    "settings",
    [{"std": "fixed"}, {"min_std": 0.0}, {"min_std": 0.5, "initial_std": 0.5}, {"initial_std": float("nan")}],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="std"):
        gaussian(**settings)


# --- squashed


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.3), (-3.0, 2.0)])
def test_a_squashed_density_of_the_action_integrates_to_one(mean: float, std: float) -> None:
    law = SquashedNormal(torch.tensor(mean).double(), torch.tensor(std).double())
    z = torch.linspace(-25, 25, 200_001).double()
    action = z.tanh()
    widths = action.diff()
    density = law.log_prob(z).exp()
    inside = widths > 1e-14
    total = (widths * (density[1:] + density[:-1]) / 2)[inside].sum()
    assert float(total) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("mean", [0.0, 2.0, -30.0, 80.0])
def test_a_squashed_log_likelihood_is_finite_far_out_and_that_of_torch_near_by(mean: float) -> None:
    ours = SquashedNormal(torch.tensor(mean), torch.tensor(0.5))
    value = torch.tensor(mean + 0.3, requires_grad=True)
    score = ours.log_prob(value)
    (slope,) = torch.autograd.grad(score, value)
    assert score.isfinite() and slope.isfinite()
    if abs(mean) < 3:
        theirs = TransformedDistribution(Normal(torch.tensor(mean), torch.tensor(0.5)), TanhTransform())
        assert float(score) == pytest.approx(float(theirs.log_prob(value.tanh())), abs=1e-3)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.1), (0.0, 1.0), (2.0, 0.5), (-1.0, 3.0)])
def test_the_entropy_of_a_squashed_gaussian_is_that_of_numerical_integration(mean: float, std: float) -> None:
    loc = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
    law = SquashedNormal(loc, torch.tensor(std, dtype=torch.float64))
    z = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    density = Normal(law.loc, law.scale).log_prob(z).exp()
    expected = -torch.trapezoid(density * law.log_prob(z), z)
    assert float(law.entropy()) == pytest.approx(float(expected), abs=2e-2 if std > 2 else 1e-4)
    slopes = [torch.autograd.grad(value, loc)[0] for value in (law.entropy(), expected)]
    assert float(slopes[0]) == pytest.approx(float(slopes[1]), abs=2e-2)


def test_squashing_changes_no_divergence() -> None:
    plain = [Normal(torch.tensor(0.3), torch.tensor(0.5)), Normal(torch.tensor(-0.2), torch.tensor(0.9))]
    squashed = [SquashedNormal(law.loc, law.scale) for law in plain]
    assert kl_divergence(*squashed) == kl_divergence(*plain)


def test_a_squashed_action_keeps_to_its_bounds_and_imitates_those_at_them() -> None:
    policy = gaussian(squash=True, initial_std=5.0)
    policy.fit_actions(torch.tensor([0.0, -1.0]), torch.tensor([10.0, 1.0]))
    obs = torch.randn(1000, 1, 3)
    action = policy.sample(obs, generator=torch.Generator().manual_seed(0)).action
    assert (action.amin((0, 1)) >= torch.tensor([0.0, -1.0])).all()
    assert (action.amax((0, 1)) <= torch.tensor([10.0, 1.0])).all()
    at_the_bounds = torch.tensor([10.0, -1.0]).expand(1000, 1, 2)
    assert policy.imitation_loss(obs, at_the_bounds).isfinite()
