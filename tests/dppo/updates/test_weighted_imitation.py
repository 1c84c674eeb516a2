"""Imitation of what was sampled, weighted by its advantage."""

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dppo.rollout import collect_rollout
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.batch import Batch
from dppo.updates.weighted_imitation import WeightedImitation, WeightedImitationConfig
from policies import UserError

CRITIC = {"type": "mlp", "hidden_dims": [8]}
KINDS = ("gaussian", "mixture", "categorical", "diffusion")
PLAIN = {"normalize_advantages": False, "max_grad_norm": None}


@pytest.fixture
def make_trainer(small_policy, task_of) -> Callable[..., Trainer]:
    """A trainer of a small policy in 4 environments and rollouts of 8 steps: 32 rows."""

    def build(kind: str, critic: dict[str, Any] = CRITIC, policy: dict[str, Any] | None = None, **algo: Any) -> Trainer:
        size = TrainerConfig(1000, 4, 8)
        return Trainer(
            small_policy(kind, **(policy or {})), task_of(kind), size, WeightedImitationConfig(**algo), critic
        )

    return build


def batch_of(trainer: Trainer) -> Batch:
    rollout = collect_rollout(trainer.actor, trainer.policy, 8)
    return trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))


def rule_of(trainer: Trainer) -> WeightedImitation:
    assert isinstance(trainer.update_rule, WeightedImitation)
    return trainer.update_rule


def test_weights_are_exponentials_of_advantages_and_at_most_so_large(make_trainer):
    trainer = make_trainer("gaussian", temperature=0.5, max_weight=7.0, **PLAIN)
    advantages = torch.tensor([[0.0], [0.5], [-1.0], [0.9], [400.0]])
    batch = dataclasses.replace(batch_of(trainer), advantages=advantages)
    weights = rule_of(trainer).weights(batch)
    assert weights.tolist() == pytest.approx([1, math.exp(1), math.exp(-2), math.exp(1.8), 7], rel=1e-5)
    normal = rule_of(make_trainer("gaussian", temperature=1.0)).weights(batch)
    assert normal.log().mean().item() == pytest.approx(0, abs=1e-5)
    assert normal.log().std().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("squash", [False, True])
def test_what_is_imitated_is_the_action_that_was_sampled(small_policy, squash):
    for kind in KINDS:
        policy = small_policy(kind, **({"squash": squash} if kind == "gaussian" else {}))
        if kind != "categorical":
            policy.fit_actions(torch.tensor([-1.0, -3.0]), torch.tensor([1.0, 2.0]))
        sample = policy.sample(torch.zeros(20, policy.config.history, 2), generator=torch.Generator().manual_seed(0))
        chunk = policy.chunk_of(sample.chain[:, -1])
        executed = policy.config.executed_part
        torch.testing.assert_close(chunk if policy.discrete else chunk[:, executed], sample.action)
        assert policy.discrete or chunk.shape[1] == policy.config.chunk


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_one_of_adam_on_the_weighted_imitation_loss(make_trainer, kind):
    trainer = make_trainer(kind, {"type": "none"}, epochs=1, batch_size=None, learning_rate=0.01, **PLAIN)
    batch, policy, rule = batch_of(trainer), trainer.policy, rule_of(trainer)
    before, generator = copy.deepcopy(policy), torch.Generator()
    generator.set_state(rule.generator.get_state())
    metrics = rule.update(batch, progress=0.0, iteration=0)
    order = torch.randperm(32, generator=generator)
    action = before.chunk_of(batch.chain[:, -1])[order]
    exercise = before.imitation_exercise(batch.obs[order], action, generator)
    if kind == "diffusion":
        assert int(exercise[2].max()) < 3, "only what is fine-tuned"
    losses = before.exercise_losses(*exercise)
    loss = (batch.advantages[order, -1].exp().clamp(max=20) * losses).mean()
    optimizer = torch.optim.Adam([p for p in before.parameters() if p.requires_grad], 0.01)
    loss.backward()
    optimizer.step()
    assert metrics["policy_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for (name, ours), theirs in zip(policy.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4, msg=name)


def test_the_better_action_of_a_bandit_becomes_the_likelier_one(make_trainer):
    """Action 0 is worth more than 1, and 2 less: the policy of least KL from equal shares."""
    trainer = make_trainer("categorical", {"type": "none"}, epochs=200, learning_rate=0.01, **PLAIN)
    action = torch.arange(3).repeat(20)
    obs = torch.zeros(60, 1, 2)
    batch = Batch(
        obs=obs,
        chain=torch.stack([torch.zeros_like(action), action], 1),
        log_prob_factors=torch.zeros(60, 1),
        advantages=torch.tensor([1.0, 0.0, -1.0])[action][:, None],
        returns=None,
        values=None,
    )
    for iteration in range(3):
        rule_of(trainer).update(batch, progress=0.0, iteration=iteration)
    probs = trainer.policy.transition(obs[:1], obs[:1], torch.zeros(1)).probs[0].tolist()
    total = math.exp(1) + 1 + math.exp(-1)
    assert probs == pytest.approx([math.exp(1) / total, 1 / total, math.exp(-1) / total], abs=0.02)


def test_a_compiled_step_is_the_same(make_trainer, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    found = []
    for compile in (False, True):
        trainer = make_trainer("diffusion", {"type": "none"}, epochs=2, batch_size=7, compile=compile)
        found.append([trainer.iterate()["policy_loss"] for _ in range(2)])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_only_the_critic_learns_during_its_warm_up(make_trainer):
    trainer = make_trainer("gaussian", critic_warmup_iterations=1)
    before = rule_of(trainer).optimizer.parameters.values.clone()
    row = trainer.iterate()
    assert (row["policy_loss"], row["actor_steps"]) == (None, 0)
    assert torch.equal(rule_of(trainer).optimizer.parameters.values, before)
    assert trainer.iterate()["policy_loss"] is not None


def test_an_eta_that_would_never_move_is_refused(small_policy, task_of):
    policy = small_policy("diffusion", sampler={"steps": 4, "learned_eta": "scalar"})
    with pytest.raises(UserError, match="the imitation loss says nothing of eta"):
        Trainer(policy, task_of("diffusion"), TrainerConfig(1000, 4, 8), WeightedImitationConfig(), CRITIC)
