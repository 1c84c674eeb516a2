"""From a comparison's settings to its runs and its report."""

import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dppo.cli import main
from dppo.commands.compare import Shares
from dppo.comparison import running
from dppo.comparison.plan import ComparisonConfig, PlannedRun, plan
from dppo.comparison.recorded import read_recorded
from dppo.comparison.report import write_report
from dppo.comparison.results import POINTS, Result, Table, finished
from dppo.comparison.running import run_all
from dppo.locking import held
from dppo.output.run_directory import HEADER
from policies import UserError
from policies.config import config_from_dict

METHODS = {"good": ["algo=ppo"], "bad": ["algo=trpo", "algo.max_kl=1e-9"]}


def settings(**changes) -> dict:
    return {"name": "trial", "tasks": ["cartpole", "hopper"], "seeds": [0, 1], "methods": METHODS, **changes}


def config(**changes) -> ComparisonConfig:
    return config_from_dict(ComparisonConfig, settings(**changes), "compare")


def nothing(*_: object) -> None:
    pass


SILENTLY: dict[str, Any] = {"extra": None, "on_end": nothing, "on_wait": nothing}
"""Runs without anybody who hears of them."""

ROWS = 10
"""Of metrics of a run."""


def finish(run: PlannedRun, score: float, *, before: float = 10.0, steps: int = 1000) -> None:
    run.note_settings()
    run.path.mkdir(parents=True)
    rows = [{"env_steps": s, "return_mean": score * s / steps} for s in range(steps // ROWS, steps + 1, steps // ROWS)]
    run.directory.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = {key: {"return_mean": value, "success_rate": None} for key, value in (("before", before), ("after", score))}
    run.directory.summary_path.write_text(json.dumps({"env_steps": steps, "wall_clock_s": 60.0, **ends}))
    provenance = {
        "started": f"2030-01-0{1 + run.seed}T10:00",
        "git": {"revision": "abcdef0123", "dirty": False},
        "machine": {"cpu": "a processor", "cores": 4},
        "packages": dict.fromkeys(("torch", "gymnasium", "mujoco", "numpy"), "1.0"),
    }
    run.directory.config_path.write_text(f"{HEADER}\n{json.dumps({'provenance': provenance})}")


# --- the plan


def test_every_method_meets_every_task_with_every_seed(tmp_path):
    runs = plan(config(), tmp_path)
    assert len({(run.method, run.task, run.seed) for run in runs}) == 8
    assert len({run.path for run in runs}) == 8
    assert [run.seed for run in runs] == [0] * 4 + [1] * 4, "first results of everything come early"


def test_the_users_own_settings_win_over_a_methods_over_a_tasks_over_those_for_all(tmp_path):
    choice = config(settings=["env_steps=1"], task_settings={"hopper": ["env_steps=2"]})
    run = next(run for run in plan(choice, tmp_path, ["env_steps=4"]) if (run.method, run.task) == ("good", "hopper"))
    assert run.overrides == ("task=hopper", "env_steps=1", "env_steps=2", "algo=ppo", "env_steps=4", "seed=0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"odd": ["algo.clipp=1"]}}, "^odd on cartpole: .*clipp"),
        ({"tasks": ["cartpole", "chess"]}, "unknown task 'chess'"),
        ({"tasks": []}, "tasks must not be empty"),
        ({"seeds": [1, 1]}, "seeds holds something twice"),
        ({"methods": {}}, "methods must not be empty"),
        ({"task_settings": {"hoper": []}}, r"unknown task 'hoper' \(did you mean hopper\?\)"),
        ({"settings": ["seed=3"]}, "seed=3: a comparison chooses seed of each run itself"),
        ({"methods": {"odd": ["task=maze"]}}, "task=maze: a comparison chooses task"),
    ],
)
def test_a_comparison_that_cannot_work_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        plan(config(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_with_other_settings_is_refused_and_one_with_the_same_is_kept(tmp_path):
    for run in plan(config(), tmp_path):
        finish(run, 100.0)
    assert all(run.summary for run in plan(config(), tmp_path))
    with pytest.raises(UserError, match=r"^8 runs were .* other settings.* \(nothing then, env_steps=5 now\)"):
        plan(config(settings=["env_steps=5"]), tmp_path)


def test_the_users_own_settings_are_checked_like_the_comparisons(tmp_path):
    with pytest.raises(UserError, match="run=here: a comparison chooses run"):
        plan(config(), tmp_path, ["run=here"])


def test_settings_in_another_order_are_other_settings_and_both_are_named(tmp_path):
    for run in plan(config(settings=["env_steps=1", "env_steps=2"]), tmp_path):
        finish(run, 100.0)
    with pytest.raises(UserError, match=r"task=cartpole env_steps=1 env_steps=2 .* then, .* env_steps=2 env_steps=1 "):
        plan(config(settings=["env_steps=2", "env_steps=1"]), tmp_path)


def test_a_run_that_did_not_end_is_not_finished(tmp_path):
    run = plan(config(), tmp_path)[0]
    assert run.summary is None
    finish(run, 100.0)
    assert run.summary is not None
    content = json.loads(run.directory.summary_path.read_text())
    run.directory.summary_path.write_text(json.dumps({**content, "after": None}))
    assert run.summary is None
    run.directory.summary_path.write_text("{ torn")
    assert run.summary is None


# --- running


@pytest.fixture
def shell(monkeypatch):
    """Runs a shell script in place of `dppo finetune`."""

    def use(script: str) -> None:
        monkeypatch.setattr(running.sys, "executable", "/bin/sh")
        start = running.subprocess.Popen
        monkeypatch.setattr(
            running.subprocess, "Popen", lambda command, **how: start(["/bin/sh", "-c", script, *command], **how)
        )

    return use


def test_no_more_runs_go_at_a_time_than_allowed_and_the_failed_ones_are_named(tmp_path, shell):
    shell(f'echo start >> {tmp_path}/log; sleep 0.3; echo end >> {tmp_path}/log; case "$*" in *seed=1*) exit 3;; esac')
    ended = []
    runs = plan(config(tasks=["cartpole"]), tmp_path / "out")
    hear = {**SILENTLY, "on_end": lambda run, status, _: ended.append((run, status))}
    failed = run_all(runs, processes=2, threads=1, **hear)
    assert {run.seed for run in failed} == {1}
    assert len(failed) == 2
    assert {status for run, status in ended if run.seed == 1} == {3}
    assert len(ended) == 4
    running_now = np.cumsum([1 if line == "start" else -1 for line in (tmp_path / "log").read_text().split()])
    assert running_now.max() == 2


def test_what_runs_is_stopped_when_the_comparison_is(tmp_path, shell):
    shell(
        f"trap 'echo saved >> {tmp_path}/log; exit 1' TERM; echo started >> {tmp_path}/log; while :; do sleep 0.1; done"
    )

    def poll(seconds: float) -> None:
        log = tmp_path / "log"
        if log.is_file() and log.read_text().count("started") == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "time", SimpleNamespace(**vars(time) | {"sleep": poll}))
        with pytest.raises(KeyboardInterrupt):
            run_all(plan(config(), tmp_path / "out"), processes=2, threads=1, **SILENTLY)
    assert (tmp_path / "log").read_text().count("saved") == 2


def test_a_run_that_was_stopped_goes_on_and_one_with_other_settings_starts_anew(tmp_path, shell):
    shell(f'echo "$*" >> {tmp_path}/log')
    for overrides in ([], ["env_steps=5"]):
        runs = plan(config(tasks=["cartpole"], seeds=[0]), tmp_path / "out", overrides)[:1]
        run_all(runs, processes=1, threads=1, **SILENTLY)
        (runs[0].path / "checkpoints" / "100").mkdir(parents=True, exist_ok=True)
        run_all(runs, processes=1, threads=2, **SILENTLY)
    path = runs[0].path
    fresh, gone_on, other, gone_on_again = (tmp_path / "log").read_text().splitlines()
    assert f"task=cartpole algo=ppo seed=0 run='{path}' overwrite=true threads=1" in fresh
    assert f"task=cartpole algo=ppo env_steps=5 seed=0 run='{path}' overwrite=true threads=1" in other
    for command in (gone_on, gone_on_again):
        assert command.endswith(f"dppo.cli finetune resume='{path}' threads=2")


def test_a_run_of_an_environment_of_the_users_own_goes_on(tmp_path, shell):
    """Whose module the comparison names itself: what a run's files say does not count."""
    shell(f'echo "$*" >> {tmp_path}/log')
    choice = config(tasks=["cartpole"], seeds=[0], settings=["task.env_id=mine:CartPole-v1"])
    (run, *_) = plan(choice, tmp_path / "out")
    run.note_settings()
    (run.path / "checkpoints" / "100").mkdir(parents=True)
    run_all([run], processes=1, threads=1, **SILENTLY)
    assert (tmp_path / "log").read_text().endswith(f"resume='{run.path}' trust=mine threads=1\n")


def test_how_far_the_runs_are_is_seen_while_they_go_on(tmp_path):
    runs = plan(config(seeds=[0, 1]), tmp_path)
    for run, steps in zip(runs[:2], (250, 2000), strict=True):
        run.path.mkdir(parents=True)
        run.directory.config_path.write_text(f"{HEADER}\nenv_steps: 1000\n")
        rows = [{"env_steps": 1}, {"env_steps": steps}]
        run.directory.metrics_path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"env_st')
    (runs[2].path).mkdir(parents=True)  # just begun: nothing is written yet
    assert [run.share for run in runs[:4]] == [0.25, 1.0, 0.0, 0.0]

    moves = []
    shares = Shares(moves.append, {runs[3]: 0.5})
    shares.look(runs[:3])
    assert moves == [], "the first look comes a while after the start"
    shares.next_look = 0.0
    shares.look(runs[:3])
    shares.look(runs[:3])
    assert sum(moves) == 1.25
    assert len(moves) == 1, "the second look came too early"
    shares.end(runs[0])
    shares.end(runs[3])
    assert sum(moves) == 2.5, "of the last, half was done before"


# --- the report


def reported(tmp_path: Path) -> str:
    runs = plan(config(), tmp_path)
    for run in runs:
        finish(run, {"good": 200.0, "bad": 50.0}[run.method] + 10 * run.seed + 1000 * (run.task == "hopper"))
    table = Table(finished(runs), ["cartpole", "hopper"], METHODS)
    return write_report(table, name="trial", command="dppo compare x", output=tmp_path).read_text()


def test_the_report_has_the_scores_the_probabilities_and_the_picture(tmp_path):
    text = reported(tmp_path)
    assert "| cartpole | good | 2 | 205.0 [200.0, 210.0] | 205.0 ± 7.07 | 200.0 | 210.0 |" in text
    assert "| hopper | bad | 2 | 1,055 [1,050, 1,060] |" in text
    assert "|  | good | bad |" in text
    assert "| good |  | 1.00 [1.00, 1.00] |" in text
    assert "| bad | 0.00 [0.00, 0.00] |  |" in text
    assert "different numbers" not in text
    assert "    dppo compare x" in text
    assert "| bad | `algo=trpo algo.max_kl=1e-9` |" in text
    assert "8 runs, seeds 0, 1, 2030-01-01 to 2030-01-02, on a processor, 4 cores; revision abcdef0; torch 1.0" in text
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000


def test_recorded_curves_are_drawn_beside_the_methods(tmp_path):
    runs = plan(config(), tmp_path)
    for run in runs:
        finish(run, 100.0)
    table = Table(finished(runs), ["cartpole", "hopper"], METHODS)
    (tmp_path / "theirs.csv").write_text("task,env_steps,return\nhopper,10,1\nhopper,20,2\n")
    recorded = read_recorded({"theirs": str(tmp_path / "theirs.csv")})
    write_report(table, name="trial", command="x", output=tmp_path, recorded=recorded)
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[-2:] == ["hopper,theirs,10.0,1.0,1.0,1.0", "hopper,theirs,20.0,2.0,2.0,2.0"]
    assert not any("cartpole,theirs" in line for line in lines)


def test_normalised_scores_are_zero_before_training_and_one_for_the_best_run(tmp_path):
    reported(tmp_path)
    table = Table(finished(plan(config(), tmp_path)), ["cartpole", "hopper"], METHODS)
    cartpole, hopper = table.normalized("good")
    np.testing.assert_allclose(cartpole, [190 / 200, 1.0])
    np.testing.assert_allclose(hopper, [1190 / 1200, 1.0])


def test_of_two_methods_that_only_harm_the_one_that_harms_more_has_the_lower_normalised_score(tmp_path):
    runs = plan(config(tasks=["hopper"], seeds=[0]), tmp_path)
    for run in runs:
        finish(run, {"good": 90.0, "bad": 50.0}[run.method], before=100.0)
    table = Table(finished(runs), ["hopper"], METHODS)
    assert [table.normalized(method)[0].tolist() for method in ("good", "bad")] == [[-0.2], [-1.0]]


def test_the_tables_hold_every_run_and_every_point(tmp_path):
    reported(tmp_path)
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {(row["task"], row["method"], row["seed"]) for row in rows} == {
        (task, method, seed) for task in ("cartpole", "hopper") for method in METHODS for seed in "01"
    }
    with (tmp_path / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * ROWS


def test_the_curve_of_a_method_covers_what_all_its_runs_measured_as_finely_as_the_coarsest(tmp_path):
    for run in (runs := plan(config(tasks=["hopper"]), tmp_path)):
        finish(run, 100.0, steps=1000 * (1 + run.seed) * (10 if run.method == "good" else 1))
    table = Table(finished(runs), ["hopper"], METHODS)
    np.testing.assert_allclose(table.grid("hopper", "good"), np.linspace(2000, 10_000, ROWS))
    np.testing.assert_allclose(table.grid("hopper", "bad"), np.linspace(200, 1000, ROWS))


def measured(tmp_path: Path, rows: list[tuple[float, float | None]]) -> Result:
    """A run that measured these returns at these environment steps."""
    run = plan(config(tasks=["hopper"], seeds=[0]), tmp_path)[0]
    finish(run, 100.0, before=7.0)
    lines = [json.dumps({"env_steps": steps, "return_mean": value}) for steps, value in rows]
    run.directory.metrics_path.write_text("".join(f"{line}\n" for line in lines))
    return Result(run, run.summary or {})


def test_a_curve_is_straight_between_what_was_measured(tmp_path):
    result = measured(tmp_path, [(10, None), (100, 20.0), (200, 40.0), (300, None), (400, 60.0)])
    np.testing.assert_allclose(
        result.curve(np.array([0.0, 100, 150, 200, 300, 400, 500])), [20, 20, 30, 40, 50, 60, 60]
    )
    np.testing.assert_allclose(measured(tmp_path / "other", [(10, None)]).curve(np.array([5.0])), [7])


def test_of_many_iterations_a_curve_has_the_means_of_several_in_a_row(tmp_path):
    count = 2 * POINTS
    result = measured(tmp_path, [(10 * i, i) for i in range(1, count + 1)])
    steps, returns = result.points
    np.testing.assert_allclose(steps, 20 * np.arange(1, POINTS + 1))
    np.testing.assert_allclose(returns, 2 * np.arange(1, POINTS + 1) - 0.5)


def test_iterations_of_unequal_lengths_are_neither_merged_nor_repeated(tmp_path):
    """They end a little before or after even steps, at each seed elsewhere."""
    steps = np.cumsum([15_926, 15_929, 15_934, 15_931, 15_927, 15_935, 15_930, 15_932])
    result = measured(tmp_path, list(zip(steps.tolist(), range(8), strict=True)))
    table = Table([result], ["hopper"], METHODS)
    np.testing.assert_allclose(result.curve(table.grid("hopper", "good")), np.arange(8), atol=1e-3)


def test_the_report_warns_of_unequal_budgets_and_says_nothing_of_probabilities_of_single_runs(tmp_path):
    for run in (runs := plan(config(tasks=["hopper"], seeds=[0]), tmp_path)):
        finish(run, 100.0, steps=1000 * (3 if run.method == "good" else 1))
    table = Table(finished(runs), ["hopper"], METHODS)
    settings = {"all runs": ["video=false"], "hopper": []}
    text = write_report(table, name="trial", command="x", output=tmp_path, settings=settings).read_text()
    assert "The methods had different numbers of environment steps on hopper." in text
    assert "Probability" not in text
    assert "| (all runs) | `video=false` |" in text
    assert "(hopper)" not in text


# --- the command


TINY = ["env_steps=40", "num_envs=2", "rollout_steps=10", "evaluation.episodes=2", "video=false", "logger=none"]


def test_the_command_runs_what_is_missing_and_nothing_again(tmp_path, capsys, shell):
    (tmp_path / "comparison").mkdir()
    content = {**settings(tasks=["cartpole"], seeds=[0], settings=TINY), "methods": {"npg": ["algo=npg"]}}
    (tmp_path / "comparison" / "mine.yaml").write_text("# @package _global_\n" + json.dumps(content))
    command = ["compare", "--config-dir", str(tmp_path), "comparison=mine", f"output={tmp_path / 'out'}"]
    assert main(command) == 0
    assert "1 runs, of which 0 are finished" in capsys.readouterr().out
    assert "| cartpole | npg | 1 |" in (tmp_path / "out" / "report.md").read_text()
    shell(f'echo "$*" >> {tmp_path}/log; exit 3')
    assert main([*command, "seeds=[0,1]"]) == 2
    told = capsys.readouterr()
    assert "2 runs, of which 1 are finished" in told.out
    assert "1 of 2 runs failed, the first of them npg, cartpole, seed 1: see " in told.err
    assert "- npg: cartpole seed 1" in (tmp_path / "out" / "report.md").read_text()
    (again,) = (tmp_path / "log").read_text().splitlines()
    assert "seed=1" in again
    assert main([*command, "--", "algo.gamma=0.5"]) == 2
    assert "finished with other settings" in capsys.readouterr().err


def test_dashes_mean_something_to_a_comparison_only(capsys):
    assert main(["finetune", "--", "env_steps=3"]) == 2
    assert "`--` means nothing to dppo finetune" in capsys.readouterr().err


def test_two_comparisons_do_not_share_a_directory(tmp_path, refused):
    with held(tmp_path, "unused"):
        assert f"another `dppo compare` is at work in {tmp_path}" in refused("compare", f"output={tmp_path}")


def test_a_method_may_have_any_name_and_two_that_would_share_a_folder_are_refused(tmp_path):
    runs = plan(config(methods={"lr=1e-3 (slow)": ["algo=ppo"], "../up": ["algo=ppo"]}), tmp_path)
    assert {run.path.relative_to(tmp_path / "runs").parts[0] for run in runs} == {"lr-1e-3-slow", "up"}
    with pytest.raises(UserError, match="share a folder"):
        plan(config(methods={"a b": ["algo=ppo"], "a-b": ["algo=ppo"]}), tmp_path)


def test_a_file_that_is_not_of_the_whole_configuration_is_named(tmp_path, capsys):
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "mine.yaml").write_text(json.dumps(settings()))
    assert main(["compare", "--config-dir", str(tmp_path), "comparison=mine", f"output={tmp_path / 'out'}"]) == 2
    assert "must begin with the line `# @package _global_`" in capsys.readouterr().err


def test_what_is_missing_is_named_in_the_report(tmp_path):
    runs = plan(config(), tmp_path)
    finish(runs[0], 100.0)
    table = Table(finished(runs), ["cartpole"], METHODS)
    text = write_report(table, runs[1:], name="trial", command="x", output=tmp_path).read_text()
    assert "- bad: cartpole seed 0, hopper seed 0, cartpole seed 1, hopper seed 1\n- good: hopper seed 0," in text


def test_the_configuration_of_a_run_is_read_as_text(tmp_path, monkeypatch):
    """No resolver of OmegaConf's runs, no object is made, no tag of YAML's obeyed."""
    monkeypatch.setenv("SECRET", "told")
    (run, *_) = plan(config(), tmp_path)
    finish(run, 1.0)
    (result,) = finished([run])
    text = "provenance: {git: '${oc.env:SECRET}', started: {_target_: os.getcwd}}"
    run.directory.config_path.write_text(f"{HEADER}\n{text}")
    assert result.provenance == {"git": "${oc.env:SECRET}", "started": {"_target_": "os.getcwd"}}
    run.directory.config_path.write_text(f"{HEADER}\nprovenance: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match=r"config.yaml is damaged: .*python/object"):
        _ = result.provenance
