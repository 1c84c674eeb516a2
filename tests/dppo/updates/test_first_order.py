import copy
import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dppo.advantages import inner_discount
from dppo.critic import Critic
from dppo.rollout import collect_rollout
from dppo.surrogates import approximate_kl
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.batch import Batch, PairOrder, Pairs, Targets
from dppo.updates.faults import NotFiniteError
from dppo.updates.first_order import FirstOrder
from dppo.updates.first_order_config import FirstOrderConfig, PPOConfig, PPOKLConfig, PPOMaskConfig
from dppo.updates.natural import TRPOConfig
from dppo.updates.objective import Rows
from dppo.updates.rules import make_update_rule
from dppo.updates.step import make_step
from policies import Policy, UserError, log_prob_factors

CRITIC = {"type": "mlp", "hidden_dims": [8], "activation": "tanh"}
KINDS = ("gaussian", "categorical", "diffusion")
FACTORED = [("gaussian", "mean"), ("diffusion", "mean")]


@pytest.fixture
def make_trainer(small_policy: Callable[..., Policy], task_of: Callable) -> Callable[..., Trainer]:
    """A trainer of a small policy in 4 environments and rollouts of 8 steps: 32 rows."""

    def build(kind: str, settings: dict[str, Any] | None = None, **algo: Any) -> Trainer:
        policy = small_policy(kind, **(settings or {}))
        size = TrainerConfig(env_steps=1000, num_envs=4, rollout_steps=8)
        return Trainer(policy, task_of(kind), size, PPOConfig(**algo), CRITIC)

    return build


Updated = tuple[dict[str, Tensor], list[dict[str, float | None]]]


@pytest.fixture
def updated() -> Callable[..., Updated]:
    """The weights of copies of a trainer's policy and critic after an update on each batch, and the metrics."""

    def update(trainer: Trainer, batches: list[Batch], config: PPOConfig) -> Updated:
        policy, critic = copy.deepcopy(trainer.policy), copy.deepcopy(trainer.critic)
        assert isinstance(critic, Critic)
        rule = make_update_rule(config, policy, critic, torch.Generator().manual_seed(3))
        metrics = [rule.update(batch, progress=0.0, iteration=i) for i, batch in enumerate(batches)]
        return with_critic(policy, critic), metrics

    return update


def with_critic(policy: nn.Module, critic: nn.Module) -> dict[str, Tensor]:
    return {**weights(policy), **{f"critic.{name}": value for name, value in weights(critic).items()}}


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rollout_batch(trainer: Trainer) -> Batch:
    rollout = collect_rollout(trainer.actor, trainer.policy, trainer.config.rollout_steps)
    return trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))


def numbered(batch: Batch) -> Batch:
    """The batch with the number of each row as its advantage and return, so that `Spy` can tell the rows."""
    rows = torch.arange(len(batch)).float()
    return dataclasses.replace(batch, advantages=rows[:, None].expand_as(batch.advantages), returns=rows)


def all_pairs(batch: Batch) -> Pairs:
    return batch.pairs(torch.arange(len(batch) * batch.num_steps))


def pairs_at(batch: Batch, rows: Tensor, step: int = 0) -> Pairs:
    return batch.pairs(rows * batch.num_steps + step)


class Result(NamedTuple):
    """What PPO says of the rows of a minibatch."""

    losses: Tensor
    log_ratios: Tensor
    clipped: Tensor


class Spy:
    """Keeps what an update rule's losses were asked for of a `numbered` batch, and what they answered.

    Only advantages that are neither normalised nor discounted tell the rows.
    """

    def __init__(self, rule: FirstOrder) -> None:
        self.pairs: list[list[tuple[int, int]]] = []
        self.rows: list[list[int]] = []
        self.results: list[Result] = []

        def spied_rows(pairs: Pairs) -> Rows:
            self.pairs.append(list(zip(pairs.advantages.tolist(), pairs.step.tolist(), strict=True)))
            rows = rule.rows(pairs)
            self.results.append(Result(*(column.detach() for column in rows)))
            return rows

        def spied_value_rows(targets: Targets) -> Rows:
            self.rows.append(targets.returns.tolist())
            return fit.rows(targets)

        fit = rule.critic_fit
        spied = dataclasses.replace(rule.objective, rows=spied_rows)
        rule._step = make_step(spied, rule.optimizer, compile=False)
        spied_critic = dataclasses.replace(fit.objective, rows=spied_value_rows)
        fit._step = make_step(spied_critic, fit.optimizer, compile=False)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def clip_fraction(result: Result) -> float:
    return result.clipped.mean().item()


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# --- what the loss is


