"""collect -> pretrain -> finetune -> evaluate on CartPole, and what each of them leaves behind."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dppo.data.demos import load_episodes
from dppo.output.metrics import read_metrics
from dppo.task import Task
from policies import Policy

FINETUNING_ROW = {
    *("iteration", "env_steps", "wall_clock_s", "env_steps_per_s", "return_mean", "success_rate", "episodes"),
    *("value_loss", "policy_loss", "approx_kl", "clip_fraction", "explained_variance"),
    *("actor_learning_rate", "critic_learning_rate"),
    *("environment_s", "sampling_s", "scoring_s", "advantages_s", "update_s"),
}
SUMMARY = {"task", "policy", "algo", "seed", "env_steps", "wall_clock_s", "env_steps_per_s", "before", "after"}
EVALUATION = {"return_mean", "return_ci95", "success_rate", "episodes"}


@dataclass
class Pipeline:
    runs: dict[str, Path]
    summaries: dict[str, dict[str, Any]]
    """What each command returned."""
    datasets: Path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., dict[str, Any]]) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    runs = {name: folder / name for name in ("collect", "pretrain", "finetune", "evaluate")}
    overrides = {
        "collect": ["task=cartpole"],
        "pretrain": ["task=cartpole", "evaluation.interval=1"],
        "finetune": [
            *("task=cartpole", f"checkpoint={runs['pretrain']}", "logger=tensorboard", "video=true"),
            *("evaluation.interval=2", "checkpoint_interval=2"),
        ],
        "evaluate": [f"checkpoint={runs['finetune']}"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
        patch.setattr("dppo.commands.finetune.record_video", empty_video)
        summaries = {name: command(name, *overrides[name], f"run={runs[name]}") for name in runs}
    return Pipeline(runs, summaries, folder / "datasets")


def empty_video(policy: Policy, task: Task, path: Path, **settings: Any) -> Path:
    """The drawing itself has tests of its own."""
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path


def rows(pipeline: Pipeline, name: str) -> list[dict[str, Any]]:
    return read_metrics(pipeline.runs[name] / "metrics.jsonl")


def stored(pipeline: Pipeline, name: str) -> dict[str, Any]:
    return json.loads((pipeline.runs[name] / "summary.json").read_text())


def names_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_every_run_directory_has_its_files_and_no_others(pipeline):
    common = {"config.yaml", "summary.json"}
    trained = common | {"metrics.jsonl", "checkpoints"}
    assert names_in(pipeline.runs["collect"]) == trained
    assert names_in(pipeline.runs["pretrain"]) == trained | {"plots"}
    assert names_in(pipeline.runs["finetune"]) == trained | {"plots", "videos", "tensorboard"}
    assert names_in(pipeline.runs["evaluate"]) == common
    assert names_in(pipeline.runs["finetune"] / "videos") == {"before.mp4", "after.mp4"}
    assert names_in(pipeline.runs["finetune"] / "plots") == {"learning_curve.png"}
    assert (pipeline.runs["finetune"] / "plots" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_named_after_their_steps(pipeline):
    # 3 environments for 20 steps; a checkpoint every second iteration, and one at the end. The best one stays, too.
    assert {"120", "240", "300", "best"} <= names_in(pipeline.runs["finetune"] / "checkpoints")
    assert {"12", "best"} <= names_in(pipeline.runs["pretrain"] / "checkpoints")
    for path in pipeline.runs["finetune"].glob("checkpoints/*"):
        assert names_in(path) == {"policy", "trainer", "manifest.json"}
        assert names_in(path / "policy") == {"config.json", "model.safetensors"}
        assert names_in(path / "trainer") == {"state.json", "state.safetensors"}


def test_the_configuration_is_the_resolved_one_with_its_provenance(pipeline):
    for name, path in pipeline.runs.items():
        config = yaml.safe_load((path / "config.yaml").read_text())
        assert {"started", "command", "packages", "git", "machine"} <= set(config["provenance"])
        assert config["overwrite"] is False
        if name != "evaluate":
            assert config["task"]["env_id"] == "CartPole-v1"
            assert config["policy"]["type"] == "categorical"


def test_every_iteration_is_a_row_with_all_metrics(pipeline):
    found = rows(pipeline, "finetune")
    assert [row["iteration"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["env_steps"] for row in found] == [60, 120, 180, 240, 300]
    for row in found:
        assert set(row) >= FINETUNING_ROW
        assert row["success_rate"] is None, "CartPole has no notion of success"
        assert row["approx_kl"] >= -1e-6
        assert 0 <= row["clip_fraction"] <= 1
    assert [("eval_return_mean" in row) for row in found] == [False, True, False, True, False]
    assert sum(row["episodes"] for row in found) > 3


def test_cloning_writes_its_rows_and_evaluates_in_between(pipeline):
    found = rows(pipeline, "pretrain")
    assert [row["updates"] for row in found] == [4, 8, 12]
    assert [("return_mean" in row) for row in found] == [True, True, False], "the last one is in the summary"
    assert all(row["train_loss"] > 0 and row["validation_loss"] > 0 for row in found)


def test_the_summary_holds_what_the_command_returned(pipeline):
    for name in ("collect", "pretrain", "finetune"):
        assert stored(pipeline, name) == pipeline.summaries[name]


def test_the_summary_of_finetuning(pipeline):
    summary = stored(pipeline, "finetune")
    assert set(summary) >= SUMMARY
    facts = {"task": "cartpole", "policy": "categorical", "algo": "ppo", "seed": 0, "env_steps": 300}
    assert {name: summary[name] for name in facts} == facts
    assert summary["wall_clock_s"] == pytest.approx(rows(pipeline, "finetune")[-1]["wall_clock_s"])
    assert summary["env_steps_per_s"] == pytest.approx(300 / summary["wall_clock_s"])
    for name in ("before", "after"):
        assert set(summary[name]) >= EVALUATION
        assert summary[name]["episodes"] == 4
        low, high = summary[name]["return_ci95"]
        assert low <= summary[name]["return_mean"] <= high


def test_the_cloned_policy_is_worth_before_finetuning_what_it_was_after_cloning(pipeline):
    """The same seeds and the same weights, averaged and read from disk."""
    assert stored(pipeline, "finetune")["before"] == stored(pipeline, "pretrain")["evaluation"]


def test_evaluating_the_run_repeats_the_evaluation_after_finetuning(pipeline):
    summary = stored(pipeline, "evaluate")
    assert summary["evaluation"] == stored(pipeline, "finetune")["after"]
    assert len(summary["episodes"]) == 4
    assert summary["checkpoint"].endswith("finetune/checkpoints/300/policy")
    assert (summary["task"], summary["policy"]) == ("cartpole", "categorical")


def test_the_demonstrations_are_whole_episodes_of_the_expert(pipeline, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(pipeline.datasets))
    episodes = load_episodes("dppo/cartpole/weak-v0")
    summary = stored(pipeline, "collect")
    assert sum(map(len, episodes)) == summary["recorded_env_steps"] >= 60
    assert sum(map(len, episodes[:-1])) < 60, "no episode more than needed"
    assert summary["demonstrations"]["episodes"] == len(episodes)
    assert summary["demonstrations"]["return_mean"] == pytest.approx(sum(map(len, episodes)) / len(episodes))
    assert summary["training_env_steps"] == rows(pipeline, "collect")[-1]["env_steps"] == 240


def test_a_trained_policy_acts_with_nothing_but_its_folder(pipeline):
    policy = Policy.from_pretrained(pipeline.runs["finetune"] / "checkpoints" / "300" / "policy")
    obs = torch.zeros(2, policy.config.history, policy.config.obs_dim)
    assert policy.sample(obs, deterministic=True).action.shape == (2,)
