"""Composing configurations with Hydra, and errors in one line with the near misses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml import YAMLError

from policies import UserError
from policies.config import complaint, near_misses


def config_directory() -> Path:
    """Where the YAML files are: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


TASK_APART = ("evaluate", "import")
"""Commands that want of a task what it is, and not the policy and settings of training that its choice brings."""


def compose_config(
    command: str, overrides: Sequence[str], extra: Path | None = None, implied: Sequence[str] = ()
) -> dict[str, Any]:
    """The resolved configuration of a command as plain data.

    Args:
        command: a file of the configuration directory.
        overrides: ``key=value`` as of Hydra.
        extra: a directory with more choices, e.g. ``task/mine.yaml``.
        implied: more overrides, before those, which are not the user's.

    Raises:
        UserError: an override that is malformed, names something unknown, or gives a setting of the command itself a
            value of another type than its default's. (The settings of groups are checked by whoever takes them.)
    """
    if command not in TASK_APART:
        return _composed(command, overrides, extra, implied)
    of_task = [override for override in overrides if re.match(r"\+*task[.=]", override)]
    if of_task and not any(override.startswith("task=") for override in of_task):
        raise UserError(f"{of_task[0]}: name the task, too: task=...")
    config = _composed(command, [override for override in overrides if override not in of_task], extra)
    return {**config, "task": _composed("finetune", of_task, extra)["task"]} if of_task else config


def _composed(
    command: str, overrides: Sequence[str], extra: Path | None, implied: Sequence[str] = ()
) -> dict[str, Any]:
    if extra is not None and not extra.is_dir():
        raise UserError(f"--config-dir {extra} is not a directory")
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override!r} is no setting; settings are given as key=value")
    search = [] if extra is None else [f"hydra.searchpath=['file://{extra.resolve()}']"]
    with initialize_config_dir(str(config_directory().resolve()), version_base="1.3"):
        try:
            parsed = OverridesParser.create().parse_overrides(list(overrides))
        except HydraException as error:
            hint = """; quote what holds a "=": 'key=["a=b"]'""" if "input '[" in str(error) else ""
            raise UserError(f"cannot read the override: {_one_line(error)}{hint}") from error
        own, groups = _own_settings(command), groups_of(command)
        choices = [str(one.input_line) for one in parsed if _is_choice(one, extra)]
        for key in overridden_keys(overrides):
            if key.split(".")[0] not in (*own, *groups):
                raise _unknown(command, key, own, groups)
        try:
            config = compose(command, [*search, *implied, *overrides])
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise UserError(f"{command} needs {missing[0]}=...; see `dppo {command} --help`")
            content = OmegaConf.to_container(config, resolve=True)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            unknown = re.match(r"Could not override '([^']*)'", str(error))
            if unknown is None:
                raise UserError(_one_line(error)) from error
            if isinstance(own.get(unknown[1]), Mapping):
                raise UserError(f"{command} has settings {unknown[1]}.<name>=..., no choice of {unknown[1]}") from error
            known = _keys(compose(command, [*search, *implied, *choices]))
            raise _of_another_choice(command, unknown[1]) or _no_setting(command, unknown[1], known) from error
    assert isinstance(content, dict)
    _check_experiment(dict(choice.split("=", 1) for choice in choices), overridden_keys(overrides), content)
    everywhere = {path.name for path in config_directory().iterdir() if path.is_dir()}
    for key in content:
        if key not in (*own, *groups, *everywhere):
            raise _unknown(command, str(key), own, groups)
    # A choice may set what only other commands have: a policy's file says how PPO trains it, and `pretrain` has no PPO.
    kept = {str(key): value for key, value in content.items() if key in own or key in groups}
    return kept | _typed(content, own, command)


def _check_experiment(chosen: Mapping[str, str], overridden: set[str], content: Mapping[Any, Any]) -> None:
    """Refuse a choice that goes with settings of an experiment which that choice does not have."""
    if "experiment" not in chosen:
        return
    for group in ("policy", "algo", "critic"):
        choice = chosen.get(group, "")
        if not (config_directory() / group / f"{choice}.yaml").is_file():
            continue
        own = default_settings(group, choice)
        names = [f"{group}.{name}" for name in content[group] if name not in own.get(group, own)]
        strange = [name for name in names if name not in overridden]
        if strange:
            raise UserError(
                f"experiment={chosen['experiment']} sets {', '.join(strange)}, which {group}={choice} does not have; "
                f"leave one of them out"
            )


def overridden_keys(overrides: Sequence[str]) -> set[str]:
    """The keys and groups that the overrides name."""
    return {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}


