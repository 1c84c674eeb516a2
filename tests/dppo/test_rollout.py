from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from dppo import trainer as trainer_module
from dppo.advantages import gae
from dppo.envs.stepper import Step, Stepper
from dppo.envs.vector import make_vector_env
from dppo.estimators import GAE
from dppo.reward_scaling import RewardScaler
from dppo.rollout import Actor, EpisodeResult, EpisodeTracker, Rollout, Storage, collect_rollout
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.batch import Batch
from dppo.updates.first_order_config import PPOConfig
from policies import Policy, UserError

MODES = list(AutoresetMode)
NUM_ENVS = 3
LENGTHS = (5, 4, 1, 7)
"""Of the counting environment's episodes, in turn."""


@pytest.fixture
def actor_of(counting_task: Task) -> Callable[..., Actor]:
    """Acts in 3 counting environments that begin with episodes 0, 1 and 2."""

    def build(policy: Policy, mode: AutoresetMode = AutoresetMode.SAME_STEP, success: float | None = None) -> Actor:
        history, chunk = policy.config.history, policy.config.executed_chunk
        env = Stepper(make_vector_env(counting_task, NUM_ENVS, history=history, chunk=chunk, autoreset_mode=mode))
        actor = Actor(env, success_reward=success, generator=torch.Generator().manual_seed(0))
        actor.reset(0)
        return actor

    return build


def valid_rows(rollout: Rollout, count: int) -> list[list[tuple[Any, ...]]]:
    """The first transitions of each environment: observation, reward, flags."""
    rows = []
    for env in range(rollout.valid.shape[1]):
        times = rollout.valid[:, env].nonzero()[:count, 0]
        columns = (rollout.obs, rollout.rewards, rollout.terminated, rollout.truncated)
        rows.append([tuple(column[t, env].tolist() for column in columns) for t in times])
    return rows


# --- transitions


@pytest.mark.parametrize("steps", [4, 6])
def test_a_rollout_refuses_a_storage_of_another_length_before_it_acts(small_policy, actor_of, steps):
    policy = small_policy("gaussian")
    actor = actor_of(policy)
    heard: list[int] = []
    with pytest.raises(ValueError, match=f"^a rollout of {steps} steps does not fit a storage of 5$"):
        collect_rollout(actor, policy, steps, heard.append, storage=Storage.of(policy, 5, NUM_ENVS))
    assert heard == []


@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("chunk", [1, 3])
def test_every_autoreset_mode_gives_the_same_valid_transitions(small_policy, actor_of, chunk, history):
    policy = small_policy("gaussian", history=history, chunk=chunk, executed=chunk)
    found = [valid_rows(collect_rollout(actor_of(policy, mode), policy, 30), 15) for mode in MODES]
    assert found[0] == found[1] == found[2]
    for env, rows in enumerate(found[0]):
        (first, *_), (obs, reward, terminated, truncated) = rows[0], rows[-1]
        assert first == [[0.0, float(env)]] * history
        assert (len(rows), len(obs)) == (15, history)
        assert reward > 0
        assert not (terminated and truncated)


@pytest.mark.parametrize("mode", MODES)
def test_the_reward_of_a_chunk_is_summed_over_its_executed_steps(small_policy, actor_of, mode):
    policy = small_policy("gaussian", history=1, chunk=3, executed=3)
    rewards = [row[1] for row in valid_rows(collect_rollout(actor_of(policy, mode), policy, 12), 6)[0]]
    assert rewards == [1 + 2 + 3, 4 + 5, 1 + 2 + 3, 4, 1, 1 + 2 + 3]


def test_a_rollout_keeps_what_was_seen_sampled_and_scored(small_policy, actor_of):
    policy = small_policy("diffusion")
    rollout = collect_rollout(actor_of(policy), policy, 6)
    assert rollout.obs.shape == (6, NUM_ENVS, 2, 2)
    assert rollout.chain.shape == (6, NUM_ENVS, 4, 3, 2)
    assert rollout.log_prob_factors.shape == (6, NUM_ENVS, 3, 3, 2)
    obs, chain = rollout.obs.flatten(0, 1), rollout.chain.flatten(0, 1)
    for step in range(3):
        law = policy.transition(obs, chain[:, step], torch.full((len(obs),), step))
        scored = rollout.log_prob_factors.flatten(0, 1)[:, step].sum((1, 2))
        torch.testing.assert_close(law.log_prob(chain[:, step + 1]), scored, rtol=1e-4, atol=1e-4)