@pytest.mark.parametrize("observation_scaling", ["min_max", "running"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_minibatch_of_every_rollout_has_ratio_one_everywhere(make_trainer, kind, observation_scaling):
    settings = {"observation_scaling": observation_scaling}
    trainer = make_trainer(kind, settings, epochs=2, batch_size=16, learning_rate=0.01)
    spy = Spy(trainer.update_rule)
    for _ in range(3):
        seen = len(spy.results)
        trainer.iterate()
        first, last = spy.results[seen], spy.results[-1]
        assert first.log_ratios.abs().max().item() < 1e-4
        assert clip_fraction(first) == 0
        assert last.log_ratios.abs().max().item() > 1e-3, "the policy must have moved by the last minibatch"


@pytest.mark.parametrize(("kind", "reduction"), [*((kind, "sum") for kind in KINDS), *FACTORED])
def test_the_gradient_at_the_old_policy_is_the_policy_gradient(make_trainer, kind, reduction):
    config = {"normalize_advantages": False, "log_ratio": reduction, "inner_gamma": 0.9, "clip": 0.1}
    trainer = make_trainer(kind, **config)
    batch, policy = rollout_batch(trainer), trainer.policy
    rule = trainer.update_rule
    loss = rule.rows(rule.weighted(all_pairs(batch)))[0].mean()
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    surrogate = torch.autograd.grad(loss, parameters)

    pairs = torch.arange(len(batch) * batch.num_steps)
    rows, steps = pairs // batch.num_steps, pairs % batch.num_steps
    law = policy.transition(batch.obs[rows], batch.chain[rows, steps], steps)
    factors = getattr(law, "base_dist", law).log_prob(batch.chain[rows, steps + 1])
    if factors.dim() > 1:
        factors = factors[:, policy.config.executed_part].flatten(1)
        factors = factors.sum(1) if reduction == "sum" else factors.mean(1)
    weight = batch.advantages[rows, steps] * inner_discount(policy.num_steps, 0.9)[steps]
    reinforce = torch.autograd.grad(-(weight * factors).mean(), parameters)
    assert any(gradient.abs().max() > 1e-4 for gradient in reinforce)
    for ours, expected in zip(surrogate, reinforce, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_the_inner_discount_weights_the_steps_of_the_chain(make_trainer):
    trainer = make_trainer("diffusion", normalize_advantages=False, inner_gamma=0.5)
    batch = rollout_batch(trainer)
    row = torch.tensor([5])
    rule = trainer.update_rule
    losses = [rule.rows(rule.weighted(pairs_at(batch, row, step)))[0].item() for step in range(3)]
    advantage = float(batch.advantages[5, 0])
    assert losses == pytest.approx([-0.25 * advantage, -0.5 * advantage, -advantage], rel=1e-3)


def test_each_inner_step_is_clipped_at_its_own_range(make_trainer):
    trainer = make_trainer("diffusion", clip=0.2, clip_base=0.01)
    assert trainer.update_rule.surrogate.below.tolist() == pytest.approx([0.01, 0.0446, 0.2], abs=1e-3)
    batch = rollout_batch(trainer)
    moved = Batch(**{**vars(batch), "log_prob_factors": batch.log_prob_factors.clone()})
    moved.log_prob_factors[:, :, 0, 0] -= math.log(1.1)  # every ratio is 1.1
    rows = torch.arange(len(batch))
    results = [Result(*trainer.update_rule.rows(pairs_at(moved, rows, k))) for k in range(3)]
    assert [clip_fraction(result) for result in results] == [1.0, 1.0, 0.0]


def test_a_chain_without_a_base_range_has_the_same_range_at_every_step(make_trainer):
    assert make_trainer("diffusion", clip=0.03).update_rule.surrogate.below.tolist() == pytest.approx([0.03] * 3)


def test_ranges_above_one_are_in_proportion_to_those_below_at_every_inner_step(make_trainer):
    surrogate = make_trainer("diffusion", clip=0.2, clip_base=0.4, clip_above=0.3, clip_rate=0).update_rule.surrogate
    assert surrogate.below.tolist() == pytest.approx([0.4, 0.3, 0.2])
    assert surrogate.above.tolist() == pytest.approx([0.6, 0.45, 0.3])


def test_advantages_are_normalised_in_each_minibatch(make_trainer, monkeypatch, torch_threads):
    torch_threads(1)  # so that the spy hears of the parts in their order
    monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", 6)  # over all parts of it
    losses = []
    for shift, scale in ((0, 1), (100, 7)):
        trainer = make_trainer("gaussian", epochs=1, batch_size=16)
        spy = Spy(trainer.update_rule)
        batch = rollout_batch(trainer)
        batch = dataclasses.replace(batch, advantages=shift + scale * batch.advantages)
        trainer.update_rule.update(batch, progress=0.0, iteration=0)
        assert [len(part) for part in spy.pairs] == [6, 6, 4] * 2
        for minibatch in (spy.pairs[:3], spy.pairs[3:]):
            advantages = torch.tensor([advantage for part in minibatch for advantage, _ in part])
            assert advantages.mean().item() == pytest.approx(0, abs=1e-4)
            assert advantages.std().item() == pytest.approx(1, rel=0.05)
        losses.append(torch.cat([result.losses for result in spy.results]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_a_minibatch_of_a_single_pair_has_no_advantage_over_itself(make_trainer):
    trainer = make_trainer("gaussian", epochs=1, batch_size=1)
    spy = Spy(trainer.update_rule)
    before = weights(trainer.policy)
    trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=0)
    assert [result.losses.tolist() for result in spy.results] == [[0.0]] * 32
    assert changed(before, trainer.policy) == set()


def test_without_normalisation_advantages_are_taken_as_they_are(make_trainer):
    trainer = make_trainer("gaussian", epochs=1, normalize_advantages=False)
    spy = Spy(trainer.update_rule)
    batch = rollout_batch(trainer)
    trainer.update_rule.update(batch, progress=0.0, iteration=0)
    assert sorted(advantage for advantage, _ in spy.pairs[0]) == sorted(batch.advantages[:, 0].tolist())


def test_advantages_are_clipped_to_quantiles_of_the_minibatch_after_normalisation_and_before_the_discount(make_trainer):
    trainer = make_trainer("diffusion", advantage_quantiles=[0.25, 0.75], inner_gamma=0.5)
    rule, batch = trainer.update_rule, rollout_batch(trainer)
    pairs = batch.pairs(torch.tensor([0, 4, 8, 30, 61]))
    normal = (pairs.advantages - pairs.advantages.mean()) / pairs.advantages.std()
    low, high = normal.sort().values[[1, 3]]
    expected = normal.clamp(low, high) * 0.5 ** (2 - pairs.step)
    torch.testing.assert_close(rule.weighted(pairs).advantages, expected)


# --- what an update covers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 19, 31, 32, 95, 96, 10_000])
def test_every_pair_is_seen_once_an_epoch_and_so_is_every_row_by_the_critic(make_trainer, kind, batch_size):
    as_they_are = {"normalize_advantages": False, "inner_gamma": 1.0}
    trainer = make_trainer(kind, epochs=2, batch_size=batch_size, learning_rate=1e-5, **as_they_are)
    spy = Spy(trainer.update_rule)
    batch = numbered(rollout_batch(trainer))
    trainer.update_rule.update(batch, progress=0.0, iteration=0)
    assert max(len(pairs) for pairs in spy.pairs) <= batch_size
    assert min(len(rows) for rows in spy.rows) >= 1
    pairs = [pair for minibatch in spy.pairs for pair in minibatch]
    total = len(batch) * batch.num_steps
    wanted = [(row, step) for row in range(len(batch)) for step in range(batch.num_steps)]
    assert [sorted(pairs[:total]), sorted(pairs[total:])] == [wanted, wanted]
    rows = [row for minibatch in spy.rows for row in minibatch]
    assert [sorted(rows[: len(batch)]), sorted(rows[len(batch) :])] == [list(range(len(batch)))] * 2


def test_epochs_are_shuffled_anew(make_trainer):
    trainer = make_trainer("gaussian", epochs=2, batch_size=64, normalize_advantages=False)
    spy = Spy(trainer.update_rule)
    trainer.update_rule.update(numbered(rollout_batch(trainer)), progress=0.0, iteration=0)
    first, second = spy.pairs
    assert first != second
    assert sorted(first) == sorted(second)


def test_the_target_kl_stops_the_actor_but_not_the_critic(make_trainer):
    trainer = make_trainer("gaussian", epochs=5, batch_size=16, target_kl=1e-3, learning_rate=0.05)
    spy = Spy(trainer.update_rule)
    batch = rollout_batch(trainer)
    metrics = trainer.update_rule.update(batch, progress=0.0, iteration=0)
    kls = [approximate_kl(result.log_ratios).item() for result in spy.results]
    assert len(kls) < 10
    assert max(kls[:-1]) <= 1e-3 < kls[-1]
    assert metrics["actor_steps"] == len(kls) - 1
    assert len(spy.rows) == 10
    trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=1)
    assert len(spy.results) > len(kls), "the next update begins anew"


def test_metrics_are_over_all_pairs_seen_also_where_the_target_kl_cut_an_epoch_short(make_trainer):
    trainer = make_trainer("diffusion", epochs=5, batch_size=10, target_kl=0.02, learning_rate=0.002)
    spy = Spy(trainer.update_rule)
    metrics = trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=0)
    assert len(spy.results) > 10, "more than an epoch"
    assert len(spy.results) % 10 != 0, "and part of another"
    losses, log_ratios, clipped = (torch.cat(column) for column in zip(*spy.results, strict=True))
    whole = [losses.mean().item(), approximate_kl(log_ratios).item(), clipped.mean().item()]
    assert [metrics[name] for name in ("policy_loss", "approx_kl", "clip_fraction")] == pytest.approx(whole, rel=1e-4)
    assert all(value != 0 for value in whole)


def test_without_a_target_kl_nothing_stops_the_actor(make_trainer):
    trainer = make_trainer("gaussian", epochs=5, batch_size=16, learning_rate=0.05)
    metrics = trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=0)
    assert metrics["actor_steps"] == 10
    assert metrics["approx_kl"] > 1e-3


def test_only_the_critic_learns_during_its_warm_up(make_trainer):
    trainer = make_trainer("diffusion", critic_warmup_iterations=2)
    for iteration in range(3):
        policy, critic = weights(trainer.policy), weights(trainer.critic)
        metrics = trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=iteration)
        assert changed(critic, trainer.critic)
        assert bool(changed(policy, trainer.policy)) == (iteration == 2)
        assert (metrics["policy_loss"] is None) == (iteration < 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("observation_scaling", ["min_max", "running"])
def test_an_update_changes_the_trained_network_and_nothing_else(make_trainer, kind, observation_scaling):
    trainer = make_trainer(kind, {"observation_scaling": observation_scaling}, learning_rate=0.01)
    trainer.policy.fit_actions(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, 2.0]))
    trainer.policy.fit_observations(torch.tensor([-2.0, -2.0]), torch.tensor([4.0, 3.0]))
    trainer.policy.observe(torch.randn(50, 2))
    before = weights(trainer.policy)
    trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=0)
    trained = {name for name in before if name.startswith("network.") or name == "raw_std"}
    assert changed(before, trainer.policy) == trained
    assert any(name.startswith("frozen.") for name in before) == (kind == "diffusion")


