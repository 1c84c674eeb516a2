"""What a source is, is recognised in one place, wherever it lies; what is not known is one clear line."""

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dppo.checkpoint import find_policy, load_policy
from dppo.sources import DIRECTORY_PATTERNS, Foreign, located, read_policy
from policies import UserError, hub
from policies.hub import Repository

DATA = Path(__file__).parents[1] / "data" / "imports"
LEROBOT, CKPT = DATA / "lerobot_ddim", DATA / "diffusion_policy_unet_ddim" / "latest.ckpt"
ORIGINAL = DATA / "original_mlp_ddpm"
GIVEN = {"denoising_steps": 20, "activation": "relu"}


# --- recognising


@pytest.mark.parametrize(
    ("source", "foreign", "dims"),
    [
        (LEROBOT, Foreign(), (8, 2)),
        (CKPT, Foreign(), (4, 3)),
        (ORIGINAL / "pretrained.pt", Foreign(given=GIVEN), (11, 3)),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_a_source_of_any_project_is_found_and_read(source: Path, foreign: Foreign, dims: tuple[int, int]) -> None:
    path = find_policy(str(source))
    assert path == source
    policy, task = load_policy(path, foreign=foreign)
    assert (policy.type, policy.config.obs_dim, policy.config.action_dim) == ("diffusion", *dims)
    assert task is None


def test_a_policy_of_this_project_is_read_as_one(small_policy, tmp_path) -> None:
    small_policy("gaussian").save_pretrained(tmp_path)
    assert read_policy(find_policy(str(tmp_path))).type == "gaussian"


def test_a_file_of_another_kind_is_refused_with_what_there_is(tmp_path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.onnx is no policy that is known: a file is one of .*\.ckpt.*\.pt"):
        load_policy(find_policy(str(tmp_path / "model.onnx")))


# --- the original's settings


def test_the_settings_of_the_original_come_from_a_file_and_what_is_given_wins(tmp_path) -> None:
    settings = tmp_path / "ft.yaml"
    settings.write_text("denoising_steps: 20\nft_denoising_steps: 10\nmodel: {actor: {activation_type: ReLU}}\n")
    policy = read_policy(ORIGINAL / "finetuned.pt", Foreign(settings=str(settings), given={"likelihood_std": 0.2}))
    assert policy.num_steps == 10
    assert policy.config.likelihood_std == 0.2  # type: ignore[attr-defined]


def test_a_run_of_the_original_says_all_itself_and_its_normalization_is_beside_the_file(tmp_path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    (run / ".hydra").mkdir()
    shutil.copy(ORIGINAL / "pretrained.pt", run / "checkpoint" / "state_1.pt")
    (run / ".hydra" / "config.yaml").write_text("denoising_steps: 20\nmodel: {network: {activation_type: ReLU}}\n")
    with pytest.raises(UserError, match=r"normalization.npz, which is not beside it: set foreign.normalization"):
        read_policy(run / "checkpoint" / "state_1.pt")
    shutil.copy(ORIGINAL / "normalization.npz", run / "checkpoint" / "normalization.npz")
    assert read_policy(run / "checkpoint" / "state_1.pt").num_steps == 20


@pytest.mark.parametrize(
    ("path", "foreign", "complaint"),
    [
        (ORIGINAL / "pretrained.pt", {}, r"does not say its activation, .* foreign.given=\{activation: \.\.\.\}"),
        (ORIGINAL / "pretrained.pt", {"given": {"denoising_step": 3}}, "no setting 'denoising_step' .*denoising_steps"),
        (ORIGINAL / "pretrained.pt", {"settings": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        (ORIGINAL / "pretrained.pt", {"normalization": "nowhere.npz"}, "nowhere.npz does not exist"),
        (LEROBOT, {"given": GIVEN}, "foreign.given is for the original DPPO's files"),
        (CKPT, {"settings": "a.yaml"}, "foreign.settings is for the original DPPO's files"),
    ],
)
def test_settings_that_are_missing_or_mean_nothing_are_named(path, foreign, complaint) -> None:
    with pytest.raises(UserError, match=complaint):
        read_policy(path, Foreign(**foreign))


def test_a_block_of_a_configuration_is_checked_by_name() -> None:
    assert Foreign.of({"foreign": {"map": None, "given": {"a": 1}}}) == Foreign(given={"a": 1})
    with pytest.raises(UserError, match=r"foreign has no setting 'mapp' \(did you mean map"):
        Foreign.of({"foreign": {"mapp": {}}})
    with pytest.raises(UserError, match="foreign, map"):
        Foreign.of({"foreign": {"map": [1]}})


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "- 1", "{", "a: [1"])
def test_a_yaml_that_is_no_plain_mapping_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a.yaml (cannot be read as plain data|holds no settings)"):
        read_policy(ORIGINAL / "pretrained.pt", Foreign(settings=str(tmp_path / "a.yaml")))


@pytest.mark.parametrize("text", ["a: &a [x]\nb: [*a, *a]", "a: &a {a: *a}"])
def test_a_yaml_with_aliases_is_refused_since_a_few_lines_of_them_are_gigabytes(tmp_path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a.yaml cannot be read as plain data: aliases"):
        read_policy(ORIGINAL / "pretrained.pt", Foreign(settings=str(tmp_path / "a.yaml")))


# --- the Hub


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[str]]]:
    """Repositories whose content is that of the folders of the test data; what was asked of them."""
    asked: list[tuple[str, Sequence[str]]] = []

    def download(repository: Repository, patterns: Sequence[str]) -> Path:
        asked.append((str(repository), patterns))
        return DATA / repository.id.rpartition("/")[2]

    monkeypatch.setattr(hub, "download", download)
    return asked


def test_a_repository_is_read_as_the_directory_that_it_is(remote) -> None:
    policy, _ = load_policy(find_policy("lerobot/lerobot_ddim@v2"))
    assert policy.metadata["inputs"][0] == ["observation.state", 2]
    assert remote == [("lerobot/lerobot_ddim@v2", DIRECTORY_PATTERNS)]
    assert not any(pattern.endswith((".pt", ".ckpt", ".bin", ".pkl", "*")) for pattern in DIRECTORY_PATTERNS)


def test_a_file_of_a_repository_is_downloaded_with_what_it_needs_and_nothing_else(remote) -> None:
    assert find_policy("columbia/diffusion_policy_unet_ddim/latest.ckpt") == CKPT
    assert find_policy("irom/original_mlp_ddpm/pretrained.pt") == ORIGINAL / "pretrained.pt"
    located("irom/run/checkpoint/state_3.pt")
    assert [patterns for _, patterns in remote] == [
        ["latest.ckpt"],
        ["pretrained.pt", "normalization.npz", ".hydra/config.yaml"],
        ["checkpoint/state_3.pt", "checkpoint/normalization.npz", ".hydra/config.yaml"],
    ]


def test_a_path_that_exists_wins_and_one_that_cannot_be_a_repository_is_missing(remote, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(LEROBOT, "owner/name")
    assert find_policy("owner/name") == Path("owner/name")
    with pytest.raises(UserError, match=r"checkpoint runs/demo/policy does not exist"):
        find_policy("runs/demo/policy")
    assert remote == []


# --- files that name files elsewhere


def with_member(archive: Path, name: str, folder: Path) -> Path:
    """A copy of a zip, deep in a folder, with one member more; ``*`` in its name is the folder of the others."""
    copy = folder / "a" / "b" / archive.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(archive, copy)
    with zipfile.ZipFile(copy, "a") as file:
        file.writestr(name.replace("*", file.namelist()[0].split("/")[0]), b"was here")
    return copy


@pytest.mark.parametrize("name", ["../escaped", "*/../../escaped", "/tmp/../escaped"])
@pytest.mark.parametrize("source", [CKPT, ORIGINAL / "pretrained.pt"], ids=lambda path: path.name)
def test_members_of_an_archive_of_weights_are_never_written_anywhere(tmp_path: Path, name: str, source: Path) -> None:
    path = with_member(source, name, tmp_path)
    if source.suffix == ".pt":
        shutil.copy(ORIGINAL / "normalization.npz", path.parent)
    before = sorted(tmp_path.rglob("*"))
    foreign = Foreign(given=GIVEN) if source.suffix == ".pt" else Foreign()
    if name.startswith("*"):
        assert read_policy(path, foreign).type == "diffusion"
    else:
        with pytest.raises(UserError, match=rf"{path.name} cannot be read as weights: .*escaped"):
            read_policy(path, foreign)
    assert sorted(tmp_path.rglob("*")) == before


def test_members_of_an_archive_of_arrays_are_never_written_anywhere(tmp_path: Path) -> None:
    path = with_member(ORIGINAL / "normalization.npz", "../escaped.npy", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert read_policy(ORIGINAL / "pretrained.pt", Foreign(normalization=str(path), given=GIVEN)).type == "diffusion"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_processor_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(LEROBOT, tmp_path / "policy"))
    path = directory / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    content["steps"][-1]["state_file"] = "../policy/model.safetensors"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"names the file '../policy/model.safetensors', which is not one beside it"):
        read_policy(directory)


def test_sizes_that_no_memory_has_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(LEROBOT, tmp_path / "policy"))
    path = directory / "config.json"
    content = json.loads(path.read_text())
    for name, value in (("down_dims", [16, 2**40]), ("horizon", 2**40), ("diffusion_step_embed_dim", 2**45)):
        path.write_text(json.dumps({**content, name: value}))
        with pytest.raises(UserError, match=r"the network|sizes that cannot be|chunk must be at most"):
            read_policy(directory)


def test_weights_that_are_said_to_be_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    weights = {"network.time_embedding.1.weight": torch.zeros(1, 1).expand(2**20, 2**20)}
    torch.save({"model": weights}, tmp_path / "state.pt")
    shutil.copy(ORIGINAL / "normalization.npz", tmp_path)
    with pytest.raises(UserError, match=r"does not hold all the entries that network.time_embedding"):
        read_policy(tmp_path / "state.pt", Foreign(given=GIVEN))


def test_weights_that_share_one_storage_are_refused_before_a_network_of_their_size_is_made(tmp_path: Path) -> None:
    weights = torch.load(ORIGINAL / "pretrained.pt", weights_only=True)["ema"]
    shared = torch.zeros(max(value.numel() for value in weights.values()))
    weights = {name: shared[: value.numel()].view(value.shape) for name, value in weights.items()}
    torch.save({"ema": weights}, tmp_path / "state.pt")
    shutil.copy(ORIGINAL / "normalization.npz", tmp_path)
    with pytest.raises(UserError, match=r"state.pt holds weights that share their entries"):
        read_policy(tmp_path / "state.pt", Foreign(given=GIVEN))


def test_arrays_that_would_unpack_to_far_more_than_statistics_are_refused(tmp_path: Path) -> None:
    with np.load(ORIGINAL / "normalization.npz") as file:
        arrays = {**file, "obs_min": np.zeros(2**22)}
    np.savez_compressed(tmp_path / "large.npz", **arrays)
    assert (tmp_path / "large.npz").stat().st_size < 2**20
    with pytest.raises(UserError, match=r"large.npz would unpack to more than 16 MiB"):
        read_policy(ORIGINAL / "pretrained.pt", Foreign(normalization=str(tmp_path / "large.npz"), given=GIVEN))
