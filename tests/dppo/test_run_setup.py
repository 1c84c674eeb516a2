from pathlib import Path
from typing import Any

import pytest
import torch

from dppo import run_setup
from dppo.output.metrics import TensorBoardSink
from dppo.output.run_directory import RunDirectory
from dppo.run_setup import build_sinks, open_run, prepare_device
from policies import UserError

CONFIG: dict[str, Any] = {"device": "auto", "threads": None, "seed": 0, "run": None, "overwrite": False}


def test_the_automatic_device_is_a_gpu_where_there_is_one(monkeypatch):
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert prepare_device(CONFIG).type == kind


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(UserError, match=f"device={device} cannot be used: ") as caught:
        prepare_device({**CONFIG, "device": device})
    assert "\n" not in str(caught.value)


def test_the_number_of_threads_is_set_only_if_it_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    prepare_device(CONFIG)
    assert asked == []
    prepare_device({**CONFIG, "threads": 3})
    assert asked == [3]


def test_more_threads_than_any_machine_has_are_refused():
    with pytest.raises(UserError, match="threads=100000 is more than"):
        prepare_device({**CONFIG, "threads": 100_000})


@pytest.mark.parametrize("settings", [{"threads": 0}, {"threads": "many"}, {"threads": 1.5}, {"seed": -1}], ids=str)
def test_an_impossible_number_of_threads_or_seed_is_refused(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} must"):
        prepare_device({**CONFIG, **settings})


def opened(config: dict[str, Any], name: str = "unused", source: Path | None = None) -> Path:
    """The directory of a run that is over."""
    with open_run(config, name, source) as directory:
        return directory.path


def test_a_run_at_work_is_not_overwritten(tmp_path):
    config = {**CONFIG, "run": tmp_path / "run", "overwrite": True}
    with open_run(config, "unused") as directory:
        directory.metrics_path.write_text("precious")
        with pytest.raises(UserError, match="another process is at work in"), open_run(config, "unused"):
            pass
        assert directory.metrics_path.read_text() == "precious"
    assert not (opened(config) / "metrics.jsonl").exists()


def test_a_run_without_a_name_takes_the_first_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [opened(CONFIG, "finetune-hopper") for _ in range(3)]
    assert [str(path) for path in names] == [f"runs/finetune-hopper{end}" for end in ("", "-2", "-3")]
    assert (tmp_path / "runs" / "finetune-hopper-2" / "config.yaml").is_file()


def test_a_named_run_is_where_it_was_asked_for_and_never_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened({**CONFIG, "run": "~/mine"}) == tmp_path / "mine"
    with pytest.raises(UserError, match=r"mine exists; choose another run=\.\.\., or overwrite=true"):
        opened({**CONFIG, "run": "~/mine"})


def test_a_run_may_be_named_with_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opened({**CONFIG, "run": 7}) == Path("7")


def test_overwriting_a_run_without_a_name_takes_the_plain_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened(CONFIG, "finetune-hopper")
    assert str(opened({**CONFIG, "overwrite": True}, "finetune-hopper")) == "runs/finetune-hopper"


def test_overwriting_spares_the_checkpoint_that_a_run_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = opened({**CONFIG, "run": "mine"}) / "checkpoints" / "1" / "policy"
    source.mkdir(parents=True)
    for run in ("mine", "./mine", str(tmp_path / "mine")):
        with pytest.raises(UserError, match="would delete the checkpoint"):
            opened({**CONFIG, "run": run, "overwrite": True}, source=source)
    assert source.is_dir()
    assert opened({**CONFIG, "run": "other", "overwrite": True}, source=source) == Path("other")


def test_loggers_by_name(tmp_path):
    run = RunDirectory(tmp_path)
    assert build_sinks({"logger": {"type": "none"}}, run, "env_steps") == []
    (sink,) = build_sinks({"logger": {"type": "tensorboard"}}, run, "env_steps")
    assert isinstance(sink, TensorBoardSink)
    sink.close()


@pytest.mark.parametrize(
    ("kind", "says"),
    [("csv", "unknown logger.type 'csv'; there are: tensorboard, wandb, none"), ("wandb", "pip install")],
)
def test_a_logger_that_cannot_work_leaves_no_run_directory(tmp_path, monkeypatch, kind, says):
    monkeypatch.setattr(run_setup, "find_spec", lambda name: None)
    config = {"logger": {"type": kind}, "run": tmp_path / "run", "overwrite": False}
    with pytest.raises(UserError, match=says):
        opened(config)
    assert not (tmp_path / "run").exists()


def test_wandb_is_given_its_settings_and_the_configuration(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(run_setup, "WandbSink", lambda run, **settings: given.update(settings))
    config = {"logger": {"type": "wandb", "project": "mine"}, "seed": 3}
    build_sinks(config, RunDirectory(tmp_path), "updates")
    assert given == {"project": "mine", "x_axis": "updates", "config": config}