def test_the_critic_leaves_no_gradient_in_the_policy_nor_the_policy_one_in_the_critic(make_trainer):
    trainer = make_trainer("gaussian")
    batch = rollout_batch(trainer)
    rows = torch.arange(8)
    trainer.update_rule.critic_fit.rows(batch.targets(rows))[0].mean().backward()
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())
    trainer.critic.zero_grad(set_to_none=True)
    trainer.update_rule.rows(pairs_at(batch, rows))[0].mean().backward()
    assert all(parameter.grad is None for parameter in trainer.critic.parameters())


@pytest.mark.parametrize("whole_chains", [False, True])
def test_the_gradient_over_some_inner_steps_is_on_average_that_over_all(make_trainer, whole_chains):
    """Over all choices of two of three inner steps for each of two rows: every choice is as likely as every other."""
    trainer = make_trainer("diffusion", normalize_advantages=False, inner_steps=2)
    rule, batch = trainer.update_rule, rollout_batch(trainer)
    parameters = rule.optimizer.parameters

    def gradient(pairs: list[int]) -> Tensor:
        return parameters.gradient(rule.rows(rule.weighted(batch.pairs(torch.tensor(pairs))))[0].mean())

    whole = gradient(list(range(6)))
    assert whole.abs().max() > 1e-3
    choices = list(itertools.product(itertools.combinations(range(3), 2), repeat=2))
    of_choices = [gradient([*first, *(3 + step for step in second)]) for first, second in choices]
    torch.testing.assert_close(torch.stack(of_choices).mean(0), whole, rtol=1e-4, atol=1e-6)
    drawn, two_rows = torch.zeros(9), Batch(**{name: value[:2] for name, value in vars(batch).items()})
    for seed in range(900):
        (part,) = PairOrder(2, whole_chains).parts(two_rows, 1, torch.Generator().manual_seed(seed))
        pairs = sorted(part.tolist())
        drawn[choices.index((tuple(pairs[:2]), tuple(pair - 3 for pair in pairs[2:])))] += 1
    assert float((drawn / 100 - 1).abs().max()) < 0.4


