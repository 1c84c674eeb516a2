"""What rollouts and update rules rely on, for every policy there is. A new policy is one more line in `CASES`."""

import copy
import dataclasses
import functools
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policies import CategoricalPolicy, DiffusionPolicy, MixturePolicy, ODEPolicy, Policy, Sample, log_prob_factors
from policies.normalization import Affine, RunningStandardizer

ROOT = Path(__file__).parents[2]

OBS_DIM, ACTION_DIM, BATCH = 3, 2, 16
PLAIN = {"type": "mlp", "hidden_dims": [8, 8], "activation": "tanh", "residual": False}
RESIDUAL = {"type": "mlp", "hidden_dims": [8, 8, 8], "activation": "mish", "residual": True}
GAUSSIAN = {"type": "gaussian", "network": PLAIN}
SQUASHED = {**GAUSSIAN, "squash": True}
MIXTURE = {"type": "mixture", "network": PLAIN, "components": 3}
CATEGORICAL = {"type": "categorical", "network": PLAIN}
SEVERAL = {**CATEGORICAL, "action_dim": 5, "choices": [3, 2]}
DIFFUSION = {"type": "diffusion", "network": RESIDUAL, "chunk": 3, "denoising_steps": 5}
DDIM = {**DIFFUSION, "denoising_steps": 20, "sampler": {"steps": 5, "eta": 0.7, "evaluation_eta": 0.0}}
LEARNED = {"steps": 5, "eta": 0.7, "evaluation_eta": 0.0, "eta_range": [0.3, 1.0]}
UNET_NETWORK = {"type": "unet", "down_dims": [8, 12, 16], "groups": 4, "final_groups": 2, "step_dim": 8}
UNET = {**DIFFUSION, "network": UNET_NETWORK}
FLOW = {"type": "diffusion_ode", "network": RESIDUAL, "chunk": 2, "denoising_steps": 5, "beta_schedule": "linear"}
FLOW |= {"beta_range": [0.01, 0.3]}  # a cosine leaves no signal, and there random weights blow a flow up
TRANSFORMER = {**DIFFUSION, "network": {"type": "transformer", "width": 8, "layers": 2, "heads": 2}}

