import torch

from policies.networks.dropout import RowDropout, draw_seeds, hashed


def seeds(batch: int) -> torch.Tensor:
    return draw_seeds(batch, torch.Generator().manual_seed(0), torch.device("cpu"))


def mixed(x: int) -> int:
    """One of Wellons' hash functions of 32 bits, in Python's own integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def test_the_hash_is_its_formula_on_unsigned_integers() -> None:
    drawn = seeds(5)
    for call in (1, 2, 100):
        expected = [
            [mixed((mixed((seed + call * 0x9E3779B9) % 2**32) + position) % 2**32) % 2**31 for position in range(7)]
            for seed in drawn.tolist()
        ]
        assert hashed(drawn, call, 7).tolist() == expected


def test_hashes_are_uniform_and_know_nothing_of_each_other() -> None:
    unit = hashed(seeds(1000), 1, 500).double() / 2**31
    assert (torch.histc(unit, 20, 0, 1) / unit.numel() * 20 - 1).abs().max() < 0.03
    other_call = hashed(seeds(1000), 2, 500).double() / 2**31
    next_position, next_row = unit.roll(1, 1), unit.roll(1, 0)
    for other in (other_call, next_position, next_row):
        correlation = torch.corrcoef(torch.stack([unit.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.01


def test_neighbouring_seeds_drop_different_entries() -> None:
    rows = hashed(torch.arange(200, dtype=torch.int32), 1, 300) > 2**30
    agreement = (rows[1:] == rows[:-1]).double().mean(1)
    assert (agreement - 0.5).abs().max() < 0.15


def test_a_share_of_the_entries_is_dropped_and_the_mean_stays() -> None:
    x = torch.rand(200, 10, 30) + 1
    dropped = RowDropout(seeds(200))(x, 0.3)
    kept = dropped != 0
    assert abs(kept.double().mean() - 0.7) < 0.01
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)


def test_each_call_drops_others_and_a_new_pass_drops_the_same_again() -> None:
    x = torch.ones(4, 100)
    first, again = RowDropout(seeds(4)), RowDropout(seeds(4))
    one, two = first(x, 0.5), first(x, 0.5)
    assert not torch.equal(one, two)
    assert torch.equal(again(x, 0.5), one) and torch.equal(again(x, 0.5), two)


def test_a_call_that_drops_nothing_counts() -> None:
    """So that what one layer drops does not hang on another's share."""
    x = torch.ones(4, 100)
    first, again = RowDropout(seeds(4)), RowDropout(seeds(4))
    first(x, 0.0)
    again(x, 0.2)
    assert torch.equal(first(x, 0.5), again(x, 0.5))


def test_without_seeds_nothing_is_dropped() -> None:
    x = torch.ones(4, 100)
    assert RowDropout(None)(x, 0.5) is x