def test_an_update_is_about_the_inner_steps_that_it_is_told_to_take(make_trainer):
    options = {"normalize_advantages": False, "inner_gamma": 1.0, "learning_rate": 1e-5}
    trainer = make_trainer("diffusion", epochs=2, batch_size=8, inner_steps=2, minibatches_of="chains", **options)
    spy = Spy(trainer.update_rule)
    metrics = trainer.update_rule.update(numbered(rollout_batch(trainer)), progress=0.0, iteration=0)
    assert metrics["actor_steps"] == 16
    assert [len(pairs) for pairs in spy.pairs] == [8] * 16
    assert all(len({row for row, _ in pairs}) == 4 for pairs in spy.pairs)
    assert [len(rows) for rows in spy.rows] == [2] * 32, "the critic has as many minibatches as all inner steps make"


@pytest.mark.parametrize("setting", [{"log_ratio": "mean"}, {"log_prob_clamp": (-5.0, 2.0)}])
@pytest.mark.parametrize("kind", ["mixture", "categorical", "gaussian"])
def test_what_is_done_to_factors_of_a_likelihood_is_refused_where_there_are_none(make_trainer, kind, setting):
    if kind == "gaussian":
        assert make_trainer(kind, **setting).iterate()["actor_steps"]
        return
    with pytest.raises(UserError, match=f"the likelihood of a {kind} policy is one number"):
        make_trainer(kind, **setting)


