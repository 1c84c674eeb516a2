"""One process at a time in a directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policies.errors import UserError


@contextmanager
def held(path: Path, message: str) -> Iterator[None]:
    """Make a directory, where it is not there yet, and keep other processes out of it while this context lasts.

    Args:
        path: the directory.
        message: of the error, if there is one at work in it.

    Raises:
        UserError: that, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}; choose another place") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(message) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
