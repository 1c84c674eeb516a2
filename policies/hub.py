"""Repositories on the Hugging Face Hub: ``owner/name`` or ``owner/name@revision``, perhaps with a file in them.

``huggingface_hub`` is imported where it is needed only: a policy from a directory does without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from policies.errors import UserError

PART = r"[A-Za-z0-9][\w.-]*"
REPOSITORY = re.compile(rf"(?P<id>{PART}/{PART}?)(?P<file>(?:/[\w.=+-]+)+)?(?:@(?P<revision>[\w./-]+))?", re.ASCII)
PICKLES = (".ckpt", ".pt")
"""How the names of files end that may be asked for; all else of a repository is what a directory of weights needs."""


@dataclass(frozen=True)
class Repository:
    """What of the Hub is meant."""

    id: str
    """``owner/name``."""
    revision: str | None = None
    """A branch, tag or commit; None: the main branch."""
    file: PurePosixPath | None = None
    """One that is named in it."""

    def __str__(self) -> str:
        return f"{self.id}{f'@{self.revision}' if self.revision else ''}"


def parse(source: str) -> Repository | None:
    """The repository that ``source`` can mean, if it can mean one."""
    found = REPOSITORY.fullmatch(source)
    if found is None or ".." in source:
        return None
    file = None if found["file"] is None else PurePosixPath(found["file"].lstrip("/"))
    if file is not None and file.suffix not in PICKLES:
        return None
    return Repository(found["id"], found["revision"], file)


def download(repository: Repository, patterns: Sequence[str]) -> Path:
    """The files of a repository that match ``patterns``, in the cache of ``huggingface_hub``; their directory.

    Raises:
        UserError: the Hub cannot be reached, there is no such repository or revision, or it may not be read, or has
            none of the files, or not the one that is named.
    """
    from huggingface_hub import snapshot_download

    needed = patterns if repository.file is None else [str(repository.file)]
    with told(f"{repository} (no path that exists, so a repository on the Hugging Face Hub)"):
        folder = Path(snapshot_download(repository.id, revision=repository.revision, allow_patterns=list(patterns)))
    if not any(any(folder.glob(pattern)) for pattern in needed):
        raise UserError(f"{repository} on the Hugging Face Hub has no {' or '.join(needed)}")
    return folder


def upload(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Put the files of a folder into a repository, made if need be; its URL.

    Raises:
        UserError: it cannot be reached, or not be written to.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with told(f"{repo_id} on the Hugging Face Hub"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision)
    return str(url)


@contextmanager
def told(what: str) -> Iterator[None]:
    """What goes wrong with ``what``, a repository, in a line."""
    from huggingface_hub import errors

    network_error = errors.HTTPError  # type: ignore[attr-defined]  # of the client below it, which differs by release
    log_in = "log in with `hf auth login`"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what} is gated: ask for access on its page, then {log_in}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{what} does not exist, or is private: then {log_in}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{what} has no such revision") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(f"{what} cannot be reached: there is no connection, and no copy of it here") from error
    except (errors.HFValidationError, network_error, OSError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:200]}") from error