def test_more_inner_steps_than_there_are_are_refused(make_trainer):
    with pytest.raises(UserError, match=r"algo\.inner_steps=4, but the policy has 3 in all"):
        make_trainer("diffusion", inner_steps=4)


# --- learning rates and steps


@pytest.mark.parametrize(("schedule", "factor"), [("constant", 1.0), ("linear", 0.625), ("cosine", 0.55)])
def test_both_learning_rates_follow_the_schedule(make_trainer, schedule, factor):
    rates = {"learning_rate": 0.01, "critic_learning_rate": 0.02}
    trainer = make_trainer("gaussian", schedule=schedule, final_learning_rate_share=0.1, **rates)
    progress = 0.5 if schedule == "cosine" else 0.375 / 0.9
    metrics = trainer.update_rule.update(rollout_batch(trainer), progress=progress, iteration=0)
    optimizers = trainer.update_rule.optimizer, trainer.update_rule.critic_fit.optimizer
    used = [optimizer.learning_rate for optimizer in optimizers]
    assert used == pytest.approx([0.01 * factor, 0.02 * factor])
    assert [metrics["actor_learning_rate"], metrics["critic_learning_rate"]] == pytest.approx(used)


def test_a_minibatch_in_parts_gives_the_step_of_the_whole(make_trainer, monkeypatch):
    steps = []
    for size in (7, 10_000):
        monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", size)
        trainer = make_trainer("diffusion", batch_size=50)
        spy = Spy(trainer.update_rule)
        metrics = trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=0)
        assert max(len(pairs) for pairs in spy.pairs) == min(size, 48)
        assert max(len(rows) for rows in spy.rows) == (6 if size == 7 else 16)
        steps.append((with_critic(trainer.policy, trainer.critic), metrics))
    (in_parts, metrics), (whole, expected) = steps
    for name, weight in in_parts.items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-6)
    for name in ("policy_loss", "approx_kl", "clip_fraction", "value_loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_does_not_depend_on_the_number_of_threads_to_the_last_bit(
    make_trainer, updated, torch_threads, monkeypatch, kind
):
    monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", 7)
    trainer = make_trainer(kind, batch_size=20)
    batch = rollout_batch(trainer)
    results = []
    for threads in (1, 3):
        torch_threads(threads)
        results.append(updated(trainer, [batch], trainer.algo))
        assert torch.get_num_threads() == threads
    (one, metrics), (three, same) = results
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert metrics == same


def test_large_minibatches_and_networks_do_not_depend_on_the_number_of_threads_either(
    make_trainer, updated, torch_threads
):
    """So large that torch would share out sums among its threads, and add up what they found."""
    network = {"network": {"type": "mlp", "hidden_dims": [200, 200]}}
    trainer = make_trainer("gaussian", network, batch_size=40_000, epochs=1, learning_rate=1e-2)
    batch = rollout_batch(trainer)
    repeated = Batch(**{name: torch.cat([value] * 1250) for name, value in vars(batch).items()})
    results = []
    for threads in (1, 3):
        torch_threads(threads)
        results.append(updated(trainer, [repeated], trainer.algo)[0])
    assert len(repeated) == 40_000
    assert sum(value.numel() for value in trainer.policy.network.parameters()) > 32_768
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("kind", ["gaussian", pytest.param("diffusion", marks=pytest.mark.slow)])
def test_a_compiled_update_is_the_same(make_trainer, updated, torch_threads, monkeypatch, kind):
    """Two updates, with weights that change from step to step, and minibatches of 7 and of 6 pairs in two parts."""
    monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", 5)
    torch_threads(3)
    compile, compiled_functions = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled_functions.append(f) or compile(f, **how))
    algo = {"epochs": 2, "batch_size": 7, "learning_rate": 3e-3, "log_prob_clamp": (-5, 2), "value_clip": 0.3}
    trainer = make_trainer(kind, **algo)
    batches = [rollout_batch(trainer) for _ in range(2)]
    results = []
    for compiled in (False, True):
        config = dataclasses.replace(trainer.algo, compile=compiled)
        results.append(updated(trainer, batches, config))
    assert len(compiled_functions) == 2, "the actor's and the critic's"
    (eager, metrics), (compiled, same) = results
    before = with_critic(trainer.policy, trainer.critic)
    assert any(not torch.equal(eager[name], before[name]) for name in before)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for ours, expected in zip(same, metrics, strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_compiling_without_a_compiler_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="compile needs a C\\+\\+ compiler"):
        make_trainer("gaussian", compile=True)


