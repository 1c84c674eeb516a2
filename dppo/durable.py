"""Files and directories that are whole or absent, whenever the process or the machine stops."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policies.seal import sha256_of

NEW, OLD = ".tmp", ".old.tmp"
"""Ends of the names of a directory that is being filled, and of the one that it replaces."""
MANIFEST_NAME = "manifest.json"
"""Size and SHA-256 of each file of a directory, in it."""


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that takes the name ``path`` once it is filled, listed in a manifest and on the disk.

    Whatever had the name before is replaced, and there is always one of the two: see `recover`. If filling fails, all
    is as it was.
    """
    temporary, replaced = (path.with_name(f"{path.name}{end}") for end in (NEW, OLD))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = sorted(entry for entry in temporary.rglob("*") if entry.is_file())
        listed = {str(file.relative_to(temporary)): _described(file) for file in files}
        write_flushed(temporary / MANIFEST_NAME, (json.dumps({"files": listed}, indent=1) + "\n").encode())
        for entry in (*temporary.rglob("*"), temporary):
            flush(entry)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
    os.replace(temporary, path)
    flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clear away what an interrupted `new_directory` left in a folder; if its name is free, what is whole takes it."""
    for left in sorted(folder.glob(f"*{NEW}"), key=lambda left: left.name.endswith(OLD)):
        path = left.with_name(left.name.removesuffix(OLD).removesuffix(NEW))
        if left.is_symlink():
            left.unlink()
        elif not path.exists() and damage(left) is None:
            os.replace(left, path)
        else:
            shutil.rmtree(left, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a directory by its manifest; None: nothing."""
    try:
        listed = json.loads((path / MANIFEST_NAME).read_text())["files"]
        expected = {name: (facts["size"], facts["sha256"]) for name, facts in listed.items()}
    except OSError:
        return f"it has no {MANIFEST_NAME}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"its {MANIFEST_NAME} is damaged"
    for name, (size, digest) in expected.items():
        try:
            found = _described(path / name)
        except OSError:
            return f"{name} is missing"
        if found != {"size": size, "sha256": digest}:
            return f"{name} is damaged" if found["size"] == size else f"{name} has {found['size']} bytes of {size}"
    return None


def _described(file: Path) -> dict[str, int | str]:
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}
