"""Where Minari keeps its datasets on this machine: they appear there whole or not at all.

Minari writes straight into the final folder, so that an interrupted download or recording leaves a dataset that looks
finished. Here everything is written into a hidden staging folder first and then renamed into place.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import minari
from huggingface_hub import constants, get_session
from huggingface_hub.utils import logging as hub_logging
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import NAMESPACE_METADATA_FILENAME
from minari.storage import get_dataset_path
from minari.storage.remotes import DEFAULT_REMOTE

from policies.errors import UserError
from policies.seal import sha256_of

LOCAL_NAMESPACE = "dppo"
"""Datasets of this namespace, and of none, are never looked for on the public hub."""

CHECKSUMS = "sha256.json"
"""A file in a dataset's folder: the SHA-256 of each file of the dataset by its path. Minari itself has none."""

PROBE_SECONDS = 5.0
"""How long the hub may take to answer at all."""


def dataset_path(dataset_id: str) -> Path:
    """The folder of a dataset, whether it exists or not (``MINARI_DATASETS_PATH``, else ``~/.minari/datasets``).

    Raises:
        UserError: ``dataset_id`` is not of the form ``namespace/name-v0``, or the folder of all datasets is unusable.
    """
    try:
        parse_dataset_id(dataset_id)
    except (TypeError, ValueError):  # TypeError: minari's answer to a missing version
        raise UserError(f"dataset id {dataset_id!r} is not of the form namespace/name-v0") from None
    try:
        return get_dataset_path(dataset_id)
    except OSError as error:
        raise UserError(f"cannot use {error.filename} as the folder of datasets ({error.strerror})") from None


def is_stored(dataset_id: str) -> bool:
    """Whether the dataset is on this machine.

    Raises:
        UserError: a malformed id, or the folder holds something that is no dataset.
    """
    path = dataset_path(dataset_id)
    if path.exists() and not (path / "data").is_dir():
        raise UserError(f"{path} exists but is no Minari dataset; move it away or choose another id than {dataset_id}")
    return path.exists()


def seal(path: Path) -> None:
    """Note down the checksums of a dataset's files beside them, for `check`."""
    files = sorted(file for file in (path / "data").rglob("*") if file.is_file())
    listed = {str(file.relative_to(path)): sha256_of(file) for file in files}
    (path / CHECKSUMS).write_text(json.dumps(listed, indent=1) + "\n")


def check(path: Path) -> None:
    """Compare a dataset's files with the checksums that `seal` wrote; one without them is left unchecked.

    Raises:
        UserError: a file is another, or missing.
    """
    if not (path / CHECKSUMS).is_file():
        return
    try:
        listed = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
        wrong = [name for name, digest in listed.items() if sha256_of(path / name) != digest]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path / CHECKSUMS} is damaged, or a file that it lists is missing: {error}") from error
    if wrong or not listed:
        raise UserError(
            f"{path / (wrong or [CHECKSUMS])[0]} is damaged or was changed: its checksum is not the one in "
            f"{CHECKSUMS}; get the dataset again, or remove {path / CHECKSUMS} if you changed it on purpose"
        )


@contextmanager
def staging() -> Iterator[Path]:
    """Let minari write into a hidden folder beside the datasets; the folder is removed at the end, come what may.

    Raises:
        UserError: the folder of the datasets cannot be written to.
    """
    root = get_dataset_path()
    try:
        folder = tempfile.TemporaryDirectory(prefix=".staging-", dir=root)  # minari overlooks hidden folders
    except OSError as error:
        raise UserError(f"cannot write datasets into {root}: {error.strerror}") from None
    before = os.environ.get("MINARI_DATASETS_PATH")
    with folder as name:
        os.environ["MINARI_DATASETS_PATH"] = name
        try:
            yield Path(name)
        finally:
            if before is None:
                del os.environ["MINARI_DATASETS_PATH"]
            else:
                os.environ["MINARI_DATASETS_PATH"] = before


def publish(staged: Path, dataset_id: str, *, overwrite: bool) -> None:
    """Move a complete dataset from the `staging` folder into its place, in place of an older one if ``overwrite``.

    To be called inside `staging`.

    Raises:
        UserError: the dataset exists already and ``overwrite`` is false.
    """
    root, final = staged.parent, staged.parent / dataset_id
    replaced = staged / ".replaced"
    for namespace in Path(dataset_id).parents:
        metadata = staged / namespace / NAMESPACE_METADATA_FILENAME
        (root / namespace).mkdir(parents=True, exist_ok=True)
        if metadata.exists() and not (root / namespace / NAMESPACE_METADATA_FILENAME).exists():
            shutil.copyfile(metadata, root / namespace / NAMESPACE_METADATA_FILENAME)
    if final.exists():
        if not overwrite:
            raise UserError(f"dataset {dataset_id} exists already at {final}")
        final.rename(replaced)
    try:
        (staged / dataset_id).rename(final)
    except BaseException:
        if replaced.exists():
            replaced.rename(final)
        raise


def download(dataset_id: str, hint: str = "") -> None:
    """Fetch a public dataset, e.g. ``mujoco/hopper/medium-v0``, from the Minari hub.

    Args:
        dataset_id: the id of a dataset that is not stored yet.
        hint: what to do instead, for the error message, e.g. "build it with `dppo collect task=hopper`".

    Raises:
        UserError: the hub cannot be reached, has no such dataset, or broke off; nothing partial is left behind.
    """
    otherwise = f"; {hint}" if hint else ""
    missing = f"dataset {dataset_id} is not in {get_dataset_path()}"
    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is None or namespace.split("/")[0] == LOCAL_NAMESPACE:
        raise UserError(f"{missing}{otherwise}")
    unreachable = _why_unreachable()
    if unreachable:
        connect = f"connect to the network{f', or {hint}' if hint else ''}"
        raise UserError(f"{missing} and the Minari hub cannot be reached ({unreachable}); {connect}")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its warnings about retries would only announce what the error says
    try:
        with staging() as staged:
            minari.download_dataset(dataset_id)
            for part in minari.list_local_datasets():  # a combined dataset comes with the ones it is made of
                if part == dataset_id or not (staged.parent / part).exists():
                    publish(staged, part, overwrite=False)
    except UserError:
        raise
    except Exception as error:  # the network stack's, the hub's and minari's own exceptions share no base class
        raise UserError(f"{missing} and could not be downloaded ({_one_line(error)}){otherwise}") from error
    finally:
        hub_logging.set_verbosity(verbosity)


def _why_unreachable() -> str:
    """Why the hub does not answer, or nothing if it does: left to itself minari retries noisily for 23 seconds."""
    if not os.environ.get("MINARI_REMOTE", DEFAULT_REMOTE).startswith("hf://"):
        return ""
    try:
        response = get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # httpx, its successor under another name, or the hub's own offline mode
        return _one_line(error)
    return f"status {response.status_code}" if response.status_code >= 500 else ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
