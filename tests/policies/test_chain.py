"""The diffusion policy: who serves which step, which std is used when, and whether the chain leads to the data."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from two_modes import energy_distance, ideal_output, mixture

from policies import DiffusionPolicy, Policy, UserError
from policies.chain import EVALUATION_STD, DiffusionConfig
from policies.networks.mlp import DenoisingMLP
from policies.samplers import Sampler

OBS_DIM, ACTION_DIM, CHUNK, STEPS = 2, 2, 3, 5
BATCH = 4
NETWORK = {"type": "mlp", "hidden_dims": [8, 8, 8], "activation": "mish", "residual": True}
LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])


def diffusion(**changes: Any) -> DiffusionPolicy:
    """A pretrained policy of K = 5 steps whose trained and frozen networks (if any) differ."""
    torch.manual_seed(0)
    settings = {"chunk": CHUNK, "denoising_steps": STEPS, "network": NETWORK, **changes}
    policy = DiffusionPolicy(DiffusionConfig(**{"obs_dim": OBS_DIM, "action_dim": ACTION_DIM, **settings}))
    policy.fit_observations(LOW, HIGH)
    action_low = torch.linspace(-3, 10, policy.config.action_dim)
    policy.fit_actions(action_low, action_low + 5)
    if policy.frozen is not None:
        with torch.no_grad():
            for weights in policy.frozen.parameters():
                weights.add_(0.2 * torch.randn(weights.shape))
    return policy


def observations(policy: Policy, batch: int = BATCH) -> Tensor:
    shape = (batch, policy.config.history, policy.config.obs_dim)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 3 - 1


def noise_for(policy: DiffusionPolicy, batch: int = BATCH, seed: int = 2) -> Tensor:
    return policy.draw_noise(batch, torch.Generator().manual_seed(seed))


# --- who serves which step -------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The timesteps that each denoising network, by its id, was evaluated at."""
    seen: dict[int, list[int]] = {}

    def spy(method: str) -> None:
        original = getattr(DenoisingMLP, method)

        def spied(self: DenoisingMLP, latent: Tensor, timestep: Any, *rest: Any) -> Tensor:
            seen.setdefault(id(self), []).extend(torch.as_tensor(timestep).flatten().tolist())
            return original(self, latent, timestep, *rest)

        monkeypatch.setattr(DenoisingMLP, method, spied)

    spy("forward")
    spy("forward_prepared")
    return seen


@pytest.mark.parametrize("finetuned", range(1, STEPS))
def test_sampling_runs_the_frozen_network_before_the_finetuned_steps_and_the_trained_one_on_them(
    finetuned: int, served: dict[int, list[int]]
) -> None:
    policy = diffusion(finetuned_steps=finetuned)
    policy.sample(observations(policy))
    timesteps = list(reversed(range(STEPS)))
    assert served == {id(policy.frozen): timesteps[:-finetuned], id(policy.network): timesteps[-finetuned:]}


@pytest.mark.parametrize("finetuned", range(1, STEPS + 1))
def test_scoring_runs_the_trained_network_alone_on_finetuned_steps_alone(
    finetuned: int, served: dict[int, list[int]]
) -> None:
    policy = diffusion(finetuned_steps=finetuned)
    latent = torch.randn(finetuned, CHUNK, ACTION_DIM)
    policy.transition(observations(policy, finetuned), latent, torch.arange(finetuned))
    assert served == {id(policy.network): list(reversed(range(finetuned)))}


@pytest.mark.parametrize("finetuned", range(1, STEPS + 1))
def test_imitation_trains_the_network_on_all_its_steps_and_on_no_other(
    finetuned: int, served: dict[int, list[int]]
) -> None:
    policy = diffusion(finetuned_steps=finetuned)
    policy.imitation_loss(observations(policy, 100), torch.zeros(100, CHUNK, ACTION_DIM))
    assert served.keys() == {id(policy.network)}
    assert set(served[id(policy.network)]) == set(range(finetuned))


