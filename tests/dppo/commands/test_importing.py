"""From a checkpoint of another project to a fine-tuned policy, and back from disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dppo.checkpoint import find_policy, load_policy
from dppo.cli import main
from policies import Policy, hub
from policies.hub import Repository

DATA = Path(__file__).parents[2] / "data" / "imports"
SOURCES = {
    "lerobot": (DATA / "lerobot_ddim", ["task=lerobot"]),
    "diffusion_policy": (DATA / "diffusion_policy_unet_ddim" / "latest.ckpt", ["task=stanford"]),
    "original": (
        DATA / "original_mlp_ddpm" / "pretrained.pt",
        ["task=hopper", "foreign.given={denoising_steps: 20, activation: relu}"],
    ),
}


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    """A directory of tasks that fit the checkpoints, as an option."""
    tasks = {
        "lerobot": {"parts": {"agent_pos": 2, "environment_state": 6, "extra": 1}, "action_dim": 2},
        "stanford": {"parts": {"obs": 4}, "action_dim": 3},
    }
    (tmp_path / "configs" / "task").mkdir(parents=True)
    for name, settings in tasks.items():
        content = {"name": name, "env_id": "Parts-v0", "env_kwargs": settings, "max_episode_steps": None}
        content |= {"success_reward": None, "dataset": ""}
        (tmp_path / "configs" / "task" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["--config-dir", str(tmp_path / "configs")]


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, configs: list[str], tiny: Any) -> Any:
    """Runs a command line, with its tiny settings, to its end; what it printed."""
    monkeypatch.setattr("dppo.output.video.choose_gl_backend", lambda: None)

    def run(command: str, *arguments: str) -> str:
        status = main([command, *arguments, *configs, *tiny.get(command, [])])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return shown.out

    return run


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("name", SOURCES)
def test_a_foreign_checkpoint_is_finetuned_as_it_is_and_imported_is_worth_the_same(
    name: str, done: Any, tmp_path: Path
) -> None:
    source, options = SOURCES[name]
    run, imported = tmp_path / "run", tmp_path / "imported"
    done("finetune", f"checkpoint={source}", f"run={run}", *options, "env_steps=150", "policy.finetuned_steps=2")
    policy, task = load_policy(find_policy(str(run)))
    assert task is not None and task.name == options[0].removeprefix("task=")
    assert policy.num_steps == 2
    shown = done("import", str(source), f"output={imported}", *options)
    assert f"{source} -> {imported}: a diffusion policy" in shown
    assert sorted(path.name for path in imported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    done("evaluate", f"checkpoint={imported}", f"run={tmp_path / 'before'}")
    assert summary(tmp_path / "before")["evaluation"] == summary(run)["before"]


def test_a_foreign_checkpoint_is_evaluated_as_it_is(done: Any, tmp_path: Path) -> None:
    source, options = SOURCES["diffusion_policy"]
    done("evaluate", f"checkpoint={source}", f"run={tmp_path / 'own'}", *options)
    done("import", str(source), f"output={tmp_path / 'imported'}")
    done("evaluate", f"checkpoint={tmp_path / 'imported'}", f"run={tmp_path / 'imported'}-run", *options)
    assert summary(tmp_path / "own")["evaluation"] == summary(tmp_path / "imported-run")["evaluation"]


def test_a_source_on_the_hub_goes_the_same_way(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: Repository, patterns: Sequence[str]) -> Path:
        assert (repository.id, repository.revision) == ("lerobot/diffusion_pusht", "v2")
        return DATA / "lerobot_ddim"

    monkeypatch.setattr(hub, "download", download)
    done("import", "lerobot/diffusion_pusht@v2", f"output={tmp_path / 'imported'}")
    policy, task = load_policy(tmp_path / "imported")
    assert task is None and policy.metadata["inputs"][1] == ["observation.environment_state", 6]


def test_results_are_in_the_card_of_what_was_finetuned_and_of_what_is_saved_after_an_evaluation(
    done: Any, tmp_path: Path
) -> None:
    source, options = SOURCES["original"]
    run, again = tmp_path / "run", tmp_path / "again"
    done("finetune", f"checkpoint={source}", f"run={run}", *options, "env_steps=150", "policy.finetuned_steps=2")
    policy = Policy.from_pretrained(find_policy(str(run)))
    assert policy.metadata["evaluation"] == summary(run)["after"]
    assert "## Results" in (find_policy(str(run)) / "README.md").read_text()
    done("evaluate", f"checkpoint={run}", f"run={again}", "save_policy=true", "seed=3")
    saved = Policy.from_pretrained(again / "policy")
    assert saved.metadata["evaluation"] == summary(again)["evaluation"] != summary(run)["after"]
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in saved.state_dict().items())


# --- errors


def test_a_task_has_to_be_named_where_the_source_says_none(refused: Any, done: Any, tmp_path: Path) -> None:
    source = DATA / "lerobot_ddim"
    done("import", str(source), f"output={tmp_path / 'imported'}")
    for checkpoint in (source, tmp_path / "imported"):
        for command in ("finetune", "evaluate"):
            message = refused(command, f"checkpoint={checkpoint}")
            assert message == f"error: {checkpoint} does not say which task it was trained for; name it: task=..."


def test_what_does_not_fit_is_said_before_anything_is_written(refused: Any, configs: Any, tmp_path: Path) -> None:
    source = DATA / "lerobot_ddim"
    for command, extra in (("finetune", f"run={tmp_path / 'run'}"), ("evaluate", f"run={tmp_path / 'run'}")):
        message = refused(command, f"checkpoint={source}", "task=stanford", extra, *configs)
        assert "sees observation.state (2), observation.environment_state (6), in this order" in message
    refused("import", str(source), f"output={tmp_path / 'run'}", "task=stanford", *configs)
    assert not (tmp_path / "run").exists()
    message = refused("import", str(source), f"output={tmp_path / 'run'}", "foreign.map={observation.state: obs}")
    assert "name that, too, task=..." in message


def test_an_import_replaces_a_policy_only_if_it_is_told_to(refused: Any, done: Any, tmp_path: Path) -> None:
    source, output = DATA / "lerobot_ddim", f"output={tmp_path / 'imported'}"
    done("import", str(source), output)
    assert "holds a policy already" in refused("import", str(source), output)
    done("import", str(source), output, "overwrite=true")
    (tmp_path / "file").write_text("")
    assert "is a file; output=... names a directory" in refused("import", str(source), f"output={tmp_path / 'file'}")


def test_no_module_is_imported_because_a_repository_says_so(
    refused: Any, small_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = small_policy("gaussian")
    policy.metadata["task"] = {"name": "point", "env_id": "no_such_module:Point-v0"}
    policy.save_pretrained(tmp_path / "remote")
    monkeypatch.setattr(hub, "download", lambda repository, patterns: tmp_path / "remote")
    for command in ("finetune", "evaluate"):
        message = refused(command, "checkpoint=owner/name")
        assert "owner/name asks for an environment of the module 'no_such_module', which would be imported" in message
