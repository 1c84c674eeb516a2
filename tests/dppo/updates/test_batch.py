import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo.updates.batch import Batch, minibatches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(size=st.integers(1, 60), count=st.integers(1, 60), seed=st.integers(0, 5))
def test_minibatches_hold_every_index_once_and_are_of_nearly_equal_length(size, count, seed):
    count = min(count, size)
    parts = list(minibatches(size, count, generator(seed)))
    assert len(parts) == count
    assert sorted(torch.cat(parts).tolist()) == list(range(size))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_one_index_too_many_does_not_make_a_minibatch_of_one():
    assert [len(part) for part in minibatches(3 * 8 + 1, 4, generator())] == [7, 6, 6, 6]


def test_minibatches_are_in_random_order_which_the_generator_decides():
    first, again, other = (torch.cat(list(minibatches(50, 5, generator(seed)))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(50))


def test_a_generator_gives_another_partition_each_time():
    one = generator()
    assert not torch.equal(*(torch.cat(list(minibatches(50, 5, one))) for _ in range(2)))


def test_a_batch_knows_its_rows_and_inner_steps():
    row = torch.zeros(7)
    batch = Batch(
        obs=torch.zeros(7, 1, 2),
        chain=torch.zeros(7, 4, 5),
        log_prob_factors=torch.zeros(7, 3, 5),
        advantages=row,
        returns=row,
        values=row,
    )
    assert (len(batch), batch.num_steps) == (7, 3)
