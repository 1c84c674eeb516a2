"""What computing in bfloat16 changes, and what it must not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dppo.precision import computing_in
from dppo.rollout import collect_rollout
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.batch import Batch
from dppo.updates.first_order_config import PPOConfig
from policies import Policy

KINDS = ("gaussian", "categorical", "diffusion")
CPU = torch.device("cpu")


@pytest.fixture
def make_trainer(small_policy: Callable[..., Policy], task_of: Callable) -> Callable[..., Trainer]:
    """A trainer of a policy of 64 units a layer: 256 rows."""

    def build(kind: str, **algo: Any) -> Trainer:
        network = {"type": "mlp", "hidden_dims": [64, 64, 64]}
        policy = small_policy(kind, network=network)
        size = TrainerConfig(env_steps=10_000, num_envs=16, rollout_steps=16)
        return Trainer(policy, task_of(kind), size, PPOConfig(**algo), {"type": "mlp", "hidden_dims": [16]})

    return build


def rollout_batch(trainer: Trainer) -> Batch:
    rollout = collect_rollout(trainer.actor, trainer.policy, trainer.config.rollout_steps)
    return trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_in_bfloat16_points_where_the_one_in_float32_does_but_is_another(make_trainer, kind):
    gradients: list[Tensor] = []
    batch = rollout_batch(make_trainer(kind))
    for precision in ("float32", "bfloat16"):
        rule = make_trainer(kind, precision=precision).update_rule
        losses = rule.rows(batch.pairs(torch.arange(len(batch) * batch.num_steps)))[0]
        assert losses.dtype == torch.float32
        gradients.append(rule.optimizer.parameters.gradient(losses.mean()))
    exact, coarse = gradients
    assert exact.dtype == coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse)
    assert float(torch.cosine_similarity(exact, coarse, dim=0)) > 0.99
    assert float(coarse.norm()) == pytest.approx(float(exact.norm()), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_moments_and_what_is_sampled_stay_in_float32(make_trainer, kind):
    trainer = make_trainer(kind, precision="bfloat16", epochs=2)
    before = {name: value.clone() for name, value in trainer.policy.named_parameters()}
    for _ in range(2):
        row = trainer.iterate()
    trainer.close()
    optimizer = trainer.update_rule.optimizer
    moments = optimizer.state_dict()
    tensors = [*trainer.policy.parameters(), optimizer.parameters.values, moments["exp_avg"], moments["exp_avg_sq"]]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert trainer.storage.log_prob_factors.dtype == torch.float32
    trained = {name for name, value in trainer.policy.named_parameters() if value.requires_grad}
    assert {
        name for name, value in trainer.policy.named_parameters() if not torch.equal(value, before[name])
    } == trained
    assert row["approx_kl"] < 0.5


def test_the_critic_learns_in_float32_whatever_the_policy_does(make_trainer):
    losses = []
    batch = rollout_batch(make_trainer("gaussian"))
    for precision in ("float32", "bfloat16"):
        rule = make_trainer("gaussian", precision=precision).update_rule
        losses.append(rule.critic_fit.rows(batch.targets(torch.arange(len(batch))))[0].mean())
    assert losses[0] == losses[1]


def test_products_are_computed_in_the_precision_that_is_asked_for_and_outside_in_float32():
    weight = torch.eye(3)
    for precision, inside in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with computing_in(precision, CPU):
            assert (weight @ weight).dtype == inside
        assert (weight @ weight).dtype == weight.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_means_and_logits_are_not_rounded(make_trainer, kind):
    policy = make_trainer(kind).policy
    sample = policy.sample(obs := torch.randn(64, policy.config.history, policy.config.obs_dim))
    with computing_in("bfloat16", torch.device("cpu")):
        law = policy.transition(obs, sample.chain[:, 0], torch.zeros(64, dtype=torch.long))
    put_out = law.logits if kind == "categorical" else getattr(law, "base_dist", law).mean
    assert put_out.dtype == torch.float32
    assert (put_out != put_out.bfloat16()).any()
