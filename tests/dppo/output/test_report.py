import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dppo.output.report import HEADER_EVERY, Progress, bar, duration, final_table, number, small
from dppo.statistics import summarize

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Screen:
    """A console whose output is kept."""

    def __init__(self, *, terminal: bool):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=40, color_system=None)

    @property
    def text(self) -> str:
        return self.file.getvalue()


def row(iteration, **values):
    return {"iteration": iteration, "env_steps": 1000 * iteration, "env_steps_per_s": 512.3, **values}


def shown(rows, *, terminal=False):
    screen = Screen(terminal=terminal)
    with Progress(4000, "env_steps", console=screen.console) as progress:
        for each in rows:
            progress.advance(1000)
            progress.update(each)
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
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("dppo.output.report.time.perf_counter", lambda: next(clock))
    screen = Screen(terminal=False)
    progress = Progress(4000, "env_steps", console=screen.console)
    progress.update(row(1))
    assert screen.text.split()[-1] == "1:30"


def test_more_steps_than_planned_leave_no_time():
    assert shown([row(5)]).split()[-1] == "0:00"


def test_a_row_without_iterations_counts_in_its_own_unit():
    screen = Screen(terminal=False)
    progress = Progress(100, "updates", console=screen.console)
    progress.update({"updates": 50, "train_loss": 0.5, "validation_loss": 0.25, "updates_per_s": 20.0})
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


def test_the_final_table_shows_evaluations_pace_and_whole_paths():
    before, after = summarize([1.0, 3.0], [False, False]), summarize([2000.0], [True])
    screen = Screen(terminal=False)
    path = Path("runs") / ("long-name-" * 10) / "curve [1].png"
    final_table(
        {"before": before, "runs/[a]/after": after},
        env_steps=6000,
        seconds=60.0,
        paths={"learning curve": path},
        console=Console(file=screen.file, width=80),
    )
    text = screen.text
    assert not CONTROL.search(text)
    assert re.search(r"before\s+2\.00 \[1\.00, 3\.00\]\s+0 % \[0 %, 66 %\]\s+2 *\n", text)
    assert re.search(r"runs/\[a\]/after\s+2,000\s+100 % \[21 %, 100 %\]\s+1 *\n", text)
    assert re.search(r"env steps\s+6,000 in 1:00, 100 per second\n", text)
    assert f"learning curve  {path}\n" in text


def test_the_final_table_of_a_task_without_success_has_no_such_column():
    screen = Screen(terminal=False)
    final_table({"after": summarize([1.0], None)}, updates=5, seconds=0.0, paths={}, console=screen.console)
    assert "success" not in screen.text
    assert "updates  5 in 0:00\n" in screen.text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (725, "12:05"), (11045, "3:04:05")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(3.123, "3.12"), (-31.26, "-31.3"), (12345.6, "12,346")])
def test_numbers_keep_about_four_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0042, "0.0042"), (4.2e-5, "4.2e-05"), (0.0, "0.0000")])
def test_a_small_kl_is_not_shown_as_none(value, text):
    assert small(value) == text
