"""What changes along a chain while it is trained, and what must not get lost on the way."""

import pytest
import torch

from dppo.annealing import Annealing
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.first_order_config import PPOConfig, PPOKLConfig
from dppo.updates.natural import TRPOConfig
from policies import UserError

CRITIC = {"type": "mlp", "hidden_dims": [8, 8]}
SMALL = {"critic_epochs": 1, "critic_batch_size": 32}


def trainer(policy, task, anneal, algo=None, env_steps=600):
    size = TrainerConfig(env_steps, num_envs=4, rollout_steps=8, anneal=anneal)
    return Trainer(policy, task, size, algo or PPOConfig(epochs=1, **SMALL), CRITIC)


def test_the_number_of_finetuned_steps_falls_evenly_to_what_is_asked_for():
    anneal = Annealing(finetuned_steps=2)
    assert [anneal.steps_at(progress / 8, first=6) for progress in range(9)] == [6, 6, 5, 5, 4, 4, 3, 3, 2]
    assert Annealing().steps_at(0.9, first=6) == 6


def test_the_exploration_std_moves_evenly_to_what_is_asked_for(small_policy):
    policy = small_policy("diffusion", exploration_std=0.2)
    for progress, expected in [(0.0, 0.2), (0.5, 0.15), (1.0, 0.1)]:
        Annealing(exploration_std=0.1).apply(policy, progress)
        assert policy.exploration_std == pytest.approx(expected)
    Annealing().apply(policy, 0.0)
    assert policy.exploration_std == pytest.approx(0.1)


def test_training_explores_less_and_less(small_policy, point_task):
    training = trainer(small_policy("diffusion"), point_task, Annealing(exploration_std=0.01))
    seen = []
    while not training.finished:
        row = training.iterate()
        seen.append(training.policy.exploration_std)
        assert row["exploration_std"] == seen[-1]
        assert "finetuned_steps" not in row
    assert seen == sorted(seen, reverse=True) and seen[0] == 0.1 and seen[-1] < 0.1
    training.close()


@pytest.mark.parametrize("algo", [PPOConfig(epochs=2, **SMALL), PPOKLConfig(epochs=2, **SMALL), TRPOConfig(**SMALL)])
def test_with_fewer_finetuned_steps_the_update_goes_on_with_the_same_network_and_memory(small_policy, point_task, algo):
    training = trainer(small_policy("diffusion"), point_task, Annealing(finetuned_steps=1), algo)
    training.iterate()
    before, rule = training.policy, training.update_rule
    learned = {name: weights.clone() for name, weights in before.network.state_dict().items()}
    memory = [moment.clone() for moment in rule.critic_fit.optimizer.moments]
    if hasattr(rule, "optimizer"):
        memory += [moment.clone() for moment in rule.optimizer.moments]
    getattr(rule, "optimizer", rule).skips.count([False, False], dict)
    training.env_steps = training.config.env_steps - 1
    training._anneal()
    after, rule = training.policy, training.update_rule
    assert (before.num_steps, after.num_steps) == (3, 1)
    for name, weights in learned.items():
        assert torch.equal(after.network.state_dict()[name], weights)
        assert torch.equal(after.frozen.state_dict()[name], weights)
    kept = [*rule.critic_fit.optimizer.moments]
    if hasattr(rule, "optimizer"):
        kept += rule.optimizer.moments
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, memory, strict=True))
    assert getattr(rule, "optimizer", rule).skips.state_dict() == {"in_a_row": 2, "counted": 2}
    row = training.iterate()
    assert row["actor_steps"]
    moved = [not torch.equal(after.network.state_dict()[name], weights) for name, weights in learned.items()]
    assert all(moved)
    assert all(torch.equal(after.frozen.state_dict()[name], weights) for name, weights in learned.items())
    training.close()


def test_with_fewer_finetuned_steps_than_are_to_be_drawn_all_of_them_are_learned_from(small_policy, point_task):
    algo = PPOConfig(inner_steps=2, **{**SMALL, "epochs": 1, "batch_size": 4})
    training = trainer(small_policy("diffusion"), point_task, Annealing(finetuned_steps=1), algo)
    steps = [training.iterate()["actor_steps"]]
    training.env_steps = training.config.env_steps - 1
    steps.append(training.iterate()["actor_steps"])
    assert training.policy.num_steps == 1
    assert steps[0] == 2 * steps[1] > 0
    training.close()


@pytest.mark.parametrize(
    ("kind", "anneal", "says"),
    [
        ("gaussian", Annealing(exploration_std=0.1), "a gaussian policy has nothing to anneal"),
        ("diffusion", Annealing(finetuned_steps=4), "anneal.finetuned_steps=4 must not exceed the 3 steps"),
    ],
)
def test_what_cannot_be_annealed_is_one_line(small_policy, point_task, kind, anneal, says):
    with pytest.raises(UserError, match=says):
        trainer(small_policy(kind), point_task, anneal)


@pytest.mark.parametrize("settings", [{"finetuned_steps": 0}, {"exploration_std": -0.1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Annealing(**settings)