def options(group: str, extra: Path | None = None) -> list[str]:
    """The choices of a configuration group, those in the directory ``extra`` included."""
    directories = [config_directory()] if extra is None else [config_directory(), extra]
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


def default_settings(group: str, choice: str) -> dict[str, Any]:
    """What a choice's own file says, as plain data."""
    content = OmegaConf.to_container(OmegaConf.load(config_directory() / group / f"{choice}.yaml"))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def groups_of(command: str) -> dict[str, str | None]:
    """The configuration groups that a command has, and what they choose by default; None: nothing."""
    text = (config_directory() / f"{command}.yaml").read_text()
    found = re.findall(r"^  - (?:optional |override /)?(\w+): (\w+)", text, flags=re.MULTILINE)
    return {group: None if choice == "null" else choice for group, choice in found}


def _is_choice(override: Override, extra: Path | None) -> bool:
    """Whether the override chooses from a group.

    Raises:
        UserError: an unknown choice, or something that only makes sense to Hydra's own command line.
    """
    key, text = override.key_or_group, override.input_line
    if not key:
        raise UserError(f"cannot read the override {text!r}: it names no setting")
    if override.is_sweep_override():
        raise UserError(f"{text} gives {key} several values; start one run for each, or write a list: {key}=[...]")
    if override.is_delete() or override.package is not None:
        raise UserError(f"{text}: settings can be set, but neither removed nor moved")
    if not (config_directory() / key).is_dir():
        return False
    value, known = str(override.value()), options(key, extra)
    if value not in known:
        raise UserError(f"unknown {key} {value!r}{near_misses(value, known)}; there are: {', '.join(known)}")
    return True


def _own_settings(command: str) -> dict[str, Any]:
    """The settings of the command itself, as opposed to those of groups, and their defaults."""
    content = default_settings("", command)
    return {key: value for key, value in content.items() if key != "defaults"}


def _typed(values: Mapping[Any, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of the settings in ``defaults``, each in the type of its default; a default of null has none."""
    typed = dict(values)
    for name, default in defaults.items():
        if isinstance(default, Mapping):
            if not isinstance(values[name], Mapping):
                raise UserError(f"{where}, {name}: holds settings ({name}.{next(iter(default), 'x')}=... and so on)")
            if not default:  # whatever names the user likes
                continue
            for key in values[name]:
                if key not in default:
                    raise _no_setting(f"{where}, {name}", str(key), default)
            typed[name] = _typed(values[name], default, f"{where}, {name}")
        elif default is not None:
            adapter = TypeAdapter(type(default), config=ConfigDict(coerce_numbers_to_str=True))
            try:
                typed[name] = adapter.validate_python(values[name])
            except ValidationError as error:
                raise UserError(f"{where}, {name}{complaint(error)}") from error
    return typed


def _no_setting(where: str, key: str, known: Iterable[str]) -> UserError:
    if key.startswith("task.env_kwargs."):
        return UserError(f"{key} is not among the task's env_kwargs; write +{key}=... to add it")
    return UserError(f"{where} has no setting {key!r}{near_misses(key, known)}")


def _unknown(command: str, key: str, own: Mapping[str, Any], groups: Iterable[str]) -> UserError:
    """The error of a key that begins with neither a setting nor a group of the command."""
    group, _, name = key.partition(".")
    if name and (config_directory() / group).is_dir():
        return UserError(f"{command} has no setting {key!r}, nor any other of {group}; see `dppo {command} --help`")
    # The name of a setting without what it is a setting of.
    longer = [f"{where}.{key}" for where, default in own.items() if isinstance(default, Mapping) and key in default]
    longer += [f"{where}.{key}" for where in groups if _owners(where, key)]
    if longer:
        return UserError(f"{command} has no setting {key!r} (did you mean {' or '.join(longer)}?)")
    return _no_setting(command, key, [*own, *groups])


def _of_another_choice(command: str, key: str) -> UserError | None:
    """The error of a setting ``group.name`` that other choices of the group have; None: none has it."""
    group, _, name = key.partition(".")
    owners = _owners(group, name)
    if not owners:
        return None
    return UserError(f"{command} has no setting {key!r} here; it belongs to {' or '.join(owners)}")


def _owners(group: str, name: str) -> list[str]:
    """The choices of a group that have a setting, as ``group=choice``."""
    files = {choice: default_settings(group, choice) for choice in options(group)}
    return [f"{group}={choice}" for choice, content in files.items() if name in (content.get(group, content) or ())]


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration."""
    for key in config:
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(config._get_node(key)):  # a node, so that a missing or interpolated value is not resolved
            yield from _keys(config[key], f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines if not line.startswith(("See https", "full_key:", "object_type=")))
