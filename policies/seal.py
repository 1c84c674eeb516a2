"""Checksums by which changes of saved files are noticed: a flipped bit in a weight is as good a number as any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.errors import UserError

SEAL = "sha256"
"""The entry of a configuration that holds the checksums: its own, and that of each file beside it by name."""
OWN = "config"


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(content: Mapping[str, Any], *files: Path) -> dict[str, Any]:
    """A configuration with the checksums of itself and of files."""
    return {**content, SEAL: {OWN: _of_content(content), **{path.name: sha256_of(path) for path in files}}}


def check_seal(seal: Any, content: Mapping[str, Any], config: Path, *files: Path) -> None:
    """Compare a configuration and files with the checksums that it came with.

    Args:
        seal: the configuration's entry `SEAL`; None: it has none, and nothing is compared.
        content: the configuration without it.
        config: its file.
        files: those beside it.

    Raises:
        UserError: the configuration or a file is another than was sealed.
    """
    if seal is None:
        return
    expected = sealed(content, *files)[SEAL]
    if seal == expected:
        return
    given = seal if isinstance(seal, Mapping) else {}
    wrong = [path for path in files if given.get(path.name) != expected[path.name]]
    changed = wrong[0] if wrong and given.get(OWN) == expected[OWN] else config
    raise UserError(
        f"{changed} is damaged or was changed: its checksum is not the one in {config.name}; if you changed it on "
        f"purpose, remove the entry {SEAL!r} from {config}"
    )


def _of_content(content: Mapping[str, Any]) -> str:
    """Of what a configuration says, however it is laid out."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
