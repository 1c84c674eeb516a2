import json
import sys
from pathlib import Path

import pytest

from dppo.checkpoint import save_checkpoint
from dppo.output.report import number
from dppo.task import Task


@pytest.fixture
def saved(small_policy, tmp_path) -> Path:
    """The run directory of a policy for the point task."""
    task = Task("point", "Point-v0", success_reward=-0.1)
    save_checkpoint(tmp_path / "trained" / "checkpoints" / "100", small_policy("diffusion"), task, {})
    return tmp_path / "trained"


def test_an_evaluation_writes_its_summary_and_every_episode(command, saved, tmp_path):
    summary = command("evaluate", f"checkpoint={saved}", f"run={tmp_path / 'run'}", "episodes=6", "num_envs=3")
    content = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"task", "policy", "checkpoint", "evaluation", "episodes"} == set(content) == set(summary)
    assert content["evaluation"]["episodes"] == len(content["episodes"]) == 6
    assert [episode["env"] for episode in content["episodes"]] == [0, 0, 1, 1, 2, 2]
    assert set(content["episodes"][0]) == {"env", "undiscounted_return", "length", "success"}
    returns = [episode["undiscounted_return"] for episode in content["episodes"]]
    assert content["evaluation"]["return_mean"] == pytest.approx(sum(returns) / 6)


def test_a_run_a_checkpoint_and_a_policy_are_evaluated_alike(command, saved, tmp_path):
    forms = [saved, saved / "checkpoints" / "100", saved / "checkpoints" / "100" / "policy"]
    results = [
        command("evaluate", f"checkpoint={form}", f"run={tmp_path / str(number)}")["episodes"]
        for number, form in enumerate(forms)
    ]
    assert results[0] == results[1] == results[2]


def test_the_run_directory_is_named_after_task_and_policy(command, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("evaluate", f"checkpoint={saved}")
    command("evaluate", f"checkpoint={saved}")
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["evaluate-point-diffusion", "evaluate-point-diffusion-2"]


def test_the_table_shows_return_and_success(command, saved, tmp_path, capsys):
    summary = command("evaluate", f"checkpoint={saved}", f"run={tmp_path / 'run'}")
    shown = capsys.readouterr().out
    assert "return (95 % CI)" in shown
    assert "success (95 % CI)" in shown
    assert number(summary["evaluation"]["return_mean"]) in shown


def test_a_checkpoint_is_evaluated_under_another_sampler(command, saved, tmp_path, capsys):
    own = command("evaluate", f"checkpoint={saved}", f"run={tmp_path / 'own'}")
    assert "4 of 4 denoising steps with eta = 1" in capsys.readouterr().out
    ddim = ["sampler=ddim", "sampler.steps=2"]
    other = command("evaluate", f"checkpoint={saved}", f"run={tmp_path / 'other'}", *ddim)
    assert own["evaluation"] != other["evaluation"]
    assert "2 of 4 denoising steps with eta = 0" in capsys.readouterr().out
    assert "steps: 2" in (tmp_path / "other" / "config.yaml").read_text()


# --- errors


def test_a_checkpoint_that_was_cut_short_is_one_line_and_writes_nothing(refused, saved, tiny, tmp_path):
    weights = saved / "checkpoints" / "100" / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    message = refused("evaluate", *tiny["evaluate"], f"checkpoint={saved}", f"run={tmp_path / 'run'}")
    assert "(no whole checkpoints/<steps>/ in it)" in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_was_never_finished_is_not_taken(refused, saved):
    (saved / "checkpoints" / "100").rename(saved / "checkpoints" / "100.tmp")
    assert "is neither a run" in refused("evaluate", f"checkpoint={saved}")


def test_a_policy_that_knows_no_task_is_refused(refused, small_policy, tmp_path):
    small_policy("gaussian").save_pretrained(tmp_path / "policy")
    assert "does not say which task it was trained for" in refused("evaluate", f"checkpoint={tmp_path / 'policy'}")


def test_a_task_whose_environment_is_not_installed_says_so(refused, small_policy, tmp_path):
    save_checkpoint(tmp_path / "1", small_policy("gaussian"), Task("elsewhere", "no_such_package:Reach-v0"), {})
    arguments = [f"checkpoint={tmp_path / '1'}", f"run={tmp_path / 'run'}", "trust=no_such_package"]
    message = refused("evaluate", *arguments)
    assert "needs the Python module 'no_such_package'; install it" in message


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_no_module_is_imported_because_a_checkpoint_says_so(
    refused, small_policy, tmp_path, monkeypatch, tiny, command
):
    """Not even in what looks for settings that follow from the checkpoint."""
    (tmp_path / "mischief.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mischief", raising=False)
    save_checkpoint(tmp_path / "1", small_policy("gaussian"), Task("elsewhere", "mischief:Reach-v0"), {})
    arguments = [*tiny[command], f"checkpoint={tmp_path / '1'}", f"run={tmp_path / 'run'}"]
    message = refused(command, *arguments)
    assert "asks for an environment of the module 'mischief'" in message and "add trust=mischief" in message
    assert not (tmp_path / "trace").exists() and not (tmp_path / "run").exists()
    refused(command, *arguments, "trust=mischief")  # which has no such environment
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_an_id_of_gymnasium_that_imports_what_it_is_told_is_refused(refused, small_policy, tmp_path, tiny, command):
    task = Task("elsewhere", "GymV26Environment-v0", {"env_id": "mischief:Reach-v0"})
    save_checkpoint(tmp_path / "1", small_policy("gaussian"), task, {})
    message = refused(command, *tiny[command], f"checkpoint={tmp_path / '1'}", f"run={tmp_path / 'run'}")
    assert "asks for GymV26Environment-v0, which imports what it is told" in message


@pytest.mark.parametrize("name", ["../../elsewhere", "", ".", "..", "a\\b", "a\nb"])
def test_a_task_in_a_checkpoint_names_no_path(refused, small_policy, tmp_path, name):
    save_checkpoint(tmp_path / "1", small_policy("gaussian"), Task("point", "Point-v0"), {})
    path = tmp_path / "1" / "policy" / "config.json"
    content = json.loads(path.read_text())
    content["metadata"]["task"]["name"] = name
    path.write_text(json.dumps({**content, "sha256": None}))
    assert "a task's name becomes part of paths" in refused("evaluate", f"checkpoint={path.parent}")


def test_an_environment_that_only_ever_returns_nan_is_given_up(refused, small_policy, tmp_path):
    save_checkpoint(tmp_path / "1", small_policy("gaussian"), Task("point", "Point-v0", {"broken": 1}), {})
    message = refused("evaluate", f"checkpoint={tmp_path / '1'}", f"run={tmp_path / 'run'}", "episodes=3", "num_envs=3")
    assert "task point: 6 episodes were dropped" in message


def test_a_checkpoint_whose_environment_has_changed_its_dimensions_is_refused_with_both(
    refused, small_policy, tmp_path
):
    save_checkpoint(tmp_path / "1", small_policy("gaussian"), Task("pendulum", "Pendulum-v1"), {})
    message = refused("evaluate", f"checkpoint={tmp_path / '1'}", f"run={tmp_path / 'run'}")
    assert "does not fit task pendulum: its policy has obs_dim 2" in message