@pytest.mark.parametrize("finetuned", [None, STEPS])
def test_a_policy_that_trains_all_its_steps_has_no_frozen_copy(finetuned: int | None) -> None:
    policy = diffusion(finetuned_steps=finetuned)
    assert policy.frozen is None
    assert policy.num_steps == STEPS
    assert not any(name.startswith("frozen") for name in policy.state_dict())


# --- from a pretrained policy to one that is fine-tuned --------------------------------------------------------------


@pytest.mark.parametrize("finetuned", range(1, STEPS + 1))
@pytest.mark.parametrize("deterministic", [False, True])
def test_before_training_an_adjusted_policy_samples_as_the_pretrained_one(finetuned: int, deterministic: bool) -> None:
    pretrained = diffusion()
    obs, noise = observations(pretrained), noise_for(pretrained)
    adjusted = pretrained.adjusted(finetuned_steps=finetuned)
    ours, theirs = (policy.sample(obs, noise=noise, deterministic=deterministic) for policy in (adjusted, pretrained))
    assert adjusted.num_steps == finetuned
    assert torch.equal(ours.action, theirs.action)
    assert torch.equal(ours.chain, theirs.chain[:, -finetuned - 1 :])
    assert torch.equal(ours.log_prob_factors, theirs.log_prob_factors[:, -finetuned:])


def test_training_an_adjusted_policy_changes_neither_its_frozen_network_nor_the_pretrained_policy() -> None:
    pretrained = diffusion()
    before = copy.deepcopy(pretrained.network.state_dict())
    adjusted = pretrained.adjusted(finetuned_steps=2)
    with torch.no_grad():
        for weights in adjusted.network.parameters():
            weights.add_(1)
    assert adjusted.frozen is not None
    for name, weights in before.items():
        assert torch.equal(adjusted.frozen.state_dict()[name], weights)
        assert torch.equal(pretrained.network.state_dict()[name], weights)


def test_an_adjusted_policy_keeps_its_scaling_and_a_copy_of_its_metadata() -> None:
    pretrained = diffusion()
    pretrained.metadata = {"task": "hopper"}
    adjusted = pretrained.adjusted(finetuned_steps=2, exploration_std=0.05, executed=1)
    obs = observations(pretrained)
    assert torch.equal(adjusted.normalize_obs(obs), pretrained.normalize_obs(obs))
    assert torch.equal(adjusted.action_scaler.scale, pretrained.action_scaler.scale)
    assert (adjusted.config.exploration_std, adjusted.config.executed) == (0.05, 1)
    adjusted.metadata["task"] = "walker2d"
    assert pretrained.metadata == {"task": "hopper"}


FIXED = {
    "action_dim": 3,
    "beta_range": [1e-3, 0.1],
    "beta_schedule": "linear",
    "chunk": 2,
    "denoising_steps": 10,
    "first_executed": 1,
    "history": 2,
    "network": {"type": "mlp"},
    "obs_dim": 3,
    "observation_scaling": "running",
    "prediction": "sample",
}


def test_every_setting_is_either_fixed_by_the_weights_or_adjustable() -> None:
    names = {field.name for field in dataclasses.fields(DiffusionConfig)}
    assert names == set(FIXED) | DiffusionConfig.adjustable
    assert not set(FIXED) & DiffusionConfig.adjustable


@pytest.mark.parametrize("name", FIXED)
def test_a_setting_that_the_weights_fix_cannot_be_adjusted(name: str) -> None:
    with pytest.raises(UserError, match=rf"policy\.{name} is fixed by the checkpoint's weights"):
        diffusion().adjusted(**{name: FIXED[name]})


@pytest.mark.parametrize("finetuned", [1, 3, STEPS, None])
def test_the_number_of_finetuned_steps_of_a_finetuned_policy_cannot_change(finetuned: int | None) -> None:
    with pytest.raises(UserError, match="already fine-tuned on its last 2 steps"):
        diffusion(finetuned_steps=2).adjusted(finetuned_steps=finetuned)