def test_a_rollout_goes_on_where_the_one_before_stopped(small_policy, actor_of):
    policy = small_policy("gaussian")
    actor = actor_of(policy)
    first, second = (collect_rollout(actor, policy, 4) for _ in range(2))
    whole = collect_rollout(actor_of(policy), policy, 8)
    assert torch.equal(torch.cat([first.obs, second.obs]), whole.obs)
    assert torch.equal(first.last_obs, second.obs[0])
    assert torch.equal(torch.cat([first.chain, second.chain]), whole.chain)


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "diffusion"])
@pytest.mark.parametrize("at_once", [1, 3, 7, 20])
def test_it_does_not_matter_how_many_steps_are_written_together(small_policy, actor_of, monkeypatch, kind, at_once):
    policy = small_policy(kind)
    expected = collect_rollout(actor_of(policy), policy, 7)
    monkeypatch.setattr("dppo.rollout.KEPT_STEPS", at_once)
    ours = collect_rollout(actor_of(policy), policy, 7)
    for name in ("obs", "chain", "log_prob_factors", "rewards", "last_obs"):
        found = getattr(ours, name)
        assert torch.equal(found, getattr(expected, name)), name
        assert not found.is_inference(), "it can be learned from"


@pytest.mark.parametrize("kind", ["gaussian", "diffusion"])
def test_a_rollout_through_used_storage_is_the_one_through_fresh_memory_and_lies_where_the_one_before_lay(
    small_policy, actor_of, kind
):
    policy = small_policy(kind)
    storage = Storage.of(policy, 5, NUM_ENVS)
    reusing, fresh = actor_of(policy), actor_of(policy)
    for _ in range(3):
        ours = collect_rollout(reusing, policy, 5, storage=storage)
        expected = collect_rollout(fresh, policy, 5)
        for name in ("obs", "chain", "log_prob_factors"):
            assert getattr(ours, name).data_ptr() == getattr(storage, name).data_ptr() != 0, name
            assert getattr(expected, name).data_ptr() != getattr(storage, name).data_ptr(), name
        for field in fields(Rollout):
            if field.name != "environment_s":
                found, wanted = getattr(ours, field.name), getattr(expected, field.name)
                assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted, field.name


@pytest.mark.parametrize(
    ("kind", "chain", "factors"),
    [("gaussian", (2, 3, 2), (1, 3, 2)), ("categorical", (2,), (1,)), ("diffusion", (4, 3, 2), (3, 3, 2))],
)
def test_storage_has_the_shapes_and_the_size_of_what_a_policy_samples(small_policy, kind, chain, factors):
    torch.manual_seed(0)
    policy = small_policy(kind)
    before = torch.get_rng_state()
    storage = Storage.of(policy, 7, 5)
    assert torch.equal(torch.get_rng_state(), before)
    history = policy.config.history
    assert [tuple(tensor.shape) for tensor in vars(storage).values()] == [
        (7, 5, history, 2),
        (7, 5, *chain),
        (7, 5, *factors),
    ]
    integer = kind == "categorical"
    assert storage.chain.dtype == (torch.int64 if integer else torch.float32)
    numbers = history * 2 + (2 if integer else 1) * np.prod(chain) + np.prod(factors)
    assert storage.nbytes == 7 * 5 * 4 * numbers


def test_training_goes_on_in_the_same_memory_and_learns_from_it_without_a_copy(small_policy, point_task):
    trainer = Trainer(
        small_policy("diffusion"), point_task, TrainerConfig(1000, 3, 4), PPOConfig(epochs=1), {"type": "mlp"}
    )
    seen: list[dict[str, int]] = []
    update = trainer.update_rule.update

    def spied(batch: Batch, **kwargs: Any) -> Any:
        seen.append({name: getattr(batch, name).data_ptr() for name in vars(trainer.storage)})
        return update(batch, **kwargs)

    trainer.update_rule.update = spied  # type: ignore[method-assign]
    for _ in range(3):
        trainer.iterate()
    trainer.close()
    assert seen == [{name: tensor.data_ptr() for name, tensor in vars(trainer.storage).items()}] * 3