@pytest.mark.parametrize("target_kl", [None, 0.1])
@pytest.mark.parametrize(
    ("field", "what"), [("advantages", "policy"), ("returns", "critic"), ("log_prob_factors", "policy")]
)
def test_losses_that_are_never_finite_are_an_error_and_destroy_no_parameters(make_trainer, field, what, target_kl):
    trainer = make_trainer("gaussian", batch_size=8, target_kl=target_kl)
    batch = rollout_batch(trainer)
    broken = Batch(**{**vars(batch), field: torch.full_like(getattr(batch, field), torch.nan)})
    critic = weights(trainer.critic)
    with pytest.raises(NotFiniteError, match=f"^10 updates of the {what} network in a row had a loss .nan. "):
        trainer.update_rule.update(broken, progress=0.0, iteration=0)
    assert changed(critic, trainer.critic) == set()
    assert all(parameter.isfinite().all() for parameter in trainer.policy.parameters())


def test_a_minibatch_whose_loss_is_not_finite_is_skipped_and_in_no_metric(make_trainer):
    trainer = make_trainer("gaussian", epochs=3, batch_size=8, normalize_advantages=False)
    batch = rollout_batch(trainer)
    advantages, returns = batch.advantages.clone(), batch.returns.clone()
    advantages[0], returns[0] = torch.nan, torch.nan
    before = weights(trainer.policy.network)
    row = trainer.update_rule.update(
        dataclasses.replace(batch, advantages=advantages, returns=returns), progress=0.0, iteration=0
    )
    minibatches = -(-len(batch) // 8)
    assert (row["skipped_updates"], row["skipped_critic_updates"]) == (3, 3)
    assert row["actor_steps"] == 3 * (minibatches - 1)
    assert all(math.isfinite(row[name]) for name in ("policy_loss", "approx_kl", "value_loss"))
    assert changed(before, trainer.policy.network)


def test_an_update_in_which_everything_is_skipped_says_so_and_is_forgotten(make_trainer):
    trainer = make_trainer("gaussian")
    batch = rollout_batch(trainer)
    broken = dataclasses.replace(batch, advantages=torch.full_like(batch.advantages, torch.nan))
    config = PPOKLConfig(epochs=2, batch_size=None, critic_epochs=1)
    rule = make_update_rule(config, trainer.policy, trainer.critic, torch.Generator().manual_seed(3))
    before = copy.deepcopy(rule.state_dict()["surrogate"])
    row = rule.update(broken, progress=0.0, iteration=0)
    assert (row["skipped_updates"], row["actor_steps"], row["policy_loss"]) == (2, 0, None)
    assert rule.state_dict()["surrogate"] == before
    for _ in range(5):  # two of ten: they are not in a row with others
        rule.update(batch, progress=0.0, iteration=0)
        assert rule.update(broken, progress=0.0, iteration=0)["skipped_updates"] == 2


def test_the_same_generator_gives_the_same_update(make_trainer, updated):
    trainer = make_trainer("diffusion", batch_size=16)
    batch = rollout_batch(trainer)
    (first, _), (again, _) = (updated(trainer, [batch], trainer.algo) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"batch_size": 0}])
def test_settings_that_would_learn_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="at least 1"):
        PPOConfig(**settings)


# --- options of the policy's steps


def test_a_target_kl_of_the_epoch_is_looked_at_after_it(make_trainer):
    trainer = make_trainer(
        "gaussian", epochs=20, batch_size=8, target_kl=0.02, target_kl_of="epoch", learning_rate=0.01
    )
    spy = Spy(trainer.update_rule)
    metrics = trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=0)
    steps = len(spy.results)
    assert steps % 4 == 0, "whole epochs"
    assert 0 < steps < 80
    assert metrics["actor_steps"] == steps, "what was seen was learned from"
    kls = [
        approximate_kl(torch.cat([result.log_ratios for result in spy.results[first : first + 4]])).item()
        for first in range(0, steps, 4)
    ]
    assert kls[-1] > 0.02
    assert all(kl <= 0.02 for kl in kls[:-1])


@pytest.mark.parametrize(("rate", "speeds"), [(0.05, [1.0, 1 / 1.5]), (1e-6, [1.0, 1.5])])
def test_the_learning_rate_adapts_to_the_desired_kl(make_trainer, rate, speeds):
    trainer = make_trainer("gaussian", epochs=3, batch_size=8, learning_rate=rate, desired_kl=0.005)
    for iteration, speed in enumerate(speeds):
        metrics = trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=iteration)
        assert metrics["actor_learning_rate"] == pytest.approx(rate * speed)
        assert metrics["critic_learning_rate"] == 1e-3
    assert trainer.update_rule.state_dict()["speed"] != 1.0