def test_other_settings_of_a_finetuned_policy_can_change() -> None:
    policy = diffusion(finetuned_steps=2)
    adjusted = policy.adjusted(finetuned_steps=2, exploration_std=0.0)
    obs, noise = observations(policy), noise_for(policy)
    assert not torch.equal(adjusted.sample(obs, noise=noise).action, policy.sample(obs, noise=noise).action)
    ours, theirs = (p.sample(obs, noise=noise, deterministic=True) for p in (adjusted, policy))
    assert torch.equal(ours.chain, theirs.chain)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"finetuned_steps": 0}, "finetuned_steps must lie between 1 and denoising_steps = 5, not 0"),
        ({"finetuned_steps": 6}, "finetuned_steps must lie between 1 and denoising_steps = 5, not 6"),
        ({"executed": 4}, "executed must lie between 1 and chunk = 3, not 4"),
        ({"likelihood_std": "wide"}, "likelihood_std"),
        ({"exploration_sdt": 0.1}, "no setting 'exploration_sdt'.*did you mean exploration_std"),
    ],
)
def test_an_impossible_adjustment_is_an_error_that_a_user_can_read(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        diffusion().adjusted(**changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"denoising_steps": 0},
        {"finetuned_steps": 0},
        {"finetuned_steps": STEPS + 1},
        {"executed": 0},
        {"executed": CHUNK + 1},
        {"likelihood_std": 0.0},
        {"likelihood_std": math.nan},
        {"exploration_std": -0.1},
        {"x0_clip": 0.0},
        {"noise_clip": -1.0},
        {"final_clip": -1.0},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        diffusion(**settings)


# --- samplers --------------------------------------------------------------------------------------------------------


def finetuned_on(*, sampler: Sampler | None = None, steps: int = 20, finetuned: int = 10) -> DiffusionPolicy:
    return diffusion(denoising_steps=steps, finetuned_steps=finetuned, sampler=sampler or Sampler())


@pytest.mark.parametrize(
    ("sampler", "finetuned", "expected"),
    [(Sampler(), 10, range(10)), (Sampler(steps=5), 2, range(5)), (Sampler(steps=5), 5, range(20))],
)
def test_imitation_trains_the_network_on_every_timestep_that_it_serves(
    sampler: Sampler, finetuned: int, expected: range, served: dict[int, list[int]]
) -> None:
    policy = finetuned_on(sampler=sampler, finetuned=finetuned)
    policy.imitation_loss(observations(policy, 400), torch.zeros(400, CHUNK, ACTION_DIM))
    assert set(served[id(policy.network)]) == set(expected)


def test_another_sampler_runs_each_network_on_the_timesteps_that_it_serves(served: dict[int, list[int]]) -> None:
    policy = finetuned_on().with_sampler(Sampler(steps=5, evaluation_eta=0))
    policy.sample(observations(policy))
    assert policy.num_steps == 3
    assert served == {id(policy.frozen): [16, 12], id(policy.network): [8, 4, 0]}


def test_another_sampler_that_needs_no_frozen_step_does_without_the_frozen_network() -> None:
    finetuned = finetuned_on(finetuned=18)
    policy = finetuned.with_sampler(Sampler(steps=5))
    assert policy.frozen is None and policy.num_steps == 5
    for name, weights in finetuned.network.state_dict().items():
        assert torch.equal(policy.network.state_dict()[name], weights)


def test_a_sampler_may_have_more_steps_than_the_one_that_was_finetuned() -> None:
    policy = finetuned_on(sampler=Sampler(steps=5), finetuned=3).with_sampler(Sampler())
    assert policy.num_steps == 9  # up to timestep 8
    assert policy.frozen is not None


@pytest.mark.parametrize(
    ("sampler", "complaint"),
    [
        (Sampler(steps=21), "sampler.steps must not exceed denoising_steps = 20, but is 21"),
        (Sampler(steps=1, offset=15), "sampler.offset=15 leaves no step to what was fine-tuned.*below 10"),
    ],
)
def test_a_sampler_that_does_not_fit_is_an_error_that_a_user_can_read(sampler: Sampler, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        finetuned_on().with_sampler(sampler)


def test_ddim_with_all_noise_over_all_timesteps_is_ddpm() -> None:
    ddpm = diffusion()
    ddim = ddpm.adjusted(sampler={"steps": STEPS, "eta": 1.0})
    obs, noise = observations(ddpm), noise_for(ddpm)
    ours, theirs = (policy.sample(obs, noise=noise).chain for policy in (ddim, ddpm))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_training_fewer_steps_freezes_what_was_learned_and_goes_on_with_the_same_network(
    served: dict[int, list[int]],
) -> None:
    policy = finetuned_on()
    shorter = policy.with_fewer_finetuned_steps(4)
    assert shorter.num_steps == 4 and shorter.frozen is not None
    for network in (shorter.network, shorter.frozen):
        for name, weights in policy.network.state_dict().items():
            assert torch.equal(network.state_dict()[name], weights)
    assert not any(weights.requires_grad for weights in shorter.frozen.parameters())
    shorter.sample(observations(shorter))
    assert served[id(shorter.frozen)] == list(range(19, 3, -1))


@pytest.mark.parametrize("kind", ["scalar", "action", "state"])
def test_a_learned_eta_begins_at_the_one_that_is_set_and_moves_the_law(kind: Any) -> None:
    sampler = Sampler(steps=5, eta=0.5, learned_eta=kind)
    learned, fixed = (finetuned_on(sampler=s, finetuned=5) for s in (sampler, Sampler(steps=5, eta=0.5)))
    learned.network.load_state_dict(fixed.network.state_dict())
    obs, noise = observations(learned), noise_for(learned)
    ours, theirs = (policy.sample(obs, noise=noise) for policy in (learned, fixed))
    torch.testing.assert_close(ours.chain, theirs.chain, rtol=1e-4, atol=1e-4)
    step = torch.ones(BATCH, dtype=torch.long)
    law = learned.transition(obs, ours.chain[:, 1], step)
    torch.testing.assert_close(law.mean, fixed.transition(obs, ours.chain[:, 1], step).mean, rtol=1e-4, atol=1e-4)
    assert learned.eta is not None
    gradients = torch.autograd.grad(law.log_prob(ours.chain[:, 2]).sum(), list(learned.eta.parameters()))
    assert gradients[-1].abs().max() > 0


@pytest.mark.parametrize("kind", ["scalar", "action", "state"])
def test_a_learned_eta_survives_another_setting_and_is_dropped_with_its_sampler(kind: Any) -> None:
    policy = finetuned_on(sampler=Sampler(steps=5, eta=0.5, learned_eta=kind), finetuned=5)
    assert policy.eta is not None
    with torch.no_grad():
        for weights in policy.eta.parameters():
            weights.add_(0.3)
    kept = policy.adjusted(exploration_std=0.2)
    assert kept.eta is not None
    for name, weights in policy.eta.state_dict().items():
        assert torch.equal(kept.eta.state_dict()[name], weights)
    assert policy.with_sampler(Sampler(steps=5)).eta is None


@pytest.mark.parametrize("kind", ["scalar", "action", "state"])
@pytest.mark.parametrize(
    "change",
    [
        {"learned_eta": "scalar"},
        {"learned_eta": "action"},
        {"learned_eta": "state"},
        {"eta": 0.9},
        {"eta_range": (0, 1)},
    ],
)
def test_a_learned_eta_begins_anew_where_its_settings_are_others(kind: Any, change: dict[str, Any]) -> None:
    before = Sampler(steps=5, eta=0.5, learned_eta=kind)
    policy = finetuned_on(sampler=before, finetuned=5)
    assert policy.eta is not None
    with torch.no_grad():
        for weights in policy.eta.parameters():
            weights.add_(0.3)
    after = dataclasses.replace(before, **change)
    changed = policy.with_sampler(after)
    assert changed.eta is not None
    (eta,) = changed.eta(torch.zeros(1, policy.config.history * policy.config.obs_dim)).unique().tolist()
    assert (eta == pytest.approx(after.eta)) == (after != before)


# --- std and clips ---------------------------------------------------------------------------------------------------


def added_std(policy: DiffusionPolicy, deterministic: bool = False) -> Tensor:
    """[K]: how far a standard normal draw of one moves the latent, by timestep."""
    assert policy.frozen is None
    obs, still = observations(policy), noise_for(policy)
    still[:, 1:] = 0
    stds = []
    for step in range(STEPS):
        moved = still.clone()
        moved[:, 1 + step] = 1
        chains = [policy.sample(obs, noise=noise, deterministic=deterministic).chain for noise in (moved, still)]
        assert torch.equal(chains[0][:, : step + 1], chains[1][:, : step + 1])
        stds.append((chains[0] - chains[1])[:, step + 1].mean())
    return torch.stack(stds).flip(0)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.6, 2.0])