def test_environment_steps_are_those_that_were_executed(small_policy, actor_of):
    policy = small_policy("gaussian", chunk=3, executed=3)
    for mode in MODES:
        actor, heard = actor_of(policy, mode), []
        rollout = collect_rollout(actor, policy, 9, heard.append)
        received = [len(env.unwrapped.received) for env in actor.env.env.envs]
        assert rollout.env_steps == sum(heard) == sum(received)
        assert len(heard) == 9


def test_acting_without_a_reset_is_a_mistake_of_the_program(small_policy, counting_task):
    env = Stepper(make_vector_env(counting_task, 1, history=2, chunk=2))
    actor = Actor(env, success_reward=None, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="reset the environments before acting"):
        actor.act(small_policy("gaussian"))


# --- episodes


def counted(episode: int, env: int, success: bool | None) -> EpisodeResult:
    length = LENGTHS[episode % 4]
    return EpisodeResult(env, sum(range(1, length + 1)), length, success)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_returns_lengths_and_successes_carry_over_the_ends_of_rollouts(small_policy, actor_of, mode, steps):
    policy = small_policy("gaussian", chunk=3, executed=3)
    actor = actor_of(policy, mode, success=5.0)
    episodes = [e for _ in range(30 // steps) for e in collect_rollout(actor, policy, steps).episodes]
    for env in range(NUM_ENVS):
        mine = [episode for episode in episodes if episode.env == env]
        assert len(mine) > 6
        # A step pays its number, so an episode succeeds if it is at least 5 steps long.
        expected = [counted(env + i, env, success=LENGTHS[(env + i) % 4] >= 5) for i in range(len(mine))]
        assert mine == expected


def test_success_is_judged_at_each_step_and_not_by_the_sum_of_a_chunk(small_policy, actor_of):
    policy = small_policy("gaussian", chunk=7, executed=7)
    episodes = collect_rollout(actor_of(policy, success=6.0), policy, 8).episodes
    assert {(episode.length, episode.success) for episode in episodes} == {
        (5, False),
        (4, False),
        (1, False),
        (7, True),
    }


def test_a_task_without_success_reports_none(small_policy, actor_of):
    policy = small_policy("gaussian")
    assert {episode.success for episode in collect_rollout(actor_of(policy), policy, 10).episodes} == {None}


def step_of(step_rewards: list[list[float]], steps: list[int], terminated: list[bool]) -> Step:
    obs = np.zeros((len(steps), 1, 1), np.float32)
    no, yes = np.zeros(len(steps), bool), np.ones(len(steps), bool)
    return Step(obs, obs, np.array(step_rewards), np.array(steps), np.array(terminated), no, yes, no)


def test_the_zeros_after_the_end_of_a_chunk_are_no_success():
    tracker = EpisodeTracker(3, success_reward=0.0)
    step = step_of([[-1.0, -2.0, 0.0], [-1.0, 0.0, -2.0], [0.0, 0.0, 0.0]], [2, 3, 0], [True, True, True])
    assert [episode.success for episode in tracker.update(step)] == [False, True, False]


def test_an_episode_that_succeeded_once_has_succeeded():
    tracker = EpisodeTracker(1, success_reward=1.0)
    assert tracker.update(step_of([[1.0]], [1], [False])) == []
    assert tracker.update(step_of([[0.0]], [1], [True])) == [EpisodeResult(0, 1.0, 2, True)]
    assert tracker.update(step_of([[0.0]], [1], [True])) == [EpisodeResult(0, 0.0, 1, False)]


def test_a_reset_forgets_the_running_episodes(small_policy, actor_of):
    policy = small_policy("gaussian", chunk=2, executed=2)
    actor = actor_of(policy)
    collect_rollout(actor, policy, 2)
    actor.reset(0)
    assert collect_rollout(actor, policy, 3).episodes[0] == counted(2, 2, None)


# --- values


class StepNumber(nn.Module):
    """A critic whose value of a counting environment's observation is the step in its episode."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, normalized_obs: Tensor) -> Tensor:
        return normalized_obs[:, -1, 0]


def values_of(trainer: Trainer, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """V(s_t) and V of the true successor, [T, N] each."""
    values = trainer.estimator.score(trainer.policy, rollout)
    assert values is not None
    return values.current[..., 0], values.following


@pytest.fixture
def counting_trainer(small_policy, counting_task, monkeypatch) -> Callable[..., Trainer]:
    """A trainer in 3 counting environments, whose critic returns the number of the step."""

    def build(mode: AutoresetMode, chunk: int, steps: int, bad: str = "", **algo: Any) -> Trainer:
        monkeypatch.setattr(trainer_module, "make_vector_env", partial(make_vector_env, autoreset_mode=mode))
        policy = small_policy("gaussian", chunk=chunk, executed=chunk)
        size = TrainerConfig(num_envs=NUM_ENVS, rollout_steps=steps)
        critic = {"type": "mlp", "hidden_dims": [4]}
        task = replace(counting_task, env_kwargs={"bad": bad})
        trainer = Trainer(policy, task, size, PPOConfig(reward_scaling=False, **algo), critic)
        assert isinstance(trainer.estimator, GAE)
        trainer.estimator.critic = StepNumber()  # type: ignore[assignment]
        trainer.actor.reset(0)
        return trainer

    return build


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("steps", [1, 20])
def test_the_value_after_a_truncation_is_that_of_the_true_last_observation(counting_trainer, mode, chunk, steps):
    trainer = counting_trainer(mode, chunk, steps)
    truncations = 0
    for _ in range(20 // steps):
        rollout = collect_rollout(trainer.actor, trainer.policy, steps)
        values, next_values = values_of(trainer, rollout)
        assert torch.equal(values, rollout.obs[:, :, -1, 0])
        assert len(rollout.truncated_obs) == rollout.truncated.sum()
        for t, env in rollout.valid.nonzero().tolist():
            episode = int(rollout.obs[t, env, -1, 1])
            if not rollout.terminated[t, env]:
                ends = LENGTHS[episode % 4]
                assert next_values[t, env] == min(values[t, env] + chunk, ends)
                assert rollout.truncated[t, env] == (values[t, env] + chunk >= ends)
                truncations += int(rollout.truncated[t, env])
    assert truncations >= 6


def test_many_observations_are_valued_in_parts_as_in_one_go(counting_trainer, monkeypatch):
    trainer = counting_trainer(AutoresetMode.SAME_STEP, 2, 20)
    rollout = collect_rollout(trainer.actor, trainer.policy, 20)
    whole = values_of(trainer, rollout)
    monkeypatch.setattr("dppo.estimators.VALUE_BATCH", 7)
    for ours, expected in zip(values_of(trainer, rollout), whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_batch_is_the_same_in_every_autoreset_mode_without_the_bogus_rows_of_next_step(counting_trainer, chunk):
    found = []
    for mode in MODES:
        trainer = counting_trainer(mode, chunk, 60, gamma=0.9, gae_lambda=0.8)
        rollout = collect_rollout(trainer.actor, trainer.policy, 60)
        batch = trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))
        assert len(batch) == int(rollout.valid.sum())
        assert (mode is AutoresetMode.NEXT_STEP) == (len(batch) < 60 * NUM_ENVS)
        env, episode = torch.arange(NUM_ENVS).expand(60, -1)[rollout.valid], batch.obs[:, -1, 1]
        rows = torch.stack(
            [env, episode, batch.obs[:, -1, 0], batch.values, batch.advantages[:, 0], batch.returns], dim=1
        )
        # Episodes 0 to 7 are whole in every mode; in order of environment, episode and step.
        found.append(sorted(rows[episode < 8].tolist()))
    chunks = [-(-length // chunk) for length in LENGTHS]
    assert len(found[0]) == sum(sum((chunks * 2)[first:]) for first in range(NUM_ENVS))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)


def test_the_advantages_of_a_counted_episode_by_hand(counting_trainer):
    trainer = counting_trainer(AutoresetMode.SAME_STEP, 3, 8, gamma=0.9, gae_lambda=0.5)
    rollout = collect_rollout(trainer.actor, trainer.policy, 8)
    batch = trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout))
    advantages = batch.advantages.view(8, NUM_ENVS)
    # Environment 0 begins with an episode of 5 steps that terminates: chunks of rewards 1 + 2 + 3 and 4 + 5.
    second = 9 - 3
    first = 6 + 0.9 * 3 - 0 + 0.9 * 0.5 * second
    torch.testing.assert_close(advantages[:2, 0], torch.tensor([first, second]))
    # Environment 1 with one of 4 steps that is truncated: its last observation is worth 4.
    second = 4 + 0.9 * 4 - 3
    first = 6 + 0.9 * 3 - 0 + 0.9 * 0.5 * second
    torch.testing.assert_close(advantages[:2, 1], torch.tensor([first, second]))


def test_the_bootstrap_after_the_last_row_is_the_value_of_what_follows(counting_trainer):
    trainer = counting_trainer(AutoresetMode.SAME_STEP, 1, 2)
    rollout = collect_rollout(trainer.actor, trainer.policy, 2)
    values, next_values = values_of(trainer, rollout)
    assert next_values[-1, 0] == 2
    advantages, _ = gae(
        rollout.rewards, values, next_values, rollout.terminated, rollout.truncated, gamma=0.9, gae_lambda=0.5
    )
    assert advantages[-1, 0] == pytest.approx(2 + 0.9 * 2 - 1)


# --- dropped episodes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", ["observation", "reward"])
@pytest.mark.parametrize("steps", [8, 2])
def test_an_episode_is_cut_at_the_last_good_observation_and_what_broke_is_nowhere(counting_trainer, mode, bad, steps):
    """The third step of environment 1 breaks, be it within the rollout or at the beginning of the next one."""
    trainer = counting_trainer(mode, 1, steps, bad=bad, gamma=0.9, gae_lambda=0.5)
    rollouts = [collect_rollout(trainer.actor, trainer.policy, steps) for _ in range(8 // steps)]
    batches = [trainer._batch(rollout, trainer.estimator.score(trainer.policy, rollout)) for rollout in rollouts]
    for batch in batches:
        assert all(value.isfinite().all() for value in vars(batch).values())
    of_env = torch.cat([rollout.valid[:, 1] for rollout in rollouts])
    assert of_env[:4].tolist() == [True, True, False, True]
    env = torch.arange(NUM_ENVS).expand(steps, -1)[rollouts[0].valid]
    second = 2 + 0.9 * 2 - 1  # bootstrapped from what the third step began with
    first = 1 + 0.9 * 1 - 0 + 0.9 * 0.5 * second
    torch.testing.assert_close(batches[0].advantages[env == 1, 0][:2], torch.tensor([first, second]))
    assert all(episode.length != 4 for rollout in rollouts for episode in rollout.episodes if episode.env == 1)


def test_training_counts_dropped_episodes_and_goes_on(counting_trainer):
    row = counting_trainer(AutoresetMode.SAME_STEP, 1, 8, bad="reward").iterate()
    # Episode 1, in environment 1 and later in environment 0.
    assert (row["dropped_episodes"], row["worker_restarts"], row["skipped_updates"]) == (2, 0, 0)
    assert all(np.isfinite(value) for value in row.values() if value is not None)


def test_an_iteration_of_nothing_but_dropped_episodes_is_an_error(small_policy):
    task = Task("point", "Point-v0", {"broken": 0})
    trainer = Trainer(small_policy("gaussian"), task, TrainerConfig(100, 2, 3), PPOConfig(), {"type": "mlp"})
    with pytest.raises(UserError, match=r"^task point: all 6 episodes of this iteration were dropped"):
        trainer.iterate()


def test_the_scale_of_rewards_never_sees_a_dropped_episode(counting_trainer):
    """What was paid before it broke ends with it, and is not carried into the next episode."""
    whole, broken = (counting_trainer(AutoresetMode.SAME_STEP, 1, 3, bad=bad, gamma=0.9) for bad in ("", "reward"))
    sums = []
    for trainer in (whole, broken):
        trainer.estimator.discounting.scaler = scaler = RewardScaler(NUM_ENVS, 0.9)
        trainer.iterate()
        assert scaler.statistics.count == (9 if trainer is whole else 8)
        sums.append(scaler.discounted.tolist())
    assert sums[0][1] != 0 and sums[1][1] == 0
    assert [sums[0][i] for i in (0, 2)] == [sums[1][i] for i in (0, 2)]
