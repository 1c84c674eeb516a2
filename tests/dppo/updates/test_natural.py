"""Natural-gradient steps: their direction, their length, and what is taken back."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from dppo.advantages import inner_discount
from dppo.critic import Critic
from dppo.rollout import collect_rollout
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.batch import Batch
from dppo.updates.faults import NotFiniteError
from dppo.updates.fisher import FisherProduct
from dppo.updates.natural import NaturalConfig, NaturalGradient, TRPOConfig
from policies import DiffusionPolicy, log_prob_factors
from policies.chain import DiffusionConfig

CRITIC = {"type": "mlp", "hidden_dims": [8], "activation": "tanh"}
KINDS = ("gaussian", "categorical", "diffusion")


@pytest.fixture
def make_trainer(small_policy, task_of) -> Callable[..., Trainer]:
    """A trainer of a small policy in 4 environments and rollouts of 8 steps: 32 rows."""

    def build(kind: str, algo: NaturalConfig, **settings: Any) -> Trainer:
        size = TrainerConfig(env_steps=1000, num_envs=4, rollout_steps=8)
        return Trainer(small_policy(kind, **settings), task_of(kind), size, algo, CRITIC)

    return build


def rollout_batch(trainer: Trainer) -> Batch:
    rollout = collect_rollout(trainer.actor, trainer.policy, trainer.config.rollout_steps)
    return trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))


def rule_of(trainer: Trainer) -> NaturalGradient:
    assert isinstance(trainer.update_rule, NaturalGradient)
    return trainer.update_rule


def update(trainer: Trainer, batch: Batch) -> dict[str, float | None]:
    return trainer.update_rule.update(batch, progress=0.0, iteration=0)


def chain_kl(old: Any, new: Any, batch: Batch) -> float:
    """KL(old || new) of the inner steps of a batch, summed over them."""
    pairs = batch.pairs(torch.arange(len(batch) * batch.num_steps))
    with torch.no_grad():
        laws = [policy.transition(pairs.obs, pairs.latent, pairs.step) for policy in (old, new)]
    return float(kl_divergence(*laws).sum() / len(batch))


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- the direction


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_policy_gradient(make_trainer, kind):
    trainer = make_trainer(kind, NaturalConfig(inner_gamma=0.9, normalize_advantages=False))
    batch, rule = rollout_batch(trainer), rule_of(trainer)
    found = rule._gradient(rule.weighted(batch))
    pairs = batch.pairs(torch.arange(len(batch) * batch.num_steps))
    factors = log_prob_factors(trainer.policy.transition(pairs.obs, pairs.latent, pairs.step), pairs.following)
    log_prob = factors if factors.dim() == 1 else factors[:, trainer.policy.config.executed_part].flatten(1).sum(1)
    weights = pairs.advantages * inner_discount(trainer.policy.num_steps, 0.9)[pairs.step]
    expected = rule.parameters.gradient((weights * log_prob).sum() / len(batch))
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_solves_the_system_of_the_fisher_information(make_trainer, kind):
    """Against a dense solve; the length is such that the quadratic model has the largest KL."""
    config = NaturalConfig(max_kl=1e-4, damping=0.3, iterations=500, tolerance=1e-6)
    trainer = make_trainer(kind, config)
    batch, rule = rollout_batch(trainer), rule_of(trainer)
    gradient = rule._gradient(rule.weighted(batch))
    pairs = batch.pairs(torch.arange(len(batch) * batch.num_steps))

    def column(unit: Tensor) -> Tensor:
        law = trainer.policy.transition(pairs.obs, pairs.latent, pairs.step)
        return batch.num_steps * FisherProduct(law, pairs.following, rule.parameters)(unit)

    fisher = torch.stack([column(unit) for unit in torch.eye(len(gradient))])
    damped = fisher.double() + 0.3 * torch.eye(len(gradient), dtype=torch.float64)
    expected = torch.linalg.solve(damped, gradient.double())
    before = rule.parameters.values.clone()
    old = copy.deepcopy(trainer.policy)
    metrics = update(trainer, batch)
    step = rule.parameters.values - before
    assert torch.cosine_similarity(step.double(), expected, dim=0) > 0.9999
    kl = chain_kl(old, trainer.policy, batch)
    damping = 0.5 * 0.3 * float(step @ step)
    assert kl + damping == pytest.approx(config.max_kl, rel=0.05)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)


def test_pairs_for_the_fisher_information_can_be_drawn(make_trainer):
    steps = []
    for share in (1.0, 0.5, 0.5):
        trainer = make_trainer("gaussian", NaturalConfig(fisher_share=share))
        before = rule_of(trainer).parameters.values.clone()
        update(trainer, rollout_batch(trainer))
        steps.append(rule_of(trainer).parameters.values - before)
    assert torch.equal(steps[1], steps[2]), "by the generator"
    assert 0.5 < torch.cosine_similarity(steps[0], steps[1], dim=0) < 0.9999


def test_no_more_rows_are_evaluated_at_once_than_a_part_has(make_trainer, monkeypatch):
    """So memory does not grow with the batch."""
    monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", 7)
    trainer = make_trainer("diffusion", TRPOConfig())
    batch, policy, rows = rollout_batch(trainer), trainer.policy, []
    transition = policy.transition
    monkeypatch.setattr(policy, "transition", lambda *a: rows.append(len(a[0])) or transition(*a))
    update(trainer, batch)
    assert max(rows) == 7
    assert sum(rows) % (len(batch) * batch.num_steps) == 0


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
def test_an_update_in_parts_is_that_of_the_whole_and_of_any_number_of_threads(
    make_trainer, kind, monkeypatch, torch_threads
):
    found = []
    for at_once, threads in ((1000, 1), (7, 1), (7, 3)):
        monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", at_once)
        torch_threads(threads)
        trainer = make_trainer(kind, TRPOConfig(damping=0.5))
        update(trainer, rollout_batch(trainer))
        found.append(rule_of(trainer).parameters.values.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(found[1], found[2])


# --- the step that is kept


@pytest.mark.parametrize("kind", KINDS)
def test_every_accepted_step_of_trpo_keeps_the_kl_and_improves(make_trainer, kind):
    trainer = make_trainer(kind, TRPOConfig(max_kl=0.05, damping=1e-3, backtracks=30))
    accepted = 0
    for _ in range(8):
        batch, old = rollout_batch(trainer), copy.deepcopy(trainer.policy)
        metrics = update(trainer, batch)
        kl = chain_kl(old, trainer.policy, batch)
        assert kl <= 0.05 * (1 + 1e-4)
        assert metrics["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        if metrics["step_failed"] == 0:
            accepted += 1
            assert metrics["improvement"] > 0
            assert kl > 0
    assert accepted >= 6


@pytest.mark.parametrize("kind", KINDS)
def test_trpo_takes_the_step_of_npg_where_nothing_is_taken_back(make_trainer, kind):
    found = []
    for config in (NaturalConfig(max_kl=1e-3), TRPOConfig(max_kl=1e-3, backtracks=0)):
        trainer = make_trainer(kind, config)
        metrics = update(trainer, rollout_batch(trainer))
        assert metrics["step_failed"] == 0
        found.append(rule_of(trainer).parameters.values.clone())
    assert torch.equal(*found)


def test_a_step_that_is_too_long_is_shortened(make_trainer):
    """Without damping, the quadratic model of a large step is off by more than nothing."""
    trainer = make_trainer("gaussian", TRPOConfig(max_kl=0.5, damping=1e-4, backtrack_factor=0.5, backtracks=30))
    before = rule_of(trainer).parameters.values.clone()
    batch = rollout_batch(trainer)
    npg = make_trainer("gaussian", NaturalConfig(max_kl=0.5, damping=1e-4))
    metrics = update(trainer, batch)
    npg_metrics = update(npg, rollout_batch(npg))
    assert npg_metrics["kl"] > 0.5
    assert metrics["backtracks"] >= 1
    whole = rule_of(npg).parameters.values - before
    taken = rule_of(trainer).parameters.values - before
    torch.testing.assert_close(taken, whole * 0.5 ** metrics["backtracks"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_search_restores_every_bit_and_says_so(make_trainer, kind, monkeypatch):
    monkeypatch.setattr(TRPOConfig, "accepts", lambda *judgements: False)
    trainer = make_trainer(kind, TRPOConfig(backtracks=3))
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    metrics = update(trainer, rollout_batch(trainer))
    assert (metrics["step_failed"], metrics["actor_steps"], metrics["backtracks"]) == (1, 0, 3)
    assert (metrics["kl"], metrics["improvement"]) == (0, 0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items())


def test_advantages_that_say_nothing_move_nothing(make_trainer):
    trainer = make_trainer("gaussian", TRPOConfig())
    batch = rollout_batch(trainer)
    before = rule_of(trainer).parameters.values.clone()
    metrics = update(trainer, dataclasses.replace(batch, advantages=torch.zeros_like(batch.advantages)))
    assert metrics["step_failed"] == 1
    assert torch.equal(rule_of(trainer).parameters.values, before)


def test_an_advantage_that_is_not_finite_is_no_step_and_ten_in_a_row_are_an_error(make_trainer):
    trainer = make_trainer("gaussian", TRPOConfig())
    batch = rollout_batch(trainer)
    before = rule_of(trainer).parameters.values.clone()
    broken = dataclasses.replace(batch, advantages=torch.full_like(batch.advantages, torch.nan))
    for _ in range(9):
        row = update(trainer, broken)
        assert (row["skipped_updates"], row["actor_steps"], row["policy_loss"]) == (1, 0, None)
    with pytest.raises(
        NotFiniteError, match=r"^10 updates of the policy network in a row had a loss \(nan\), a gradient"
    ) as caught:
        update(trainer, broken)
    assert {"batch/advantages", "gradient_norm", "loss"} < caught.value.evidence.keys()
    assert torch.equal(rule_of(trainer).parameters.values, before)


def test_skipped_steps_are_in_a_row_with_those_before_the_state_was_saved(make_trainer):
    trainer, resumed = (make_trainer("gaussian", TRPOConfig(critic_epochs=1)) for _ in range(2))
    batch = rollout_batch(trainer)
    broken = dataclasses.replace(batch, advantages=torch.full_like(batch.advantages, torch.nan))
    for _ in range(9):
        update(trainer, broken)
    rule_of(resumed).load_state_dict(rule_of(trainer).state_dict())
    with pytest.raises(NotFiniteError, match=r"^10 updates"):
        update(resumed, broken)


def test_only_the_critic_learns_during_its_warm_up(make_trainer):
    trainer = make_trainer("gaussian", TRPOConfig(critic_warmup_iterations=1))
    before = rule_of(trainer).parameters.values.clone()
    critic = trainer.update_rule.critic_fit.optimizer.parameters.values
    critic_before = critic.clone()
    row = trainer.iterate()
    assert torch.equal(rule_of(trainer).parameters.values, before)
    assert not torch.equal(critic, critic_before)
    assert row["kl"] is None
    assert trainer.iterate()["kl"] > 0


# --- what the KL of a chain bounds


def test_the_kl_of_the_chain_bounds_that_of_the_actions():
    """A chain of two steps in one dimension, whose densities are integrated on a grid."""
    torch.manual_seed(0)
    network = {"type": "mlp", "hidden_dims": [8, 8, 8], "step_dim": 4}
    config = DiffusionConfig(obs_dim=1, action_dim=1, denoising_steps=2, network=network, final_clip=None)
    old = DiffusionPolicy(config).double()
    grid = torch.linspace(-8, 8, 1601, dtype=torch.float64)[:, None, None]  # [G, Tp, Da]
    width = 0.01
    obs = torch.zeros(len(grid), 1, 1, dtype=torch.float64)

    def log_kernel(policy: DiffusionPolicy, step: int) -> Tensor:
        """[G, G]: log density of the latent of each column after that of each row."""
        law = policy.transition(obs, grid, torch.full((len(grid),), step))
        base = law.base_dist
        return torch.distributions.Normal(base.loc[:, 0, 0, None], base.scale[:, 0, 0, None]).log_prob(grid[:, 0, 0])

    start = torch.distributions.Normal(0.0, 1.0).log_prob(grid[:, 0, 0]).exp() * width
    with torch.no_grad():
        kernels = [log_kernel(old, step) for step in range(2)]
        densities = [start, start @ kernels[0].exp() * width]
        actions = densities[1] @ kernels[1].exp()
        assert float(actions.sum() * width) == pytest.approx(1, abs=1e-3)
        new = copy.deepcopy(old)
        for parameter in new.network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        moved = [log_kernel(new, step) for step in range(2)]
        new_actions = (start @ moved[0].exp() * width) @ moved[1].exp()
        likely = actions > 1e-12
        of_actions = float((actions * (actions.log() - new_actions.log()))[likely].sum() * width)
        of_chain = 0.0
        for step in range(2):
            law_old, law_new = (policy.transition(obs, grid, torch.full((len(grid),), step)) for policy in (old, new))
            of_chain += float((densities[step] * kl_divergence(law_old, law_new)).sum())
        assert 0.001 < of_actions <= of_chain

        # And it is the chain's that the rule measures, from samples of the old policy.
        chain = [torch.randn(20_000, 1, 1, dtype=torch.float64)]
        factors = []
        for step in range(2):
            law = old.transition(chain[0].new_zeros(20_000, 1, 1), chain[-1], torch.full((20_000,), step))
            chain.append(law.sample())
            factors.append(log_prob_factors(law, chain[-1]))
        nothing = torch.zeros(20_000, dtype=torch.float64)
        rows = torch.zeros(20_000, 1, 1, dtype=torch.float64), torch.stack(chain, 1), torch.stack(factors, 1)
        batch = Batch(*rows, nothing[:, None].expand(-1, 2), nothing, nothing)
        rule = NaturalGradient(NaturalConfig(), old, Critic(CRITIC, 1, 1), torch.Generator())
        laws: list[Any] = []
        assert rule._judge(batch, laws).kl == 0
        old.load_state_dict(new.state_dict())
        assert rule._judge(batch, laws).kl == pytest.approx(of_chain, rel=0.05)


@pytest.mark.parametrize("kind", ["scalar", "action", "state"])
def test_a_learned_eta_moves_with_the_rest_of_the_policy(make_trainer, kind):
    sampler = {"steps": 4, "eta": 0.9, "learned_eta": kind}
    trainer = make_trainer("diffusion", TRPOConfig(), sampler=sampler, likelihood_std=0.01)
    before = [weights.clone() for weights in trainer.policy.eta.parameters()]
    metrics = update(trainer, rollout_batch(trainer))
    assert metrics["step_failed"] == 0
    assert metrics["cg_iterations"] > 1
    assert not torch.equal(before[-1], list(trainer.policy.eta.parameters())[-1])
    assert trainer.iterate()["eta"] != pytest.approx(0.9, abs=1e-6)
