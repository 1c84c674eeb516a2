import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from dppo.output import run_directory
from dppo.output.run_directory import RunDirectory, free_path, provenance, write_json
from policies.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", overwrite=False, config={"seed": 1})


def test_the_configuration_is_written_with_its_provenance(run):
    content = OmegaConf.load(run.config_path)
    assert content.seed == 1
    assert content.provenance.packages.torch == run_directory.metadata.version("torch")
    assert content.provenance.machine.cores >= 1
    assert content.provenance.started.endswith("+00:00")


def test_values_that_look_like_other_types_survive_the_file(tmp_path):
    config = {"text": "1e-3", "rate": 1e-5, "nothing": None, "nested": {"list": [1, "true"]}}
    run = RunDirectory.create(tmp_path / "run", overwrite=False, config=config)
    content = OmegaConf.to_container(OmegaConf.load(run.config_path))
    assert isinstance(content, dict)
    assert {key: content[key] for key in config} == config


def test_provenance_of_an_earlier_run_is_replaced(tmp_path):
    old = {"seed": 1, "provenance": {"started": "long ago"}}
    run = RunDirectory.create(tmp_path / "run", overwrite=False, config=old)
    assert OmegaConf.load(run.config_path).provenance.started != "long ago"


def test_the_name_of_the_host_is_not_recorded():
    import platform

    assert platform.node() not in json.dumps(provenance()["machine"])


def test_the_command_line_is_recorded_as_one_could_type_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dppo", "finetune", "run=my run"])
    assert provenance()["command"] == "dppo finetune 'run=my run'"


def test_a_source_tree_without_git_has_no_revision_and_does_not_fail(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert provenance()["git"] == {"revision": None, "dirty": None}


def test_a_file_that_the_repository_around_it_does_not_track_has_no_revision(tmp_path, monkeypatch):
    installed = tmp_path / "site-packages" / "run_directory.py"
    installed.parent.mkdir()
    installed.write_text("")
    commit(tmp_path, "README")
    monkeypatch.setattr(run_directory, "__file__", str(installed))
    assert provenance()["git"] == {"revision": None, "dirty": None}


def test_a_changed_source_file_makes_the_revision_dirty(tmp_path, monkeypatch):
    commit(tmp_path, "run_directory.py")
    source = tmp_path / "run_directory.py"
    monkeypatch.setattr(run_directory, "__file__", str(source))
    clean = provenance()["git"]
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    source.write_text("changed")
    assert provenance()["git"] == {"revision": clean["revision"], "dirty": True}


def commit(repository: Path, name: str) -> None:
    (repository / name).write_text("content")
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", name], [*identity, "commit", "-q", "-m", "message"]):
        subprocess.run(["git", "-C", str(repository), *command], check=True)


def test_an_earlier_run_is_not_touched_unless_overwriting_is_asked_for(run):
    run.metrics_path.write_text("precious")
    with pytest.raises(UserError, match=r"exists; choose another run=\.\.\., or overwrite=true"):
        RunDirectory.create(run.path, overwrite=False, config={})
    assert run.metrics_path.read_text() == "precious"


def test_overwriting_leaves_nothing_of_the_earlier_run(run):
    run.checkpoints.mkdir()
    (run.checkpoints / "weights").write_text("old")
    run.metrics_path.write_text("old")
    RunDirectory.create(run.path, overwrite=True, config={"seed": 2})
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]
    assert OmegaConf.load(run.config_path).seed == 2


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml"])
def test_overwriting_refuses_a_directory_that_is_no_run(tmp_path, name):
    (tmp_path / name).write_text("seed: 1\n")
    with pytest.raises(UserError, match="no run of dppo"):
        RunDirectory.create(tmp_path, overwrite=True, config={})
    assert (tmp_path / name).read_text() == "seed: 1\n"


def test_overwriting_does_not_follow_links_out_of_the_run(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("precious")
    run.checkpoints.symlink_to(elsewhere)
    RunDirectory.create(run.path, overwrite=True, config={})
    assert (elsewhere / "data").read_text() == "precious"
    assert not run.checkpoints.exists()


def test_an_empty_directory_is_used_as_it_is(tmp_path):
    RunDirectory.create(tmp_path, overwrite=False, config={})
    assert (tmp_path / "config.yaml").exists()


def test_a_file_in_the_place_of_the_directory_is_one_clear_line(tmp_path):
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(UserError, match="is not a directory"):
        RunDirectory.create(path, overwrite=True, config={})
    with pytest.raises(UserError, match="cannot write to the run directory"):
        RunDirectory.create(path / "below", overwrite=True, config={})


def test_a_free_path_is_the_first_that_does_not_exist(tmp_path):
    base = tmp_path / "hopper.v5"
    assert free_path(base) == base
    base.mkdir()
    assert free_path(base) == tmp_path / "hopper.v5-2"
    (tmp_path / "hopper.v5-2").mkdir()
    assert free_path(base) == tmp_path / "hopper.v5-3"


@dataclasses.dataclass(frozen=True)
class Inner:
    values: tuple[float, ...]
    path: Path


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    score: np.float32


def test_nested_dataclasses_become_strict_json_with_null_for_nan(tmp_path):
    value = {"run": Outer(Inner((1.0, float("nan"), float("-inf")), Path("a/b")), np.float32("nan")), 3: np.int64(4)}
    write_json(tmp_path / "summary.json", value)
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content == {"run": {"inner": {"values": [1.0, None, None], "path": "a/b"}, "score": None}, "3": 4}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": True})

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run_directory.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]
