import numpy as np
import pytest

from dppo.comparison.statistics import curve_ci95, improvement_ci95, iqm, iqm_ci95


def scores(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1, 2, 3, 100), 2.5), ((5, 1, 2, 3, -50), 2), ((7,), 7), ((1, 2), 1.5), (tuple(range(8)), 3.5)],
)
def test_the_interquartile_mean_leaves_out_a_quarter_on_either_side(values, expected):
    assert iqm(scores(*values)) == pytest.approx(expected)


def test_the_interval_holds_the_value_and_shrinks_with_more_runs():
    rng = np.random.default_rng(0)
    few, many = (iqm_ci95([rng.normal(10, 1, size)]) for size in (5, 200))
    for value, low, high in (few, many):
        assert low < value < high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = [low <= 0 <= high for _, low, high in (iqm_ci95([rng.normal(size=20)]) for _ in range(150))]
    assert 0.85 < np.mean(hits) <= 0.99


def test_a_single_run_has_no_interval():
    assert iqm_ci95([scores(3)]) == (3, None, None)
    assert iqm_ci95([scores(3, 4), scores(3)]).low is None


def test_the_bootstrap_draws_from_each_task_as_many_runs_as_it_has():
    """Equal runs on each of two tasks: however they are drawn, both tasks are there, and nothing varies."""
    assert iqm_ci95([scores(1, 1, 1), scores(5, 5, 5)]) == (3, 3, 3)


def test_the_same_scores_give_the_same_interval():
    values = [scores(1, 5, 2, 8, 3)]
    assert iqm_ci95(values) == iqm_ci95(values)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([scores(3, 4)], [scores(1, 2)], 1.0),
        ([scores(1, 2)], [scores(3, 4)], 0.0),
        ([scores(1, 3)], [scores(2, 2)], 0.5),
        ([scores(2, 2)], [scores(2, 2)], 0.5),
        ([scores(3, 3), scores(0, 0)], [scores(1, 1), scores(0, 5)], (1 + 0.25) / 2),
    ],
)
def test_the_probability_of_improvement_counts_pairs_on_the_same_task(ours, theirs, expected):
    assert improvement_ci95(ours, theirs).value == pytest.approx(expected)


def test_the_probabilities_of_two_methods_over_each_other_add_up_to_one():
    ours, theirs = [scores(1, 5, 2, 8, 3)], [scores(4, 4, 1, 9)]
    first, second = improvement_ci95(ours, theirs), improvement_ci95(theirs, ours)
    assert first.value + second.value == pytest.approx(1)
    assert first.low < first.value < first.high


def test_the_band_of_a_curve_is_the_interval_at_each_point():
    curves = np.stack([np.linspace(0, 1, 6) * slope for slope in (1.0, 2.0, 3.0, 4.0)])
    value, low, high = curve_ci95(curves)
    np.testing.assert_allclose(value, np.linspace(0, 1, 6) * 2.5)
    assert (low <= value).all() and (value <= high).all()
    assert value[0] == low[0] == high[0]
    value, low, high = curve_ci95(curves[:1])
    assert (value == low).all() and (value == high).all()
