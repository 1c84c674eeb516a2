"""The probability flow: whether its likelihood is that of what it samples, and both are those of the data."""

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from two_modes import MODES, SHARES, SPREAD, energy_distance, ideal_output, mixture

from policies import DiffusionPolicy, ODEPolicy, Policy, UserError
from policies.chain import DiffusionConfig
from policies.networks.mlp import DenoisingMLP
from policies.ode import FlowLaw, ODEConfig, _with_divergence
from policies.samplers import Sampler

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
COSINE = {"prediction": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
SMOOTH = {"type": "mlp", "hidden_dims": [16, 16, 16], "activation": "mish", "residual": True}


def flow(**changes: Any) -> ODEPolicy:
    """With random weights, none of them zero; of two observations, and chunks of two actions in the plane.

    The schedule ends where there is signal left: at its end, the cosine's flow grows 400-fold by what is no noise in
    the output of a network that predicts it, as one that has not been trained does.
    """
    torch.manual_seed(0)
    schedule = {"beta_schedule": "linear", "beta_range": (1e-2, 0.5)}
    settings = {"obs_dim": 2, "action_dim": 2, "chunk": 2, "denoising_steps": 8, "network": SMOOTH, **schedule}
    policy = ODEPolicy(ODEConfig(**{**settings, **changes}))
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.2 * torch.randn(weights.shape))
    return policy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law_of(policy: ODEPolicy, obs: Tensor, probe: Tensor | None = None) -> FlowLaw:
    latent = torch.zeros(len(obs), *policy.latent_shape) if probe is None else probe
    law = policy.transition(obs, latent, torch.zeros(len(obs), dtype=torch.int64))
    assert isinstance(law, FlowLaw)
    return law


def with_denoiser(monkeypatch: pytest.MonkeyPatch, output: Any) -> None:
    """Let every network put out ``output(latent, timestep)``."""

    def perfect(self: DenoisingMLP, latent: Tensor, timestep: int, prepared: object) -> Tensor:
        return output(latent, timestep)

    monkeypatch.setattr(DenoisingMLP, "forward_prepared", perfect)


# --- against what is known in closed form ----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_likelihood_of_gaussian_data_is_that_of_the_gaussian(
    prediction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = flow(prediction=prediction, denoising_steps=300, chunk=1, beta_schedule="squaredcos_cap_v2")
    mean, std = torch.tensor([0.3, -0.5]), 0.4

    def ideal(latent: Tensor, timestep: int) -> Tensor:
        alpha_bar = policy.alpha_bar[timestep]
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0 = mean + signal * std**2 / (alpha_bar * std**2 + 1 - alpha_bar) * (latent - signal * mean)
        eps = (latent - signal * x0) / noise
        return {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}[prediction]

    with_denoiser(monkeypatch, ideal)
    data = Normal(mean, std)
    actions = data.sample((64, 1))
    ours = law_of(policy, torch.zeros(64, 1, 2)).log_prob(actions)
    torch.testing.assert_close(ours, data.log_prob(actions).sum((1, 2)), rtol=0, atol=5e-3)


