"""What other projects saved, as policies of this one: which project's it is, and the settings that it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from policies import Policy, UserError
from policies.config import config_from_dict
from policies.imports.dppo_original import OriginalSettings, import_original, settings_in_yaml

NORMALIZATION = "normalization.npz"
HYDRA_CONFIG = Path(".hydra") / "config.yaml"
GIVEN = ("policy", "network", "sampler")
"""The groups of settings that a user may give with a source."""


def import_policy(config: Mapping[str, Any]) -> Policy:
    """The policy that ``source`` holds.

    Args:
        config: ``source``, ``normalization``, ``settings``, and `GIVEN`, as of ``configs/import.yaml``.

    Raises:
        UserError: it is none that is known, or does not say all that is needed.
    """
    source = Path(str(config["source"])).expanduser()
    if not source.exists():
        raise UserError(f"{source} does not exist")
    return _original(source, config)


def _original(source: Path, config: Mapping[str, Any]) -> Policy:
    normalization = _named_or_beside(config["normalization"], source.parent / NORMALIZATION)
    if normalization is None:
        raise UserError(f"{source} needs the original's {NORMALIZATION}, which is not beside it: set normalization=...")
    # <run>/checkpoint/state_1000.pt, <run>/.hydra/config.yaml
    settings = _named_or_beside(config["settings"], source.parent.parent / HYDRA_CONFIG)
    said = {} if settings is None else settings_in_yaml(read_plain_data(settings))
    where = str(source) if settings is None else str(settings)
    return import_original(source, normalization, config_from_dict(OriginalSettings, {**said, **_given(config)}, where))


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the user gave, as fields of `OriginalSettings`."""
    names = {"steps": "ddim_steps"}
    given: dict[str, Any] = {
        name: value for group in GIVEN for name, value in config[group].items() if value is not None
    }
    return {names.get(name, name): value for name, value in given.items()}


def _named_or_beside(named: Any, beside: Path) -> Path | None:
    if named is None:
        return beside if beside.is_file() else None
    path = Path(str(named)).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return path


def read_plain_data(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file that holds a mapping; tags that would make objects are refused.

    Raises:
        UserError: it cannot be read as such.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as plain data: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no settings (name: value)")
    return content
