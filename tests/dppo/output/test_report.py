import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from dppo.output.report import duration, final_table, number, small
from dppo.statistics import summarize

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def test_the_final_table_shows_evaluations_pace_and_whole_paths():
    before, after = summarize([1.0, 3.0], [False, False]), summarize([2000.0], [True])
    file = io.StringIO()
    path = Path("runs") / ("long-name-" * 10) / "curve [1].png"
    final_table(
        {"before": before, "runs/[a]/after": after},
        env_steps=6000,
        seconds=60.0,
        paths={"learning curve": path},
        console=Console(file=file, width=80),
    )
    text = file.getvalue()
    assert not CONTROL.search(text)
    assert re.search(r"before\s+2\.00 \[1\.00, 3\.00\]\s+0 % \[0 %, 66 %\]\s+2 *\n", text)
    assert re.search(r"runs/\[a\]/after\s+2,000\s+100 % \[21 %, 100 %\]\s+1 *\n", text)
    assert re.search(r"env steps\s+6,000 in 1:00, 100 per second\n", text)
    assert f"learning curve  {path}\n" in text


def test_the_final_table_of_a_task_without_success_has_no_such_column():
    file = io.StringIO()
    final_table({"after": summarize([1.0], None)}, updates=5, seconds=0.0, paths={}, console=Console(file=file))
    assert "success" not in file.getvalue()
    assert "updates  5 in 0:00\n" in file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (725, "12:05"), (11045, "3:04:05")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(3.123, "3.12"), (-31.26, "-31.3"), (12345.6, "12,346")])
def test_numbers_keep_about_four_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0042, "0.0042"), (4.2e-5, "4.2e-05"), (0, "0.0000"), (8e9, "8.0e+09")])
def test_a_small_kl_is_not_shown_as_none_nor_a_large_one_in_full(value, text):
    assert small(value) == text
