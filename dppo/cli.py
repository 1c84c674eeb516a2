"""The command line: ``dppo <command> [key=value ...]``."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import NoReturn

from dppo.stopping import Stopped
from policies.errors import UserError

USER_ERROR_STATUS = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room for a file."""

COMMANDS = {
    "collect": (
        "make demonstrations: train an expert (or run a scripted one) and record a Minari dataset",
        """
        dppo collect task=hopper
        dppo collect task=maze steps=50_000
        dppo collect task=hopper demonstrator.expert.target_return=2000 dataset=me/hopper/better-v0
        """,
    ),
    "pretrain": (
        "clone demonstrations into a policy",
        """
        dppo pretrain task=hopper policy=diffusion
        dppo pretrain task=hopper dataset=mujoco/hopper/medium-v0
        dppo pretrain task=hopper policy=diffusion network.hidden_dims=[512,512,512] policy.history=2
        dppo pretrain resume=runs/pretrain-hopper-diffusion-seed0
        """,
    ),
    "finetune": (
        "fine-tune a policy with reinforcement learning",
        """
        dppo finetune task=hopper                                       # from the embedded checkpoint
        dppo finetune task=hopper checkpoint=runs/pretrain-hopper-diffusion-seed0
        dppo finetune task=hopper policy=gaussian checkpoint=scratch    # plain PPO
        dppo finetune task=hopper checkpoint=state_3000.pt foreign.settings=ft_ppo_diffusion_mlp.yaml   # the original's
        dppo finetune task=hopper policy.finetuned_steps=5 algo.learning_rate=3e-4 env_steps=5_000_000
        dppo finetune experiment=demo
        dppo finetune resume=runs/demo                                  # go on with a run that was stopped
        """,
    ),
    "compare": (
        "compare methods over tasks and seeds, several runs at a time, and write a report",
        """
        dppo compare comparison=quick
        dppo compare comparison=gaussian seeds=[0,1] processes=4
        dppo compare comparison=gaussian output=comparisons/short -- env_steps=200_000 algo.gamma=0.98
        """,
    ),
    "import": (
        "make a policy of one that another project saved: LeRobot, diffusion_policy, the original DPPO",
        """
        dppo import lerobot/diffusion_pusht_keypoints output=policies/pusht
        dppo import data/outputs/pusht/checkpoints/latest.ckpt output=policies/pusht
        dppo import state_3000.pt output=policies/hopper task=hopper foreign.settings=ft_ppo_diffusion_mlp.yaml
        dppo import state_3000.pt output=policies/hopper 'foreign.given={denoising_steps: 20, activation: relu}'
        """,
    ),
    "evaluate": (
        "evaluate a checkpoint; it knows its task, normalisation and denoising steps itself",
        """
        dppo evaluate checkpoint=runs/demo
        dppo evaluate checkpoint=runs/demo/checkpoints/100000 episodes=200 video=true
        dppo evaluate checkpoint=owner/name task=hopper save_policy=true
        """,
    ),
    "export": (
        "hand a policy to other programs: ONNX, TorchScript, torch.export, LeRobot",
        """
        dppo export format=onnx checkpoint=runs/demo output=exported/hopper.onnx
        dppo export format=torchscript checkpoint=embedded/hopper output=hopper.pt sampler=ddim sampler.steps=5
        dppo export format=lerobot checkpoint=runs/finetune-pusht output=exported/pusht state_dim=2
        """,
    ),
}

