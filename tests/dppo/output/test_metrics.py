import json
import sys
from types import SimpleNamespace

import pytest

from dppo.output.metrics import LONGEST_ROW, MetricsLogger, TensorBoardSink, WandbSink, last_row, read_metrics
from dppo.output.run_directory import RunDirectory
from policies.errors import UserError


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


class Recorder:
    def __init__(self):
        self.rows = []
        self.closed = False

    def log(self, row):
        self.rows.append(row)

    def close(self):
        self.closed = True


def test_each_row_is_one_line_that_is_on_disk_at_once(run):
    with MetricsLogger(run) as logger:
        logger.log({"iteration": 1, "return_mean": 2.5})
        logger.log({"iteration": 2, "return_mean": float("nan"), "approx_kl": None, "loss": float("inf")})
        lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 1, "return_mean": 2.5},
        {"iteration": 2, "return_mean": None, "approx_kl": None, "loss": None},
    ]


def test_sinks_get_the_rows_without_nan_and_are_closed(run):
    sink = Recorder()
    with MetricsLogger(run, [sink]) as logger:
        logger.log({"env_steps": 1, "return_mean": float("nan")})
        assert not sink.closed
    assert sink.rows == [{"env_steps": 1, "return_mean": None}]
    assert sink.closed


def test_a_last_line_that_was_cut_off_is_left_out(run):
    run.metrics_path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iterat')
    assert read_metrics(run.metrics_path) == [{"iteration": 1}, {"iteration": 2}]


def test_a_damaged_line_in_the_middle_is_named(run):
    run.metrics_path.write_text('{"iteration": 1}\n{"iterat\n{"iteration": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(run.metrics_path)


def test_the_last_row_is_the_last_whole_one_however_long_the_file_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) is None
    path.write_text('{"n": 0')
    assert last_row(path) is None
    with path.open("w") as file:
        file.writelines(json.dumps({"n": n, "text": "x" * 100}) + "\n" for n in range(2 * LONGEST_ROW // 100))
        file.write('{"n": ')
    found = last_row(path)
    assert found is not None
    assert found["n"] == 2 * LONGEST_ROW // 100 - 1
    path.write_text('{"n": 0}\n{"n": \x01}\n')
    assert last_row(path) is None, "damaged"


def test_metrics_that_are_not_there_are_one_clear_line(run):
    with pytest.raises(UserError, match="cannot read metrics"):
        read_metrics(run.metrics_path)


def test_tensorboard_gets_a_scalar_per_value_at_its_environment_steps(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(run, [TensorBoardSink(run)]) as logger:
        logger.log({"env_steps": 100, "return_mean": None, "approx_kl": 0.5})
        logger.log({"env_steps": 200, "return_mean": 3.0, "approx_kl": 0.25})
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"return_mean": [(200, 3.0)], "approx_kl": [(100, 0.5), (200, 0.25)]}


def test_a_missing_wandb_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WandbSink(run, project="dppo", config={})


def test_wandb_gets_the_values_the_configuration_and_the_axis(run, monkeypatch):
    seen = SimpleNamespace(rows=[], axes=[], finished=False)

    class Run:
        def define_metric(self, name, step_metric):
            seen.axes.append((name, step_metric))

        def log(self, row):
            seen.rows.append(row)

        def finish(self):
            seen.finished = True

    def init(**settings):
        seen.settings = settings
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with MetricsLogger(run, [WandbSink(run, project="dppo", config={"seed": 1}, x_axis="updates")]) as logger:
        logger.log({"updates": 5, "train_loss": 0.1, "validation_loss": None})
    assert seen.settings["config"] == {"seed": 1}
    assert seen.settings["name"] == run.path.name
    assert seen.axes == [("*", "updates")]
    assert seen.rows == [{"updates": 5, "train_loss": 0.1}]
    assert seen.finished
