import os
import shutil
import time

import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.storage import remotes
from minari.storage.remotes.cloud_storage import CloudStorage

from dppo.data import minari_store
from policies.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def datasets_folder(tmp_path, monkeypatch):
    folder = tmp_path / "datasets"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    return folder


def make_dataset(dataset_id, reward=1.0):
    box = spaces.Box(-1, 1, (2,))
    episode = EpisodeBuffer(
        observations=np.zeros((2, 2)), actions=np.zeros((1, 2)), rewards=[reward], terminations=[True],
        truncations=[False], infos={},
    )  # fmt: skip
    return minari.create_dataset_from_buffers(dataset_id, [episode], observation_space=box, action_space=box)


def reward_of(dataset_id):
    return minari.load_dataset(dataset_id)[0].rewards[0]


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# --- publishing


def test_what_is_staged_appears_under_its_id_with_its_namespaces(datasets_folder):
    with minari_store.staging() as staged:
        make_dataset("dppo/deep/one-v0")
        assert not (datasets_folder / "dppo").exists()
        minari_store.publish(staged, "dppo/deep/one-v0", overwrite=False)
    assert list(minari.list_local_datasets()) == ["dppo/deep/one-v0"]
    assert sorted(minari.namespace.list_local_namespaces()) == ["dppo", "dppo/deep"]
    assert leftovers(datasets_folder) == []


def test_a_dataset_without_a_namespace_is_published_too():
    with minari_store.staging() as staged:
        make_dataset("one-v0")
        minari_store.publish(staged, "one-v0", overwrite=False)
    assert reward_of("one-v0") == 1.0


def test_an_interruption_leaves_nothing(datasets_folder, monkeypatch):
    before = os.environ["MINARI_DATASETS_PATH"]
    with pytest.raises(KeyboardInterrupt), minari_store.staging():
        make_dataset("dppo/one-v0")
        raise KeyboardInterrupt
    assert list(datasets_folder.iterdir()) == []
    assert os.environ["MINARI_DATASETS_PATH"] == before


def test_an_unset_datasets_path_is_unset_again_afterwards(monkeypatch, tmp_path):
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    with minari_store.staging() as staged:
        assert staged.parent == tmp_path / ".minari" / "datasets"
    assert "MINARI_DATASETS_PATH" not in os.environ


def test_an_existing_dataset_is_replaced_only_on_demand(datasets_folder):
    make_dataset("dppo/one-v0", reward=1.0)
    with minari_store.staging() as staged:
        make_dataset("dppo/one-v0", reward=2.0)
        with pytest.raises(UserError, match="exists already"):
            minari_store.publish(staged, "dppo/one-v0", overwrite=False)
        assert (datasets_folder / "dppo/one-v0").exists()
        minari_store.publish(staged, "dppo/one-v0", overwrite=True)
    assert reward_of("dppo/one-v0") == 2.0
    assert leftovers(datasets_folder) == []


def test_a_replacement_that_fails_puts_the_old_dataset_back():
    make_dataset("dppo/one-v0", reward=1.0)
    with pytest.raises(FileNotFoundError), minari_store.staging() as staged:
        minari_store.publish(staged, "dppo/one-v0", overwrite=True)  # nothing was staged
    assert reward_of("dppo/one-v0") == 1.0


def test_a_datasets_folder_that_cannot_be_made_is_refused(datasets_folder):
    datasets_folder.write_text("a file in its place")
    with pytest.raises(UserError, match=r"cannot use .*datasets as the folder of datasets \(File exists\)"):
        minari_store.is_stored("dppo/one-v0")


def test_a_datasets_folder_that_cannot_be_written_to_is_refused(datasets_folder, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(minari_store.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(UserError, match=r"cannot write datasets into .* Permission denied"), minari_store.staging():
        pass


# --- downloading


class FakeHub(CloudStorage):
    """A folder in the part of the hub; it breaks off after the metadata if it holds a file ``broken``."""

    def __init__(self, name, token=None):
        self.folder = FakeHub.folder

    def list_datasets(self, prefix=None):
        stored = [path.parent.parent for path in self.folder.glob("**/data/metadata.json")]
        return [path.relative_to(self.folder).as_posix() for path in stored if prefix in path.as_posix()]

    def get_dataset_metadata(self, dataset_id):
        return minari.dataset.minari_storage.MinariStorage.read_raw_metadata(self.folder / dataset_id / "data")

    def download_dataset(self, dataset_id, path):
        target = path / dataset_id / "data"
        target.mkdir(parents=True)
        shutil.copy(self.folder / dataset_id / "data/metadata.json", target)
        if (self.folder / "broken").exists():
            raise ConnectionResetError("Connection\nreset by peer")
        shutil.copy(self.folder / dataset_id / "data/main_data.hdf5", target)

    def download_namespace_metadata(self, namespace, path):
        (path / namespace).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / namespace / "namespace_metadata.json", path / namespace)

    def list_namespaces(self):
        return ["mujoco", "mujoco/hopper"]

    upload_dataset = upload_namespace = list_namespaces


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        make_dataset("mujoco/hopper/medium-v0", reward=7.0)
    FakeHub.folder = folder
    monkeypatch.setitem(remotes._registry, "fake", lambda: FakeHub)
    monkeypatch.setenv("MINARI_REMOTE", "fake://hub")
    return folder


def test_a_public_dataset_is_downloaded_into_its_place(hub, datasets_folder):
    minari_store.download("mujoco/hopper/medium-v0")
    assert reward_of("mujoco/hopper/medium-v0") == 7.0
    assert leftovers(datasets_folder) == []


def test_a_download_that_breaks_off_leaves_nothing(hub, datasets_folder):
    (hub / "broken").touch()
    with pytest.raises(UserError) as caught:
        minari_store.download("mujoco/hopper/medium-v0", hint="build it")
    assert str(caught.value) == (
        f"dataset mujoco/hopper/medium-v0 is not in {datasets_folder} and could not be downloaded "
        "(Connection reset by peer); build it"
    )
    assert list(datasets_folder.iterdir()) == []


def test_a_dataset_that_the_hub_does_not_have_is_an_error(hub):
    with pytest.raises(UserError, match=r"Couldn't find any version .*; build it"):
        minari_store.download("mujoco/nothing/medium-v0", hint="build it")


def test_an_unreachable_hub_is_reported_at_once_and_quietly(datasets_folder, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        minari_store.download("mujoco/hopper/medium-v0", hint="build it with `dppo collect task=hopper`")
    assert time.monotonic() - begin < minari_store.PROBE_SECONDS + 1
    message = str(caught.value)
    assert "the Minari hub cannot be reached (" in message and "\n" not in message
    assert message.endswith("connect to the network, or build it with `dppo collect task=hopper`")
    assert capfd.readouterr() == ("", "")
    assert not datasets_folder.exists() or list(datasets_folder.iterdir()) == []
