from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo.output.metrics import Row
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.first_order_config import PPOConfig
from policies import Policy

KINDS = ("gaussian", "categorical", "diffusion")
CRITIC = {"type": "mlp", "hidden_dims": [16], "activation": "tanh"}


@pytest.fixture
def make_trainer(small_policy: Callable[..., Policy], task_of: Callable) -> Callable[..., Trainer]:
    """A trainer of a small policy; settings of the policy, the size of the training and the algorithm."""

    def build(
        kind: str,
        settings: dict[str, Any] | None = None,
        task: Task | None = None,
        algo: dict[str, Any] | None = None,
        **size: Any,
    ) -> Trainer:
        policy = small_policy(kind, **(settings or {}))
        config = TrainerConfig(**{"env_steps": 1000, "num_envs": 3, "rollout_steps": 8, **size})
        algo = {"epochs": 2} if algo is None else algo
        return Trainer(policy, task or task_of(kind), config, PPOConfig(**algo), CRITIC)

    return build


def without_times(row: Row) -> Row:
    return {name: value for name, value in row.items() if not name.endswith("_s")}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    modules = {"policy": trainer.policy, "critic": trainer.critic}
    return {f"{name}.{key}": v.clone() for name, module in modules.items() for key, v in module.state_dict().items()}


def trained(trainer: Trainer, iterations: int = 3) -> tuple[list[Row], dict[str, Tensor]]:
    try:
        return [without_times(trainer.iterate()) for _ in range(iterations)], weights(trainer)
    finally:
        trainer.close()


# --- seeds


@pytest.mark.parametrize("kind", KINDS)
def test_two_trainings_with_one_seed_are_the_same_bit_for_bit(make_trainer, kind):
    settings = {"observation_scaling": "running"}
    (rows, first), (again, second) = (trained(make_trainer(kind, settings, seed=3)) for _ in range(2))
    assert rows == again
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_training(make_trainer, kind):
    (rows, first), (other, second) = (trained(make_trainer(kind, seed=seed)) for seed in (3, 4))
    assert rows[0]["return_mean"] != other[0]["return_mean"]
    assert not torch.equal(first["critic.network.input.weight"], second["critic.network.input.weight"])
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith("policy.network"))


def test_every_source_of_randomness_follows_the_seed_and_none_follows_another(make_trainer):
    trainers = [make_trainer("gaussian", seed=seed) for seed in (3, 4)]
    generators = [(t.actor.generator, t.update_rule.generator) for t in trainers]
    seeds = {generator.initial_seed() for pair in generators for generator in pair}
    assert len(seeds) == 4
    assert not np.array_equal(trainers[0].actor.obs, trainers[1].actor.obs)


def test_random_numbers_drawn_elsewhere_do_not_change_the_training(make_trainer):
    quiet, noisy = make_trainer("gaussian"), make_trainer("gaussian")
    for _ in range(2):
        row = without_times(quiet.iterate())
        torch.rand(5)
        assert without_times(noisy.iterate()) == row


# --- sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ({"num_envs": 1}, {}),
        ({"num_envs": 1, "rollout_steps": 1}, {}),
        ({}, {"chunk": 1, "executed": None}),
        ({"rollout_steps": 2}, {"chunk": 1, "executed": 1}),
    ],
)
def test_the_smallest_sizes_train(make_trainer, kind, size, settings):
    trainer = make_trainer(kind, {} if kind == "categorical" else settings, **size)
    before = weights(trainer)
    rows, after = trained(trainer, 2)
    assert all(value is None or abs(value) < float("inf") for row in rows for value in row.values())
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["critic.network.input.weight"], after["critic.network.input.weight"])


def test_a_rollout_that_ends_no_episode_reports_none_and_the_next_one_the_whole_episode(make_trainer):
    task = Task("point", "Point-v0", {"length": 6, "reward": 1.0}, success_reward=1.0)
    trainer = make_trainer("gaussian", {"chunk": 1, "executed": 1}, task, rollout_steps=4)
    first, second = trainer.iterate(), trainer.iterate()
    names = ("episodes", "return_mean", "episode_length", "success_rate")
    assert [first[name] for name in names] == [0, None, None, None]
    assert [second[name] for name in names] == [3, 6.0, 6.0, 1.0]


@pytest.mark.parametrize("finetuned_steps", [1, 2, 4, None])
def test_any_number_of_finetuned_steps_trains(make_trainer, finetuned_steps):
    trainer = make_trainer("diffusion", {"finetuned_steps": finetuned_steps}, algo={"epochs": 2, "clip_base": 0.05})
    before = weights(trainer)
    rows, after = trained(trainer)
    assert rows[-1]["policy_loss"] is not None
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.startswith("policy.")} == {n for n in before if "policy.network." in n}
    assert any("policy.frozen." in name for name in before) == (finetuned_steps in (1, 2))


@pytest.mark.parametrize("name", ["env_steps", "num_envs", "rollout_steps"])
def test_a_size_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match="at least 1"):
        TrainerConfig(**{name: 0})


# --- counting


