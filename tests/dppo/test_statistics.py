import math

import numpy as np
import pytest

from dppo.statistics import mean_ci95, success_ci95, summarize


def test_the_interval_of_a_normal_sample_is_close_to_the_textbook_one():
    sample = np.random.default_rng(0).normal(10.0, 2.0, size=400)
    mean, low, high = mean_ci95(sample)
    half = 1.96 * sample.std(ddof=1) / math.sqrt(400)
    assert mean == pytest.approx(sample.mean())
    assert low == pytest.approx(mean - half, abs=0.03)
    assert high == pytest.approx(mean + half, abs=0.03)


def test_the_interval_of_a_skewed_sample_leans_to_its_tail():
    sample = np.random.default_rng(0).exponential(size=100)
    mean, low, high = mean_ci95(sample)
    assert low is not None
    assert high is not None
    assert high - mean > 1.1 * (mean - low)


def test_the_same_values_give_the_same_interval():
    sample = [1.0, 5.0, 2.0, 8.0]
    assert mean_ci95(sample) == mean_ci95(sample)


def test_equal_values_have_an_interval_without_width():
    assert mean_ci95([0.1, 0.1, 0.1]) == (pytest.approx(0.1),) * 3


def test_one_value_has_no_interval():
    assert mean_ci95([7.0]) == (7.0, None, None)


@pytest.mark.parametrize("sample", [[0.0, 1.0], [0.0] * 49 + [1.0], [1.0, 1.0 + 1e-12] + [1.0] * 8])
def test_nearly_degenerate_samples_still_have_a_finite_interval_around_the_mean(sample):
    mean, low, high = mean_ci95(sample)
    assert low is not None
    assert high is not None
    assert low - 1e-9 <= mean <= high + 1e-9


@pytest.mark.parametrize("sample", [[], [1.0, float("nan")], [float("inf")]])
def test_no_values_or_values_that_are_not_finite_are_refused(sample):
    with pytest.raises(ValueError, match="finite"):
        mean_ci95(sample)


def test_the_interval_of_a_rate_is_wilsons():
    # Wilson (1927) for 8 of 10: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.959964.
    assert success_ci95(8, 10) == (pytest.approx(0.490162, abs=1e-5), pytest.approx(0.943318, abs=1e-5))


def test_no_success_at_all_still_leaves_room_above():
    low, high = success_ci95(0, 20)
    assert low == pytest.approx(0.0)
    assert high == pytest.approx(0.1611, abs=1e-3)


def test_a_summary_holds_returns_and_successes():
    summary = summarize([1.0, 2.0, 3.0, 6.0], [True, False, True, True])
    assert summary.return_mean == 3.0
    assert summary.return_std == pytest.approx(math.sqrt(14 / 3))
    assert summary.success_rate == 0.75
    assert summary.success_ci95 == success_ci95(3, 4)
    assert summary.episodes == 4


def test_arrays_are_summarized_like_lists():
    returns, successes = [1.0, 2.0, 3.0], [True, False, False]
    assert summarize(np.array(returns), np.array(successes)) == summarize(returns, successes)


def test_a_summary_is_plain_data_with_intervals_as_lists():
    plain = summarize([1.0], [True]).as_dict()
    low, high = plain.pop("success_ci95")
    assert 0 < low < high <= 1
    assert plain == {
        "return_mean": 1.0,
        "return_ci95": [None, None],
        "return_std": None,
        "success_rate": 1.0,
        "episodes": 1,
        "dropped_episodes": 0,
    }


def test_a_task_without_success_has_none():
    summary = summarize([1.0, 2.0], None)
    assert summary.success_rate is None
    assert summary.success_ci95 is None


def test_returns_and_successes_of_different_episodes_are_refused():
    with pytest.raises(ValueError, match="2 returns but 1 successes"):
        summarize([1.0, 2.0], [True])
