"""Anchors against hand calculations, and what they do to a training."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dppo import building
from dppo.anchors import Anchor, Imitation, KLPenalty, KLReward, Replay
from dppo.annealing import Annealing
from dppo.building import build_anchor
from dppo.data.demos import Episode, WindowDataset
from dppo.rollout import collect_rollout
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.batch import Batch
from dppo.updates.first_order import FirstOrder
from dppo.updates.first_order_config import PPOConfig
from dppo.updates.natural import TRPOConfig
from policies import Policy, UserError

CRITIC = {"type": "mlp", "hidden_dims": [8]}
KINDS = ("gaussian", "mixture", "categorical", "diffusion")


def demonstrations(policy: Policy) -> WindowDataset:
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, (41, 2)).astype(np.float32)
    action = rng.integers(3, size=40) if policy.discrete else target[:-1]
    episode = Episode(target, action, np.zeros(40, np.float32), False, True)
    return WindowDataset([episode], policy.config.history, policy.config.chunk)


ANCHORS: dict[str, Callable[[float, Policy], Anchor]] = {
    "kl": KLPenalty,
    "kl_reward": KLReward,
    "imitation": Imitation,
    "replay": lambda coefficient, policy: Replay(coefficient, policy, demonstrations(policy)),
}
LOSSES = ("kl", "imitation", "replay")
METRICS = {"kl": "anchor_kl", "kl_reward": "anchor_kl", "imitation": "imitation_loss", "replay": "replay_loss"}


@pytest.fixture
def make_trainer(small_policy, task_of) -> Callable[..., Trainer]:
    """A trainer of a small policy in 4 environments and rollouts of 8 steps, anchored where it is."""

    def build(kind: str, anchor: str | None, coefficient: float = 0.5, **algo: Any) -> Trainer:
        policy = small_policy(kind)
        held = None if anchor is None else ANCHORS[anchor](coefficient, policy)
        config = PPOConfig(**{"epochs": 2, "batch_size": 20, "learning_rate": 3e-3, **algo})
        return Trainer(policy, task_of(kind), TrainerConfig(1000, 4, 8), config, CRITIC, anchor=held)

    return build


def batch_of(trainer: Trainer) -> Batch:
    rollout = collect_rollout(trainer.actor, trainer.policy, 8)
    return trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))


def moved(policy: Policy, by: float = 0.1) -> Policy:
    """The policy itself, its weights shifted at random."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():  # also the std: with equal ones, a KL would be symmetric
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return policy


def rows_of(trainer: Trainer, batch: Batch) -> tuple[FirstOrder, dict[str, Tensor]]:
    """The columns of all pairs by the names of their metrics."""
    rule = trainer.update_rule
    assert isinstance(rule, FirstOrder)
    rule.extras[0].begin(batch, rule.generator)
    pairs = rule.weighted(rule.gather(batch, torch.arange(len(batch) * batch.num_steps)))
    return rule, dict(zip(rule._names, rule.rows(pairs), strict=True))


def normals(policy: Policy, batch: Batch, chain: Tensor) -> list[Normal]:
    """The laws of each inner step [M, Ta, Da] for given latents, of what is executed."""
    found = []
    for step in range(policy.num_steps):
        law = policy.transition(batch.obs, chain[:, step], torch.full((len(batch),), step)).base_dist
        executed = policy.config.executed_part
        found.append(Normal(law.loc[:, executed], law.scale.expand_as(law.loc)[:, executed]))
    return found


