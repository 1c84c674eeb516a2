"""Policies on disk and on the Hugging Face Hub: ``config.json``, ``model.safetensors`` and a model card."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

import policies
from policies import hub
from policies.card import model_card
from policies.errors import UserError
from policies.seal import SEAL, check_seal, sealed
from policies.skeleton import check_shapes, shapes_of, skeleton

if TYPE_CHECKING:
    from policies.base import Policy

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"


def save(policy: Policy, directory: Path, name: str) -> None:
    """Write a policy; ``name`` is what its card calls it."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.contiguous() for key, tensor in policy.state_dict().items()}
    save_file(weights, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    content = {"type": policy.type, **dataclasses.asdict(policy.config), "metadata": policy.metadata}
    config = json.dumps(sealed(content, directory / WEIGHTS_NAME), indent=2) + "\n"
    (directory / CONFIG_NAME).write_text(config, encoding="utf-8")
    (directory / CARD_NAME).write_text(model_card(policy, name), encoding="utf-8")


def directory_of(source: str | os.PathLike[str]) -> Path:
    """A directory as it is, a repository on the Hub as its copy here.

    Raises:
        UserError: it cannot be downloaded, or names a file of another project.
    """
    repository = None if Path(source).exists() else hub.parse(str(source))
    if repository is not None and repository.file is not None:
        raise UserError(
            f"{source} is a file of another project; `dppo import {source} output=...` makes a policy of it"
        )
    return Path(source) if repository is None else hub.download(repository, [CONFIG_NAME, WEIGHTS_NAME])


def load(directory: Path) -> Policy:
    """The policy in a directory, on the CPU.

    Raises:
        UserError: a file that is missing, damaged, or does not fit the configuration.
    """
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"{directory} is not a policy checkpoint: it has no {path.name}")
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config_path} is not valid JSON: {error}") from error
    if isinstance(content, dict) and "input_features" in content:
        raise UserError(
            f"{directory} holds a policy of LeRobot's; `dppo import {directory} output=...` makes one of this project"
        )
    seal = content.pop(SEAL, None) if isinstance(content, dict) else None
    told = dict(content) if isinstance(content, dict) else {}
    metadata = content.pop("metadata", {}) if isinstance(content, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{config_path} is not a policy configuration: it, and its metadata, must be JSON objects")
    unfit = f"{weights_path} is damaged or does not fit {CONFIG_NAME}"
    wanted = shapes_of(skeleton(lambda: policies.Policy.from_config(content), str(config_path)))
    check_shapes(wanted, _shapes_in(weights_path, unfit), unfit)
    policy = policies.Policy.from_config(content)
    policy.load_state_dict(load_file(weights_path))
    check_seal(seal, told, config_path, weights_path)
    policy.metadata = metadata
    return policy


def _shapes_in(path: Path, unfit: str) -> dict[str, tuple[int, ...]]:
    """Those of the weights in a file, by its header, which safetensors compares with its length."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors and the file system raise a family of their own kinds
        raise UserError(f"{unfit}: {' '.join(str(error).split())[:300]}") from error


def push(policy: Policy, repo_id: str, *, message: str, **options: Any) -> str:
    """Upload a policy with its card, and the URL of its repository; ``options`` as of `hub.upload`.

    Raises:
        UserError: the repository cannot be reached, or not be written to.
    """
    with TemporaryDirectory() as folder:
        save(policy, Path(folder), repo_id)
        return hub.upload(Path(folder), repo_id, message=message, **options)
