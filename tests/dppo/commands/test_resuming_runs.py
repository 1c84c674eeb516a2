"""`resume=<run>`: a run that was stopped, however and wherever, ends as the one that was not."""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dppo.checkpoint import checkpoints_in, find_policy
from dppo.cli import main
from dppo.commands import finetune
from dppo.configuration import compose_config, overridden_keys
from dppo.output.metrics import read_metrics
from dppo.output.run_directory import RunDirectory
from dppo.trainer import Trainer
from policies import UserError

GAUSSIAN = ("checkpoint=scratch", "policy=gaussian", "network.hidden_dims=[8]", "seed=3", "checkpoint_interval=2")
SCRATCH = (*GAUSSIAN, "critic.hidden_dims=[8]")


class Killed(BaseException):
    """As if the process were gone."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr("dppo.commands.finetune.learning_curve", lambda rows, path, **settings: path)


@pytest.fixture
def tune(command, point, tmp_path) -> Callable[..., Path]:
    """Fine-tunes on the point task; the run directory."""

    def run(name: str, *overrides: str) -> Path:
        start = GAUSSIAN if "advantage=group" in overrides else SCRATCH  # groups have no use for a critic
        command("finetune", *point, *start, f"run={tmp_path / name}", *overrides)
        return tmp_path / name

    return run


def go_on(command: str, run: Path, *overrides: str) -> dict[str, Any]:
    given = [f"resume={run}", *overrides]
    return import_module(f"dppo.commands.{command}").run(compose_config(command, given), overridden_keys(given))


@pytest.fixture
def kill_at(monkeypatch) -> Callable[[str, int], None]:
    """Let a function, by its name, end in `Killed` at its n-th call."""

    def prepare(name: str, call: int) -> None:
        owner, _, attribute = name.rpartition(".")
        module, _, cls = owner.rpartition(".")
        target = getattr(import_module(module), cls) if cls[0].isupper() else import_module(owner)
        whole, calls = getattr(target, attribute), itertools.count(1)

        def killed(*arguments: Any, **named: Any) -> Any:
            if next(calls) == call:
                monkeypatch.setattr(target, attribute, whole)
                raise Killed
            return whole(*arguments, **named)

        monkeypatch.setattr(target, attribute, killed)

    return prepare


def outcome(run: Path) -> tuple[Any, ...]:
    """All that a run has to show, but for times."""
    rows = [{key: v for key, v in row.items() if not key.endswith("_s")} for row in read_metrics(run / "metrics.jsonl")]
    latest = checkpoints_in(run / "checkpoints")[0]
    weights = {name: value.tolist() for name, value in load_file(latest / "policy" / "model.safetensors").items()}
    summary = yaml.safe_load((run / "summary.json").read_text())
    told = {key: value for key, value in summary.items() if not key.endswith("_s")}
    return rows, latest.name, weights, told


PLACES = {
    "in the first evaluation": ("dppo.commands.finetune.evaluate_with_progress", 1),
    "while the first checkpoint is written": ("dppo.checkpoint.write_state", 1),
    "in the first iteration": ("dppo.trainer.Trainer.iterate", 1),
    "in an update": ("dppo.updates.first_order.FirstOrder.update", 4),
    "before a row is written": ("dppo.output.metrics.MetricsLogger.log", 3),
    "while a checkpoint is written": ("dppo.durable.flush", 25),
    "in an evaluation on the way": ("dppo.commands.finetune.evaluate_with_progress", 3),
    "in the last evaluation": ("dppo.commands.finetune.evaluate_with_progress", 4),
}


@pytest.fixture(scope="module")
def finished(command, point, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("finished") / "run"
    command("finetune", *point, *SCRATCH, f"run={run}", "evaluation.interval=2")
    return run


@pytest.fixture
def expected(finished) -> tuple[Any, ...]:
    return outcome(finished)


@pytest.fixture
def ended(finished, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_killed_anywhere_ends_as_one_that_was_not(tune, expected, kill_at, tmp_path, place):
    kill_at(*PLACES[place])
    with pytest.raises(Killed):
        tune("run", "evaluation.interval=2")
    go_on("finetune", tmp_path / "run")
    assert outcome(tmp_path / "run") == expected
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_run_may_be_killed_again_and_again(tune, expected, kill_at, tmp_path):
    run = tmp_path / "run"
    kill_at("dppo.trainer.Trainer.iterate", 2)
    with pytest.raises(Killed):
        tune("run", "evaluation.interval=2")
    for iteration in (4, 2, 1):
        kill_at("dppo.trainer.Trainer.iterate", iteration)
        with pytest.raises(Killed):
            go_on("finetune", run)
    go_on("finetune", run)
    assert outcome(run) == expected


def test_a_finished_run_says_so_and_stays_as_it_is(ended, capsys):
    run = ended
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["finetune", f"resume={run}"]) == 0
    assert f"{run} is finished, with 300 env steps; env_steps=... larger than that trains on" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_was_about_to_be_replaced_is_taken_back(ended, capsys):
    latest = newest(ended)
    latest.rename(latest.with_name(f"{latest.name}.old.tmp"))
    assert main(["finetune", f"resume={ended}"]) == 0
    assert "is finished, with 300 env steps" in capsys.readouterr().out
    assert newest(ended) == latest


def test_more_steps_train_a_finished_run_on_and_are_written_down(ended, capsys):
    run = ended
    before = yaml.safe_load((run / "summary.json").read_text())["before"]
    summary = go_on("finetune", run, "env_steps=400")
    assert (summary["env_steps"], summary["before"]) == (420, before)
    assert [row["iteration"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["env_steps"] == 400
    assert [again["after"] for again in config["provenance"]["resumed"]] == [300]
    assert main(["finetune", f"resume={run}"]) == 0
    assert "is finished, with 420 env steps" in capsys.readouterr().out


def test_a_run_needs_nothing_but_its_directory(ended, command, point, kill_at, tmp_path):
    """Neither the checkpoint that it started from, nor the place where it was."""
    start = ended.rename(tmp_path / "start")
    settings = (*point, f"checkpoint={start}", "policy=gaussian", "seed=5", "checkpoint_interval=2", "num_envs=2")
    command("finetune", *settings, f"run={tmp_path / 'whole'}")
    kill_at("dppo.trainer.Trainer.iterate", 4)
    with pytest.raises(Killed):
        command("finetune", *settings, f"run={tmp_path / 'run'}")
    shutil.rmtree(start)
    (tmp_path / "run").rename(tmp_path / "moved")
    go_on("finetune", tmp_path / "moved")
    assert outcome(tmp_path / "moved") == outcome(tmp_path / "whole")


def test_environments_that_do_not_tell_their_state_start_anew_and_that_is_said(tune, kill_at, tmp_path, capsys, caplog):
    closed = ("task.env_id=Closed-v0",)
    whole = tune("whole", *closed)
    ends = []
    for name in ("run", "again"):
        kill_at("dppo.trainer.Trainer.iterate", 4)
        with pytest.raises(Killed):
            tune(name, *closed)
        go_on("finetune", tmp_path / name)
        ends.append(outcome(tmp_path / name))
    assert caplog.text.count("ClosedEnv has no get_state() and set_state(state): if this run is resumed") == 5
    assert capsys.readouterr().out.count("not as it would have without a stop") == 2
    rows = [end[0] for end in (*ends, outcome(whole))]
    assert rows[0] == rows[1], "the same stop leads to the same run"
    assert rows[0][:2] == rows[2][:2]
    assert rows[0][2] != rows[2][2]


def test_groups_begin_anew_anyway(tune, kill_at, tmp_path, capsys, caplog):
    settings = ("task.env_id=Closed-v0", "advantage=group", "advantage.group_size=3")
    whole = tune("whole", *settings)
    kill_at("dppo.trainer.Trainer.iterate", 4)
    with pytest.raises(Killed):
        tune("run", *settings)
    go_on("finetune", tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)
    assert not caplog.text
    assert "not as it would" not in capsys.readouterr().out


# --- checkpoints that are damaged


def newest(run: Path) -> Path:
    return checkpoints_in(run / "checkpoints")[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("policy/model.safetensors", cut, "policy/model.safetensors has "),
        ("trainer/state.json", change, "trainer/state.json is damaged"),
        ("trainer/state.safetensors", Path.unlink, "trainer/state.safetensors is missing"),
        ("manifest.json", cut, "its manifest.json is damaged"),
        ("manifest.json", Path.unlink, "it has no manifest.json"),
    ],
)
def test_of_a_damaged_checkpoint_a_line_tells_and_the_one_before_serves(ended, caplog, file, damage, told):
    damage(newest(ended) / file)
    assert find_policy(str(ended)) == ended / "checkpoints" / "240" / "policy"
    assert caplog.text.count("\n") == 1
    assert f"the checkpoint {ended}/checkpoints/300 is passed over: {told}" in caplog.text


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(ended, expected):
    change(newest(ended) / "trainer" / "state.json")
    go_on("finetune", ended)
    assert newest(ended).name == "300"
    assert outcome(ended) == expected


def test_a_checkpoint_of_another_configuration_is_refused_with_its_file_and_entry(ended, refused):
    config = yaml.safe_load((ended / "config.yaml").read_text())
    config["critic"]["hidden_dims"] = [7]
    header = (ended / "config.yaml").read_text().split("\n")[0]
    (ended / "config.yaml").write_text(f"{header}\n{yaml.safe_dump(config)}")
    message = refused("finetune", f"resume={ended}")
    assert f"{newest(ended)}/trainer/state.json: entry 'critic/network." in message
    assert "should be Tensor (7" in message


def test_a_run_whose_checkpoints_are_all_damaged_keeps_them_and_says_so(ended, refused):
    for checkpoint in checkpoints_in(ended / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
    before = sorted(ended.rglob("*"))
    message = refused("finetune", f"resume={ended}")
    assert f"no checkpoint in {ended}/checkpoints is whole, of the newest, 300, it has no manifest.json; " in message
    assert sorted(ended.rglob("*")) == before


def test_without_any_checkpoint_a_run_starts_anew(ended, expected, capsys):
    shutil.rmtree(ended / "checkpoints")
    go_on("finetune", ended)
    assert "it starts anew from its configuration" in capsys.readouterr().out
    assert outcome(ended) == expected


# --- disks that are full


def full(*arguments: Any, **named: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["dppo.states.write_flushed", "dppo.durable.flush"])
def test_a_full_disk_ends_the_run_with_a_line_and_leaves_the_last_checkpoint(
    tune, expected, monkeypatch, tmp_path, capsys, function
):
    run = tmp_path / "run"
    save = finetune.save_checkpoint

    def without_room(path: Path, *arguments: Any) -> Path:
        if path.name != "240":
            return save(path, *arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(function, full)
            return save(path, *arguments)

    monkeypatch.setattr(finetune, "save_checkpoint", without_room)
    with pytest.raises(UserError) as caught:
        tune("run", "evaluation.interval=2")
    assert str(caught.value) == f"the checkpoint {run}/checkpoints/240 could not be written: No space left on device"
    told = f"the last checkpoint is {run}/checkpoints/120; `dppo finetune resume={run}` goes on from it"
    assert capsys.readouterr().out.count(told) == 1
    assert not list(run.rglob("*.tmp"))
    monkeypatch.undo()
    go_on("finetune", run)
    assert outcome(run) == expected


def test_files_that_may_not_grow_end_the_run_with_a_line(refused, point, tiny, tmp_path, no_pictures):
    run = tmp_path / "run"
    settings = [*tiny["finetune"], *point, *SCRATCH, f"run={run}", "env_steps=100_000", "checkpoint_interval=0"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # more than a checkpoint's files have
    try:
        message = refused("finetune", *settings, "rollout_steps=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"a row of metrics could not be written to {run}: " in message
    torn = (run / "metrics.jsonl").read_text()
    assert len(torn) == 60_000 and not torn.endswith("\n")
    assert go_on("finetune", run, "env_steps=12")["env_steps"] == 12
    assert [row["env_steps"] for row in read_metrics(run / "metrics.jsonl")] == [6, 12]


# --- what cannot go on


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("seed=4",), "seed cannot be changed in a run that goes on: it has its configuration from "),
        (("algo.clip=0.3",), "algo.clip cannot be changed"),
        (("task=cartpole",), "task cannot be changed"),
        (("run=elsewhere",), "run cannot be changed"),
        (("checkpoint_interval=-1",), "checkpoint_interval must not be negative"),
    ],
)
def test_settings_that_a_run_has_already_are_refused_by_name(ended, refused, given, message):
    assert message in refused("finetune", f"resume={ended}", *given)


def test_what_is_no_run_of_the_command_is_refused(ended, refused, tmp_path):
    assert "is no run of dppo" in refused("finetune", f"resume={tmp_path}")
    assert "is no run of `dppo pretrain`" in refused("pretrain", f"resume={ended}")


def test_a_run_that_is_running_is_refused(ended, refused):
    with RunDirectory(ended).held():
        assert f"another process is at work in {ended}" in refused("finetune", f"resume={ended}", "env_steps=400")


# --- processes that are killed


CARTPOLE = (
    *("task=cartpole", "network.hidden_dims=[8]", "critic.hidden_dims=[8]", "env_steps=1600", "num_envs=4"),
    *("rollout_steps=20", "algo.epochs=2", "evaluation.episodes=2", "checkpoint_interval=3", "logger=none"),
    *("video=false", "threads=1", "policy=categorical", "checkpoint=scratch"),
)


def forked(arguments: list[str]) -> int:
    """The number of a process that runs a command, without the seconds that a fresh one takes to begin."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        status = main(arguments)
    finally:
        os._exit(status)