def test_exploring_adds_at_least_the_exploration_std_at_every_step_including_the_last(floor: float) -> None:
    policy = diffusion(exploration_std=floor, likelihood_std=0.3)
    std = added_std(policy)
    torch.testing.assert_close(std, policy.kernel.unit_std.clamp(min=floor), rtol=1e-5, atol=1e-6)
    assert std[0] == pytest.approx(floor, abs=1e-6)


def test_only_the_last_step_explores_if_it_is_told_so() -> None:
    policy = diffusion(exploration_std=0.6, exploring_steps="last")
    expected = torch.cat([torch.tensor([0.6]), policy.kernel.unit_std[1:]])
    torch.testing.assert_close(added_std(policy), expected, rtol=1e-5, atol=1e-6)


def test_the_exploration_std_can_change_while_training_and_evaluation_does_not_see_it() -> None:
    policy = diffusion(exploration_std=0.6)
    policy.exploration_std = 0.3
    torch.testing.assert_close(added_std(policy), policy.kernel.unit_std.clamp(min=0.3), rtol=1e-5, atol=1e-6)
    assert added_std(policy, deterministic=True)[0] == 0


def test_evaluation_adds_the_std_of_the_schedule_and_none_at_the_last_step() -> None:
    policy = diffusion(exploration_std=0.6)
    std = added_std(policy, deterministic=True)
    torch.testing.assert_close(std, policy.kernel.unit_std, rtol=1e-5, atol=1e-6)
    assert std[0] == 0


