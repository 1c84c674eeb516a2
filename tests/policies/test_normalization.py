import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from policies.normalization import Affine, RunningStandardizer

LOW, HIGH = torch.tensor([-4.0, 0.0, 100.0]), torch.tensor([4.0, 1e-3, 105.0])


def affine(low: torch.Tensor = LOW, high: torch.Tensor = HIGH) -> Affine:
    scaling = Affine(len(low))
    scaling.fit(low, high)
    return scaling


def test_min_max_scaling_maps_the_bounds_to_minus_one_and_one() -> None:
    scaling = affine()
    torch.testing.assert_close(scaling.normalize(LOW), -torch.ones(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaling.normalize(HIGH), torch.ones(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaling.normalize((LOW + HIGH) / 2), torch.zeros(3), rtol=0, atol=1e-5)


def test_minus_one_and_one_stand_for_the_bounds() -> None:
    torch.testing.assert_close(affine().denormalize(-torch.ones(3)), LOW, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(affine().denormalize(torch.ones(3)), HIGH, rtol=1e-6, atol=1e-9)


def test_scaling_and_back_is_the_identity() -> None:
    x = LOW + (HIGH - LOW) * torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(affine().denormalize(affine().normalize(x)), x, rtol=1e-6, atol=1e-6)


def test_scaling_is_the_identity_before_it_is_fitted() -> None:
    x = torch.tensor([[-3.0, 1e6]])
    assert torch.equal(Affine(2).normalize(x), x)
    assert torch.equal(Affine(2).denormalize(x), x)


@pytest.mark.parametrize("width", [0.0, 1e-7])
def test_a_dimension_that_never_varied_is_centred_and_does_not_blow_up(width: float) -> None:
    constant = torch.tensor([0.5, 0.0])
    scaling = affine(constant, constant + torch.tensor([width, 1.0]))
    seen_later = constant + torch.tensor([0.01, 0.5])
    torch.testing.assert_close(scaling.normalize(seen_later), torch.tensor([0.01, 0.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(scaling.denormalize(torch.zeros(2)), torch.tensor([0.5, 0.5]), rtol=0, atol=1e-6)


def test_fitting_again_forgets_the_first_fit() -> None:
    scaling = affine()
    scaling.fit(-torch.ones(3), torch.ones(3))
    torch.testing.assert_close(scaling.normalize(LOW), LOW)


values = st.floats(-1e4, 1e4, width=32)
batches = st.lists(
    st.integers(1, 7).flatmap(lambda rows: arrays(np.float32, (rows, 2), elements=values)), min_size=1, max_size=5
)


def seen(*data: np.ndarray) -> RunningStandardizer:
    standardizer = RunningStandardizer(2)
    for batch in data:
        standardizer.update(torch.from_numpy(batch))
    return standardizer


@settings(max_examples=40, deadline=None, database=None)
@given(batches)
def test_running_statistics_are_those_of_all_batches_together(data: list[np.ndarray]) -> None:
    standardizer = seen(*data)
    together = np.concatenate(data).astype(np.float64)
    assert standardizer.count == len(together)
    np.testing.assert_allclose(standardizer.mean, together.mean(0), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(standardizer.variance, together.var(0), rtol=1e-10, atol=1e-6)


@settings(max_examples=40, deadline=None, database=None)
@given(batches, st.randoms(use_true_random=False))
def test_running_statistics_do_not_depend_on_the_order_of_what_was_seen(data: list[np.ndarray], random) -> None:
    rows = list(np.concatenate(data)[:, None])
    random.shuffle(rows)
    ours, theirs = seen(*data), seen(*rows)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(ours.variance, theirs.variance, rtol=1e-10, atol=1e-6)


def test_small_variation_around_a_large_mean_is_not_lost() -> None:
    rng = np.random.default_rng(0)
    data = [1e6 + rng.normal(size=(50, 2)) for _ in range(20)]
    np.testing.assert_allclose(seen(*data).variance, np.concatenate(data).var(0), rtol=1e-6)


def test_observations_are_standardised_by_what_was_seen() -> None:
    data = np.random.default_rng(0).normal([5, -100], [0.1, 20], size=(200, 2))
    x = torch.from_numpy(data[:10])
    expected = (data[:10] - data.mean(0)) / np.sqrt(data.var(0) + 1e-8)
    np.testing.assert_allclose(seen(data).normalize(x), expected, rtol=1e-9)
    np.testing.assert_allclose(seen(data).normalize(x.float()), expected, rtol=1e-3, atol=1e-3)
    assert seen(data).normalize(x.float()).dtype == torch.float32


def test_standardising_is_the_identity_before_anything_was_seen() -> None:
    x = torch.tensor([[0.0, -9.5], [1e-3, 7.25]])
    assert torch.equal(RunningStandardizer(2).normalize(x), x)


def test_standardised_observations_are_clipped() -> None:
    standardizer = seen(np.array([[0.0, 0.0], [2.0, 2.0]]))
    assert standardizer.normalize(torch.tensor([1e6, -1e6])).tolist() == [10, -10]


def test_a_dimension_that_never_varied_yet_stays_finite() -> None:
    standardizer = seen(np.full((5, 2), 3.0))
    assert standardizer.normalize(torch.tensor([3.0, 4.0])).tolist() == [0, 10]


def test_an_empty_batch_changes_nothing() -> None:
    data = np.array([[0.0, 1.0], [2.0, 3.0]])
    standardizer = seen(data, np.empty((0, 2)))
    assert standardizer.count == 2
    assert standardizer.mean.tolist() == [1, 2]
    assert standardizer.variance.tolist() == [1, 1]
    assert seen(np.empty((0, 2))).mean.tolist() == [0, 0]
