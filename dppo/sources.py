"""Where a policy may come from, and one function that reads it, whichever project saved it.

| source | what it is |
|---|---|
| a directory with this project's ``config.json`` | a policy of its own |
| a directory whose ``config.json`` names ``input_features`` | LeRobot's DiffusionPolicy |
| a file ``*.ckpt`` | real-stanford/diffusion_policy |
| a file ``*.pt`` | the original DPPO |

Any of them may lie in a repository on the Hugging Face Hub. Nothing of a file is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from policies import Policy, UserError, hub, pretrained
from policies.config import config_from_dict
from policies.imports import lerobot
from policies.imports.diffusion_policy import import_diffusion_policy
from policies.imports.dppo_original import OriginalSettings, import_original, settings_in_yaml

NORMALIZATION = "normalization.npz"
HYDRA_CONFIG = Path(".hydra") / "config.yaml"
DIFFUSION_POLICY, ORIGINAL = ".ckpt", ".pt"
DIRECTORY_PATTERNS = [pretrained.CONFIG_NAME, pretrained.WEIGHTS_NAME, lerobot.BEFORE, lerobot.AFTER]
DIRECTORY_PATTERNS += ["policy_*processor*.safetensors"]
"""What is downloaded of a repository whose root is a policy: neither pickles nor anything else."""


@dataclass(frozen=True)
class Foreign:
    """What a source of another project does not say itself: the ``foreign`` block of a configuration."""

    map: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """For names of what the policy sees or does, the task's parts that they are."""
    normalization: str | None = None
    """Original DPPO: its ``normalization.npz``. None: the file of that name beside the source."""
    settings: str | None = None
    """Original DPPO: its YAML, or a JSON of the same. None: its run's, if there is one."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Original DPPO: fields of `OriginalSettings`, in place of what its YAML says."""

    @staticmethod
    def of(config: Mapping[str, Any]) -> Foreign:
        """That of a configuration.

        Raises:
            UserError: an unknown setting, or one of the wrong kind.
        """
        given = {name: value for name, value in config["foreign"].items() if value is not None}
        return config_from_dict(Foreign, given, "foreign")


def located(source: str) -> Path | None:
    """Where ``source`` lies: a path that exists, or what it means on the Hugging Face Hub, in the cache.

    None where there is no such path, and the text is no name of a repository.

    Raises:
        UserError: a repository that cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    repository = hub.parse(source)
    if repository is None:
        return None
    if repository.file is None:
        return hub.download(repository, DIRECTORY_PATTERNS)
    beside, run = repository.file.parent / NORMALIZATION, repository.file.parent.parent / HYDRA_CONFIG
    wanted = [str(repository.file)]
    if repository.file.suffix == ORIGINAL:
        wanted += [str(beside), str(run)]
    return hub.download(repository, wanted) / repository.file


def is_foreign(path: Path) -> bool:
    """Whether another project's reader is the one for it."""
    return path.is_file() or lerobot.is_lerobot(path)


def read_policy(path: Path, foreign: Foreign | None = None) -> Policy:
    """The policy in a directory or file.

    Raises:
        UserError: it is none that is known, or does not say all that is needed.
    """
    foreign = foreign or Foreign()
    if path.suffix != ORIGINAL or not path.is_file():
        _refuse_settings(path, foreign)
    if not path.is_file():
        return lerobot.import_lerobot(path) if lerobot.is_lerobot(path) else Policy.from_pretrained(path)
    if path.suffix == DIFFUSION_POLICY:
        return import_diffusion_policy(path)
    if path.suffix == ORIGINAL:
        return _original(path, foreign)
    raise UserError(
        f"{path} is no policy that is known: a file is one of diffusion_policy ({DIFFUSION_POLICY}) or of the original "
        f"DPPO ({ORIGINAL}), a policy of this project or of LeRobot is a directory"
    )


def _refuse_settings(path: Path, foreign: Foreign) -> None:
    for name in ("normalization", "settings", "given"):
        if getattr(foreign, name):
            raise UserError(f"foreign.{name} is for the original DPPO's files ({ORIGINAL}); {path} says it all itself")


def _original(path: Path, foreign: Foreign) -> Policy:
    normalization = _named_or_beside(foreign.normalization, path.parent / NORMALIZATION)
    if normalization is None:
        raise UserError(
            f"{path} needs the original's {NORMALIZATION}, which is not beside it: set foreign.normalization=..."
        )
    # <run>/checkpoint/state_1000.pt, <run>/.hydra/config.yaml
    settings = _named_or_beside(foreign.settings, path.parent.parent / HYDRA_CONFIG)
    said = {} if settings is None else settings_in_yaml(_plain_data(settings))
    where = str(path) if settings is None else str(settings)
    return import_original(path, normalization, config_from_dict(OriginalSettings, {**said, **foreign.given}, where))


def _named_or_beside(named: str | None, beside: Path) -> Path | None:
    if named is None:
        return beside if beside.is_file() else None
    path = Path(named).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    return path


class _WithoutAliases(yaml.SafeLoader):
    """Refuses aliases: a few lines of them make gigabytes, or circles."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported")
        return super().compose_node(parent, index)


def _plain_data(path: Path) -> Mapping[str, Any]:
    """A YAML or JSON file that holds a mapping; tags that would make objects are refused."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _WithoutAliases)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as plain data: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no settings (name: value)")
    return content
