"""The comparison at equal settings: what is asked, run and reported. Nothing is installed."""

import dataclasses
import io
import json

import pytest

from dppo.building import build_update_rule
from dppo.configuration import compose_config
from stable_baselines.report import report
from stable_baselines.runs import SIDES, Plan, Return, Speed, append, contender_settings, missing_returns, read
from stable_baselines.settings import our_settings, their_settings
from throughput import turns

PLAN = Plan(
    tasks=["hopper"],
    rules=["ppo", "trpo"],
    seeds=[0, 1],
    env_steps=5000,
    episodes=50,
    turns=2,
    turn_iterations=3,
    threads=1,
    compiled=True,
)


def done(rule: str, side: str, seed: int, return_mean: float = 1.0) -> Return:
    return Return("hopper", rule, side, seed, 6144, 50, return_mean, 2.0, 1.0, 0.5)


def turn(side: str, number: int, seconds: float) -> Speed:
    return Speed("hopper", "trpo", side, number, 6144, seconds, seconds / 2, 4.0, 0.5)


def test_both_sides_have_the_same_ppo() -> None:
    config = compose_config("finetune", our_settings("hopper", "ppo", 3, compiled=False))
    ours, theirs = build_update_rule(config), their_settings("ppo")
    assert config["num_envs"] == 1 and config["rollout_steps"] == theirs["n_steps"]
    assert (ours.gamma, ours.gae_lambda) == (theirs["gamma"], theirs["gae_lambda"])
    assert ours.learning_rate == ours.critic_learning_rate == theirs["learning_rate"]  # pyright: ignore[reportAttributeAccessIssue]
    assert (ours.batch_size, ours.epochs) == (theirs["batch_size"], theirs["n_epochs"])  # pyright: ignore[reportAttributeAccessIssue]
    assert (ours.clip, ours.max_grad_norm) == (theirs["clip_range"], theirs["max_grad_norm"])  # pyright: ignore[reportAttributeAccessIssue]
    assert (ours.critic_epochs, ours.critic_batch_size, ours.target_kl) == (None, None, None)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("task", "action_dim"), [("hopper", 3), ("halfcheetah", 6)])
def test_both_sides_have_the_same_trpo_though_one_averages_over_action_dimensions(task: str, action_dim: int) -> None:
    config = compose_config("finetune", our_settings(task, "trpo", action_dim, compiled=False))
    ours, theirs = build_update_rule(config), their_settings("trpo")
    assert ours.max_kl == pytest.approx(action_dim * theirs["target_kl"])  # pyright: ignore[reportAttributeAccessIssue]
    assert ours.damping == pytest.approx(action_dim * theirs["cg_damping"])  # pyright: ignore[reportAttributeAccessIssue]
    assert ours.iterations == theirs["cg_max_steps"]  # pyright: ignore[reportAttributeAccessIssue]
    assert ours.backtracks + 1 == theirs["line_search_max_iter"]  # pyright: ignore[reportAttributeAccessIssue]
    assert ours.backtrack_factor == theirs["line_search_shrinking_factor"]  # pyright: ignore[reportAttributeAccessIssue]
    assert ours.critic_learning_rate == theirs["learning_rate"]
    assert (ours.critic_epochs, ours.critic_batch_size) == (theirs["n_critic_updates"], theirs["batch_size"])
    assert (ours.max_grad_norm, ours.schedule) == (None, "constant"), "SB3-contrib has neither"


@pytest.mark.parametrize("rule", ["ppo", "trpo"])
def test_both_sides_have_the_same_networks_and_the_same_first_std(rule: str) -> None:
    config = compose_config("finetune", our_settings("halfcheetah", rule, 6, compiled=False))
    theirs = their_settings(rule)["policy_kwargs"]
    assert config["network"]["hidden_dims"] == theirs["net_arch"]["pi"]
    assert config["critic"]["hidden_dims"] == theirs["net_arch"]["vf"]
    assert config["network"]["activation"] == config["critic"]["activation"] == "tanh"
    assert (config["policy"]["initial_std"], theirs["log_std_init"]) == (1.0, 0.0)
    assert config["checkpoint"] == "scratch" and config["algo"]["reward_scaling"]


def test_both_workers_are_asked_for_the_same_task_length_and_evaluation() -> None:
    ours, theirs = (contender_settings(PLAN, "hopper", "trpo", side, 4, 7) for side in SIDES)
    assert ours.pop("settings") != theirs.pop("settings")
    assert ours == theirs
    assert ours["env_id"] == "Hopper-v5" and ours["evaluation"] == {"episodes": 50, "num_envs": 10, "seed": 100_000}


def test_sides_alternate_and_what_is_there_is_not_run_again() -> None:
    todo = list(missing_returns(PLAN, [done("ppo", "ours", 0), done("trpo", "sb3", 1)]))
    assert todo == [
        (0, "hopper", "ppo", "sb3"),
        (0, "hopper", "trpo", "ours"),
        (0, "hopper", "trpo", "sb3"),
        (1, "hopper", "ppo", "ours"),
        (1, "hopper", "ppo", "sb3"),
        (1, "hopper", "trpo", "ours"),
    ]


@pytest.mark.parametrize("change", [{"env_steps": 2048}, {"episodes": 10}])
def test_runs_of_another_length_or_evaluation_are_not_mixed_with_these(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="choose another --output"):
        list(missing_returns(PLAN, [dataclasses.replace(done("ppo", "ours", 0), **change)]))


@pytest.mark.parametrize("lines", [[done("ppo", "ours", 0), done("trpo", "sb3", 1)], [turn("ours", 0, 0.1)]])
def test_lines_of_a_file_come_back_as_they_were(tmp_path, lines) -> None:
    path = tmp_path / "lines.csv"
    assert read(path, type(lines[0])) == []
    for line in lines:
        append(path, line)
    assert read(path, type(lines[0])) == lines


def test_the_report_has_means_intervals_and_ratios_of_neighbouring_turns() -> None:
    returns = [done("ppo", side, seed, 100.0 * (1 + seed)) for side in SIDES for seed in (0, 1)]
    speeds = [turn("ours", 0, 1.0), turn("sb3", 0, 3.0), turn("ours", 1, 2.0), turn("sb3", 1, 8.0)]
    machine = {"date": "today", "cpu": "a CPU", "cores": 2, "versions": {"torch": "2"}}
    text = report(PLAN, returns, speeds, machine)
    assert "| hopper, ppo | 2 | 150.0 [" in text and "(100.0 to 200.0) | 1.00 |" in text
    # The medians of two turns lie in their middle: (6144 / 1 + 6144 / 2) / 2, and ratios of 3 and 4.
    assert "| hopper, trpo | 4,608 | 1,408 | 3.50 (3.00 to 4.00) | 3.50 (3.00 to 4.00) | 4.0 s | 4.0 s |" in text
    assert "hopper, ppo | 4" not in text, "no speed of it was measured"


def test_a_contender_that_has_iterated_enough_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[None] = []
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n1\n1\n"))
    with pytest.raises(SystemExit):
        turns.run_and_report(lambda: done.append(None), lambda: [1.5, len(done)], iterations=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] + ": " for line in lines] == [turns.MARK, turns.MARK, turns.REPORT, turns.MARK]
    assert json.loads(lines[2].removeprefix(turns.REPORT)) == [1.5, 3]
