from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo.updates import batch as batch_module
from dppo.updates.batch import Batch, PairOrder, Targets, minibatches, partition, split


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(indices: Tensor) -> Targets:
    """A record of which nothing but the indices can be told."""
    return Targets(obs=indices, returns=indices, values=indices)


def gathered_parts(size: int, count: int, generator: torch.Generator) -> list[Tensor]:
    return [part.obs for part in minibatches(numbered, partition(size, count, generator))]


def numbered_batch(rows: int = 7, steps: int = 3) -> Batch:
    """Each entry says where it stands: 100 times its row, plus its place along the chain."""
    row = 100.0 * torch.arange(rows)
    return Batch(
        obs=row[:, None, None].expand(rows, 1, 2),
        chain=(row[:, None] + torch.arange(steps + 1))[..., None].expand(rows, steps + 1, 5),
        log_prob_factors=(row[:, None] + torch.arange(steps))[..., None].expand(rows, steps, 5),
        advantages=row[:, None] + torch.arange(steps) / 10,
        returns=row + 2,
        values=row + 3,
    )


@settings(deadline=None)
@given(size=st.integers(1, 60), count=st.integers(1, 60), seed=st.integers(0, 5), gathered=st.integers(1, 70))
def test_minibatches_hold_every_index_once_and_are_of_nearly_equal_length(size, count, seed, gathered):
    count = min(count, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "GATHERED", gathered)
        parts = gathered_parts(size, count, generator(seed))
    assert len(parts) == count
    assert sorted(torch.cat(parts).tolist()) == list(range(size))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_one_index_too_many_does_not_make_a_minibatch_of_one():
    assert [len(part) for part in gathered_parts(3 * 8 + 1, 4, generator())] == [7, 6, 6, 6]


def test_minibatches_are_in_random_order_which_the_generator_decides():
    first, again, other = (torch.cat(gathered_parts(50, 5, generator(seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(50))


def test_a_generator_gives_another_partition_each_time():
    one = generator()
    assert not torch.equal(*(torch.cat(gathered_parts(50, 5, one)) for _ in range(2)))


@pytest.mark.parametrize("gathered", [1, 6, 13, 25, 10_000])
def test_how_many_rows_are_gathered_at_once_does_not_change_the_minibatches(monkeypatch, gathered):
    expected = gathered_parts(25, 4, generator())
    monkeypatch.setattr(batch_module, "GATHERED", gathered)
    asked = []

    def counted(indices: Tensor) -> Targets:
        asked.append(len(indices))
        return numbered(indices)

    found = list(minibatches(counted, partition(25, 4, generator())))
    assert [part.returns.tolist() for part in found] == [part.tolist() for part in expected]
    assert sum(asked) == 25
    assert max(asked) <= max(gathered, 7), "what is gathered at once is bounded, but holds a whole minibatch"


def test_large_minibatches_are_gathered_only_when_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(batch_module, "GATHERED", 5)
    asked = []

    def counted(indices: Tensor) -> Targets:
        asked.append(len(indices))
        return numbered(indices)

    parts = minibatches(counted, partition(20, 4, generator()))
    next(parts)
    assert asked == [5]


def test_a_batch_knows_its_rows_and_inner_steps():
    batch = numbered_batch(rows=7, steps=3)
    assert (len(batch), batch.num_steps) == (7, 3)


def test_a_pair_is_an_inner_step_of_a_row_with_the_latents_on_both_sides_of_it():
    batch = numbered_batch(rows=7, steps=3)
    pairs = batch.pairs(torch.tensor([0, 20, 7, 7]))
    rows, steps = torch.tensor([0, 6, 2, 2]), torch.tensor([0, 2, 1, 1])
    assert len(pairs) == 4
    assert torch.equal(pairs.step, steps)
    assert torch.equal(pairs.obs, batch.obs[rows])
    assert pairs.latent[:, 0].tolist() == [0, 602, 201, 201]
    assert pairs.following[:, 0].tolist() == [1, 603, 202, 202]
    assert pairs.log_prob_factors[:, 0].tolist() == [0, 602, 201, 201]
    assert pairs.advantages.tolist() == pytest.approx([0, 600.2, 200.1, 200.1])


def test_what_the_critic_learns_from_belongs_to_the_same_row():
    targets = numbered_batch().targets(torch.tensor([4, 0]))
    assert targets.obs[:, 0, 0].tolist() == [400, 0]
    assert targets.returns.tolist() == [402, 2]
    assert targets.values.tolist() == [403, 3]


# --- the order of pairs


def rows_and_steps(part: Tensor, num_steps: int) -> list[tuple[int, int]]:
    return [divmod(index, num_steps) for index in part.tolist()]


@pytest.mark.parametrize("inner_steps", [None, 1, 2, 3])
@pytest.mark.parametrize("whole_chains", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 6, 1000, None])
def test_an_epoch_has_so_many_inner_steps_of_each_row_in_minibatches_of_the_size(inner_steps, whole_chains, batch_size):
    batch, order = numbered_batch(rows=7, steps=3), PairOrder(inner_steps, whole_chains)
    count = order.count(batch, batch_size)
    parts = order.parts(batch, count, generator())
    chosen = inner_steps or 3
    assert len(parts) == count
    assert max(map(len, parts)) <= max(batch_size or 1000, chosen if whole_chains else 1)
    assert max(map(len, parts)) - min(map(len, parts)) <= (chosen if whole_chains else 1)
    pairs = [rows_and_steps(part, 3) for part in parts]
    together = [pair for part in pairs for pair in part]
    assert len(set(together)) == len(together)
    assert [sum(row == other for other, _ in together) for row in range(7)] == [chosen] * 7
    if whole_chains:
        assert sum(len({row for row, _ in part}) for part in pairs) == 7, "no row is in two minibatches"


def test_inner_steps_are_drawn_anew_and_each_is_as_likely_as_the_others():
    batch, order, one = numbered_batch(rows=50, steps=4), PairOrder(2), generator()
    drawn = torch.stack([torch.cat(order.parts(batch, 3, one)).sort().values for _ in range(200)])
    assert (drawn[0] != drawn[1]).any()
    shares = torch.bincount(drawn.flatten(), minlength=200) / 200
    assert float((shares - 0.5).abs().max()) < 0.15, "of each pair"
    assert float((shares.view(50, 4).mean(0) - 0.5).abs().max()) < 0.02, "of each inner step"


@pytest.mark.parametrize(("sizes", "lengths"), [(8, [8, 8, 5]), ([1, 20], [1, 20]), (21, [21]), (50, [21])])
def test_parts_of_a_record_are_consecutive_and_views(sizes, lengths):
    pairs = replace(numbered_batch(rows=7, steps=3).pairs(torch.arange(21)), extra={"more": torch.arange(21)})
    parts = list(split(pairs, sizes))
    assert [len(part) for part in parts] == lengths
    for name in (*(field.name for field in fields(pairs) if field.name != "extra"), "more"):
        pieces = [(vars(part) | dict(part.extra))[name] for part in parts]
        whole = (vars(pairs) | dict(pairs.extra))[name]
        assert torch.equal(torch.cat(pieces), whole), name
        assert {piece.untyped_storage().data_ptr() for piece in pieces} == {whole.untyped_storage().data_ptr()}
