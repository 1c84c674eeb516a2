import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo.cloning import PREPARED_UPDATES, Cloner, CloningConfig
from dppo.data.demos import Episode, WindowDataset
from dppo.updates.faults import NotFiniteError
from policies import Policy

SETTINGS: dict[str, Any] = {
    "updates": 40,
    "batch_size": 8,
    "learning_rate": 0.01,
    "final_learning_rate_share": 0.1,
    "warmup": 0.0,
    "weight_decay": 0.0,
    "ema_decay": 0.9,
}


def windows(lengths: tuple[int, ...] = (9, 6, 5), seed: int = 0) -> WindowDataset:
    """Of episodes whose actions are a linear function of what is seen."""
    rng = np.random.default_rng(seed)
    episodes = []
    for length in lengths:
        observation = rng.uniform(-1, 1, (length + 1, 2)).astype(np.float32)
        action = 0.5 * observation[:-1, ::-1].copy()
        episodes.append(Episode(observation, action, np.zeros(length, np.float32), False, True))
    return WindowDataset(episodes, history=2, chunk=3)


def discrete_windows() -> WindowDataset:
    """Of one episode of 20 steps whose actions say which third of its range the first observation lies in."""
    observation = np.random.default_rng(0).uniform(-1, 1, (21, 2)).astype(np.float32)
    action = np.digitize(observation[:-1, 0], [-0.33, 0.33]).astype(np.int64)
    return WindowDataset([Episode(observation, action, np.zeros(20, np.float32), False, True)], history=1, chunk=1)


@pytest.fixture
def make_cloner(small_policy: Callable[..., Policy]) -> Callable[..., Cloner]:
    def build(kind: str = "diffusion", train: WindowDataset | None = None, seed: int = 0, **changes: Any) -> Cloner:
        policy = small_policy(kind, **({"finetuned_steps": None} if kind == "diffusion" else {}))
        settings = CloningConfig(**{**SETTINGS, **changes})
        return Cloner(policy, train or windows(), windows((7, 4), seed=1), settings, seed=seed)

    return build


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters()}


def learned_windows(cloner: Cloner) -> list[list[int]]:
    """The numbers of the windows that a gaussian policy will have learned from, one list for each part of an update."""
    seen: list[list[int]] = []
    everything, _ = cloner.train.batch(torch.arange(len(cloner.train)))
    exercise_losses = cloner.policy.exercise_losses

    def spy(obs: Tensor, action: Tensor) -> Tensor:
        seen.append((obs[:, None] == everything).all((2, 3)).int().argmax(1).tolist())
        assert torch.equal(obs, everything[seen[-1]])
        return exercise_losses(obs, action)

    cloner.policy.exercise_losses = spy  # type: ignore[method-assign]
    return seen


def spied_rows(cloner: Cloner) -> list[int]:
    """The number of rows of each part that the policy will have learned from."""
    rows: list[int] = []
    exercise_losses = cloner.policy.exercise_losses

    def spy(*exercise: Tensor) -> Tensor:
        rows.append(len(exercise[0]))
        return exercise_losses(*exercise)

    cloner.policy.exercise_losses = spy  # type: ignore[method-assign]
    return rows


# --- what is learned


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["diffusion", "gaussian"])
def test_the_loss_falls_on_demonstrations_and_on_unseen_episodes(make_cloner, kind, precision):
    cloner = make_cloner(kind, windows((60, 60, 60)), updates=300, batch_size=32, precision=precision)
    first, *_, last = [cloner.run(50) for _ in range(6)]
    assert last["train_loss"] < first["train_loss"] - 0.2
    assert last["validation_loss"] < first["validation_loss"] - 0.05