CASES: dict[str, dict[str, Any]] = {
    "gaussian": GAUSSIAN,
    "gaussian, std by state": {**GAUSSIAN, "std": "state"},
    "gaussian, chunk and history": {**GAUSSIAN, "chunk": 4, "history": 2, "executed": 2},
    "gaussian, the chunk begins in the past": {
        **GAUSSIAN,
        "chunk": 4,
        "history": 2,
        "first_executed": 1,
        "executed": 2,
    },
    "gaussian, std by state, residual": {**GAUSSIAN, "network": RESIDUAL, "std": "state", "chunk": 2},
    "gaussian, running scaling": {**GAUSSIAN, "observation_scaling": "running"},
    "squashed gaussian": SQUASHED,
    "squashed gaussian, chunk and history, std by state": {**SQUASHED, "chunk": 4, "history": 2, "std": "state"},
    "mixture": MIXTURE,
    "mixture, chunk and history": {**MIXTURE, "chunk": 4, "history": 2, "observation_scaling": "running"},
    "mixture of one": {**MIXTURE, "components": 1},
    "categorical": CATEGORICAL,
    "categorical, masked": {**CATEGORICAL, "masked": True, "history": 2},
    "categorical, several dimensions": SEVERAL,
    "categorical, history": {**CATEGORICAL, "history": 2},
    "categorical, running scaling": {**CATEGORICAL, "observation_scaling": "running", "network": RESIDUAL},
    "diffusion": DIFFUSION,
    "diffusion, K' = 1": {**DIFFUSION, "finetuned_steps": 1},
    "diffusion, 1 < K' < K": {**DIFFUSION, "finetuned_steps": 3},
    "diffusion, K' = K": {**DIFFUSION, "finetuned_steps": 5},
    "diffusion, K = 1": {**DIFFUSION, "denoising_steps": 1, "prediction": "sample"},
    "diffusion, history": {**DIFFUSION, "history": 2, "finetuned_steps": 3},
    "diffusion, chunk 1": {**DIFFUSION, "chunk": 1},
    "diffusion, part of the chunk": {**DIFFUSION, "executed": 2, "finetuned_steps": 3},
    "diffusion, the chunk begins in the past": {**DIFFUSION, "history": 2, "first_executed": 1, "finetuned_steps": 3},
    "diffusion, plain network": {**DIFFUSION, "network": {**PLAIN, "step_dim": 8}},
    "diffusion, running scaling": {**DIFFUSION, "observation_scaling": "running", "finetuned_steps": 3},
    "diffusion, no clips": {**DIFFUSION, "x0_clip": None, "noise_clip": None, "beta_schedule": "linear"},
    "diffusion, final clip": {**DIFFUSION, "final_clip": 0.3},
    "diffusion, no exploration floor": {**DIFFUSION, "exploration_std": 0.0, "likelihood_std": 0.05},
    "diffusion, predicts x0": {**DIFFUSION, "prediction": "sample", "finetuned_steps": 3},
    "diffusion, predicts x0, no clip": {**DIFFUSION, "prediction": "sample", "x0_clip": None},
    "diffusion, predicts v": {**DIFFUSION, "prediction": "v_prediction", "finetuned_steps": 3},
    "diffusion, predicts v, no clip": {**DIFFUSION, "prediction": "v_prediction", "x0_clip": None},
    "diffusion, DDIM": {**DDIM, "finetuned_steps": 3},
    "diffusion, DDIM, K' = 1": {**DDIM, "finetuned_steps": 1},
    "diffusion, DDIM, K' = K": {**DDIM, "finetuned_steps": 5},
    "diffusion, DDIM, deterministic but for the floors": {**DDIM, "sampler": {"steps": 5, "eta": 0.0}},
    "diffusion, DDIM, the noise as predicted": {**DDIM, "sampler": {"steps": 5, "eta": 0.5, "rederive_noise": False}},
    "diffusion, DDIM, noise clipped": {**DDIM, "sampler": {"steps": 5, "eta": 0.5, "epsilon_clip": 0.5}},
    "diffusion, DDIM, offset": {**DDIM, "sampler": {"steps": 5, "offset": 2, "eta": 0.5}, "finetuned_steps": 3},
    "diffusion, DDIM, learned eta": {**DDIM, "sampler": {**LEARNED, "learned_eta": "scalar"}},
    "diffusion, DDIM, eta by action": {**DDIM, "sampler": {**LEARNED, "learned_eta": "action"}, "finetuned_steps": 3},
    "diffusion, DDIM, eta by state": {**DDIM, "sampler": {**LEARNED, "learned_eta": "state"}, "history": 2},
    "diffusion, last step explores": {**DIFFUSION, "exploring_steps": "last", "finetuned_steps": 3},
    "diffusion, scaled linear": {**DIFFUSION, "beta_schedule": "scaled_linear", "noise_clip": None},
    "flow": FLOW,
    "flow, estimated divergence": {**FLOW, "divergence": "hutchinson", "history": 2},
    "flow, some timesteps": {**FLOW, "flow_timesteps": 3, "solver": "heun3", "solver_steps": 2},
    "flow, predicts x0": {**FLOW, "prediction": "sample", "beta_range": [0.1, 0.3], "observation_scaling": "running"},
    "flow, predicts v": {**FLOW, "prediction": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "executed": 1},
    "flow, the chunk begins in the past": {**FLOW, "history": 2, "first_executed": 1},
    "flow of a unet": {**FLOW, "network": UNET_NETWORK, "solver": "midpoint"},
    "flow of a transformer": {**FLOW, "network": {"type": "transformer", "width": 8, "layers": 2, "heads": 2}},
    "unet": UNET,
    "unet, K' = 1": {**UNET, "finetuned_steps": 1, "chunk": 4},
    "unet, 1 < K' < K": {**UNET, "finetuned_steps": 3, "chunk": 5},
    "unet, K' = K": {**UNET, "finetuned_steps": 5, "chunk": 8},
    "unet, DDIM, K' = 1": {**DDIM, "network": UNET_NETWORK, "finetuned_steps": 1},
    "unet, DDIM, K' = K": {**DDIM, "network": UNET_NETWORK, "finetuned_steps": 5},
    "unet, chunk 1": {**UNET, "chunk": 1},
    "unet, history, part of the chunk": {**UNET, "history": 2, "chunk": 7, "executed": 2, "finetuned_steps": 3},
    "unet, other conditioning": {
        **UNET,
        "network": {**UNET["network"], "scale": False, "deep_film": True, "obs_dims": [8, 4], "groups": None},
        "history": 2,
    },
    "transformer": TRANSFORMER,
    "transformer, K' = 1": {**TRANSFORMER, "finetuned_steps": 1},
    "transformer, 1 < K' < K": {**TRANSFORMER, "finetuned_steps": 3, "executed": 2},
    "transformer, K' = K": {**TRANSFORMER, "finetuned_steps": 5, "chunk": 1},
    "transformer, DDIM, K' = 1": {**DDIM, "network": TRANSFORMER["network"], "finetuned_steps": 1},
    "transformer, DDIM, K' = K": {**DDIM, "network": TRANSFORMER["network"], "finetuned_steps": 5},
    "transformer, history": {**TRANSFORMER, "history": 2, "finetuned_steps": 3},
    "transformer, encoder, the chunk starts at the first observation": {
        **TRANSFORMER,
        "network": {**TRANSFORMER["network"], "condition_layers": 1, "chunk_start": "first"},
        "history": 2,
        "finetuned_steps": 3,
    },
    "transformer, dropout": {
        **TRANSFORMER,
        "network": {**TRANSFORMER["network"], "causal": False, "embedding_dropout": 0.1, "attention_dropout": 0.3},
        "history": 2,
    },
}