def test_evaluation_adds_no_less_than_its_floor_before_the_last_step() -> None:
    policy = diffusion(sampler=Sampler(evaluation_eta=1e-5))
    expected = torch.tensor([0.0] + [EVALUATION_STD] * (STEPS - 1))
    torch.testing.assert_close(added_std(policy, deterministic=True), expected, rtol=2e-3, atol=0)


def test_evaluation_without_eta_depends_on_the_start_alone() -> None:
    policy = diffusion(sampler=Sampler(evaluation_eta=0))
    obs, noise = observations(policy), noise_for(policy)
    other = torch.cat([noise[:, :1], noise_for(policy, seed=5)[:, 1:]], dim=1)
    ours, theirs = (policy.sample(obs, noise=n, deterministic=True).chain for n in (noise, other))
    assert torch.equal(ours, theirs)
    assert not torch.equal(policy.sample(obs, noise=noise).chain, policy.sample(obs, noise=other).chain)


def test_added_noise_is_clipped_and_the_start_is_not() -> None:
    policy = diffusion(noise_clip=1.5, x0_clip=None)
    obs, noise = observations(policy), 3 * noise_for(policy)
    clipped = torch.cat([noise[:, :1], noise[:, 1:].clamp(-1.5, 1.5)], dim=1)
    assert torch.equal(policy.sample(obs, noise=noise).chain, policy.sample(obs, noise=clipped).chain)
    assert torch.equal(policy.sample(obs, noise=noise).chain[:, 0], noise[:, 0])
    unclipped = policy.adjusted(noise_clip=None).sample(obs, noise=noise).chain
    assert not torch.equal(unclipped, policy.sample(obs, noise=noise).chain)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_final_clip_bounds_the_action_and_leaves_what_was_sampled_and_scored(deterministic: bool) -> None:
    policy = diffusion(exploration_std=1.0)
    clipping = policy.adjusted(final_clip=0.2)
    obs, noise = observations(policy), noise_for(policy)
    ours, theirs = (p.sample(obs, noise=noise, deterministic=deterministic) for p in (clipping, policy))
    assert torch.equal(ours.chain, theirs.chain)
    assert torch.equal(ours.log_prob, theirs.log_prob)
    bounds = policy.action_scaler.denormalize(torch.tensor([[-0.2] * 2, [0.2] * 2]))
    assert torch.equal(ours.action, theirs.action.clamp(bounds[0], bounds[1]))
    assert not torch.equal(ours.action, theirs.action)