@pytest.mark.parametrize("kind", ["diffusion", "gaussian"])
def test_in_bfloat16_only_the_products_are_coarser(make_cloner, kind):
    exact, coarse = (make_cloner(kind, precision=precision) for precision in ("float32", "bfloat16"))
    assert exact._validation_loss() == coarse._validation_loss(), "which is measured in full precision"
    losses = [cloner.run(1)["train_loss"] for cloner in (exact, coarse)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    coarse.run(4)
    optimizer = coarse.optimizer.state_dict()
    tensors = [
        *coarse.policy.parameters(),
        *coarse.averaged.parameters(),
        optimizer["exp_avg"],
        coarse.optimizer.parameters.values,
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_the_averaged_weights_are_the_exponential_moving_average_of_the_weights_after_each_update(make_cloner):
    cloner = make_cloner()
    cloner.run(1)
    expected = weights(cloner.policy)
    for _ in range(5):
        cloner.run(1)
        now = weights(cloner.policy)
        expected = {name: 0.9 * expected[name] + 0.1 * now[name] for name in now}
    averaged = weights(cloner.averaged)
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(averaged[name], weights(cloner.policy)[name])


def test_without_a_memory_the_average_is_the_policy(make_cloner):
    cloner = make_cloner(ema_decay=0.0)
    cloner.run(5)
    averaged = weights(cloner.averaged)
    assert all(torch.equal(value, averaged[name]) for name, value in weights(cloner.policy).items())


def test_the_scaling_of_the_policy_is_part_of_the_average(make_cloner, small_policy):
    policy = small_policy("diffusion", finetuned_steps=None)
    policy.fit_actions(torch.tensor([-3.0, 0.0]), torch.tensor([5.0, 2.0]))
    cloner = Cloner(policy, windows(), None, CloningConfig(**SETTINGS), seed=0)
    cloner.run(3)
    assert cloner.averaged.state_dict()["action_scaler.scale"].tolist() == [4.0, 1.0]


# --- which windows


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20])
def test_every_epoch_covers_every_window_once(make_cloner, batch_size):
    cloner = make_cloner("gaussian", batch_size=batch_size, updates=100)
    batches = learned_windows(cloner)
    cloner.run(100)
    assert {len(batch) for batch in batches} == {batch_size}
    assert len(batches) == 100
    seen = [index for batch in batches for index in batch]
    epochs = [seen[start : start + 20] for start in range(0, len(seen) - 19, 20)]
    assert len(epochs) >= 5
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1], "in another order each time"