def test_the_learning_rate_keeps_within_a_tenfold_of_itself():
    config = PPOConfig(desired_kl=0.01)
    slow, fast = 1.0, 1.0
    for _ in range(50):
        slow, fast = config.next_speed(slow, 1.0), config.next_speed(fast, 0.0)
    assert (slow, fast) == (0.1, 10.0)
    assert config.next_speed(3.0, 0.012) == 3.0


@pytest.mark.parametrize("kind", KINDS[:2])
def test_an_entropy_bonus_makes_the_policy_more_random(make_trainer, kind):
    entropies = []
    for coefficient in (0.0, 1.0):
        trainer = make_trainer(kind, epochs=20, learning_rate=3e-3, entropy_coefficient=coefficient)
        batch = rollout_batch(trainer)
        trainer.update_rule.update(batch, progress=0.0, iteration=0)
        law = trainer.policy.transition(batch.obs, batch.chain[:, 0], torch.zeros(len(batch), dtype=torch.int64))
        entropies.append(float(law.entropy().mean()))
    assert entropies[1] > entropies[0]


def test_the_entropy_that_is_reported_is_that_of_what_was_sampled(make_trainer):
    trainer = make_trainer("gaussian")
    batch = rollout_batch(trainer)
    metrics = trainer.update_rule.update(batch, progress=0.0, iteration=0)
    assert metrics["entropy"] == pytest.approx(-float(batch.log_prob_factors.sum(-1).sum(-1).sum(-1).mean()))


def test_the_critic_may_have_epochs_and_minibatches_of_its_own(make_trainer):
    trainer = make_trainer("gaussian", epochs=2, batch_size=8, critic_epochs=3, critic_batch_size=10)
    spy = Spy(trainer.update_rule)
    trainer.update_rule.update(rollout_batch(trainer), progress=0.0, iteration=0)
    assert len(spy.pairs) == 2 * 4
    assert [len(rows) for rows in spy.rows] == [8, 8, 8, 8] * 3, "at most ten, and nearly equal"


def test_without_a_batch_size_a_step_is_of_the_whole_rollout(make_trainer):
    trainer = make_trainer("diffusion", epochs=2, batch_size=None)
    spy = Spy(trainer.update_rule)
    batch = rollout_batch(trainer)
    trainer.update_rule.update(batch, progress=0.0, iteration=0)
    assert [len(pairs) for pairs in spy.pairs] == [len(batch) * 3] * 2
    assert [len(rows) for rows in spy.rows] == [len(batch)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_vpg_is_one_step_of_adam_on_the_policy_gradient(small_policy, task_of, kind):
    config = FirstOrderConfig(learning_rate=0.01, normalize_advantages=False, max_grad_norm=None, inner_gamma=0.9)
    policy = small_policy(kind)
    trainer = Trainer(policy, task_of(kind), TrainerConfig(1000, 4, 8), config, CRITIC)
    batch, before = rollout_batch(trainer), copy.deepcopy(policy)
    trainer.update_rule.update(batch, progress=0.0, iteration=0)
    pairs = all_pairs(batch)
    factors = log_prob_factors(before.transition(pairs.obs, pairs.latent, pairs.step), pairs.following)
    log_prob = factors if factors.dim() == 1 else factors[:, policy.config.executed_part].flatten(1).sum(1)
    weights_of_pairs = pairs.advantages * inner_discount(policy.num_steps, 0.9)[pairs.step]
    optimizer = torch.optim.Adam([p for p in before.parameters() if p.requires_grad], 0.01)
    (-(weights_of_pairs * log_prob).mean()).backward()
    optimizer.step()
    moved = weights(before)
    for name, value in weights(policy).items():
        torch.testing.assert_close(value, moved[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_masked_by_the_divergence_of_its_law_from_that_which_sampled(small_policy, task_of, kind):
    config = PPOMaskConfig(epochs=4, batch_size=16, learning_rate=0.01, max_kl=0.003, normalize_advantages=False)
    policy = small_policy(kind)
    trainer = Trainer(policy, task_of(kind), TrainerConfig(1000, 4, 8), config, CRITIC)
    for _ in range(2):
        batch, before = rollout_batch(trainer), copy.deepcopy(policy)
        metrics = trainer.update_rule.update(batch, progress=0.0, iteration=0)
    assert 0 < metrics["masked_fraction"] < 1
    pairs = trainer.update_rule.weighted(all_pairs(batch))
    with torch.no_grad():
        losses, log_ratios, masked = trainer.update_rule.rows(pairs)
        old, new = (each.transition(pairs.obs, pairs.latent, pairs.step) for each in (before, policy))
    if kind == "categorical":
        divergences = (old.probs * (old.logits - new.logits)).sum(1)
    else:
        (m, s), (n, u) = ((law.base_dist.loc[:, :2], law.base_dist.scale[:, :2]) for law in (old, new))  # executed
        divergences = ((u / s).log() + (s**2 + (m - n) ** 2) / (2 * u**2) - 0.5).flatten(1).sum(1)
    beyond = (divergences > 0.003) & (log_ratios * pairs.advantages > 0)
    torch.testing.assert_close(masked, beyond.float())
    assert 0 < masked.mean() < 1
    torch.testing.assert_close(
        losses, -torch.where(beyond, pairs.advantages, log_ratios.exp() * pairs.advantages), rtol=1e-4, atol=1e-5
    )


def test_the_penalty_of_ppo_kl_grows_when_the_policy_runs_away(small_policy, point_task):
    config = PPOKLConfig(epochs=10, batch_size=8, learning_rate=0.02, desired_kl=1e-3)
    trainer = Trainer(small_policy("gaussian"), point_task, TrainerConfig(1000, 4, 8), config, CRITIC)
    penalties = [trainer.iterate()["kl_penalty"] for _ in range(4)]
    assert penalties == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"clip_above": 0.3, "clip": 0.0}, "clip must be positive"),
        ({"desired_kl": 0.0}, "desired_kl must be positive"),
        ({"desired_kl": 0.1, "epochs": 1, "batch_size": None}, "desired_kl needs more than one step per update"),
        ({"critic_epochs": 0}, "critic_epochs must be at least 1"),
        ({"advantage_quantiles": (0.9, 0.1)}, "advantage_quantiles must be"),
        ({"advantage_quantiles": (0.0, 1.1)}, "advantage_quantiles must be"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient must not be negative"),
    ],
)
def test_impossible_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