# --- likelihood ------------------------------------------------------------------------------------------------------

LAWS = {
    "epsilon, clipped": {"prediction": "epsilon", "x0_clip": 1.0},
    "epsilon, unclipped, linear": {"prediction": "epsilon", "x0_clip": None, "beta_schedule": "linear"},
    "sample, clipped hard": {"prediction": "sample", "x0_clip": 0.1},
    "sample, unclipped": {"prediction": "sample", "x0_clip": None},
    "v_prediction, clipped": {"prediction": "v_prediction", "x0_clip": 1.0},
    "v_prediction, scaled linear": {"prediction": "v_prediction", "x0_clip": None, "beta_schedule": "scaled_linear"},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("finetuned", [1, 3, STEPS])
def test_the_log_likelihood_is_the_one_of_a_diffusers_step_and_a_density_written_out(
    law: str, finetuned: int, reference_step: Callable[..., Callable[..., Tensor]]
) -> None:
    policy = diffusion(**LAWS[law], finetuned_steps=finetuned, likelihood_std=0.4, history=2)
    config = policy.config
    obs = observations(policy)
    sample = policy.sample(obs, generator=torch.Generator().manual_seed(3))
    network = copy.deepcopy(policy.network).double().requires_grad_(False)
    step = reference_step(STEPS, config.beta_schedule, config.prediction, config.x0_clip)
    context = ((obs.double() - LOW) / (HIGH - LOW) * 2 - 1).flatten(1)
    for k, row in itertools.product(range(finetuned), range(BATCH)):
        t = finetuned - 1 - k
        latent, following = sample.chain[row : row + 1, k].double(), sample.chain[row, k + 1].double()
        out = network(latent, torch.tensor([t]), context[row : row + 1])
        mean = step(out, t, latent)[0]
        std = max(float((step(out, t, latent, noise=1.0)[0] - mean).mean()), 0.4)
        density = [
            -(((float(z) - float(m)) / std) ** 2) / 2 - math.log(std * math.sqrt(2 * math.pi))
            for z, m in zip(following.flatten(), mean.flatten(), strict=True)
        ]
        assert float(sample.log_prob[row, k]) == pytest.approx(sum(density), abs=5e-4)  # float32 betas


@pytest.mark.parametrize("k", range(STEPS))
def test_the_density_of_a_step_integrates_to_one(k: int) -> None:
    policy = diffusion(action_dim=1, chunk=1)
    grid = torch.linspace(-8, 8, 2001)
    rows = len(grid)
    law = policy.transition(
        observations(policy, 1).expand(rows, 1, OBS_DIM), torch.full((rows, 1, 1), 0.3), torch.full((rows,), k)
    )
    density = law.log_prob(grid[:, None, None]).exp().detach()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)