def test_a_linear_flow_is_solved_as_its_equation_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """dz/du = (c_t - tanh u) z, so log z grows by c_t for each unit of the level, less log cosh of the last one."""
    policy = flow(denoising_steps=4, chunk=1, solver_steps=4)
    slopes = [0.9, 0.5, 1.2, 0.8]
    with_denoiser(monkeypatch, lambda latent, timestep: slopes[timestep] * latent)
    angles = policy.alpha_bar.double().sqrt().arccos()
    edges = [0.0, *((angles[1:] + angles[:-1]) / 2).tolist(), float(angles[-1])]
    levels = [math.asinh(math.tan(angle)) for angle in edges]
    growth = sum(slope * (b - a) for slope, (a, b) in zip(slopes, itertools.pairwise(levels), strict=True))
    growth -= math.log(math.cosh(levels[-1]))
    actions = 0.3 * torch.randn(16, 1, 2)
    noise, log_prob = law_of(policy, torch.zeros(16, 1, 2)).to_noise(actions)
    expected = actions * math.exp(growth)
    torch.testing.assert_close(noise, expected, rtol=1e-3, atol=1e-5)
    density = Normal(0.0, 1.0).log_prob(expected).sum((1, 2)) + 2 * growth
    torch.testing.assert_close(log_prob, density, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_with_a_perfect_denoiser_the_flow_samples_the_data_and_knows_their_density(
    prediction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"denoising_steps": 100, "beta_schedule": "squaredcos_cap_v2"}
    policy = flow(prediction=prediction, chunk=1, solver="midpoint", **schedule)
    with_denoiser(monkeypatch, lambda latent, t: ideal_output(prediction, latent, policy.alpha_bar[t]))
    actions = policy.sample(torch.zeros(2000, 1, 2), generator=seeded()).action
    assert energy_distance(actions, mixture(2000, seeded(1))) < 0.004
    data = MixtureSameFamily(Categorical(SHARES), MultivariateNormal(MODES, SPREAD**2 * torch.eye(2)))
    chunks = mixture(500, seeded(2))
    with torch.no_grad():
        error = law_of(policy, torch.zeros(500, 1, 2)).log_prob(chunks) - data.log_prob(chunks[:, 0])
    assert error.abs().median() < 0.05
    assert abs(float(error.mean())) < 0.02


@pytest.mark.parametrize("changes", [{}, COSINE, {"flow_timesteps": 4}, {"prediction": "sample"}])
def test_the_density_integrates_to_one_whatever_the_network(changes: dict[str, Any]) -> None:
    policy = flow(action_dim=1, chunk=1, solver_steps=4, **changes)
    grid = torch.linspace(-24, 24, 12_001)
    with torch.no_grad():
        density = law_of(policy, torch.full((12_001, 1, 2), 0.3)).log_prob(grid[:, None, None]).exp()
    assert density.max() < 20, "or the grid is too coarse"
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=3e-3)


def test_what_is_sampled_is_distributed_as_it_is_scored() -> None:
    policy = flow(action_dim=1, chunk=1)
    latents = policy.sample(torch.full((20_000, 1, 2), 0.3), generator=seeded()).chain[:, 1].flatten()
    grid = torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        density = law_of(policy, torch.full((4001, 1, 2), 0.3)).log_prob(grid[:, None, None]).exp()
    below = torch.cumulative_trapezoid(density, grid)
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        place = int(torch.searchsorted(below, quantile))
        assert float((latents < grid[place]).float().mean()) == pytest.approx(quantile, abs=0.015)


# --- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_way_back_leads_to_the_noise_that_a_chunk_came_from(prediction: Any) -> None:
    # An untrained network that predicts x0 contracts most: to a point, but for what is held below the first timestep.
    policy = flow(prediction=prediction, solver_steps=8 if prediction == "sample" else 1)
    obs, noise = torch.randn(32, 1, 2), policy.draw_noise(32, seeded())
    law = law_of(policy, obs)
    with torch.no_grad():
        found, _ = law.to_noise(law.from_noise(noise[:, 0]))
    torch.testing.assert_close(found, noise[:, 0], rtol=0, atol=2e-3)


