import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo.checkpoint import find_policy, load_policy, save_checkpoint
from dppo.evaluation import EvaluationConfig, evaluate, evaluate_with_progress
from dppo.rollout import EpisodeResult
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.first_order_config import PPOConfig
from policies import Policy, UserError

KINDS = ("gaussian", "categorical", "diffusion")
LENGTHS = (5, 4, 1, 7)
"""Of the counting environment's episodes, in turn; the seed is the number of the first one."""


def counted(env: int, episode: int) -> EpisodeResult:
    length = LENGTHS[episode % 4]
    return EpisodeResult(env, sum(range(1, length + 1)), length, length >= 5)


@pytest.fixture
def counting_task() -> Task:
    return Task("counting", "Counting-v0", success_reward=5.0)


@pytest.mark.parametrize(("episodes", "num_envs"), [(12, 3), (12, 1), (11, 3), (12, 12), (2, 5)])
def test_every_environment_contributes_equally_many_episodes_its_first_ones(
    small_policy, counting_task, episodes, num_envs
):
    config = EvaluationConfig(episodes=episodes, num_envs=num_envs, seed=8)
    summary, found = evaluate(small_policy("gaussian"), counting_task, config)
    num_envs = min(episodes, num_envs)
    quota = -(-episodes // num_envs)
    assert found == [counted(env, 8 + env + i) for env in range(num_envs) for i in range(quota)]
    assert summary.episodes == len(found) >= episodes
    assert summary.return_mean == pytest.approx(np.mean([episode.undiscounted_return for episode in found]))
    assert summary.success_rate == pytest.approx(np.mean([bool(episode.success) for episode in found]))


@pytest.mark.parametrize("num_envs", [1, 4, 10])
def test_short_episodes_are_not_over_represented_however_many_environments_there_are(
    small_policy, counting_task, num_envs
):
    """Taking whichever episodes end first would favour those of one step."""
    config = EvaluationConfig(episodes=40, num_envs=num_envs, seed=0)
    summary, _ = evaluate(small_policy("gaussian"), counting_task, config)
    assert summary.return_mean == pytest.approx(np.mean([15, 10, 1, 28]), abs=1.5)


def test_each_episode_is_announced_when_it_ends(small_policy, counting_task):
    heard = []
    config = EvaluationConfig(episodes=6, num_envs=3)
    _, found = evaluate(small_policy("gaussian"), counting_task, config, heard.append)
    assert sorted(heard, key=lambda e: e.env) == found


def test_a_task_without_success_has_no_success_rate(small_policy):
    summary, _ = evaluate(small_policy("gaussian"), Task("counting", "Counting-v0"), EvaluationConfig(4, 2))
    assert summary.success_rate is None
    assert summary.success_ci95 is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_episodes_and_nothing_else_does(small_policy, task_of, kind):
    policy, task = small_policy(kind), task_of(kind)

    def returns(seed: int) -> list[float]:
        torch.rand(3)
        return [e.undiscounted_return for e in evaluate(policy, task, EvaluationConfig(4, 2, seed))[1]]

    first, again, other = returns(5), returns(5), returns(50)
    assert first == again
    assert not set(first) & set(other)


def test_evaluation_acts_without_exploration_and_leaves_the_policy_as_it_was(small_policy, point_task):
    policy = small_policy("gaussian", observation_scaling="running", initial_std=0.5)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    results = [evaluate(policy, point_task, EvaluationConfig(8, 4))[1]]
    with torch.no_grad():
        policy.raw_std.fill_(5.0)
    results.append(evaluate(policy, point_task, EvaluationConfig(8, 4))[1])
    assert results[0] == results[1], "the std must not matter"
    after = policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "raw_std")


def trained_trainer(policy: Policy, task: Task) -> Trainer:
    size = TrainerConfig(env_steps=1000, num_envs=3, rollout_steps=8)
    trainer = Trainer(policy, task, size, PPOConfig(epochs=2, learning_rate=0.01), {"type": "mlp"})
    trainer.iterate()
    trainer.iterate()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("observation_scaling", ["min_max", "running"])
def test_a_policy_read_from_disk_is_worth_exactly_what_it_was_in_training(
    small_policy: Callable[..., Policy], task_of, tmp_path, kind, observation_scaling
):
    policy, task = small_policy(kind, observation_scaling=observation_scaling), task_of(kind)
    policy.fit_observations(torch.tensor([-2.0, -1.0]), torch.tensor([1.0, 3.0]))
    policy.fit_actions(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 0.5]))
    trainer = trained_trainer(policy, task)
    config = EvaluationConfig(episodes=6, num_envs=3, seed=77)
    in_training = evaluate(policy, task, config)
    save_checkpoint(tmp_path / "checkpoints" / "48", policy, task, trainer.state_dict())
    reloaded, its_task = load_policy(find_policy(str(tmp_path)))
    assert its_task is not None
    assert its_task == task
    assert evaluate(reloaded, its_task, config) == in_training
    assert reloaded.num_steps == policy.num_steps


def test_the_progress_bar_says_what_is_evaluated(small_policy, point_task, capsys):
    config = EvaluationConfig(4, 2)
    policy = small_policy("gaussian")
    assert evaluate_with_progress(policy, point_task, config, "before") == evaluate(policy, point_task, config)
    assert "evaluating (before)" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"episodes": 0}, {"num_envs": 0}])
def test_an_evaluation_of_nothing_is_refused(settings):
    with pytest.raises(ValueError, match="at least one episode"):
        EvaluationConfig(**settings)


def test_an_episode_without_an_end_is_given_up(small_policy, monkeypatch):
    monkeypatch.setattr("dppo.evaluation.LONGEST_EPISODE", 50)
    task = Task("point", "Point-v0", {"length": 10**9})
    with pytest.raises(UserError, match=r"task point: an episode has gone on for more than 50 steps; set task.max_ep"):
        evaluate(small_policy("gaussian"), task, EvaluationConfig(2, 2))


class FailsOnSecondCall(torch.nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.calls, self.config = policy, 0, policy.config
        self.draw_noise, self.products_per_sample = policy.draw_noise, policy.products_per_sample

    def sample(self, obs: Tensor, **kwargs: Any) -> object:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of order")
        return self.policy.sample(obs, **kwargs)


def test_environments_are_closed_after_an_error(small_policy, counting_task, monkeypatch):
    closed = []
    monkeypatch.setattr("dppo.evaluation.Stepper.close", lambda self: closed.append(self))
    with pytest.raises(RuntimeError, match="out of order"):
        evaluate(FailsOnSecondCall(small_policy("gaussian")), counting_task, EvaluationConfig(4, 2))  # type: ignore
    assert len(closed) == 1


def test_dropped_episodes_are_in_no_mean_but_counted_and_replaced(small_policy, counting_task, caplog):
    task = dataclasses.replace(counting_task, env_kwargs={"bad": "observation"})
    policy, config = small_policy("gaussian", chunk=1, executed=1), EvaluationConfig(6, 3, seed=0)
    summary, episodes = evaluate(policy, task, config)
    assert (summary.episodes, summary.dropped_episodes) == (6, 2), "episode 1, in environment 1 and in environment 0"
    assert [episode.length for episode in episodes] == [5, 1, 1, 7, 1, 7]
    assert np.isfinite(summary.return_mean)
    assert "task counting: 2 further episodes were dropped, and replaced by others" in caplog.text
    assert evaluate(policy, counting_task, config)[0].dropped_episodes == 0
