from collections.abc import Callable
from pathlib import Path

import pytest

from dppo import saving
from dppo.durable import new_directory
from dppo.saving import Best, CheckpointConfig, Checkpoints
from dppo.statistics import EvaluationSummary, summarize
from dppo.stopping import Stopped
from policies import UserError


def result(value: float, success: bool | None = None) -> EvaluationSummary:
    return summarize([value], None if success is None else [success])


def write(path: Path) -> None:
    with new_directory(path):
        pass


@pytest.fixture
def checkpoints(tmp_path) -> Callable[..., Checkpoints]:
    def make(**settings: float) -> Checkpoints:
        config = {"checkpoint_interval": 1, "checkpoint_minutes": 0, "keep_checkpoints": 2, **settings}
        return Checkpoints(tmp_path, CheckpointConfig(**config), write, go_on="this")  # type: ignore[arg-type]

    return make


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_and_the_best_are_kept(checkpoints, tmp_path):
    kept = checkpoints()
    for iteration, value in enumerate((1.0, 5.0, 2.0, 3.0, 4.0), 1):
        kept.after(iteration, 10 * iteration, result(value))
    assert names(tmp_path) == {"20", "40", "50", "best"}
    assert (tmp_path / "best").resolve() == tmp_path / "20"


def test_no_limit_keeps_all(checkpoints, tmp_path):
    kept = checkpoints(keep_checkpoints=0)
    for iteration in range(1, 6):
        kept.after(iteration, iteration, None)
    assert names(tmp_path) == set("12345")


def test_success_counts_before_return(checkpoints, tmp_path):
    kept = checkpoints()
    kept.after(1, 1, result(5.0, success=False))
    kept.after(2, 2, result(1.0, success=True))
    kept.after(3, 3, result(9.0, success=False))
    assert (tmp_path / "best").resolve().name == "2"


def test_the_best_is_saved_when_it_is_found_whatever_the_interval(checkpoints, tmp_path):
    kept = checkpoints(checkpoint_interval=0)
    kept.after(1, 10, result(1.0))
    kept.after(2, 20, result(0.0))
    kept.after(3, 30, None)
    assert names(tmp_path) == {"10", "best"}


def test_no_more_time_passes_than_allowed(checkpoints, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    kept = checkpoints(checkpoint_interval=0, checkpoint_minutes=2)
    for iteration, seconds in enumerate((60, 119, 121, 200, 242), 1):
        now[0] = seconds
        kept.after(iteration, iteration, None)
    assert names(tmp_path) == {"3", "5"}


def test_nothing_is_removed_before_the_new_one_is_there(checkpoints, tmp_path, monkeypatch):
    kept = checkpoints(keep_checkpoints=1)
    kept.save(1)

    def fail(path: Path) -> None:
        raise UserError("no room")

    monkeypatch.setattr(kept, "_write", fail)
    with pytest.raises(UserError, match=r"^no room$"):
        kept.save(2)
    assert names(tmp_path) == {"1"}


def test_what_fails_is_followed_by_how_to_go_on_and_what_is_stopped_says_so_itself(checkpoints, tmp_path, capsys):
    kept = checkpoints()
    for error in (UserError("no room"), Stopped(2, "all is saved")):
        with pytest.raises(type(error)), kept.told_on_failure():
            raise error
    kept.save(1)
    with pytest.raises(KeyboardInterrupt), kept.told_on_failure():
        raise KeyboardInterrupt
    told = [
        "there is no checkpoint yet; `this` starts anew",
        f"the last checkpoint is {tmp_path}/1; `this` goes on from it",
    ]
    assert capsys.readouterr().out.splitlines() == told


def test_going_on_removes_what_claims_to_be_newer(checkpoints, tmp_path):
    for steps in ("10", "20", "30"):
        write(tmp_path / steps)
    kept = checkpoints()
    kept.go_on(tmp_path / "20", Best(10, None, 3.0), None)
    assert names(tmp_path) == {"10", "20", "best"}
    kept.save(20)
    kept.after(1, 40, result(2.0))
    assert names(tmp_path) == {"10", "20", "40", "best"}


@pytest.mark.parametrize("name", ["checkpoint_interval", "checkpoint_minutes", "keep_checkpoints"])
def test_negative_settings_are_refused(checkpoints, name):
    with pytest.raises(ValueError, match=f"{name} must not be negative"):
        checkpoints(**{name: -1})