def test_more_steps_of_the_solver_change_little_on_a_smooth_network() -> None:
    policy, obs = flow(), torch.randn(32, 1, 2)
    chunks = policy.sample(obs, generator=seeded()).chain[:, 1]
    with torch.no_grad():
        ours, theirs = (law_of(p, obs).log_prob(chunks) for p in (policy, policy.adjusted(solver_steps=8)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)


def test_the_exact_divergence_is_the_trace_of_the_jacobian() -> None:
    policy, obs = flow(), torch.randn(5, 1, 2)
    derivative = policy._field(policy.normalize_obs(obs).flatten(1))
    latent = torch.randn(5, 2, 2)
    probes = torch.eye(4).view(4, 1, 2, 2).expand(4, 5, 2, 2)
    for level in (0.0, 0.7, 3.0):
        moved, trace = _with_divergence(derivative, level, latent, probes, learning=False)
        jacobian = torch.autograd.functional.jacobian(lambda z, level=level: derivative(level, z), latent)
        for row in range(5):
            by_hand = sum(jacobian[row, i, j, row, i, j] for i in range(2) for j in range(2))
            torch.testing.assert_close(trace[row], torch.as_tensor(by_hand))
        torch.testing.assert_close(moved, derivative(level, latent))


def test_the_estimated_divergence_is_exact_on_average_over_all_signs() -> None:
    policy, obs = flow(), torch.randn(3, 1, 2)
    derivative = policy._field(policy.normalize_obs(obs).flatten(1))
    latent = torch.randn(3, 2, 2)
    units = torch.eye(4).view(4, 1, 2, 2).expand(4, 3, 2, 2)
    _, exact = _with_divergence(derivative, 0.7, latent, units, learning=False)
    estimates = []
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        probe = torch.tensor(signs).view(1, 1, 2, 2).expand(1, 3, 2, 2)
        estimates.append(_with_divergence(derivative, 0.7, latent, probe, learning=False)[1])
    torch.testing.assert_close(torch.stack(estimates).mean(0), exact)
    assert torch.stack(estimates).std(0).min() > 1e-3


def test_the_signs_of_the_estimate_travel_in_the_chain() -> None:
    policy = flow(divergence="hutchinson")
    start = policy.sample(torch.randn(50, 1, 2), generator=seeded()).chain[:, 0]
    assert set(start.flatten().tolist()) == {-1.0, 1.0}
    assert flow().sample(torch.randn(5, 1, 2)).chain[:, 0].count_nonzero() == 0


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_gradient_of_the_likelihood_is_that_of_finite_differences(divergence: Any, activation: str) -> None:
    policy = flow(divergence=divergence, network={**SMOOTH, "activation": activation}).double()
    obs, chunks = torch.randn(4, 1, 2).double(), 0.5 * torch.randn(4, 2, 2).double()
    probe = policy._probe(policy.draw_noise(4, seeded()).double())

    def score() -> Tensor:
        return law_of(policy, obs, probe).log_prob(chunks).sum()

    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(score(), parameters)
    for seed in range(3):
        direction = [torch.randn(weights.shape, generator=seeded(seed)).double() for weights in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for weights, d in zip(parameters, direction, strict=True):
                    weights.add_(d, alpha=sign * 1e-5)
                ends.append(float(score()))
                for weights, d in zip(parameters, direction, strict=True):
                    weights.sub_(d, alpha=sign * 1e-5)
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("residual", [False, True])
def test_there_is_no_relu_in_a_flow(residual: bool) -> None:
    policy = flow(network={**SMOOTH, "activation": "relu", "residual": residual}, relu_sharpness=7.0)
    kinds = {type(layer) for layer in policy.network.mlp.modules()}
    assert torch.nn.ReLU not in kinds
    softplus = [layer.beta for layer in policy.network.modules() if isinstance(layer, torch.nn.Softplus)]
    assert softplus and set(softplus) == {7.0}


def test_the_likelihood_is_the_same_with_a_graph_and_without_one() -> None:
    policy, obs = flow(), torch.randn(8, 1, 2)
    chunks = policy.sample(obs, generator=seeded()).chain[:, 1]
    with_graph = law_of(policy, obs).log_prob(chunks)
    assert with_graph.requires_grad
    with torch.no_grad():
        without = law_of(policy, obs).log_prob(chunks)
    assert not without.requires_grad
    torch.testing.assert_close(with_graph.detach(), without)


def test_it_is_sampled_in_inference_mode_and_scored_in_autocast_as_anywhere_else() -> None:
    policy, obs, noise = flow(), torch.randn(8, 1, 2), flow().draw_noise(8, seeded())
    ours = policy.sample(obs, noise=noise)
    with torch.inference_mode():
        inferred = policy.sample(obs + 0, noise=noise + 0)
    for record in dataclasses.fields(ours):
        assert torch.equal(getattr(inferred, record.name), getattr(ours, record.name))
    with torch.autocast("cpu", torch.bfloat16):
        scored = law_of(policy, obs).log_prob(ours.chain[:, 1])
    torch.testing.assert_close(scored.detach(), ours.log_prob[:, 0])


def test_several_threads_learn_from_it_at_once_as_one_does() -> None:
    policy = flow()
    obs = torch.randn(40, 1, 2)
    chunks = policy.sample(obs, generator=seeded()).chain[:, 1]

    def gradient(part: int) -> list[Tensor]:
        rows = slice(5 * part, 5 * part + 5)
        score = law_of(policy, obs[rows]).log_prob(chunks[rows]).mean()
        return [g.clone() for g in torch.autograd.grad(score, list(policy.parameters()))]

    alone = [gradient(part) for part in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, range(8)))
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- from a chain ----------------------------------------------------------------------------------------------------


def chain(**changes: Any) -> DiffusionPolicy:
    torch.manual_seed(0)
    settings = {"obs_dim": 2, "action_dim": 2, "chunk": 2, "denoising_steps": 8, "network": SMOOTH}
    policy = DiffusionPolicy(DiffusionConfig(**{**settings, **changes}))
    policy.fit_observations(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0]))
    policy.fit_actions(torch.tensor([-3.0, 0.0]), torch.tensor([1.0, 4.0]))
    policy.metadata = {"task": {"name": "here"}}
    return policy


