import pytest

from dppo.updates.schedule import schedule_factor


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("constant", 0.0, 1.0),
        ("constant", 1.0, 1.0),
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 0.75),
        ("linear", 1.0, 0.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.25, 0.5 + 0.5 * 0.5**0.5),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.0),
    ],
)
def test_the_factor_by_hand(schedule, progress, expected):
    assert schedule_factor(schedule, progress) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_descent_ends_at_its_final_factor_and_stays_there(schedule):
    assert schedule_factor(schedule, 0.0, final=0.1) == pytest.approx(1.0)
    assert schedule_factor(schedule, 0.5, final=0.1) == pytest.approx(0.55)
    assert schedule_factor(schedule, 1.0, final=0.1) == pytest.approx(0.1)
    assert schedule_factor(schedule, 1.7, final=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_climbs_in_a_straight_line_before_the_descent_begins(schedule):
    factors = [schedule_factor(schedule, progress, warmup=0.2) for progress in (0.0, 0.05, 0.1, 0.2)]
    assert factors == pytest.approx([0.0, 0.25, 0.5, 1.0])


def test_the_descent_takes_what_the_warm_up_has_left():
    assert schedule_factor("linear", 0.6, warmup=0.2) == pytest.approx(0.5)


def test_training_that_is_all_warm_up_has_a_factor():
    assert schedule_factor("linear", 0.5, warmup=1.0) == 0.5
    assert schedule_factor("linear", 1.0, warmup=1.0) == 1.0
