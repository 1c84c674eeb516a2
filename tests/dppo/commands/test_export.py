from pathlib import Path

import pytest
import torch

from dppo.checkpoint import save_checkpoint
from dppo.task import Task
from policies import DiffusionPolicy, Policy
from policies.exports.torchscript import load_torchscript
from policies.imports.lerobot import import_lerobot
from policies.samplers import Sampler


@pytest.fixture
def trained(small_policy, tmp_path) -> Path:
    """The run directory of a policy for the point task."""
    save_checkpoint(tmp_path / "run" / "checkpoints" / "9", small_policy("diffusion"), Task("point", "Point-v0"), {})
    return tmp_path / "run"


def acts_alike(path: Path, policy: Policy) -> bool:
    obs = torch.randn(3, policy.config.history, policy.config.obs_dim)
    noise = policy.draw_noise(3)
    expected = policy.sample(obs, noise=noise, deterministic=True).action
    return torch.allclose(load_torchscript(path)(obs, noise), expected, atol=1e-5)


def test_a_run_is_exported_and_what_was_written_is_tried(command, trained, tmp_path, capsys):
    written = command("export", "format=torchscript", f"checkpoint={trained}", f"output={tmp_path / 'new' / 'p.pt'}")
    assert acts_alike(written, Policy.from_pretrained(trained / "checkpoints" / "9" / "policy"))
    assert "from the same noise differ by at most" in capsys.readouterr().out


def test_a_checkpoint_is_exported_under_another_sampler(command, trained, tmp_path):
    ddim = ["sampler=ddim", "sampler.steps=4"]
    written = command("export", "format=torchscript", f"checkpoint={trained}", f"output={tmp_path / 'p.pt'}", *ddim)
    policy = Policy.from_pretrained(trained / "checkpoints" / "9" / "policy")
    assert isinstance(policy, DiffusionPolicy)
    assert acts_alike(written, policy.with_sampler(Sampler(steps=4, evaluation_eta=0.0)))


@pytest.fixture
def unet(tmp_path) -> list[str]:
    """The arguments that export a policy for LeRobot."""
    network = {"type": "unet", "down_dims": [8], "groups": 4, "step_dim": 8}
    policy = Policy.from_config(
        {"type": "diffusion", "obs_dim": 3, "action_dim": 2, "chunk": 4, "noise_clip": None, "network": network}
    )
    policy.save_pretrained(tmp_path / "policy")
    return ["format=lerobot", f"checkpoint={tmp_path / 'policy'}", f"output={tmp_path / 'lerobot'}", "state_dim=2"]


def test_a_unet_is_handed_to_lerobot_whose_parts_of_an_observation_are_named(command, unet):
    written = command("export", *unet)
    assert import_lerobot(written).metadata["inputs"] == [
        ["observation.state", 2],
        ["observation.environment_state", 1],
    ]


def test_a_directory_is_replaced_whole_if_it_holds_a_policy(command, refused, unet, tmp_path):
    written = command("export", *unet)
    expected = sorted(path.name for path in written.iterdir())
    (written / "stale.safetensors").touch()
    command("export", *unet, "overwrite=true")
    assert sorted(path.name for path in written.iterdir()) == expected
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").touch()
    message = refused("export", *unet, f"output={tmp_path / 'home'}", "overwrite=true")
    assert "home holds no policy that could be replaced" in message
    assert (tmp_path / "home" / "mine").exists()


def test_what_does_not_act_as_the_checkpoint_replaces_nothing(refused, trained, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p.pt").write_text("mine")
    monkeypatch.setattr("policies.exports.formats.TOLERANCE", -1.0)
    output = f"output={tmp_path / 'out' / 'p.pt'}"
    message = refused("export", "format=torchscript", f"checkpoint={trained}", output, "overwrite=true")
    assert "does not act as the policy does" in message
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("p.pt", "mine")]


def test_a_checkpoint_of_another_project_is_to_be_imported_first(refused, tmp_path):
    (tmp_path / "state.pt").touch()
    message = refused("export", "format=onnx", f"checkpoint={tmp_path / 'state.pt'}", f"output={tmp_path / 'p'}")
    assert f"is of another project; import it first: dppo import {tmp_path / 'state.pt'} output=..." in message


def test_what_is_there_is_replaced_only_if_told_to(command, refused, trained, tmp_path):
    given = ["format=torchscript", f"checkpoint={trained}", f"output={tmp_path / 'p.pt'}"]
    (tmp_path / "p.pt").write_text("mine")
    assert "p.pt is there already; choose another output=..., or set overwrite=true" in refused("export", *given)
    assert (tmp_path / "p.pt").read_text() == "mine"
    command("export", *given, "overwrite=true")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    taken = ["format=lerobot", f"checkpoint={trained}", f"output={tmp_path / 'full'}"]
    assert "full is there already" in refused("export", *taken)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["format=onxx"], "unknown format 'onxx' (did you mean onnx?); there are: lerobot, onnx,"),
        (["format=torchscript", "output=."], ". is a directory; of format=torchscript, output=... names a file"),
        (["format=torchscript", "state_dim=1"], "state_dim is a setting of format=lerobot, not of format=torchscript"),
        (["format=lerobot"], "network=mlp cannot be exported: LeRobot's DiffusionPolicy has a unet"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(refused, trained, tmp_path, given, says):
    message = refused("export", f"checkpoint={trained}", f"output={tmp_path / 'new'}", *given)
    assert says in message
    assert not (tmp_path / "new").exists()


def test_a_file_is_no_directory(refused, trained, tmp_path):
    (tmp_path / "file").touch()
    message = refused("export", "format=lerobot", f"checkpoint={trained}", f"output={tmp_path / 'file'}")
    assert "file is a file; of format=lerobot, output=... names a directory" in message