# --- whether the chain leads to the data -----------------------------------------------------------------------------


def planar(**changes: Any) -> DiffusionPolicy:
    """An untrained policy in the plane, without an observation worth seeing, that adds the noise of the schedule."""
    torch.manual_seed(0)
    network = {"type": "mlp", "hidden_dims": [64, 64], "activation": "relu", "residual": False}
    settings = {"obs_dim": 1, "action_dim": 2, "chunk": 1, "exploration_std": 0.0, "network": network}
    return DiffusionPolicy(DiffusionConfig(**{**settings, **changes}))


SAMPLERS = {"ddpm": Sampler(), "ddim": Sampler(steps=25, eta=0.0), "ddim, half the noise": Sampler(steps=50, eta=0.5)}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_with_a_perfect_denoiser_the_chain_samples_the_data(
    prediction: Any, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = planar(prediction=prediction, denoising_steps=50, sampler=SAMPLERS[sampler])

    def perfect(self: DenoisingMLP, latent: Tensor, timestep: int, prepared: object) -> Tensor:
        return ideal_output(prediction, latent, policy.alpha_bar[timestep])

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(DenoisingMLP, "forward_prepared", perfect)
    actions = policy.sample(torch.zeros(2000, 1, 1), generator=generator).action
    assert energy_distance(actions, mixture(2000, generator)) < 0.004


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_imitation_loss_is_least_for_a_perfect_denoiser(prediction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = planar(prediction=prediction, denoising_steps=10)
    generator = torch.Generator().manual_seed(0)
    actions = mixture(20_000, generator)

    def loss(scale: float, offset: float) -> float:
        def nearly(self: DenoisingMLP, latent: Tensor, timestep: Tensor, obs: Tensor) -> Tensor:
            return scale * ideal_output(prediction, latent, policy.alpha_bar[timestep][:, None, None]) + offset

        monkeypatch.setattr(DenoisingMLP, "forward", nearly)
        return float(policy.imitation_loss(torch.zeros(20_000, 1, 1), actions, torch.Generator().manual_seed(1)))

    for scale, offset in [(0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1)]:
        assert loss(scale, offset) > loss(1, 0) + 0.001


def test_behaviour_cloning_learns_the_distribution_of_the_demonstrations_for_ddpm_and_ddim() -> None:
    policy = planar(denoising_steps=20)
    generator = torch.Generator().manual_seed(0)
    data, obs = mixture(2000, generator), torch.zeros(2000, 1, 1)
    untrained = energy_distance(policy.sample(obs, generator=generator).action, data)
    updates = 600
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        optimizer.zero_grad()
        policy.imitation_loss(obs[:256], mixture(256, generator), generator).backward()
        optimizer.step()
        schedule.step()
    assert untrained > 0.2
    for sampler in (Sampler(), Sampler(steps=5, eta=0.0), Sampler(steps=10, eta=0.5)):
        actions = policy.with_sampler(sampler).sample(obs, generator=generator).action
        assert energy_distance(actions, data) < 0.03


# --- dropout


def test_dropout_acts_in_imitation_while_training_and_nowhere_else() -> None:
    network = {"type": "transformer", "width": 8, "heads": 2, "attention_dropout": 0.5}
    policy = diffusion(network=network, finetuned_steps=3).train()
    obs = observations(policy)
    action = torch.zeros(BATCH, CHUNK, ACTION_DIM)

    def outcomes() -> list[Tensor]:
        seeded = torch.Generator().manual_seed(0)
        sample = policy.sample(obs, generator=seeded)
        law = policy.transition(obs, sample.chain[:, 0], torch.zeros(BATCH, dtype=torch.int64))
        return [
            sample.chain,
            law.log_prob(sample.chain[:, 1]),
            policy.imitation_loss(obs, action, torch.Generator().manual_seed(0)),
        ]

    training = outcomes()
    policy.eval()
    *same, loss = outcomes()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(training[:2], same, strict=True))
    assert training[2] != loss
