"""Repositories on the Hugging Face Hub: which are meant, what is downloaded of them, and what can go wrong.

Nothing is fetched: `huggingface_hub` is replaced by a folder.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from policies import Policy, UserError, hub
from policies.hub import Repository, parse

NETWORK = {"type": "mlp", "hidden_dims": [8, 8]}


def policy() -> Policy:
    torch.manual_seed(0)
    return Policy.from_config({"type": "gaussian", "obs_dim": 3, "action_dim": 2, "network": NETWORK})


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose content is that of every repository; the cache is beside it."""
    folder = tmp_path / "remote"
    folder.mkdir()

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
        cache = tmp_path / "cache" / repo_id / (revision or "main")
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder


# --- names


@pytest.mark.parametrize(
    ("source", "repository"),
    [
        ("owner/name", Repository("owner/name")),
        ("owner/name.v2-x@main", Repository("owner/name.v2-x", "main")),
        ("owner/name@refs/pr/1", Repository("owner/name", "refs/pr/1")),
        ("owner/name/a/epoch=5.ckpt@0a1b", Repository("owner/name", "0a1b", Path("a/epoch=5.ckpt"))),  # type: ignore[arg-type]
        ("owner/name/state_3.pt", Repository("owner/name", None, Path("state_3.pt"))),  # type: ignore[arg-type]
    ],
)
def test_a_repository_is_named_with_its_owner_and_perhaps_a_revision_and_a_file(source: str, repository: Any) -> None:
    found = parse(source)
    assert found is not None
    assert (found.id, found.revision, str(found.file)) == (repository.id, repository.revision, str(repository.file))


@pytest.mark.parametrize(
    "source",
    [
        *("name", "/owner/name", "./owner/name", "~/name", "../name", "owner/..", "owner/name/../../x.pt", ""),
        *("owner/name/x.pkl", "owner/name/config.json", "runs/demo/checkpoints/100", "owner/na me", "owner/name@"),
        *("owner/name\n", "ö/name"),
    ],
)
def test_nothing_else_is_a_repository(source: str) -> None:
    assert parse(source) is None


# --- downloading


def test_a_policy_comes_from_a_repository_as_from_a_directory(remote: Path) -> None:
    saved = policy()
    saved.save_pretrained(remote)
    (remote / "optimizer.pkl").write_bytes(b"")
    loaded = Policy.from_pretrained("owner/name@v1")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())
    cached = remote.parent / "cache" / "owner" / "name" / "v1"
    assert sorted(path.name for path in cached.iterdir()) == ["config.json", "model.safetensors"]


def test_a_path_that_exists_wins(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda *arguments: pytest.fail("downloaded"))
    policy().save_pretrained("owner/name")
    assert Policy.from_pretrained("owner/name").type == "gaussian"


def test_a_repository_without_a_policy_is_said_to_be_one(remote: Path) -> None:
    (remote / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"^owner/name on .* Hub has no config.json or model.safetensors$"):
        Policy.from_pretrained("owner/name")
    (remote / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a policy checkpoint: it has no model.safetensors"):
        Policy.from_pretrained("owner/name")


def test_a_file_that_a_repository_does_not_have_is_named_and_alone(remote: Path) -> None:
    (remote / "normalization.npz").write_bytes(b"")
    repository = parse("owner/name/data/latest.pt")
    assert repository is not None
    with pytest.raises(UserError, match=r"^owner/name on the Hugging Face Hub has no data/latest.pt$"):
        hub.download(repository, ["data/latest.pt", "normalization.npz"])


def test_what_another_project_saved_is_for_dppo_import(remote: Path) -> None:
    with pytest.raises(UserError, match=r"`dppo import owner/name/latest.ckpt output=\.\.\.` makes a policy of it"):
        Policy.from_pretrained("owner/name/latest.ckpt")
    (remote / "config.json").write_text('{"type": "diffusion", "n_obs_steps": 2, "input_features": {}}')
    (remote / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds a policy of LeRobot's; `dppo import"):
        Policy.from_pretrained("owner/name")


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


ERRORS: list[tuple[Exception, str]] = [
    (errors.LocalEntryNotFoundError("no\nnet"), "cannot be reached: there is no connection, and no copy"),
    (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), "cannot be reached: there is no connection, and no copy"),
    (errors.GatedRepoError("403", response=response(403)), "is gated: ask for access on its page"),
    (errors.RepositoryNotFoundError("404", response=response(404)), "does not exist, or is private: then log in"),
    (errors.RevisionNotFoundError("404", response=response(404)), "has no such revision"),
    (errors.HfHubHTTPError("500\nbroken", response=response(500)), ": 500 broken"),
    (OSError("disk full"), ": disk full"),
    (httpx2.ConnectError("no route"), ": no route"),
]


@pytest.mark.parametrize(("error", "complaint"), ERRORS, ids=lambda value: type(value).__name__)
def test_what_goes_wrong_is_one_clear_line(error: Exception, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=complaint) as caught:
        Policy.from_pretrained("owner/name@v1")
    assert str(caught.value).startswith("owner/name@v1") and "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(UserError, match="owner/name"):
        policy().push_to_hub("owner/name")


# --- uploading


def test_a_pushed_policy_is_what_is_saved_and_its_card_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def create_repo(api: Any, repo_id: str, **options: Any) -> str:
        made.append((api.token, repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(api: Any, *, folder_path: Path, **options: Any) -> None:
        shutil.copytree(folder_path, tmp_path / "uploaded")
        made.append(options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    saved = policy()
    url = saved.push_to_hub("owner/name", private=True, revision="v1", message="Better", token="secret")
    assert url == "https://huggingface.co/owner/name"
    assert made == [
        ("secret", "owner/name", {"private": True, "exist_ok": True}),
        {"repo_id": "owner/name", "commit_message": "Better", "revision": "v1"},
    ]
    assert sorted(path.name for path in (tmp_path / "uploaded").iterdir()) == [
        *("README.md", "config.json", "model.safetensors"),
    ]
    assert 'Policy.from_pretrained("owner/name")' in (tmp_path / "uploaded" / "README.md").read_text()
    loaded = Policy.from_pretrained(tmp_path / "uploaded")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_policy_from_a_directory_does_without_huggingface_hub(tmp_path: Path) -> None:
    policy().save_pretrained(tmp_path)
    code = "import sys; from policies import Policy; Policy.from_pretrained(sys.argv[1]); print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "safetensors" in result.stdout
    assert "'huggingface_hub'" not in result.stdout