ACTION_LOW, ACTION_HIGH = torch.tensor([-3.0, 10.0]), torch.tensor([1.0, 30.0])


@functools.cache
def build(case: str) -> Policy:
    torch.manual_seed(0)
    policy = Policy.from_config({"obs_dim": OBS_DIM, "action_dim": ACTION_DIM, **CASES[case]})
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.3 * torch.randn(weights.shape))
    policy.fit_observations(torch.tensor([-4.0, 0.0, 5.0]), torch.tensor([4.0, 1.0, 9.0]))
    policy.fit_actions(ACTION_LOW, ACTION_HIGH)
    for _ in range(2):
        policy.observe(observations(policy)[:, -1])
    return policy


def fitted(case: str) -> Policy:
    """The policy of a case with random weights (none of them zero), and scalings other than the identity."""
    policy = copy.deepcopy(build(case))
    torch.manual_seed(1)
    return policy


def observations(policy: Policy, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, policy.config.history, OBS_DIM) * 2 + 1


def demonstrated(policy: Policy, batch: int) -> Tensor:
    if isinstance(policy, CategoricalPolicy):
        if policy.config.choices is None:
            return torch.randint(ACTION_DIM, (batch,))
        return torch.stack([torch.randint(count, (batch,)) for count in policy.config.choices], dim=1)
    return ACTION_LOW + (ACTION_HIGH - ACTION_LOW) * torch.rand(batch, policy.config.chunk, ACTION_DIM)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_transition(obs: Tensor, sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each inner step of each row, shuffled: obs, z_k, z_{k+1}, k, and the row [B*K]."""
    batch, steps = sample.log_prob.shape
    order = torch.randperm(batch * steps)
    row, step = order // steps, order % steps
    return obs[row], sample.chain[row, step], sample.chain[row, step + 1], step, row


def assert_same_sample(ours: Sample, theirs: Sample) -> None:
    for field in dataclasses.fields(Sample):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


@pytest.fixture(params=CASES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return fitted(request.param)


def test_every_registered_policy_has_a_case() -> None:
    assert {case["type"] for case in CASES.values()} == set(Policy.registry)


def test_an_explorer_draws_what_sample_does_call_by_call(policy: Policy) -> None:
    explorer = policy.explorer()
    inputs = [(observations(policy), policy.draw_noise(BATCH, seeded(seed))) for seed in range(3)]
    with torch.inference_mode():
        actions, calls = zip(*(explorer.draw(*call) for call in inputs), strict=True)
        chains, factors = explorer.record(calls)
    for number, (obs, noise) in enumerate(inputs):
        assert_same_sample(Sample(actions[number], chains[number], factors[number]), policy.sample(obs, noise=noise))


def test_an_explorer_is_that_of_the_policy_as_it_was_made_and_leaves_it_learning(policy: Policy) -> None:
    obs, noise = observations(policy), policy.draw_noise(BATCH, seeded(0))
    first = policy.explorer()
    with torch.inference_mode():
        first.record([first.draw(obs, noise)[1]])
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.1)
    second = policy.explorer()
    with torch.inference_mode():
        action, call = second.draw(obs, noise)
        chain, _ = second.record([call])
    expected = policy.sample(obs, noise=noise)
    assert torch.equal(action, expected.action) and torch.equal(chain[0], expected.chain)


def test_transition_scores_what_was_sampled_as_sample_did(policy: Policy) -> None:
    obs = observations(policy)
    sample = policy.sample(obs, generator=seeded(0))
    obs, latent, following, step, row = every_transition(obs, sample)
    scored = policy.transition(obs, latent, step).log_prob(following)
    torch.testing.assert_close(scored, sample.log_prob[row, step], rtol=1e-5, atol=1e-4)


def test_the_log_likelihood_of_an_action_depends_on_what_was_observed(policy: Policy) -> None:
    sample = policy.sample(obs := observations(policy), generator=seeded(0))
    last = torch.full((BATCH,), policy.num_steps - 1)
    scored = policy.transition(obs.roll(1, 0), sample.chain[:, -2], last).log_prob(sample.chain[:, -1])
    assert (scored - sample.log_prob[:, -1]).abs().max() > 1e-3


def test_a_deterministic_sample_is_scored_by_the_same_law(policy: Policy) -> None:
    obs = observations(policy)
    sample = policy.sample(obs, deterministic=True, generator=seeded(0))
    obs, latent, following, step, row = every_transition(obs, sample)
    scored = policy.transition(obs, latent, step).log_prob(following)
    torch.testing.assert_close(scored, sample.log_prob[row, step], rtol=1e-5, atol=1e-4)


def test_the_law_of_a_step_has_one_entry_per_row_and_the_latent_as_its_event(policy: Policy) -> None:
    sample = policy.sample(obs := observations(policy), generator=seeded(0))
    law = policy.transition(obs, sample.chain[:, 0], torch.zeros(BATCH, dtype=torch.int64))
    assert law.batch_shape == (BATCH,)
    assert law.event_shape == sample.chain.shape[2:]


def test_the_factors_of_a_log_likelihood_sum_to_it(policy: Policy) -> None:
    sample = policy.sample(obs := observations(policy), generator=seeded(0))
    law = policy.transition(obs, sample.chain[:, 0], torch.zeros(BATCH, dtype=torch.int64))
    factors = log_prob_factors(law, sample.chain[:, 1])
    assert factors.shape == ((BATCH,) if isinstance(policy, MixturePolicy | ODEPolicy) else sample.chain[:, 1].shape)
    torch.testing.assert_close(factors.reshape(BATCH, -1).sum(1), law.log_prob(sample.chain[:, 1]))
    torch.testing.assert_close(sample.log_prob_factors.reshape(BATCH, policy.num_steps, -1).sum(2), sample.log_prob)


@pytest.mark.parametrize("batch", [1, BATCH])
def test_a_sample_has_the_promised_shapes_and_types(policy: Policy, batch: int) -> None:
    sample = policy.sample(observations(policy, batch), generator=seeded(0))
    config = policy.config
    if isinstance(policy, CategoricalPolicy):
        latent, kind = () if policy.config.choices is None else (len(policy.config.choices),), torch.int64
        assert sample.action.shape == (batch, *latent)
    else:
        assert sample.action.shape == (batch, config.executed_chunk, ACTION_DIM)
        latent, kind = (config.chunk, ACTION_DIM), torch.float32
    assert policy.num_steps >= 1
    assert sample.chain.shape == (batch, policy.num_steps + 1, *latent)
    assert sample.log_prob.shape == (batch, policy.num_steps)
    assert sample.action.dtype == sample.chain.dtype == kind
    assert sample.log_prob.dtype == sample.log_prob_factors.dtype == torch.float32
    assert not sample.log_prob_factors.requires_grad
    assert all(getattr(sample, field.name).isfinite().all() for field in dataclasses.fields(Sample))


def test_the_generator_is_the_only_source_of_randomness(policy: Policy) -> None:
    obs = observations(policy)
    before = torch.get_rng_state()
    first = policy.sample(obs, generator=seeded(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert_same_sample(policy.sample(obs, generator=seeded(5)), first)
    assert not torch.equal(policy.sample(obs, generator=seeded(6)).chain, first.chain)


@pytest.mark.parametrize("deterministic", [False, True])
def test_noise_drawn_beforehand_gives_what_its_generator_gives(policy: Policy, deterministic: bool) -> None:
    obs = observations(policy)
    before = torch.get_rng_state()
    noise = policy.draw_noise(BATCH, seeded(5))
    ours = policy.sample(obs, deterministic=deterministic, noise=noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert noise.shape[0] == BATCH
    assert_same_sample(ours, policy.sample(obs, deterministic=deterministic, generator=seeded(5)))
    other = policy.sample(obs, noise=policy.draw_noise(BATCH, seeded(6)))
    assert not torch.equal(other.chain, policy.sample(obs, noise=noise).chain)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_sampled_apart_with_their_own_noise_are_those_sampled_together(
    policy: Policy, deterministic: bool
) -> None:
    obs, noise = observations(policy), policy.draw_noise(BATCH, seeded(5))
    together = policy.sample(obs, deterministic=deterministic, noise=noise)
    bounds = [0, 1, 6, BATCH]
    parts = [
        policy.sample(obs[first:last], deterministic=deterministic, noise=noise[first:last])
        for first, last in itertools.pairwise(bounds)
    ]
    for field in dataclasses.fields(Sample):
        apart = torch.cat([getattr(part, field.name) for part in parts])
        torch.testing.assert_close(apart, getattr(together, field.name), rtol=1e-5, atol=1e-5, msg=field.name)


def test_the_noise_of_a_row_belongs_to_it_alone(policy: Policy) -> None:
    obs, noise = observations(policy), policy.draw_noise(BATCH, seeded(5))
    moved = noise.clone()
    moved[3] = policy.draw_noise(BATCH, seeded(6))[3]
    ours, theirs = policy.sample(obs, noise=moved), policy.sample(obs, noise=noise)
    others = torch.arange(BATCH) != 3
    torch.testing.assert_close(ours.chain[others], theirs.chain[others])
    assert policy.discrete or not torch.equal(ours.chain[3], theirs.chain[3])


def test_the_imitation_loss_is_repeated_by_the_same_generator(policy: Policy) -> None:
    obs, action = observations(policy), demonstrated(policy, BATCH)
    before = torch.get_rng_state()
    first = policy.imitation_loss(obs, action, seeded(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == ()
    assert first == policy.imitation_loss(obs, action, seeded(5))


def test_deterministic_evaluation_is_reproducible(policy: Policy) -> None:
    obs = observations(policy)
    first = policy.sample(obs, deterministic=True, generator=seeded(5))
    assert_same_sample(policy.sample(obs, deterministic=True, generator=seeded(5)), first)
    other = policy.sample(obs, deterministic=True, generator=seeded(6))
    starts_from_noise = isinstance(policy, DiffusionPolicy | ODEPolicy)
    assert torch.equal(other.chain, first.chain) != starts_from_noise


@pytest.mark.parametrize("case", [name for name, config in CASES.items() if not config["type"].startswith("diffusion")])
def test_a_deterministic_action_needs_no_randomness(case: str) -> None:
    policy = fitted(case)
    obs = observations(policy)
    best = policy.sample(obs, deterministic=True).log_prob
    torch.manual_seed(1)
    assert torch.equal(policy.sample(obs, deterministic=True).log_prob, best)


UNIMODAL = [name for name in CASES if name.startswith(("gaussian", "categorical"))]


@pytest.mark.parametrize("case", UNIMODAL)
def test_a_deterministic_action_is_the_most_likely_one(case: str) -> None:
    """Of a mixture it is the mean of the likeliest component, and of a squashed Gaussian that of its mean."""
    policy = fitted(case)
    obs = observations(policy)
    best = policy.sample(obs, deterministic=True).log_prob
    for seed in range(20):
        assert (policy.sample(obs, generator=seeded(seed)).log_prob <= best).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_action_is_the_executed_part_of_the_last_latent_in_units_of_the_environment(
    policy: Policy, deterministic: bool
) -> None:
    sample = policy.sample(observations(policy), deterministic=deterministic, generator=seeded(0))
    if policy.discrete:
        assert torch.equal(sample.action, sample.chain[:, -1])
        return
    latent = sample.chain[:, -1, policy.config.executed_part]
    if getattr(policy.config, "squash", False):
        latent = latent.tanh()
    final_clip = getattr(policy.config, "final_clip", None)
    if final_clip is not None:
        assert latent.abs().max() > final_clip  # or this test says nothing about the clip
        latent = latent.clamp(-final_clip, final_clip)
    expected = ACTION_LOW + (latent + 1) / 2 * (ACTION_HIGH - ACTION_LOW)
    torch.testing.assert_close(sample.action, expected)


def test_a_saved_policy_loads_as_the_same_policy(policy: Policy, tmp_path: Path) -> None:
    policy.metadata = {"task": {"name": "hopper", "max_episode_steps": None}, "steps": 3}
    policy.save_pretrained(tmp_path)
    loaded = Policy.from_pretrained(tmp_path)
    assert type(loaded) is type(policy)
    assert loaded.config == policy.config
    assert loaded.metadata == policy.metadata
    assert not loaded.training
    for name, weights in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)
        assert loaded.state_dict()[name].dtype == weights.dtype
    obs = observations(policy)
    for deterministic in (False, True):
        ours, theirs = (p.sample(obs, deterministic=deterministic, generator=seeded(1)) for p in (policy, loaded))
        assert_same_sample(ours, theirs)
    first = torch.zeros(BATCH, dtype=torch.int64)
    laws = [p.transition(obs, ours.chain[:, 0], first).log_prob(ours.chain[:, 1]) for p in (policy, loaded)]
    assert torch.equal(*laws)


def test_an_exercise_holds_all_randomness_of_the_imitation_loss(policy: Policy) -> None:
    obs = observations(policy)
    action = demonstrated(policy, BATCH)
    exercise = policy.imitation_exercise(obs, action, seeded(5))
    expected = policy.imitation_loss(obs, action, seeded(5))
    torch.manual_seed(9)
    assert torch.equal(policy.exercise_losses(*exercise).mean(), expected)
    assert torch.equal(policy.exercise_losses(*exercise).mean(), expected), "again and again"


def test_the_loss_of_each_row_of_an_exercise_depends_on_no_other(policy: Policy) -> None:
    exercise = policy.imitation_exercise(observations(policy), demonstrated(policy, BATCH), seeded(5))
    assert {len(column) for column in exercise} == {BATCH}
    assert not any(column.requires_grad for column in exercise)
    parts = zip(*(column.split([1, 9, 6]) for column in exercise), strict=True)
    losses = torch.cat([policy.exercise_losses(*part) for part in parts])
    assert losses.shape == (BATCH,)
    torch.testing.assert_close(losses, policy.exercise_losses(*exercise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ["transition", "imitation_loss"])
def test_a_gradient_reaches_every_trained_parameter_and_no_frozen_one(policy: Policy, source: str) -> None:
    obs = observations(policy, 64)
    if source == "transition":
        sample = policy.sample(obs, generator=seeded(0))
        obs, latent, following, step, _ = every_transition(obs, sample)
        policy.transition(obs, latent, step).log_prob(following).mean().backward()
    else:
        policy.imitation_loss(obs, demonstrated(policy, 64), seeded(0)).backward()
    for name, weights in policy.named_parameters():
        assert weights.requires_grad == (not name.startswith("frozen.")), name
        if name.startswith("eta.") and source == "imitation_loss":
            assert weights.grad is None, name  # demonstrations say nothing of how to explore
        elif weights.requires_grad:
            assert weights.grad is not None and weights.grad.isfinite().all() and weights.grad.abs().max() > 0, name
        else:
            assert weights.grad is None, name


def test_the_chain_and_the_imitation_loss_live_in_scaled_units(policy: Policy) -> None:
    if getattr(policy.config, "masked", False):
        pytest.skip("a mask has no units")
    obs, action = observations(policy), demonstrated(policy, BATCH)
    chain, loss = policy.sample(obs, generator=seeded(0)).chain, policy.imitation_loss(obs, action, seeded(0))
    scaled_obs = policy.normalize_obs(obs)
    assert not torch.equal(scaled_obs, obs)
    policy.obs_scaler = Affine(OBS_DIM)  # from here on the identity
    if not policy.discrete:
        action = (action - ACTION_LOW) / (ACTION_HIGH - ACTION_LOW) * 2 - 1
        policy.action_scaler = Affine(ACTION_DIM)
    torch.testing.assert_close(policy.sample(scaled_obs, generator=seeded(0)).chain, chain)
    torch.testing.assert_close(policy.imitation_loss(scaled_obs, action, seeded(0)), loss)


def test_observation_scaling_changes_through_observe_alone(policy: Policy) -> None:
    obs = observations(policy)
    before = policy.normalize_obs(obs)
    policy.sample(obs, generator=seeded(0))
    policy.imitation_loss(obs, demonstrated(policy, BATCH), seeded(0))
    policy.transition(obs, policy.sample(obs, generator=seeded(0)).chain[:, 0], torch.zeros(BATCH, dtype=torch.int64))
    assert torch.equal(policy.normalize_obs(obs), before)
    policy.observe(obs[:, -1] + 100)
    assert torch.equal(policy.normalize_obs(obs), before) != isinstance(policy.obs_scaler, RunningStandardizer)


USE_EVERY_POLICY = """
import importlib, pkgutil, sys, tempfile
import torch
import policies
obs = torch.zeros(1, 1, 3)
for module in pkgutil.walk_packages(policies.__path__, "policies."):
    importlib.import_module(module.name)
for name in policies.Policy.registry:
    policy = policies.Policy.from_config({"type": name, "obs_dim": 3, "action_dim": 2})
    with tempfile.TemporaryDirectory() as directory:
        policy.save_pretrained(directory)
        policy = policies.Policy.from_pretrained(directory)
    sample = policy.sample(obs)
    policy.transition(obs, sample.chain[:, 0], torch.zeros(1, dtype=torch.int64))
    policy.imitation_loss(obs, sample.action)
print(" ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_policies_are_used_without_the_training_code_and_without_simulators() -> None:
    done = subprocess.run(
        [sys.executable, "-c", USE_EVERY_POLICY], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    imported = set(done.stdout.split())
    assert {"policies", "torch"} <= imported
    assert not imported & {"dppo", "gymnasium", "hydra", "minari", "mujoco"}
