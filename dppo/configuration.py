"""Composing configurations with Hydra, and errors in one line with the near misses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policies import UserError
from policies.config import near_misses


def config_directory() -> Path:
    """Where the YAML files are: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose_config(command: str, overrides: Sequence[str], extra: Path | None = None) -> dict[str, Any]:
    """The resolved configuration of a command as plain data.

    Args:
        command: a file of the configuration directory.
        overrides: ``key=value`` as of Hydra.
        extra: a directory with more choices, e.g. ``task/mine.yaml``.

    Raises:
        UserError: an override that is malformed, or names something unknown.
    """
    if extra is not None and not extra.is_dir():
        raise UserError(f"--config-dir {extra} is not a directory")
    search = [] if extra is None else [f"hydra.searchpath=['file://{extra.resolve()}']"]
    with initialize_config_dir(str(config_directory().resolve()), version_base="1.3"):
        try:
            parsed = OverridesParser.create().parse_overrides(list(overrides))
        except HydraException as error:
            raise UserError(f"cannot read the override: {_one_line(error)}") from error
        known = set(_keys(compose(command))) | set(groups_of(command))
        for override in parsed:
            _check_group_choice(override.key_or_group, override.value(), extra)
        try:
            config = compose(command, [*search, *overrides])
        except (HydraException, OmegaConfBaseException) as error:
            for override in parsed:
                key = override.key_or_group
                if f"'{key.split('.')[-1]}'" in str(error) or key in str(error):
                    raise UserError(f"{command} has no setting {key!r}{near_misses(key, known)}") from error
            raise UserError(_one_line(error)) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{command} needs {missing[0]}=...; see `dppo {command} --help`")
    try:
        content = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def overridden_keys(overrides: Sequence[str]) -> set[str]:
    """The keys and groups that the overrides name."""
    return {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}


def options(group: str, extra: Path | None = None) -> list[str]:
    """The choices of a configuration group, those in the directory ``extra`` included."""
    directories = [config_directory()] if extra is None else [config_directory(), extra]
    return sorted({path.stem for directory in directories for path in (directory / group).glob("*.yaml")})


def groups_of(command: str) -> list[str]:
    """The configuration groups that a command has."""
    text = (config_directory() / f"{command}.yaml").read_text()
    return re.findall(r"^  - (?:optional |override /)?(\w+): ", text, flags=re.MULTILINE)


def _check_group_choice(key: str, value: Any, extra: Path | None) -> None:
    known = options(key, extra)
    if (config_directory() / key).is_dir() and isinstance(value, str) and value not in known:
        raise UserError(f"unknown {key} {value!r}{near_misses(value, known)}; there are: {', '.join(known)}")


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration."""
    for key in config:
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(config._get_node(key)):  # a node, so that a missing or interpolated value is not resolved
            yield from _keys(config[key], f"{prefix}{key}.")


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(line for line in lines if not line.startswith(("See https", "full_key:", "object_type=")))