# --- a critic that shares the policy's network


def shared_trainer(kind, small_policy, task_of, config=None, **settings):
    config = config or PPOConfig(epochs=2, batch_size=8, learning_rate=0.01)
    return Trainer(small_policy(kind, **settings), task_of(kind), TrainerConfig(1000, 4, 8), config, {"type": "shared"})


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_a_shared_critic_learns_in_the_policys_steps_and_moves_the_trunk(small_policy, task_of, kind):
    trainer = shared_trainer(kind, small_policy, task_of)
    rule = trainer.update_rule
    assert len(rule.optimizer.parameters) == sum(
        parameter.numel() for parameter in (*trainer.policy.parameters(), *trainer.critic.parameters())
    )
    assert [name for name, _ in trainer.critic.named_parameters()] == ["head.weight", "head.bias"]
    batch, before = rollout_batch(trainer), with_critic(trainer.policy, trainer.critic)
    metrics = rule.update(dataclasses.replace(batch, advantages=0 * batch.advantages), progress=0.0, iteration=0)
    after = with_critic(trainer.policy, trainer.critic)
    assert {name for name in before if not torch.equal(before[name], after[name])} >= {
        "network.input.weight",
        "critic.head.weight",
    }
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + 0.5 * metrics["value_loss"], abs=1e-5)
    assert metrics["actor_steps"] == 8


def test_the_loss_of_a_shared_critic_is_that_of_its_values(small_policy, task_of):
    trainer = shared_trainer("gaussian", small_policy, task_of)
    batch = rollout_batch(trainer)
    everything = torch.arange(len(batch))
    losses, _, _, policy_losses, value_terms = trainer.update_rule.rows(trainer.update_rule.gather(batch, everything))
    values = trainer.critic(trainer.policy.normalize_obs(batch.obs))
    torch.testing.assert_close(values, batch.values)
    torch.testing.assert_close(value_terms, 0.5 * (values - batch.returns).square())
    torch.testing.assert_close(losses, policy_losses + 0.5 * value_terms)


def test_a_shared_critic_learns_the_returns(small_policy, task_of):
    config = FirstOrderConfig(epochs=300, learning_rate=0.01, gamma=0.0, gae_lambda=0.0, normalize_advantages=False)
    trainer = shared_trainer("gaussian", small_policy, task_of, config)
    batch = dataclasses.replace(rollout_batch(trainer), advantages=torch.zeros(32, 1))
    trainer.update_rule.update(batch, progress=0.0, iteration=0)
    values = trainer.critic(trainer.policy.normalize_obs(batch.obs))
    before, after = ((v - batch.returns).square().mean() for v in (batch.values, values))
    assert after < 0.2 * before


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("diffusion", PPOConfig(), "a diffusion policy has no trunk"),
        ("gaussian", TRPOConfig(), "steps are of the policy alone"),
        ("gaussian", PPOConfig(critic_warmup_iterations=2), "cannot learn alone"),
    ],
)
def test_a_critic_that_cannot_share_is_refused(small_policy, task_of, kind, config, message):
    with pytest.raises(UserError, match=message):
        shared_trainer(kind, small_policy, task_of, config)
