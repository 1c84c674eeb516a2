import errno
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from dppo import cli
from dppo.cli import COMMANDS, main
from dppo.configuration import groups_of, options
from dppo.stopping import Stopped

Refused = Callable[..., str]


# --- help


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = "import sys; from dppo.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command_and_gives_an_example_of_each(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr()
    for command, (about, _) in COMMANDS.items():
        assert f"  {command:10}{about}" in shown.out
        assert f"  dppo {command} " in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_of_a_command_lists_its_choices_settings_and_examples(capsys, command, option):
    assert main([command, option]) == 0
    text = capsys.readouterr().out
    assert f"usage: dppo {command} [key=value ...]" in text
    for group in groups_of(command):
        assert f"  {group}={'|'.join(options(group))}" in text
    assert ("processes: null" if command == "compare" else "overwrite: false") in text
    assert "override /" not in text, "the list of defaults is Hydra's business"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_can_be_composed(command):
    from dppo.configuration import compose_config

    for example in cli._examples(command):
        program, name, *overrides = shlex.split(example.split(" -- ")[0], comments=True)
        assert (program, name) == ("dppo", command)
        overrides = cli.with_source_apart(overrides)[1] if command == "import" else overrides
        compose_config(command, overrides)


@pytest.mark.parametrize("name", ["a.pt", "mydir", "./a${b}", "./x.y=z.pt", "it's a=b, {c} [d].pt", "back\\slash"])
def test_a_source_may_stand_first_without_its_name_whatever_it_is_called(capsys, name):
    for arguments in ([name, "output=here"], ["--show", name, "output=here"]):
        assert main(["import", *arguments, "--show"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert (config["source"], config["output"]) == (name, "here")


@pytest.mark.parametrize("first", ["output=here", "foreign.map={a: b}", "+task.env_kwargs.size=3"])
def test_a_setting_that_stands_first_is_no_source(first):
    assert cli.with_source_apart([first, "source=a"]) == (None, [first, "source=a"])


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_show_prints_the_whole_configuration_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail(f"{name} was run"))
    assert main(["finetune", "task=cartpole", "--show", "algo.clip=0.25"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["algo"]["clip"], config["task"]["name"], config["seed"]) == (0.25, "cartpole", 0)


# --- errors: status 2 and one line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fintune"], "unknown command 'fintune' (did you mean finetune?); there are: collect, pretrain, finetune, "),
        (["xyzzy"], "unknown command 'xyzzy'; there are: collect"),
        (["finetune", "env_step=5"], "has no setting 'env_step' (did you mean env_steps"),
        (["finetune", "task=hoper"], "unknown task 'hoper' (did you mean hopper?)"),
        (["finetune", "seed"], "is no setting; settings are given as key=value"),
        (["finetune", "--vidoe"], "--vidoe"),
        (["finetune", "--config-dir"], "--config-dir"),
        (["finetune", "--config-dir", "/nowhere"], "/nowhere is not a directory"),
        (["finetune", "task=cartpole", "seed=-1"], "seed must not be negative"),
        (["finetune", "task=cartpole", "threads=0"], "threads must be a positive number"),
        (["finetune", "task=cartpole", "device=gpu"], "device=gpu cannot be used"),
        (["finetune", "task=cartpole", "algo.learning_rate=fast"], "algo, learning_rate: "),
        (["finetune", "task=cartpole", "policy.history=many"], "history: "),
        (["finetune", "task=cartpole", "task.env_id=CartPol-v1"], "did you mean CartPole-v1"),
        (["finetune", "task=cartpole", "policy=gaussian", "checkpoint=scratch"], "use policy=categorical"),
        (["evaluate"], "evaluate needs checkpoint=..."),
        (["import", "nowhere.pt", "output=x"], "nowhere.pt does not exist"),
        (["import", "a.pt", "output=x", "for_task=hopper"], "import has no setting 'for_task' (did you mean task?)"),
        (["import", "a.pt", "output=x", "network=unet"], "import has no setting 'network'"),
        (["evaluate", "checkpoint=./nowhere"], "checkpoint ./nowhere does not exist"),
        (["pretrain", "task=cartpole"], "build it with `dppo collect task=cartpole`"),
        (["collect", "task=cartpole", "dataset=weak"], "is not of the form namespace/name-v0"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_on_stderr(refused: Refused, arguments, message):
    assert message in refused(*arguments)


def test_an_error_of_several_lines_is_still_one_line(refused: Refused, monkeypatch):
    def fail(*arguments: object) -> int:
        raise cli.UserError("first\n  second")

    monkeypatch.setattr(cli, "_run", fail)
    assert refused("finetune") == "error: first   second"


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["finetune"])


def test_an_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupt(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert main(["finetune"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_program_itself_exits_with_the_status_and_without_a_traceback():
    command = [sys.executable, "-m", "dppo.cli", "finetune", "task=hoper"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown task 'hoper'")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_line_wherever_it_is_met(refused: Refused, monkeypatch, number):
    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number), "here/plot.png")

    monkeypatch.setattr(cli, "_run", fail)
    message = refused("finetune")
    assert message.startswith(f"error: here/plot.png could not be written: {os.strerror(number)}; make room")


def test_another_error_of_the_system_keeps_its_traceback(monkeypatch):
    def fail(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "no", "here")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(PermissionError):
        main(["finetune"])


def test_a_stopped_run_ends_with_the_signals_status_and_a_line(capsys, monkeypatch):
    def stop(*arguments: object) -> int:
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM; all is saved")

    monkeypatch.setattr(cli, "_run", stop)
    assert main(["finetune"]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; all is saved\n"


@pytest.mark.parametrize("command", ["finetune", "evaluate", "compare"])
def test_the_help_of_a_command_marks_its_defaults_and_stays_in_its_columns(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    critics = "critic=latent|mlp|none|residual_mlp|shared   (default: mlp)"
    assert {"finetune": critics, "evaluate": "sampler=ddim|ddpm\n", "compare": "(default: quick)"}[command] in text
    if command == "evaluate":
        first, second = text.partition("settings and their defaults:\n")[2].splitlines()[:2]
        assert first.startswith("  checkpoint: (required)")
        assert first.index("#") == second.index("Hugging") - 2


@pytest.mark.parametrize("unbuffered", [True, False])
def test_a_reader_that_has_read_enough_is_no_error(unbuffered):
    script = f"{sys.executable} -c 'from dppo.cli import main; raise SystemExit(main())' finetune --help | true"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