@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_what_is_prepared_ahead_covers_every_window_once_a_pass_in_random_order(make_cloner, batch_size):
    cloner = make_cloner("gaussian", batch_size=batch_size)
    everything, actions = cloner.train.batch(torch.arange(20))
    seen = []
    for _ in range(5):
        cloner._prepare()
        assert len(cloner.prepared) == PREPARED_UPDATES
        for obs, action in cloner.prepared:
            assert len(obs) == batch_size
            indices = (obs[:, None] == everything).all((2, 3)).int().argmax(1)
            assert torch.equal(obs, everything[indices])
            assert torch.equal(action, actions[indices])
            seen += indices.tolist()
    assert sorted(seen + cloner.order.tolist()) == sorted([*range(20)] * -(-len(seen) // 20))
    passes = [seen[start : start + 20] for start in range(0, len(seen) - 19, 20)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes) >= 10, "never in the same order"


def test_windows_are_prepared_only_when_none_are_left_and_used_in_order(make_cloner, monkeypatch):
    cloner = make_cloner()
    prepared = []
    prepare = cloner._prepare

    def spy() -> None:
        assert cloner.prepared == []
        prepare()
        prepared.append(cloner.updates)

    monkeypatch.setattr(cloner, "_prepare", spy)
    for _ in range(35):
        ahead = list(cloner.prepared)
        cloner.run(1)
        assert not ahead or cloner.prepared == ahead[1:]
    assert prepared == [0, PREPARED_UPDATES, 2 * PREPARED_UPDATES]


def test_a_batch_larger_than_the_data_is_the_data(make_cloner):
    cloner = make_cloner("gaussian", batch_size=256, updates=4)
    batches = learned_windows(cloner)
    row = cloner.run(4)
    assert [sorted(batch) for batch in batches] == [list(range(20))] * 4
    assert row["epoch"] == 4.0


def test_the_row_of_metrics_counts_updates_and_epochs(make_cloner):
    cloner = make_cloner(updates=10)
    first, second = cloner.run(6), cloner.run(6)
    assert (first["updates"], second["updates"]) == (6, 10), "and stops where it was told"
    assert second["epoch"] == 10 * 8 / 20
    assert second["wall_clock_s"] > first["wall_clock_s"] > 0
    assert set(first) >= {"updates", "epoch", "wall_clock_s", "train_loss", "validation_loss", "learning_rate"}


def test_each_update_is_announced(make_cloner):
    heard = []
    make_cloner().run(7, heard.append)
    assert heard == [1] * 7


# --- learning rate and seeds


def test_the_learning_rate_climbs_and_then_falls_to_its_final_share(make_cloner):
    cloner = make_cloner(updates=10, warmup=0.2)
    rates = [cloner.run(1)["learning_rate"] for _ in range(10)]
    assert rates[:2] == pytest.approx([0.005, 0.01])
    assert rates[5] == pytest.approx(0.01 * (0.1 + 0.9 * 0.5))
    assert rates[-1] == pytest.approx(0.001)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_other_ones(make_cloner):
    found = []
    for seed in (4, 4, 5):
        cloner = make_cloner(seed=seed)
        torch.rand(3)
        row = cloner.run(15)
        found.append((weights(cloner.averaged), row["train_loss"], row["validation_loss"]))
    (first, *losses), (again, *same), (other, *_) = found
    assert losses == same
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", ["gaussian", "categorical", "diffusion"])
def test_the_number_of_threads_does_not_change_the_weights_by_a_single_bit(make_cloner, monkeypatch, kind):
    monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", 6)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            data = discrete_windows() if kind == "categorical" else windows()
            cloner = Cloner(
                make_cloner(kind).policy, data, None, CloningConfig(**SETTINGS | {"batch_size": 20}), seed=0
            )
            rows = spied_rows(cloner)
            found.append((cloner.run(5)["train_loss"], weights(cloner.policy), weights(cloner.averaged)))
            assert rows == [5] * 20
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    (loss, *one), (same, *three) = found
    assert loss == same
    for ours, expected in zip(one, three, strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_an_update_in_parts_is_that_of_the_whole(make_cloner, monkeypatch):
    found = []
    for size in (3, 100):
        monkeypatch.setattr("dppo.threads.ROWS_PER_GRADIENT_PART", size)
        cloner = make_cloner()
        rows = spied_rows(cloner)
        found.append((cloner.run(3)["train_loss"], weights(cloner.averaged)))
        assert rows == ([3, 3, 2] if size == 3 else [8]) * 3
    (loss, in_parts), (expected, whole) = found
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(in_parts[name], value, rtol=1e-4, atol=1e-5)


def test_the_averaged_policy_is_views_of_the_average(make_cloner):
    cloner = make_cloner()
    cloner.run(3)
    with torch.no_grad():
        cloner.average.add_(1.0)
    flat = torch.cat([value.detach().flatten() for value in cloner.averaged.parameters()])
    assert torch.equal(flat, cloner.average)
    assert not any(torch.equal(value, weights(cloner.policy)[name]) for name, value in weights(cloner.averaged).items())


def test_the_number_of_updates_between_rows_does_not_change_the_weights(make_cloner):
    one, many = make_cloner(), make_cloner()
    one.run(12)
    for _ in range(4):
        many.run(3)
    assert all(torch.equal(value, weights(many.averaged)[name]) for name, value in weights(one.averaged).items())


def test_a_policy_drops_entries_while_it_learns_and_its_average_never_does(make_cloner):
    cloner = make_cloner()
    assert cloner.policy.training
    assert not any(module.training for module in cloner.averaged.modules())


def test_the_validation_loss_is_the_averaged_policys_on_the_same_windows_and_noise_every_time(make_cloner):
    cloner = make_cloner()
    cloner.run(10)
    first, again = cloner._validation_loss(), cloner._validation_loss()
    assert first == again
    with torch.no_grad():
        next(cloner.averaged.parameters()).add_(1.0)
    assert cloner._validation_loss() != first


def test_without_validation_data_there_is_no_validation_loss(small_policy):
    cloner = Cloner(small_policy("gaussian"), windows(), None, CloningConfig(**SETTINGS), seed=0)
    assert cloner.run(2)["validation_loss"] is None


# --- errors and state


def test_losses_that_are_not_finite_to_the_last_are_an_error(make_cloner):
    with pytest.raises(
        NotFiniteError, match=r"^\d+ updates of the policy network in a row had a loss \((nan|inf)\)"
    ) as caught:
        make_cloner(learning_rate=1e30).run(40)
    assert {"minibatch/0", "rows/0", "gradient_norm"} < caught.value.evidence.keys()


def test_updates_whose_loss_is_not_finite_are_skipped_and_in_no_mean(make_cloner):
    cloner, broken = make_cloner(), make_cloner()
    cloner.run(1)
    broken.run(1)
    observations = broken.train.observation.clone()
    broken.prepared = []
    broken.train.observation[:] = torch.nan
    row = broken.run(2)
    assert (row["skipped_updates"], row["train_loss"]) == (2, None)
    assert torch.equal(broken.optimizer.parameters.values, cloner.optimizer.parameters.values)
    broken.prepared = []
    broken.train.observation[:] = observations
    row = broken.run(2)
    assert row["skipped_updates"] == 0
    assert row["train_loss"] > 0


@pytest.mark.parametrize(
    "settings", [{"updates": 0}, {"batch_size": 0}, {"ema_decay": 1.0}, {"ema_decay": -0.1}], ids=str
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        CloningConfig(**{**SETTINGS, **settings})


def test_the_state_holds_what_a_continued_training_would_need(make_cloner):
    cloner = make_cloner()
    cloner.run(4)
    state = copy.deepcopy(cloner.state_dict())
    learned = {"policy", "averaged", "optimizer", "generator", "order", "prepared", "randomness"}
    assert set(state) == learned | {"windows", "updates", "wall_clock_s"}
    assert all(torch.equal(state["policy"][name], value) for name, value in cloner.policy.state_dict().items())
    assert state["updates"] == 4
    assert [[len(column) for column in exercise] for exercise in state["prepared"]] == [[8] * 4] * 12
    assert len(state["order"]) == 7 * 20 - 16 * 8