MODULES = {"import": "importing"}
"""In ``dppo.commands``, of those commands whose name can name no module."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after an error that the user can mend, 128 + n after signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command, overrides = arguments[0], arguments[1:]
    with suppress(ValueError):  # not the main thread: then signals are somebody else's business
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that worker processes end
    try:
        status = _run(command, overrides)
        sys.stdout.flush()
        return status
    except UserError as error:
        print("error:", *str(error).split("\n"), file=sys.stderr)
        return USER_ERROR_STATUS
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read what it printed has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes what is left
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        what = f"{error.filename or 'a file'} could not be written: {error.strerror}"
        print(f"error: {what}; make room, and a run goes on from its last checkpoint with resume=...", file=sys.stderr)
        return USER_ERROR_STATUS


def _run(command: str, overrides: list[str]) -> int:
    from policies.config import near_misses

    if command == "--version":
        print(import_module("importlib.metadata").version("dppo"))
        return 0
    if command not in COMMANDS:
        raise UserError(
            f"unknown command {command!r}{near_misses(command, COMMANDS)}; there are: {', '.join(COMMANDS)}"
        )
    if any(option in overrides for option in ("-h", "--help")):
        print(_command_help(command))
        return 0
    from dppo.building import implied_choices
    from dppo.configuration import compose_config, overridden_keys

    overrides, for_runs = _at_dashes(command, overrides)
    options, overrides = _options(command, overrides)
    source, overrides = with_source_apart(overrides) if command == "import" else (None, overrides)
    config = compose_config(command, overrides, options.config_dir)
    config |= {} if source is None else {"source": source}
    going_on = config.get("resume") is not None  # and then nothing follows from what is given
    implied = [] if going_on else implied_choices(config, overridden_keys(overrides), options.config_dir)
    if implied:
        config = compose_config(command, overrides, options.config_dir, implied)
    if options.show:
        import yaml

        print(yaml.safe_dump(config, sort_keys=False), end="")
        return 0
    from dppo.output.video import choose_gl_backend

    choose_gl_backend()
    more = {"overrides": for_runs, "extra": options.config_dir} if command == "compare" else {}
    import_module(f"dppo.commands.{MODULES.get(command, command)}").run(config, overridden_keys(overrides), **more)
    return 0


def _at_dashes(command: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before ``--`` and after it, which only a comparison has a use for."""
    if "--" not in arguments:
        return arguments, []
    if command != "compare":
        raise UserError(f"`--` means nothing to dppo {command}; settings are given as key=value")
    middle = arguments.index("--")
    return arguments[:middle], arguments[middle + 1 :]


def with_source_apart(arguments: list[str]) -> tuple[str | None, list[str]]:
    """A source that stands first without its name (None: there is none), and overrides with something in its place.

    It may hold any character, of which Hydra would read some its own way.
    """
    name, equals, _ = arguments[0].partition("=") if arguments else ("", "=", "")
    is_setting = equals and all(part.isidentifier() for part in name.lstrip("+").split("."))
    return (None, arguments) if not arguments or is_setting else (arguments[0], ["source=''", *arguments[1:]])


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; settings are given as key=value, see `{self.prog} --help`")


def _options(command: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides that stand between them."""
    parser = _Parser(prog=f"dppo {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    return options, options.overrides


def _overview() -> str:
    lines = [
        "Fine-tune diffusion policies with reinforcement learning.",
        "",
        "usage: dppo <command> [key=value ...]",
        "",
    ]
    lines += [f"  {name:10}{about}" for name, (about, _) in COMMANDS.items()]
    first = [_examples(name)[0] for name in COMMANDS]
    lines += ["", "examples:", *(f"  {line}" for line in first), "", "`dppo <command> --help` tells more about each."]
    return "\n".join(lines)


def _command_help(command: str) -> str:
    from dppo.configuration import TASK_APART, config_directory, groups_of, options

    about, _ = COMMANDS[command]
    has_defaults = bool(groups_of(command))
    groups = groups_of(command) | ({"task": None} if command in TASK_APART else {})
    options_text = "[--show] [--config-dir DIR]" if groups else "[--show]"
    options_text += " [-- key=value ... for all runs]" if command == "compare" else ""
    lines = [f"dppo {command}: {about}", "", f"usage: dppo {command} [key=value ...] {options_text}", ""]
    lines += ["examples:", *(f"  {line}" for line in _examples(command)), ""]
    if groups:
        lines += [f"choices, each a YAML file in {config_directory()}/<group>/ with settings <group>.<name>=...:"]
        for group, default in groups.items():
            lines += [f"  {group}={'|'.join(options(group))}{f'   (default: {default})' if default else ''}"]
        if "policy" in groups:
            lines += ["  A choice may bring others with it, as task=cartpole brings policy=categorical."]
        lines += [""]
    text = (config_directory() / f"{command}.yaml").read_text()
    text = text.split("\n\n", 1)[-1] if has_defaults else text
    text = re.sub(r"\?\?\? {0,7}", "(required)", text)  # in as many columns, where there are so many
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    lines += ["settings and their defaults:", *(f"  {line}" for line in settings), ""]
    lines += ["--show prints the whole configuration, with the choices' own settings, and stops."]
    if groups:
        lines += ["--config-dir DIR adds your own choices, e.g. DIR/task/mine.yaml for task=mine."]
    return "\n".join(lines)


def _examples(command: str) -> list[str]:
    return dedent(COMMANDS[command][1]).strip().splitlines()


if __name__ == "__main__":
    sys.exit(main())