def test_environment_steps_count_what_was_executed(make_trainer, counting_task):
    trainer = make_trainer("gaussian", {"chunk": 4, "executed": 4}, counting_task)
    envs, heard = trainer.actor.env.env.envs, []
    for iteration in (1, 2, 3):
        row = trainer.iterate(heard.append)
        executed = sum(len(env.unwrapped.received) for env in envs)
        assert row["env_steps"] == trainer.env_steps == executed == sum(heard)
        assert row["iteration"] == iteration
    assert executed < 3 * 8 * 3 * 4, "some chunks must have ended early"


def test_training_ends_with_the_iteration_that_spends_its_environment_steps(make_trainer):
    trainer = make_trainer("categorical", env_steps=3 * 8 * 2 + 1)
    finished = []
    while not trainer.finished:
        trainer.iterate()
        finished.append(trainer.env_steps)
    assert finished == [24, 48, 72]


def test_training_ends_when_its_time_is_over(make_trainer):
    trainer = make_trainer("categorical", env_steps=10**9, max_minutes=1e-9)
    assert not trainer.finished
    trainer.iterate()
    assert trainer.finished


def test_learning_rates_follow_the_environment_steps(make_trainer):
    algo = {"epochs": 1, "schedule": "linear", "learning_rate": 0.1}
    trainer = make_trainer("categorical", env_steps=96, algo=algo)
    rates = [trainer.iterate()["actor_learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_times_add_up(make_trainer):
    row = make_trainer("diffusion").iterate()
    parts = ("environment_s", "sampling_s", "scoring_s", "advantages_s", "update_s")
    assert all(row[part] >= 0 for part in parts)
    assert sum(row[part] for part in parts) == pytest.approx(row["wall_clock_s"], rel=0.05)
    assert row["env_steps_per_s"] == pytest.approx(row["env_steps"] / row["wall_clock_s"])


# --- statistics of observations and rewards


def test_running_statistics_of_observations_see_every_row_once_and_after_the_update(make_trainer):
    trainer = make_trainer("gaussian", {"observation_scaling": "running"})
    seen_by_update = []
    update = trainer.update_rule.update

    def spied(batch: Any, **kwargs: Any) -> Any:
        seen_by_update.append(float(trainer.policy.obs_scaler.count))
        return update(batch, **kwargs)

    trainer.update_rule.update = spied
    for _ in range(2):
        trainer.iterate()
    assert seen_by_update == [0.0, 24.0]
    assert float(trainer.policy.obs_scaler.count) == 48


def test_rewards_are_scaled_only_where_that_is_asked_for(make_trainer):
    for scaling in (True, False):
        trainer = make_trainer("gaussian", algo={"epochs": 1, "reward_scaling": scaling})
        trainer.iterate()
        scaler = trainer.estimator.discounting.scaler
        assert (scaler is None) == (not scaling)
        assert scaler is None or float(scaler.statistics.count) == 24


def test_the_return_that_scales_rewards_begins_anew_after_a_time_limit(make_trainer):
    task = Task("point", "Point-v0", {"length": 4, "reward": 1.0})
    trainer = make_trainer("gaussian", {"chunk": 1, "executed": 1}, task, rollout_steps=8, algo={"gamma": 0.5})
    trainer.iterate()
    scaler = trainer.estimator.discounting.scaler
    assert scaler.discounted.tolist() == [0.0] * 3
    assert float(scaler.statistics.mean) == pytest.approx(np.mean([1, 1.5, 1.75, 1.875]))


# --- learning


def test_the_value_of_a_reward_of_one_for_ever_is_learned_through_a_time_limit(make_trainer):
    """V = 1 / (1 - gamma): a truncated episode goes on behind its time limit, as far as its value is concerned."""
    task = Task("point", "Point-v0", {"length": 5, "reward": 1.0})
    algo = {
        "gamma": 0.9,
        "reward_scaling": False,
        "critic_warmup_iterations": 1000,
        "critic_learning_rate": 0.02,
        "batch_size": 64,
        "epochs": 5,
    }
    settings = {"chunk": 1, "executed": 1, "history": 1}
    trainer = make_trainer("gaussian", settings, task, algo, num_envs=8, rollout_steps=16)
    for _ in range(40):
        trainer.iterate()
    with torch.no_grad():
        values = trainer.critic(torch.rand(100, 1, 2) * 2 - 1)
    # Taken for a termination, the limit would leave at most 1 + 0.9 + ... + 0.9^4 = 4.1.
    torch.testing.assert_close(values, torch.full((100,), 10.0), rtol=0, atol=0.5)


def test_the_state_holds_what_a_continued_training_would_need(make_trainer):
    trainer = make_trainer("diffusion")
    trainer.iterate()
    state = trainer.state_dict()
    counters = {"iteration", "env_steps", "wall_clock_s", "first_steps"}
    assert set(state) == {"anchor", "critic", "estimator", "update_rule", "actor", "randomness"} | counters
    assert set(state["actor"]["environments"]) == {"state", "obs", "episodes"}
    assert set(state["update_rule"]) == {"actor_optimizer", "critic_optimizer", "surrogate", "speed", "generator"}
    assert (state["iteration"], state["env_steps"]) == (1, trainer.env_steps)
    assert state["update_rule"]["actor_optimizer"]["exp_avg"].any(), "the moments of Adam"
