import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from safetensors.torch import load_file

from dppo.checkpoint import load_policy
from dppo.cli import main
from dppo.cloning import Cloner
from dppo.commands import pretrain
from dppo.configuration import compose_config, overridden_keys
from dppo.output.metrics import read_metrics
from dppo.statistics import summarize


def store(dataset: str = "dppo/point-v0", episodes: int = 8, length: int = 6, dim: int = 2, bad: float = 0.0) -> None:
    """Demonstrations that go halfway to the target; the last observation of the last episode may be ``bad``."""
    rng = np.random.default_rng(0)
    buffers = []
    for number in range(episodes):
        observations = rng.uniform(-1, 1, (length + 1, dim))
        actions = 0.5 * observations[:-1, :2].astype(np.float32)
        if bad and number == episodes - 1:
            observations[-1] = bad
        ends = [False] * (length - 1) + [True]
        buffers.append(
            EpisodeBuffer(
                observations=observations,  # type: ignore[arg-type]  # arrays are what minari itself makes of them
                actions=actions,  # type: ignore[arg-type]
                rewards=[0.0] * length,
                terminations=[False] * length,
                truncations=ends,
                infos={},
            )
        )
    observation, action = (spaces.Box(-1, 1, (size,), np.float32) for size in (dim, 2))
    minari.create_dataset_from_buffers(dataset, buffers, observation_space=observation, action_space=action)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture
def clone(command, point, tmp_path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    def run(name: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
        return tmp_path / name, command("pretrain", *point, f"run={tmp_path / name}", *overrides)

    return run


SMALL = ("policy.denoising_steps=4",)


def test_a_diffusion_policy_is_cloned_over_its_whole_chain_and_scaled_by_the_demonstrations(clone):
    store()
    run, summary = clone("run", *SMALL)
    loaded: Any = load_policy(run / "checkpoints" / "12" / "policy")
    policy, task = loaded
    assert (policy.num_steps, policy.config.finetuned_steps, policy.frozen) == (4, None, None)
    assert task.name == "point"
    assert 0.9 < float(policy.obs_scaler.scale.min()) <= float(policy.obs_scaler.scale.max()) <= 1.0
    assert 0.4 < float(policy.action_scaler.scale.min()) <= float(policy.action_scaler.scale.max()) <= 0.5
    assert summary["dataset"] == "dppo/point-v0"
    assert json.loads((run / "summary.json").read_text()) == summary


def test_what_was_cloned_can_be_replayed_while_it_is_finetuned(clone, command, point, tmp_path):
    store()
    run, _ = clone("run", *SMALL)
    settings = (f"checkpoint={run}", "policy.finetuned_steps=2", f"run={tmp_path / 'tuned'}")
    command("finetune", *point, *settings, "anchor=replay")
    rows = read_metrics(tmp_path / "tuned" / "metrics.jsonl")
    assert all(0 < row["replay_loss"] < 10 for row in rows)


def test_two_clonings_with_one_seed_are_the_same_bit_for_bit(clone):
    store()
    weights, rows = [], []
    for name in ("first", "again"):
        run, _ = clone(name, *SMALL, "seed=5")
        weights.append((run / "checkpoints" / "12" / "policy" / "model.safetensors").read_bytes())
        rows.append([row["train_loss"] for row in read_metrics(run / "metrics.jsonl")])
    assert weights[0] == weights[1]
    assert rows[0] == rows[1]


def test_another_dataset_than_the_tasks_own_can_be_cloned(clone):
    store("me/other-v0")
    assert clone("run", "policy=gaussian", "dataset=me/other-v0")[1]["dataset"] == "me/other-v0"


def test_without_validation_there_is_no_validation_loss(clone):
    store()
    run, _ = clone("run", "policy=gaussian", "validation_fraction=0")
    assert [row["validation_loss"] for row in read_metrics(run / "metrics.jsonl")] == [None] * 3


def test_the_last_row_may_cover_fewer_updates(clone):
    store()
    run, _ = clone("run", "policy=gaussian", "updates=6")
    assert [row["updates"] for row in read_metrics(run / "metrics.jsonl")] == [4, 6]


def test_an_interrupted_cloning_keeps_its_last_checkpoint(clone, tmp_path, monkeypatch):
    store()
    update = Cloner._update

    def interrupted(cloner: Cloner, exercise: Any) -> Any:
        if cloner.updates == 6:
            raise KeyboardInterrupt
        return update(cloner, exercise)

    monkeypatch.setattr(Cloner, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clone("run", "policy=gaussian", "checkpoint_interval=1")
    assert load_policy(tmp_path / "run" / "checkpoints" / "4" / "policy")[0].type == "gaussian"
    assert [row["updates"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [4]


GAUSSIAN = ("policy=gaussian", "network.hidden_dims=[8,8,8]")


@pytest.mark.parametrize("settings", [GAUSSIAN, SMALL], ids=["gaussian", "diffusion"])
def test_a_cloning_that_is_resumed_is_the_one_that_never_stopped(clone, tmp_path, monkeypatch, settings):
    store()
    settings = (*settings, "checkpoint_interval=1", "evaluation.interval=1", "updates=23", "batch_size=7")
    clone("whole", *settings)
    update = Cloner._update

    def killed(cloner: Cloner, exercise: Any) -> Any:
        if cloner.updates == 14:  # of 23 in rows of 4: in the fourth one; windows are prepared for 16 at a time
            raise RuntimeError("killed")
        return update(cloner, exercise)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Cloner, "_update", killed)
        clone("run", *settings)
    resume = [f"resume={tmp_path / 'run'}"]
    pretrain.run(compose_config("pretrain", resume), overridden_keys(resume))
    found, wanted = (outcome(tmp_path / name) for name in ("run", "whole"))
    assert found == wanted
    assert len(wanted[0]) == 6


def outcome(run: Path) -> tuple[Any, ...]:
    """All that a run has to show, but for times."""
    rows = [{key: v for key, v in row.items() if not key.endswith("_s")} for row in read_metrics(run / "metrics.jsonl")]
    summary = json.loads((run / "summary.json").read_text())
    weights = (run / "checkpoints" / "23" / "policy" / "model.safetensors").read_bytes()
    return rows, weights, {key: value for key, value in summary.items() if not key.endswith("_s")}


def test_a_finished_cloning_says_so(clone, capsys):
    store()
    run, summary = clone("run", "policy=gaussian")
    assert main(["pretrain", f"resume={run}"]) == 0
    assert f"{run} is finished, with 12 updates; updates=... larger than that trains on" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text()) == summary


def test_a_cloning_that_is_prolonged_ends_with_an_evaluation_and_keeps_its_best_checkpoint(clone, monkeypatch):
    store()
    run, _ = clone("run", "policy=gaussian", "keep_checkpoints=1")

    def killed(*arguments: Any) -> Any:
        raise RuntimeError("killed")

    worse = summarize([-1e9], [False])
    for override, evaluate in (("updates=20", killed), ("keep_checkpoints=1", lambda *arguments: (worse, []))):
        given = [f"resume={run}", override]
        with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
            patch.setattr(pretrain, "evaluate_with_progress", evaluate)
            pretrain.run(compose_config("pretrain", given), overridden_keys(given))
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["updates"], summary["evaluation"]["return_mean"]) == (20, -1e9)
    assert summary["best_checkpoint"]["steps"] == 12
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"12", "20", "best"}
    assert (run / "checkpoints" / "best").resolve().name == "12"


def test_a_cloning_is_not_resumed_with_other_demonstrations(clone, refused):
    store()
    run, _ = clone("run", "policy=gaussian")
    shutil.rmtree(Path(os.environ["MINARI_DATASETS_PATH"]))
    store(episodes=9)
    assert "it learned from " in (message := refused("pretrain", f"resume={run}", "updates=20"))
    assert message.endswith("; is the dataset another one?")


# --- errors


@pytest.fixture
def refusal(refused, point, tiny, tmp_path) -> Callable[..., str]:
    """The one line that such a cloning ends with; it must not have begun a run."""

    def run(*overrides: str) -> str:
        message = refused("pretrain", *tiny["pretrain"], *point, f"run={tmp_path / 'run'}", *overrides)
        assert not (tmp_path / "run").exists()
        return message

    return run


def test_a_dataset_that_is_not_there_is_told_how_to_be_made(refusal, datasets_folder):
    message = refusal()
    assert message.startswith(f"error: dataset dppo/point-v0 is not in {datasets_folder}")
    assert "; build it with `dppo collect task=point`" in message
    assert "build it with `dppo collect task=point dataset=dppo/else-v0`" in refusal("dataset=dppo/else-v0")


def test_a_task_without_a_dataset_says_so(refusal):
    assert "task point names no dataset of demonstrations; set dataset=..." in refusal("task.dataset=''")


def test_nan_in_demonstrations_is_refused_with_its_place(refusal):
    store(bad=np.nan)
    assert "dataset dppo/point-v0: NaN or inf in the observation of episode 7, step 6" in refusal()


def test_demonstrations_of_another_task_are_refused_with_both_dimensions(refusal):
    store(dim=5)
    message = refusal()
    assert "has 5-dimensional observations and 2-dimensional actions" in message
    assert "the task has 2-dimensional observations and 2-dimensional actions" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("log_interval=0", "log_interval must be at least 1"),
        ("updates=0", "must be at least 1"),
        ("validation_fraction=1.5", "the validation fraction must lie in [0, 1)"),
        ("ema_decay=1", "ema_decay must lie in [0, 1)"),
        ("policy=categorical", "use policy="),
        ("batch_size=big", "batch_size"),
        ("precision=float16", "precision: must be 'float32' or 'bfloat16', not 'float16'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(refusal, override, message):
    store()
    assert message in refusal(override)


def test_a_cloning_that_diverges_is_one_line(refused, point, tiny, tmp_path):
    store()
    message = refused("pretrain", *tiny["pretrain"], *point, f"run={tmp_path / 'run'}", "learning_rate=1e30")
    assert "updates of the policy network in a row had a loss" in message
    debug = tmp_path / "run" / "debug" / "not_finite.safetensors"
    assert f"are in {debug}" in message
    assert {"minibatch/0", "loss", "gradient_norm"} < load_file(debug).keys()