# --- what each of them says


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
def test_the_penalty_is_the_divergence_of_the_new_laws_from_the_first(make_trainer, kind):
    trainer = make_trainer(kind, "kl")
    batch, first = batch_of(trainer), copy.deepcopy(trainer.policy)
    _, columns = rows_of(trainer, batch)
    torch.testing.assert_close(columns["anchor_kl"], torch.zeros(len(columns["anchor_kl"])))
    moved(trainer.policy)
    _, columns = rows_of(trainer, batch)
    laws = zip(normals(trainer.policy, batch, batch.chain), normals(first, batch, batch.chain), strict=True)
    expected = torch.stack([kl_divergence(new, old).flatten(1).sum(1) for new, old in laws], 1).flatten()
    assert expected.mean() > 0.01
    torch.testing.assert_close(columns["anchor_kl"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(columns["loss"], columns["policy_loss"] + 0.5 * expected, rtol=1e-4, atol=1e-5)


def test_the_penalty_of_a_mixture_is_the_divergence_on_average(small_policy):
    first = small_policy("mixture")
    anchor, old = KLPenalty(1.0, first), moved(copy.deepcopy(first), 0.1)
    new = moved(copy.deepcopy(old), 0.02)
    obs = torch.zeros(100_000, 2, 2)
    nothing = torch.zeros(len(obs))
    generator = torch.Generator().manual_seed(0)
    sample = old.sample(obs, generator=generator)
    batch = Batch(obs, sample.chain, sample.log_prob_factors, nothing[:, None], nothing, nothing)
    rule = FirstOrder(PPOConfig(), new, None, generator, [anchor])
    columns = dict(zip(rule._names, rule.rows(rule.gather(batch, torch.arange(len(obs)))), strict=True))
    own = new.sample(obs, generator=generator).chain
    laws = [each.transition(obs, own[:, 0], nothing.long()) for each in (new, first)]
    expected = (laws[0].log_prob(own[:, 1]) - laws[1].log_prob(own[:, 1])).mean()
    assert float(expected.detach()) > 0.01
    assert float(columns["anchor_kl"].detach().mean()) == pytest.approx(float(expected.detach()), rel=0.1)


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
def test_the_reward_is_less_by_the_log_ratio_of_the_chain(make_trainer, kind, monkeypatch):
    monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", 5)
    trainer = make_trainer(kind, "kl_reward")
    first = copy.deepcopy(trainer.policy)
    rollout = collect_rollout(trainer.actor, trainer.policy, 8)
    same, metrics = trainer.anchor.adjusted(rollout)
    torch.testing.assert_close(same.rewards, rollout.rewards, rtol=0, atol=1e-4)
    assert metrics["anchor_kl"] == pytest.approx(0, abs=1e-4)
    rollout = collect_rollout(trainer.actor, moved(trainer.policy), 8)
    adjusted, metrics = trainer.anchor.adjusted(rollout)
    batch = trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))
    expected = torch.zeros(len(batch))
    pairs = zip(normals(trainer.policy, batch, batch.chain), normals(first, batch, batch.chain), strict=True)
    for step, (new, old) in enumerate(pairs):
        following = batch.chain[:, step + 1, :2]
        expected += (new.log_prob(following) - old.log_prob(following)).flatten(1).sum(1)
    torch.testing.assert_close(
        adjusted.rewards.flatten(), rollout.rewards.flatten() - 0.5 * expected, rtol=1e-3, atol=1e-3
    )
    assert metrics["anchor_kl"] == pytest.approx(float(expected.mean().detach()), rel=1e-3)
    assert float(expected.mean()) > 0.01
    assert torch.equal(adjusted.step_rewards[..., 1:], rollout.step_rewards[..., 1:])


@pytest.mark.parametrize(("reduction", "clamp"), [("sum", None), ("mean", (-5.0, 0.3))])
def test_imitation_scores_chains_that_the_first_policy_sampled_for_the_observations(make_trainer, reduction, clamp):
    trainer = make_trainer("diffusion", "imitation", log_ratio=reduction, log_prob_clamp=clamp)
    first = copy.deepcopy(trainer.policy)
    batch = batch_of(trainer)
    moved(trainer.policy)
    state = trainer.update_rule.generator.get_state()
    _, columns = rows_of(trainer, batch)
    generator = torch.Generator()
    generator.set_state(state)
    chain = first.sample(batch.obs, generator=generator).chain
    expected = []
    for step, law in enumerate(normals(trainer.policy, batch, chain)):
        factors = law.log_prob(chain[:, step + 1, :2]).clamp(*(clamp or (None, 1e9))).flatten(1)
        expected.append(-(factors.sum(1) if reduction == "sum" else factors.mean(1)))
    torch.testing.assert_close(columns["imitation_loss"], torch.stack(expected, 1).flatten(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_imitation_loss_of_demonstrations(make_trainer, kind):
    trainer = make_trainer(kind, "replay")
    batch = batch_of(trainer)
    state = trainer.update_rule.generator.get_state()
    _, columns = rows_of(trainer, batch)
    generator, windows = torch.Generator(), demonstrations(trainer.policy)
    generator.set_state(state)
    drawn = torch.randint(len(windows), (len(columns["loss"]),), generator=generator)
    expected = trainer.policy.imitation_loss(*windows.batch(drawn), generator=generator)
    torch.testing.assert_close(columns["replay_loss"].mean(), expected)


# --- what they do


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_every_anchor_goes_with_every_policy_and_is_a_metric(make_trainer, kind, anchor):
    trainer = make_trainer(kind, anchor)
    before = [parameter.clone() for parameter in trainer.policy.network.parameters()]
    rows = [trainer.iterate() for _ in range(2)]
    assert all(np.isfinite(row[METRICS[anchor]]) for row in rows)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.network.parameters(), strict=True))
    state = trainer.state_dict()["anchor"]
    assert (anchor == "replay") == (not state)
    named = {f"network.{name}": value for name, value in trainer.policy.network.named_parameters()}
    assert any(not torch.equal(state[name], value) for name, value in named.items()) if state else True


