"""Acting at a fixed rate: the next chunk is computed in the background while the present one is executed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

import numpy as np

from policies.runner import History, Plan

Clock = Callable[[], float]
"""Seconds since some moment."""


class Timed:
    """A plan that keeps how long each of its calls took."""

    def __init__(self, plan: Plan, clock: Clock = time.perf_counter) -> None:
        self._plan, self._clock = plan, clock
        self.seconds: list[float] = []

    def __call__(self, history: np.ndarray) -> np.ndarray:
        began = self._clock()
        chunk = self._plan(history)
        self.seconds.append(self._clock() - began)
        return chunk


class BackgroundRunner:
    """Executes chunks whose successors come from another thread.

    The next chunk is asked for when ``lead`` actions of the present one are left, and for the observation of that step.
    What of it has become past when it arrives is skipped, and what is left of the present one with it. So an answer may
    take ``lead`` steps, and a chunk must be longer than that. Where it takes longer, there is nothing left to execute:
    that step misses its deadline and repeats the last action. A chunk that is all past on arrival is skipped whole.
    """

    def __init__(self, plan: Plan, history: int, lead: int, executor: Executor) -> None:
        """``history`` is To; the executor should have one thread, since calls of a plan share its noise."""
        if lead < 1:
            raise ValueError(f"lead must be at least 1, not {lead}")
        self._plan, self._executor, self._lead = plan, executor, lead
        self._history = History(history)
        self._step = 0
        self._chunk: np.ndarray | None = None
        self._began = 0
        """The step that the chunk's first action belongs to."""
        self._coming: Future[np.ndarray] | None = None
        self._asked = 0
        """The step that the coming chunk's first action belongs to."""
        self.missed = 0
        """Deadlines so far: steps that had no action of their own."""
        self.skipped = 0
        """Actions so far that were past when they arrived."""

    def reset(self) -> None:
        """A new episode begins, whose first action is waited for; a chunk that is still to come is thrown away."""
        self._history.clear()
        self._chunk, self._coming = None, None

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The action [Da] for this step, after its observation [Do]; only the first of an episode is waited for.

        Raises:
            ValueError: the plan makes chunks that are no longer than the lead.
        """
        history = self._history.add(obs)
        if self._chunk is None:
            self._ask(history)
        self._receive(wait=self._chunk is None)
        if self._coming is None and self._left() <= self._lead:
            self._ask(history)
        return self._next()

    def _ask(self, history: np.ndarray) -> None:
        self._coming, self._asked = self._executor.submit(self._plan, history), self._step

    def _receive(self, *, wait: bool) -> None:
        """Go over to the chunk that was asked for, if it is there."""
        if self._coming is None or not (wait or self._coming.done()):
            return
        chunk, self._coming = self._coming.result(), None
        if len(chunk) <= self._lead:
            raise ValueError(f"chunks must be longer than lead = {self._lead}, and this one has {len(chunk)} actions")
        past = self._step - self._asked
        self.skipped += min(past, len(chunk))
        if past < len(chunk):
            self._chunk, self._began = chunk, self._asked

    def _left(self) -> int:
        """Actions of the chunk from this step on."""
        assert self._chunk is not None
        return max(self._began + len(self._chunk) - self._step, 0)

    def _next(self) -> np.ndarray:
        assert self._chunk is not None
        left = self._left()
        self.missed += left == 0
        self._step += 1
        return self._chunk[-left] if left else self._chunk[-1]


class Pace:
    """Keeps a loop to its rate."""

    def __init__(self, period: float, clock: Clock = time.perf_counter, sleep: Callable[[float], None] = time.sleep):
        """``period`` in seconds."""
        self._period, self._clock, self._sleep = period, clock, sleep
        self._due: float | None = None
        self.late = 0
        """Steps so far that ended after their period."""

    def wait(self) -> None:
        """Sleep until the step that begins now is due, at once the first time; after a late one, time counts anew."""
        now = self._clock()
        if self._due is None or now > self._due:
            self.late += self._due is not None
            self._due = now
        else:
            self._sleep(self._due - now)
        self._due += self._period
