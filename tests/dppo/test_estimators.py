"""Advantages against loops over episodes, steps and inner steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo.critic import LatentCritic
from dppo.estimators import GAE, GAEConfig, GroupConfig, Values
from dppo.rollout import Rollout, collect_rollout
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.first_order_config import FirstOrderConfig, PPOConfig
from dppo.updates.natural import TRPOConfig
from policies import UserError

MLP = {"type": "mlp", "hidden_dims": [8]}
LATENT = {"type": "latent", "network": MLP}
NONE = {"type": "none"}


@pytest.fixture
def make_trainer(small_policy, counting_task) -> Callable[..., Trainer]:
    """A trainer of a small policy in 4 counting environments, rewards as they are."""

    def build(kind: str = "gaussian", critic: dict[str, Any] = MLP, advantage: Any = None, **options: Any) -> Trainer:
        size = TrainerConfig(1000, options.pop("num_envs", 4), options.pop("rollout_steps", 12))
        settings = {"reward_scaling": False, "gamma": 0.9, "gae_lambda": 0.5, **options}
        task = settings.pop("task", counting_task)
        return Trainer(small_policy(kind), task, size, PPOConfig(**settings), critic, advantage)

    return build


def rollout_of(trainer: Trainer) -> Rollout:
    return trainer.estimator.collect(
        trainer.actor, trainer.policy, trainer.config.rollout_steps, lambda steps: None, trainer.storage
    )


def numbers_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the discount


def test_a_discount_per_environment_step_is_that_of_single_steps(make_trainer):
    """With lambda = 1, against the discounted sum of single rewards, to the end of the episode or of the rollout."""
    trainer = make_trainer(advantage=GAEConfig("step"), gae_lambda=1.0)
    rollout = rollout_of(trainer)
    assert (rollout.steps == 1).any() and (rollout.steps == 2).any(), "chunks of two steps, some of which end early"
    values = Values(numbers_of((12, 4, 1), 0), numbers_of((12, 4), 1))
    values.following[:-1] = torch.where(
        (rollout.terminated | rollout.truncated)[:-1], values.following[:-1], values.current[1:, :, 0]
    )
    estimate = trainer.estimator.estimate(rollout, values)
    for env in range(4):
        for first in range(12):
            expected, discount, t = -float(values.current[first, env, 0]), 1.0, first
            while True:
                for step in range(int(rollout.steps[t, env])):
                    expected += discount * float(rollout.step_rewards[t, env, step])
                    discount *= 0.9
                if rollout.terminated[t, env] or rollout.truncated[t, env] or t == 11:
                    break
                t += 1
            if not rollout.terminated[t, env]:
                expected += discount * float(values.following[t, env])
            assert float(estimate.advantages[first, env, 0]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_rewards_discounted_per_step_are_scaled_by_the_return_of_that_discount(make_trainer):
    trainer = make_trainer(advantage=GAEConfig("step"), reward_scaling=True)
    assert trainer.estimator.discounting.scaler.gamma == pytest.approx(0.9**2)
    assert make_trainer(reward_scaling=True).estimator.discounting.scaler.gamma == 0.9


# --- values of inner steps


def test_a_critic_of_inner_steps_gives_the_advantages_of_the_unrolled_decision_process(make_trainer):
    trainer = make_trainer("diffusion", LATENT)
    rollout = rollout_of(trainer)
    values = Values(numbers_of((12, 4, 3), 0), numbers_of((12, 4), 1))
    estimate = trainer.estimator.estimate(rollout, values)
    assert estimate.values is values.current
    for env in range(4):
        following = 0.0
        for t in reversed(range(12)):
            ended = bool(rollout.terminated[t, env] or rollout.truncated[t, env])
            for k in reversed(range(3)):
                last = k == 2
                value = float(values.current[t, env, k])
                successor = float(values.following[t, env] if last else values.current[t, env, k + 1])
                if last and rollout.terminated[t, env]:
                    successor = 0.0
                reward, discount = (float(rollout.rewards[t, env]), 0.9) if last else (0.0, 1.0)
                delta = reward + discount * successor - value
                # lambda = 0.5 is from action to action, and a cube root of it from inner step to inner step
                following = delta + (0.0 if last and ended else discount * 0.5 ** (1 / 3) * following)
                assert float(estimate.advantages[t, env, k]) == pytest.approx(following, rel=1e-4, abs=1e-4)
                assert float(estimate.returns[t, env, k]) == pytest.approx(following + value, rel=1e-4, abs=1e-4)


class Place(LatentCritic):
    """Tells where it was asked: the step in the episode, the inner step, and the first entry of the latent."""

    def forward(self, normalized_obs: Tensor, latent: Tensor, step: Tensor) -> Tensor:
        return 1000 * normalized_obs[:, -1, 0] + 100 * step + latent[:, 0, 0]


def test_a_critic_of_inner_steps_sees_each_latent_with_its_observation_and_step(make_trainer, monkeypatch):
    monkeypatch.setattr("dppo.estimators.VALUE_BATCH", 7)
    trainer = make_trainer("diffusion", LATENT)
    assert isinstance(trainer.estimator, GAE)
    trainer.estimator.critic = Place(MLP, trainer.policy)
    rollout = rollout_of(trainer)
    values = trainer.estimator.score(trainer.policy, rollout)
    place = 1000 * rollout.obs[:, :, -1, 0, None] + 100 * torch.arange(3) + rollout.chain[:, :, :3, 0, 0]
    torch.testing.assert_close(values.current, place)
    inside = ~rollout.truncated[:-1]
    torch.testing.assert_close(values.following[:-1][inside], values.current[1:, :, 0][inside])
    ends = torch.cat([values.following[rollout.truncated], values.following[-1]])
    starts = ends[: len(rollout.truncated_obs)] - 1000 * rollout.truncated_obs[:, -1, 0]
    assert len(starts) and (starts.abs() < 10).all(), "the chain behind an end begins where chains do, at inner step 0"


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "categorical", "diffusion"])
def test_a_critic_of_inner_steps_trains_with_every_policy(small_policy, task_of, kind):
    trainer = Trainer(small_policy(kind), task_of(kind), TrainerConfig(1000, 4, 8), PPOConfig(epochs=2), LATENT)
    before = [parameter.clone() for parameter in trainer.critic.parameters()]
    row = trainer.iterate()
    assert row["value_loss"] > 0
    assert not any(torch.equal(old, new) for old, new in zip(before, trainer.critic.parameters(), strict=True))


def test_a_critic_of_inner_steps_learns_what_the_latents_are_worth(make_trainer, task_of):
    options = {"critic_epochs": 300, "critic_learning_rate": 0.03, "critic_warmup_iterations": 9}
    trainer = make_trainer("diffusion", LATENT, gae_lambda=1.0, gamma=0.0, task=task_of("diffusion"), **options)
    rollout = rollout_of(trainer)
    batch = trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))
    targets = batch.targets(torch.arange(batch.num_targets))
    assert batch.num_targets == 12 * 4 * 3
    trainer.update_rule.update(batch, progress=0.0, iteration=0)
    with torch.no_grad():
        values = trainer.critic(trainer.policy.normalize_obs(targets.obs), *targets.inner)
    assert (values - targets.returns).square().mean() < 0.3 * targets.returns.var()


# --- without a critic


def test_a_critic_of_inner_steps_that_sees_no_more_than_the_other_gives_the_advantages_of_the_other(make_trainer):
    trainers = [make_trainer("diffusion", critic) for critic in (LATENT, MLP)]
    rollout, current, following = rollout_of(trainers[0]), numbers_of((12, 4, 1), 0), numbers_of((12, 4), 1)
    values = [Values(current.expand(-1, -1, steps), following) for steps in (3, 1)]
    latent, plain = (t.estimator.estimate(rollout, v) for t, v in zip(trainers, values, strict=True))
    torch.testing.assert_close(latent.advantages[..., -1:], plain.advantages)


def test_without_a_critic_the_advantages_are_the_returns_that_followed(make_trainer):
    trainer = make_trainer(critic=NONE, gae_lambda=1.0)
    rollout = rollout_of(trainer)
    estimate = trainer.estimator.estimate(rollout, trainer.estimator.score(trainer.policy, rollout))
    assert (estimate.returns, estimate.values) == (None, None)
    for env in range(4):
        following = 0.0
        for t in reversed(range(12)):
            ended = bool(rollout.terminated[t, env] or rollout.truncated[t, env])
            following = float(rollout.rewards[t, env]) + (0.0 if ended else 0.9 * following)
            assert float(estimate.advantages[t, env, 0]) == pytest.approx(following, rel=1e-5)


@pytest.mark.parametrize("config", [PPOConfig(epochs=2), FirstOrderConfig(), TRPOConfig()])
@pytest.mark.parametrize("advantage", [GAEConfig(), GroupConfig(2)])
def test_every_rule_trains_without_a_critic_and_says_nothing_of_one(small_policy, task_of, config, advantage):
    size = TrainerConfig(1000, 4, 8)
    trainer = Trainer(small_policy("diffusion"), task_of("diffusion"), size, config, NONE, advantage)
    before = [parameter.clone() for parameter in trainer.policy.network.parameters()]
    row = trainer.iterate()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.network.parameters(), strict=True))
    assert not {"value_loss", "explained_variance", "critic_learning_rate"} & row.keys()
    assert trainer.state_dict()["critic"] == {}


# --- groups


def test_the_episodes_of_a_group_begin_in_one_state_and_those_of_another_in_another(make_trainer, task_of):
    trainer = make_trainer(critic=NONE, advantage=GroupConfig(2), task=task_of("gaussian"))
    firsts = [rollout_of(trainer).obs[0, :, -1].clone() for _ in range(2)]
    for first in firsts:
        assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3])
        assert not torch.equal(first[1], first[2])
    assert not torch.equal(firsts[0], firsts[1]), "drawn anew for each rollout"


def test_an_episode_is_worth_its_return_among_those_of_its_group(make_trainer, task_of):
    trainer = make_trainer(critic=NONE, advantage=GroupConfig(2), task=task_of("gaussian"))
    rollout = rollout_of(trainer)
    batch = trainer._batch(rollout, None)
    returns = rollout.step_rewards.sum((0, 2)).numpy()  # length 6 in chunks of 2: one episode each
    assert len(rollout.obs) == 3, "what would follow the last of the episodes is not waited for"
    reported = sorted(episode.undiscounted_return for episode in rollout.episodes)
    assert reported == pytest.approx(sorted(returns), rel=1e-5)
    for env, (own, other) in enumerate(zip(returns, returns[[1, 0, 3, 2]], strict=True)):
        expected = np.sign(own - other) / np.sqrt(2)  # of two numbers: half their distance over sqrt(2) times that
        found = batch.advantages.view(3, 4)[:, env]
        assert found.tolist() == pytest.approx([expected] * 3, rel=1e-3)


def test_only_the_first_episode_of_each_environment_counts_and_as_far_as_the_rollout_goes(make_trainer):
    """Episodes of 5, 4, 1 and 7 environment steps, by the seed of each group."""
    trainer = make_trainer(critic=NONE, advantage=GroupConfig(2), rollout_steps=3)
    trainer.estimator.seeds = type("Seeds", (), {"integers": lambda self, high, size: np.array([2, 3])})()
    rollout = rollout_of(trainer)
    assert rollout.valid.sum(0).tolist() == [1, 1, 3, 3], "one step is one chunk; of seven, three chunks are seen"
    estimate = trainer.estimator.estimate(rollout, None)
    assert (estimate.advantages == 0).all(), "the same in a group, whatever was done"
    assert [(episode.env, episode.length) for episode in rollout.episodes] == [(0, 1), (1, 1)]
    assert rollout.env_steps == int(rollout.steps.sum()), "what was executed and not learned from counts, too"


def test_an_episode_that_was_dropped_is_worth_nothing_known(make_trainer):
    task = Task("counting", "Counting-v0", {"bad": "reward"})
    trainer = make_trainer(critic=NONE, advantage=GroupConfig(2), rollout_steps=3, task=task)
    trainer.estimator.seeds = type("Seeds", (), {"integers": lambda self, high, size: np.array([1, 3])})()
    rollout = rollout_of(trainer)
    assert rollout.valid.any(0).tolist() == [False, False, True, True]
    assert rollout.dropped_episodes == 2
    assert trainer.estimator.estimate(rollout, None).advantages.isfinite().all()


def test_only_dropped_episodes_that_would_have_been_learned_from_are_counted(make_trainer):
    """The second episode of the first group breaks at its third step, and nobody learns from it."""
    endings = [[1, True, False], *3 * [[12, True, False]]]
    task = Task("counting", "Counting-v0", {"bad": "reward", "endings": endings})
    trainer = make_trainer(critic=NONE, advantage=GroupConfig(2), rollout_steps=3, task=task)
    trainer.estimator.seeds = type("Seeds", (), {"integers": lambda self, high, size: np.array([0, 3])})()
    rollout = rollout_of(trainer)
    assert rollout.truncated.any(0).tolist() == [True, True, False, False]
    assert rollout.valid.sum(0).tolist() == [1, 1, 3, 3]
    assert rollout.dropped_episodes == 0


@pytest.mark.parametrize(
    ("advantage", "critic", "options", "message"),
    [
        (GroupConfig(3), NONE, {}, "num_envs=4 cannot be dealt out to groups of advantage.group_size=3"),
        (GroupConfig(), NONE, {"num_envs": 1}, "num_envs=1 cannot be dealt out"),
        (GroupConfig(2), MLP, {}, "advantage=group has no use for a critic"),
        (GAEConfig(), NONE, {"critic_warmup_iterations": 1}, "there is no critic to warm up"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make_trainer, advantage, critic, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(critic=critic, advantage=advantage, **options)


def test_rollouts_go_on_where_they_were_unless_there_are_groups(make_trainer):
    trainer = make_trainer(rollout_steps=2)
    rollout_of(trainer)
    assert collect_rollout(trainer.actor, trainer.policy, 2).obs[0, :, -1, 0].max() > 0


def test_a_minibatch_of_a_critic_of_inner_steps_is_of_as_many_environment_steps_as_one_of_the_other(make_trainer):
    lengths = []
    for critic in (MLP, LATENT):
        trainer = make_trainer("diffusion", critic, critic_epochs=1, critic_batch_size=16)
        fit, seen = trainer.update_rule.critic_fit, []
        step = fit._step
        fit._step = lambda targets, seen=seen, step=step: (seen.append(len(targets)), step(targets))[1]
        trainer.iterate()
        lengths.append(seen)
    assert lengths == [[16] * 3, [3 * 16] * 3]