@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_strong_anchor_keeps_the_policy_nearer_to_where_it_should_stay(make_trainer, anchor):
    """Where that is, its own measure says, after some iterations with it and without."""
    found = []
    for held in (None, anchor):
        trainer = make_trainer("gaussian", held, 20.0, epochs=10, learning_rate=0.01, reward_scaling=False)
        policy = trainer.policy
        first = make_trainer("gaussian", None).policy
        for _ in range(6):
            trainer.iterate()
        batch = batch_of(trainer)
        if anchor == "replay":
            windows = demonstrations(policy)
            found.append(float(policy.imitation_loss(*windows.batch(torch.arange(40)))))
        else:
            laws = [normals(each, batch, batch.chain)[0] for each in (policy, first)]
            found.append(float(kl_divergence(*laws).sum() / len(batch)))
    free, anchored = found
    assert anchored < (0.5 if anchor != "replay" else 0.9) * free


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", LOSSES)
def test_a_compiled_step_with_an_anchor_is_the_same(make_trainer, kind, anchor, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    found = []
    for compile in (False, True):
        trainer = make_trainer(kind, anchor, compile=compile)
        rows = [trainer.iterate() for _ in range(2)]
        found.append([row[name] for row in rows for name in ("loss", METRICS[anchor])])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)


def test_a_natural_gradient_has_no_room_for_a_loss_but_for_a_reward(small_policy, task_of):
    policy, size = small_policy("gaussian"), TrainerConfig(1000, 4, 8)
    with pytest.raises(UserError, match="have room for this anchor: choose kl_reward"):
        Trainer(policy, task_of("gaussian"), size, TRPOConfig(), CRITIC, anchor=KLPenalty(1.0, policy))
    trainer = Trainer(policy, task_of("gaussian"), size, TRPOConfig(), CRITIC, anchor=KLReward(1.0, policy))
    assert trainer.iterate()["anchor_kl"] == pytest.approx(0, abs=1e-4)


def test_an_anchor_does_not_go_with_inner_steps_that_become_fewer(small_policy, task_of):
    policy, size = small_policy("diffusion"), TrainerConfig(1000, 4, 8, anneal=Annealing(finetuned_steps=1))
    with pytest.raises(UserError, match=r"critic=latent and anchor=\.\.\. do not follow"):
        Trainer(policy, task_of("diffusion"), size, PPOConfig(), CRITIC, anchor=KLPenalty(1.0, policy))


def test_what_is_replayed_begins_where_the_chunks_of_the_policy_do(small_policy, point_task, monkeypatch):
    """As in pretraining: the first action of a chunk may be of the past."""
    policy = small_policy("diffusion", history=2, chunk=3, first_executed=1, executed=2)
    observation = np.tile(np.arange(41, dtype=np.float32)[:, None], (1, 2))
    episode = Episode(observation, observation[:-1], np.zeros(40, np.float32), False, True)
    monkeypatch.setattr(building, "load_demonstrations", lambda *_: [episode])
    anchor = build_anchor({"anchor": {"type": "replay", "coefficient": 1.0, "dataset": None}}, policy, point_task)
    assert isinstance(anchor, Replay)
    obs, action = anchor.demonstrations.batch(torch.tensor([10]))
    torch.testing.assert_close(action[0, policy.config.executed_part][0], obs[0, -1])
