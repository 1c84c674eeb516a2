"""What is executed at each step while chunks arrive sooner or later, by hand arithmetic and without a real clock."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest

from policies.realtime import BackgroundRunner, Pace, Timed


class ByHand(Executor):
    """Computes at once, or, once ``holding``, when it is told to."""

    def __init__(self) -> None:
        self.holding = False
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        if not self.holding:
            self.finish()
        return future

    def finish(self) -> None:
        future, call = self.waiting.pop(0)
        try:
            future.set_result(call())
        except ZeroDivisionError as error:
            future.set_exception(error)


def plan(history: np.ndarray) -> np.ndarray:
    """Four actions: ten times the latest observation, which is the number of its step, plus 0 to 3."""
    return 10 * history[-1, 0] + np.arange(4)


def acting(executor: Executor, lead: int = 2) -> tuple[BackgroundRunner, Callable[[int], float]]:
    runner = BackgroundRunner(plan, 1, lead, executor)
    return runner, lambda step: float(runner.act(np.array([step])))


def test_the_tail_of_a_chunk_is_executed_until_the_next_arrives_without_what_is_past() -> None:
    runner, act = acting(executor := ByHand())
    assert [act(0), act(1)] == [0, 1]
    executor.holding = True
    assert act(2) == 2  # two are left: asks for the chunk of step 2
    assert act(3) == 3
    executor.finish()
    assert act(4) == 22  # of the chunk 20, 21, 22, 23, two are past; asks for that of step 4
    executor.finish()
    assert act(5) == 41
    assert (runner.missed, runner.skipped) == (0, 2 + 1)


def test_a_chunk_that_comes_too_late_costs_deadlines_and_repeats_the_last_action() -> None:
    runner, act = acting(executor := ByHand())
    assert [act(0), act(1)] == [0, 1]
    executor.holding = True
    assert [act(2), act(3), act(4)] == [2, 3, 3]
    assert runner.missed == 1
    executor.finish()
    assert act(5) == 23
    assert (runner.missed, runner.skipped) == (1, 3)


def test_a_chunk_that_is_all_past_on_arrival_is_skipped_whole_and_the_next_is_asked_for_at_once() -> None:
    runner, act = acting(executor := ByHand())
    assert [act(0), act(1)] == [0, 1]
    executor.holding = True
    assert [act(step) for step in range(2, 7)] == [2, 3, 3, 3, 3]
    executor.finish()
    assert act(7) == 3  # still the last that was executed
    assert (runner.missed, runner.skipped, len(executor.waiting)) == (4, 4, 1)
    executor.finish()
    assert act(8) == 71


def test_while_one_chunk_is_on_its_way_no_other_is_asked_for() -> None:
    _, act = acting(executor := ByHand())
    act(0)
    executor.holding = True
    for step in range(1, 8):
        act(step)
    assert len(executor.waiting) == 1


def test_where_chunks_come_at_once_each_is_executed_up_to_its_lead() -> None:
    runner, act = acting(ByHand(), lead=1)
    # Asked for at the chunk's last action, and there at the next step, as its second.
    assert [act(step) for step in range(8)] == [0, 1, 2, 3, 31, 32, 33, 61]
    assert (runner.missed, runner.skipped) == (0, 2)


def test_a_new_episode_throws_away_what_is_still_to_come_and_waits_for_its_first_chunk() -> None:
    runner, act = acting(executor := ByHand())
    assert [act(0), act(1)] == [0, 1]
    executor.holding = True
    assert act(2) == 2
    executor.finish()
    executor.holding = False
    runner.reset()
    assert [act(50), act(51)] == [500, 501]
    assert (runner.missed, runner.skipped) == (0, 0)


def test_an_error_of_the_plan_reaches_who_acts() -> None:
    def broken(history: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    runner = BackgroundRunner(broken, 1, 1, ByHand())
    with pytest.raises(ZeroDivisionError):
        runner.act(np.zeros(1))


def test_chunks_that_are_no_longer_than_the_lead_are_refused() -> None:
    _, act = acting(ByHand(), lead=4)
    with pytest.raises(ValueError, match="chunks must be longer than lead = 4, and this one has 4 actions"):
        act(0)


def test_a_lead_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="lead must be at least 1, not 0"):
        BackgroundRunner(plan, 1, 0, ByHand())


# --- time


class Time:
    """A clock that moves when somebody sleeps, or works."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_pace_sleeps_for_what_a_step_left_of_its_period() -> None:
    time = Time()
    pace = Pace(2.0, time.clock, time.sleep)
    for work in (0.5, 1.5, 2.0):
        pace.wait()
        time.now += work
    pace.wait()
    assert (time.slept, time.now, pace.late) == ([1.5, 0.5, 0.0], 106.0, 0)


def test_after_a_late_step_time_counts_anew() -> None:
    time = Time()
    pace = Pace(2.0, time.clock, time.sleep)
    for work in (3.0, 0.5):
        pace.wait()
        time.now += work
    pace.wait()
    assert (time.slept, time.now, pace.late) == ([1.5], 105.0, 1)


def test_a_timed_plan_keeps_how_long_each_call_took() -> None:
    time = Time()

    def slow(history: np.ndarray) -> np.ndarray:
        time.now += float(history[0, 0])
        return history

    timed = Timed(slow, time.clock)
    for seconds in (0.25, 2.0):
        assert timed(np.array([[seconds]]))[0, 0] == seconds
    assert timed.seconds == [0.25, 2.0]
