import io
import re

import pytest
from rich.console import Console

from dppo.output import progress
from dppo.output.progress import HEADER_EVERY, SILENCE_S, Progress, bar

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Screen:
    """A console whose output is kept."""

    def __init__(self, *, terminal: bool):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=40, color_system=None)

    @property
    def text(self) -> str:
        return self.file.getvalue()


class Clock:
    """What the progress takes for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)


def row(iteration, **values):
    return {"iteration": iteration, "env_steps": 1000 * iteration, "env_steps_per_s": 512.3, **values}


def shown(rows, *, terminal=False):
    screen = Screen(terminal=terminal)
    with Progress(4000, "env_steps", console=screen.console) as running:
        for each in rows:
            running.advance(1000)
            running.update(each)
    return screen.text


def test_a_log_file_gets_plain_lines_that_are_not_wrapped():
    text = shown([row(1, return_mean=1234.5, success_rate=0.25, approx_kl=0.0042, clip_fraction=0.1)])
    assert not CONTROL.search(text)
    header, line = text.splitlines()
    assert header.split() == ["iter", "env", "steps", "return", "success", "KL", "clipped", "steps/s", "done", "left"]
    assert line.split()[:-1] == ["1", "1,000", "1,234", "25", "%", "0.0042", "10", "%", "512", "25", "%"]
    assert max(len(header), len(line)) <= 80


def test_a_metric_without_a_value_is_a_dash_and_a_column_without_any_is_not_shown():
    lines = shown([row(1, return_mean=1.0, success_rate=None), row(2, return_mean=None)]).splitlines()
    assert "success" not in lines[0]
    assert lines[2].split()[2] == "-"


def test_a_column_that_comes_late_gets_a_new_header():
    lines = shown([row(1), row(2, eval_return_mean=5.0), row(3)]).splitlines()
    assert [("eval" in line) for line in lines] == [False, False, True, False, False]
    assert lines[4].split()[2] == "-"


def test_a_log_repeats_its_header_and_a_terminal_does_not():
    rows = [row(1)] * (HEADER_EVERY + 1)
    assert shown(rows).count("env steps") == 2
    assert shown(rows, terminal=True).count("env steps") == 1


def test_a_terminal_has_the_lines_and_a_bar_that_is_gone_in_the_end():
    text = shown([row(1), row(2)], terminal=True)
    assert "training" in text
    assert "50%" in text
    assert text.rstrip().endswith("\x1b[2K")


def test_the_time_left_is_reckoned_from_the_share_that_is_done(monkeypatch):
    clock = Clock(monkeypatch)
    screen = Screen(terminal=False)
    running = Progress(4000, "env_steps", console=screen.console)
    clock.now += 30.0
    running.update(row(1))
    assert screen.text.split()[-1] == "1:30"


def test_not_all_is_done_before_it_is():
    screen = Screen(terminal=False)
    running = Progress(4000, "env_steps", console=screen.console)
    running.update({**row(1), "env_steps": 3999})
    assert "99 %" in screen.text


def test_more_steps_than_planned_leave_no_time():
    assert shown([row(5)]).split()[-1] == "0:00"


def test_a_row_without_iterations_counts_in_its_own_unit():
    screen = Screen(terminal=False)
    running = Progress(100, "updates", console=screen.console)
    running.update({"updates": 50, "train_loss": 0.5, "validation_loss": 0.25, "updates_per_s": 20.0})
    header, line = screen.text.splitlines()
    assert header.split() == ["updates", "loss", "val", "loss", "updates/s", "done", "left"]
    assert line.split()[:4] == ["50", "0.5000", "0.2500", "20"]


def test_a_bar_inside_a_progress_display_is_allowed():
    screen = Screen(terminal=True)
    with Progress(10, "env_steps", console=screen.console), bar("evaluating", 5, console=screen.console) as advance:
        advance(5)
        screen.console.print("inside")
    assert "inside" in screen.text


def test_a_bar_is_one_line_in_a_log():
    screen = Screen(terminal=False)
    with bar("evaluating [x]", 5, console=screen.console) as advance:
        advance(5)
    assert screen.text == "evaluating [x] ...\n"


def test_a_log_that_is_silent_for_long_hears_how_far_the_work_is(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen(terminal=False)
    with bar("evaluating", 8, console=screen.console) as advance:
        for _ in range(4):
            clock.now += 0.75 * SILENCE_S
            advance(1)
    assert screen.text.splitlines()[1:] == ["evaluating: 25 %, 4:30 left", "evaluating: 50 %, 3:00 left"]


def test_a_long_iteration_does_not_look_dead_in_a_log_and_its_row_is_a_sign_of_life(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen(terminal=False)
    with Progress(4000, "env_steps", console=screen.console) as running:
        clock.now += 1.5 * SILENCE_S
        running.advance(500)
        running.advance(500)
        running.update(row(1))
        clock.now += 0.75 * SILENCE_S
        running.advance(500)
    assert [line.split()[0] for line in screen.text.splitlines()] == ["training:", "iter", "1"]


def test_a_terminal_has_a_bar_and_no_signs_of_life(monkeypatch):
    clock, screen = Clock(monkeypatch), Screen(terminal=True)
    with bar("evaluating", 8, console=screen.console) as advance:
        clock.now += 2 * SILENCE_S
        advance(1)
    assert "left\n" not in screen.text