def rows_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_that_is_killed_from_outside_ends_as_one_that_is_not(tmp_path):
    assert main(["finetune", *CARTPOLE, f"run={tmp_path / 'whole'}"]) == 0
    run = tmp_path / "run"
    process = forked(["finetune", *CARTPOLE, f"run={run}"])
    while rows_of(run) < 5 and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert main(["finetune", f"resume={run}"]) == 0
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(tmp_path):
    rng, kills, runs = random.Random(0), 0, 0
    diffusion = (
        *(
            "task=hopper",
            "policy=diffusion",
            "checkpoint=scratch",
            "network.hidden_dims=[16,16,16]",
            "env_steps=12_000",
        ),
        *("policy.denoising_steps=4", "policy.finetuned_steps=2", "num_envs=4", "rollout_steps=20", "algo.epochs=2"),
        *("evaluation.episodes=2", "evaluation.interval=7", "checkpoint_interval=2", "logger=tensorboard"),
        *("video=false", "threads=1"),
    )
    while kills < 50:
        seed, runs = f"seed={runs}", runs + 1
        assert main(["finetune", *diffusion, f"run={tmp_path / 'whole'}", "overwrite=true", seed]) == 0
        run = tmp_path / f"run{runs}"
        command = [*diffusion, seed, f"run={run}"]
        while kills < 50:
            process = forked(["finetune", *command])
            time.sleep(rng.uniform(0, 4))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), "it must not end by itself but in success"
            kills += 1
            print(f"kill {kills}: run {runs} had {rows_of(run)} rows")
            if (run / "config.yaml").exists():
                command = [f"resume={run}"]
        if (run / "config.yaml").exists():
            assert main(["finetune", f"resume={run}"]) == 0
            assert outcome(run) == outcome(tmp_path / "whole")
    print(f"{kills} kills in {runs} runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_saves_this_iteration_and_goes_on(tmp_path, monkeypatch, capsys, number):
    run, iterate = tmp_path / "run", Trainer.iterate

    def told_to_end(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.iteration == 3:
            os.kill(os.getpid(), number)
        return iterate(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", told_to_end)
        assert main(["finetune", *CARTPOLE, f"run={run}", "checkpoint_interval=0"]) == 128 + number
    said = capsys.readouterr().err
    assert f"stopped by {number.name}; all is saved, and `dppo finetune resume={run}` goes on" in said
    assert (newest(run).name, rows_of(run)) == ("320", 4), "nothing is lost"
    assert go_on("finetune", run, "env_steps=400")["env_steps"] == 400


def test_a_second_interruption_ends_at_once(tune, monkeypatch, tmp_path):
    iterate = Trainer.iterate

    def interrupted(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return iterate(trainer, *arguments)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune("run")
    assert newest(tmp_path / "run").name == "120"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- runs from elsewhere


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_no_module_is_imported_because_a_run_that_is_resumed_says_so(refused, tmp_path, monkeypatch, command):
    """Nor because it says that it is trusted."""
    (tmp_path / "mischief.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mischief", raising=False)
    config = compose_config(command, ["task.env_id=mischief:Reach-v0", "trust=mischief"])
    RunDirectory.create(tmp_path / "run", overwrite=False, config=config)
    message = refused(command, f"resume={tmp_path / 'run'}")
    assert "config.yaml asks for an environment of the module 'mischief'" in message
    assert not (tmp_path / "trace").exists()
    refused(command, f"resume={tmp_path / 'run'}", "trust=mischief")
    assert (tmp_path / "trace").exists()