def test_a_flow_samples_what_its_chain_does_without_noise_up_to_the_size_of_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distances = []
    for steps in (25, 100):
        policy = chain(chunk=1, denoising_steps=steps, x0_clip=None, sampler=Sampler(evaluation_eta=0.0))
        ours = ODEPolicy.from_diffusion(policy)
        levels = policy.alpha_bar
        with_denoiser(monkeypatch, lambda latent, t, levels=levels: ideal_output("epsilon", latent, levels[t]))
        obs, noise = torch.randn(200, 1, 2, generator=seeded()), policy.draw_noise(200, seeded())
        theirs = policy.sample(obs, noise=noise, deterministic=True).action
        distances.append(float((ours.sample(obs, noise=noise[:, :1]).action - theirs).abs().mean()))
    assert distances[1] < 0.7 * distances[0] < 0.03


def test_a_flow_keeps_weights_scalings_metadata_and_mode_of_its_chain() -> None:
    policy = chain().eval()
    ours = ODEPolicy.from_diffusion(policy)
    assert ours.state_dict().keys() == policy.state_dict().keys()
    assert all(torch.equal(weights, policy.state_dict()[name]) for name, weights in ours.state_dict().items())
    assert ours.metadata == policy.metadata
    assert not ours.training
    for name in ("obs_dim", "chunk", "denoising_steps", "prediction", "beta_schedule", "network"):
        assert getattr(ours.config, name) == getattr(policy.config, name)


def test_a_chain_that_learned_eta_becomes_a_flow_without_it() -> None:
    policy = chain(sampler=Sampler(steps=4, eta=0.5, learned_eta="state"))
    assert not any(name.startswith("eta.") for name in ODEPolicy.from_diffusion(policy).state_dict())


def test_a_chain_of_two_networks_is_refused() -> None:
    with pytest.raises(UserError, match="fine-tuned on its last 3 steps and has two"):
        ODEPolicy.from_diffusion(chain(finetuned_steps=3))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"flow_timesteps": 1}, "flow_timesteps must lie between 2 and denoising_steps = 20"),
        ({"flow_timesteps": 21}, "flow_timesteps must lie between 2 and denoising_steps = 20"),
        ({"denoising_steps": 101, "solver_steps": 1000}, "solver_steps must make at most 100,000 .* not 101,000"),
        ({"solver_steps": 0}, "solver_steps must lie between 1 and 1000, not 0"),
        ({"solver": "dopri5"}, "solver"),
        ({"relu_sharpness": 0.0}, "relu_sharpness must be positive"),
    ],
)
def test_settings_that_make_no_flow_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Policy.from_config({"type": "diffusion_ode", "obs_dim": 2, "action_dim": 2, **settings})


def test_one_timestep_makes_a_flow() -> None:
    sample = flow(denoising_steps=1, prediction="sample").sample(torch.randn(4, 1, 2), generator=seeded())
    assert sample.log_prob.isfinite().all()
