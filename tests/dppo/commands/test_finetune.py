import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dppo.checkpoint import checkpoints_in, load_policy, save_checkpoint
from dppo.commands import finetune
from dppo.output.metrics import read_metrics
from dppo.task import Task
from dppo.trainer import Trainer, TrainerConfig
from dppo.updates.first_order_config import PPOConfig
from policies import Policy

SCRATCH = ("checkpoint=scratch", "policy=gaussian", "network.hidden_dims=[8]")
DIFFUSION = (
    *("checkpoint=scratch", "policy=diffusion", "network.hidden_dims=[8,8,8]"),
    *("policy.denoising_steps=4", "policy.finetuned_steps=2", "policy.chunk=3"),
)


@pytest.fixture
def tune(command, point, tmp_path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Fine-tunes on the point task; the run directory and the summary."""

    def run(name: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
        return tmp_path / name, command("finetune", *point, f"run={tmp_path / name}", *overrides)

    return run


def last_checkpoint(run: Path) -> Path:
    return checkpoints_in(run / "checkpoints")[0]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [SCRATCH, DIFFUSION], ids=["gaussian", "diffusion"])
def test_two_runs_with_one_seed_are_the_same_bit_for_bit(tune, kind):
    (first, one), (again, two) = (tune(name, *kind, "seed=3") for name in ("first", "again"))
    for key in ("before", "after", "env_steps"):
        assert one[key] == two[key]
    for file in ("policy/model.safetensors", "trainer/state.safetensors"):
        assert (last_checkpoint(first) / file).read_bytes() == (last_checkpoint(again) / file).read_bytes()
    rows = [
        [
            {key: value for key, value in row.items() if not key.endswith("_s")}
            for row in read_metrics(run / "metrics.jsonl")
        ]
        for run in (first, again)
    ]
    assert rows[0] == rows[1]


def test_another_seed_begins_with_other_weights(tune):
    before = [tune(str(seed), *SCRATCH, f"seed={seed}")[1]["before"]["return_mean"] for seed in (1, 2)]
    assert before[0] != before[1]


def test_evaluating_the_run_gives_what_training_itself_evaluated(tune, command, tmp_path):
    run, summary = tune("run", *DIFFUSION, "algo.learning_rate=0.01")
    assert summary["before"] != summary["after"]
    evaluated = command("evaluate", f"checkpoint={run}", f"run={tmp_path / 'evaluated'}")
    assert evaluated["evaluation"] == summary["after"]
    assert evaluated["evaluation"]["success_rate"] is not None
    policy, task = load_policy(last_checkpoint(run) / "policy")
    assert (policy.num_steps, policy.config.chunk) == (2, 3)
    assert task == Task("point", "Point-v0", {}, None, -0.1, "dppo/point-v0")


def test_every_checkpoint_is_worth_what_training_evaluated_at_that_iteration(tune, command, tmp_path):
    run, _ = tune("run", *SCRATCH, "evaluation.interval=2", "checkpoint_interval=2", "algo.learning_rate=0.01")
    rows = {row["env_steps"]: row for row in read_metrics(run / "metrics.jsonl") if "eval_return_mean" in row}
    assert list(rows) == [120, 240]
    for steps, row in rows.items():
        evaluated = command("evaluate", f"checkpoint={run}/checkpoints/{steps}", f"run={tmp_path / str(steps)}")
        assert evaluated["evaluation"]["return_mean"] == row["eval_return_mean"]
        assert evaluated["evaluation"]["success_rate"] == row["eval_success_rate"]


def test_a_finetuned_run_can_be_finetuned_further(tune):
    first, summary = tune("first", *DIFFUSION)
    _, further = tune("further", f"checkpoint={first}", "policy=diffusion")
    assert further["before"] == summary["after"]
    frozen = [
        load_file(last_checkpoint(first.parent / name) / "policy" / "model.safetensors")
        for name in ("first", "further")
    ]
    names = [name for name in frozen[0] if name.startswith("frozen.")]
    assert names and all(torch.equal(frozen[0][name], frozen[1][name]) for name in names)


def test_a_run_in_bfloat16_goes_another_way_from_the_same_beginning(tune):
    exact, coarse = (
        tune(precision, *DIFFUSION, f"algo.precision={precision}") for precision in ("float32", "bfloat16")
    )
    assert exact[1]["before"] == coarse[1]["before"], "acting is in full precision"
    files = [load_file(last_checkpoint(run) / "policy" / "model.safetensors") for run, _ in (exact, coarse)]
    assert {value.dtype for name, value in files[1].items() if name.startswith("network.")} == {torch.float32}
    assert any(not torch.equal(value, files[0][name]) for name, value in files[1].items())


def test_the_plan_tells_how_much_memory_an_iteration_is_kept_in(small_policy, point_task):
    policy = small_policy("diffusion")  # chunks of 3 x 2, of which 2 are executed; histories of 2 x 2; 3 inner steps
    size = TrainerConfig(num_envs=100, rollout_steps=400)
    trainer = Trainer(policy, point_task, size, PPOConfig(), {"type": "mlp"})
    trainer.close()
    plan = finetune._plan({"checkpoint": "here"}, trainer, torch.device("cpu"))
    numbers = 100 * 400 * (2 * 2 + 4 * 3 * 2 + 3 * 3 * 2)
    assert trainer.storage.nbytes == 4 * numbers
    assert f"iterations of 80,000 (kept in {4 * numbers / 2**20:.1f} MiB)" in plan


def test_a_pretrained_policy_is_finetuned_on_the_task_it_was_trained_for(tune, small_policy, tmp_path):
    policy: Policy = small_policy("diffusion", finetuned_steps=None)
    task = Task("point", "Point-v0", {"length": 3}, success_reward=-0.2)
    save_checkpoint(tmp_path / "pretrained", policy, task, {})
    run, summary = tune("run", f"checkpoint={tmp_path / 'pretrained'}", "policy.finetuned_steps=1", "policy.executed=3")
    config = json.loads((last_checkpoint(run) / "policy" / "config.json").read_text())
    assert (config["finetuned_steps"], config["executed"]) == (1, 3)
    assert summary["policy"] == "diffusion"


def test_the_checkpoints_own_task_is_used_and_written_down_where_none_is_named(command, small_policy, tmp_path):
    task = Task("mine", "Point-v0", {"length": 3}, success_reward=-0.2)
    save_checkpoint(tmp_path / "pretrained", small_policy("diffusion", finetuned_steps=None), task, {})
    overrides = [f"checkpoint={tmp_path / 'pretrained'}", f"run={tmp_path / 'run'}", "policy.finetuned_steps=1"]
    assert command("finetune", *overrides)["task"] == "mine"
    metadata = json.loads((last_checkpoint(tmp_path / "run") / "policy" / "config.json").read_text())["metadata"]
    assert metadata["task"] == dataclasses.asdict(task)


@pytest.mark.parametrize(
    ("overrides", "there"),
    [
        (("anchor=kl",), {"anchor_kl", "value_loss"}),
        (("anchor=kl_reward",), {"anchor_kl", "value_loss"}),
        (("anchor=imitation",), {"imitation_loss", "value_loss"}),
        (("advantage=group", "advantage.group_size=3"), set()),
        (("critic=latent", "advantage.discount_per=step"), {"value_loss"}),
    ],
)
def test_anchors_critics_and_advantages_are_chosen_by_their_groups(tune, overrides, there):
    run, _ = tune("run", *DIFFUSION, *overrides)
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert {"anchor_kl", "imitation_loss", "value_loss"} & row.keys() == there


def test_demonstrations_to_replay_that_are_not_there_are_one_line(refused, point, tiny, tmp_path):
    arguments = (*point, *tiny["finetune"], *SCRATCH, f"run={tmp_path / 'run'}", "anchor=replay", "task.dataset=''")
    assert "names no dataset of demonstrations; set anchor.dataset=" in refused("finetune", *arguments)


def test_max_minutes_ends_the_training_after_its_first_iteration(tune):
    run, summary = tune("run", *SCRATCH, "env_steps=1_000_000", "max_minutes=1e-6")
    assert summary["env_steps"] == 60
    assert names_in(run / "checkpoints") == {"0", "60", "best"}


def test_without_intervals_there_is_a_checkpoint_at_the_beginning_and_one_at_the_end(tune):
    run, _ = tune("run", *SCRATCH, "checkpoint_interval=0", "checkpoint_minutes=0")
    assert names_in(run / "checkpoints") == {"0", "300", "best"}


def stop_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Let the training be interrupted in the middle of this iteration."""
    iterate = Trainer.iterate

    def interrupted(trainer: Trainer, *args: Any) -> Any:
        if trainer.iteration == iteration - 1:
            raise KeyboardInterrupt
        return iterate(trainer, *args)

    monkeypatch.setattr(Trainer, "iterate", interrupted)


def test_an_interrupted_training_keeps_its_last_checkpoint_and_what_it_was_worth_before(
    tune, command, tmp_path, monkeypatch, capsys
):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        tune("run", *SCRATCH, "checkpoint_interval=2")
    run = tmp_path / "run"
    assert names_in(run / "checkpoints") == {"0", "120", "best"}
    told = f"the last checkpoint is {run}/checkpoints/120; `dppo finetune resume={run}` goes on from it"
    assert told in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["episodes"] == 4
    assert summary["after"] is None
    assert len(read_metrics(run / "metrics.jsonl")) == 2
    assert command("evaluate", f"checkpoint={run}", f"run={tmp_path / 'evaluated'}")["evaluation"]["episodes"] == 4


def test_a_training_that_is_interrupted_at_once_leaves_what_it_began_with(tune, tmp_path, monkeypatch):
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        tune("run", *SCRATCH)
    assert names_in(tmp_path / "run" / "checkpoints") == {"0", "best"}


# --- errors


def test_an_existing_run_is_left_as_it_was(refused, point, tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("precious")
    arguments = ["finetune", *tiny["finetune"], *point, *SCRATCH, f"run={run}"]
    assert "run exists; choose another run=..., or overwrite=true" in refused(*arguments)
    assert "is no run of dppo" in refused(*arguments, "overwrite=true")
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [("config.yaml", "precious")]


def test_a_run_does_not_overwrite_the_checkpoint_that_it_starts_from(tune, refused, point, tiny):
    run, _ = tune("run", *SCRATCH)
    before = sorted(run.rglob("*"))
    for checkpoint in (run, last_checkpoint(run)):
        settings = [f"checkpoint={checkpoint}", "policy=gaussian", f"run={run}", "overwrite=true"]
        message = refused("finetune", *tiny["finetune"], *point, *settings)
        assert f"overwriting {run} would delete the checkpoint" in message
    assert sorted(run.rglob("*")) == before


def test_a_run_is_overwritten_only_if_that_is_asked_for(tune):
    run, _ = tune("run", *SCRATCH)
    (run / "mark").write_text("")
    tune("run", *SCRATCH, "overwrite=true")
    assert not (run / "mark").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*SCRATCH, "+task.env_kwargs.broken=2"], "task point: 6 episodes were dropped"),
        ([*SCRATCH, "policy.chunk=9", "task.max_episode_steps=8"], "a chunk of 9 actions is longer than an episode"),
        ([*SCRATCH, "num_envs=0"], "must be at least 1"),
        ([*SCRATCH, "evaluation.episodes=0"], "evaluation needs at least one episode"),
        (["policy=gaussian", "checkpoint=embedded"], "no checkpoint is embedded for task 'point'"),
        (["policy=gaussian", "checkpoint=nowhere"], "checkpoint nowhere does not exist"),
        ([*SCRATCH, "task.env_id=Counting-v0"], "its actions have no bounds"),
        ([*SCRATCH, "+task.env_kwargs.colour=red"], "Point-v0 does not take these env_kwargs"),
        ([*SCRATCH, "critic.hidden_dims=[]"], "hidden_dims must name at least one positive width"),
        ([*SCRATCH, "critic.type=cnn"], "cannot use the network type 'cnn'"),
        ([*SCRATCH, "logger.type=csv"], "unknown logger.type 'csv'"),
        ([*SCRATCH, "policy.std=big"], "std: "),
        (
            [*SCRATCH, "algo.precision=float16"],
            "algo, precision: must be 'float32' or 'bfloat16', not 'float16'",
        ),
        ([*SCRATCH, "network.hidden_dims=[8,8]", "network.residual=true"], "a residual MLP needs an odd number"),
    ],
)
def test_what_cannot_work_is_one_line(refused, point, tiny, tmp_path, overrides, message):
    arguments = ["finetune", *tiny["finetune"], *point, f"run={tmp_path / 'run'}", *overrides]
    assert message in refused(*arguments)


@pytest.mark.parametrize("override", ["checkpoint=nowhere", "num_envs=0", "critic.type=cnn", "policy.chunk=0"])
def test_what_is_refused_at_once_leaves_no_run_directory(refused, point, tiny, tmp_path, override):
    refused("finetune", *tiny["finetune"], *point, *SCRATCH, f"run={tmp_path / 'run'}", override)
    assert not (tmp_path / "run").exists()


def test_a_training_that_diverges_is_one_line_and_keeps_its_metrics(refused, point, tiny, tmp_path):
    settings = [
        *SCRATCH,
        "algo.learning_rate=1e30",
        "algo.max_grad_norm=null",
        "evaluation.episodes=1",
        "env_steps=900",
    ]
    message = refused("finetune", *tiny["finetune"], *point, f"run={tmp_path / 'run'}", *settings)
    assert "lower the learning rate" in message
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_environments_are_closed_after_an_error(command, point, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr("dppo.trainer.Trainer.close", lambda self: closed.append(self))
    monkeypatch.setattr(finetune, "evaluate_with_progress", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        command("finetune", *point, *SCRATCH, f"run={tmp_path / 'run'}")
    assert len(closed) == 1
