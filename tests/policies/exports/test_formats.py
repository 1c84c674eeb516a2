"""What was exported acts as the policy does, whatever the format, the policy and its network."""

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policies import Policy, UserError
from policies.exports.formats import FORMATS, largest_difference
from policies.exports.sampling import DESCRIPTION

MLP = {"type": "mlp", "hidden_dims": [8, 8, 8], "activation": "mish", "residual": True}
UNET = {"type": "unet", "down_dims": [4, 4], "groups": 2, "final_groups": 2, "step_dim": 8}
TRANSFORMER = {"type": "transformer", "width": 8, "layers": 1, "heads": 2}
DIFFUSION = {"type": "diffusion", "chunk": 3, "denoising_steps": 2, "finetuned_steps": 1, "history": 2}
"""Of a frozen and a trained part."""
DDIM = {"denoising_steps": 10, "sampler": {"steps": 2, "evaluation_eta": 0.0}}

CASES: dict[str, dict[str, Any]] = {
    "gaussian": {"type": "gaussian", "network": MLP, "history": 2, "chunk": 3, "executed": 2},
    "squashed gaussian, running scaling": {
        **{"type": "gaussian", "network": MLP, "squash": True},
        "observation_scaling": "running",
    },
    "mixture": {"type": "mixture", "network": MLP, "components": 3, "chunk": 2},
    "categorical": {"type": "categorical", "network": MLP},
    "categorical, several dimensions, masked": {
        **{"type": "categorical", "network": MLP, "obs_dim": 7, "action_dim": 5},
        **{"choices": [3, 2], "masked": True},
    },
    "mlp": {**DIFFUSION, "network": MLP},
    "mlp, DDIM, nothing frozen, running scaling": {
        **{**DIFFUSION, **DDIM, "network": MLP, "finetuned_steps": None},
        **{"observation_scaling": "running", "first_executed": 1, "executed": 1, "final_clip": 0.9},
    },
    "unet": {**DIFFUSION, "network": UNET},
    "transformer": {**DIFFUSION, "network": TRANSFORMER},
    "transformer, encoder, DDIM": {**DIFFUSION, **DDIM, "network": {**TRANSFORMER, "condition_layers": 1}},
}
FUNCTIONS = sorted(name for name, form in FORMATS.items() if not form.directory)


def made(case: str) -> Policy:
    torch.manual_seed(0)
    policy = Policy.from_config({"obs_dim": 3, "action_dim": 2, **CASES[case]})
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.3 * torch.randn(weights.shape))
    low = torch.linspace(-4.0, 1.0, policy.config.obs_dim)
    policy.fit_observations(low, low + 3)
    policy.fit_actions(torch.tensor([-3.0, 10.0]), torch.tensor([1.0, 30.0]))
    policy.observe(low + torch.randn(20, policy.config.obs_dim))
    policy.metadata["task"] = {"name": "reach"}
    return policy.eval()


def inputs(policy: Policy, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    obs = torch.randn(batch, policy.config.history, policy.config.obs_dim, generator=generator)
    return obs, policy.draw_noise(batch, generator)


def written(name: str, policy: Policy, directory: Path) -> Path:
    if name == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    path = directory / "policy.file"
    FORMATS[name].write(policy, path)
    return path


def description_in(name: str, path: Path) -> dict[str, Any]:
    """As another program reads it."""
    if name == "onnx":
        onnx = importlib.import_module("onnx")
        return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}[DESCRIPTION])
    extra = {DESCRIPTION: ""}
    if name == "torchscript":
        torch.jit.load(str(path), _extra_files=extra)
    else:
        torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    return json.loads(extra[DESCRIPTION])


def cases() -> list[tuple[str, str]]:
    """Each format with each policy; torch.export takes long, and has each kind of policy and network once."""
    return [(name, case) for name in FUNCTIONS for case in CASES if name != "torch_export" or "DDIM" not in case]


@pytest.mark.parametrize(("name", "case"), cases())
def test_the_same_noise_gives_the_policys_own_actions_in_batches_of_any_size(
    name: str, case: str, tmp_path: Path
) -> None:
    policy = made(case)
    path = written(name, policy, tmp_path)
    act = FORMATS[name].load(path)
    for batch in (1, 2, 5):
        obs, noise = inputs(policy, batch)
        expected = policy.sample(obs, noise=noise, deterministic=True).action
        torch.testing.assert_close(act(obs, noise), expected, rtol=1e-5, atol=1e-4)
    assert largest_difference(policy, act) < 1e-3

    told, (obs, noise) = description_in(name, path), inputs(policy, 1)
    assert told["inputs"] == {"obs": ["batch", *obs.shape[1:]], "noise": ["batch", *noise.shape[1:]]}
    assert told["outputs"] == {"action": ["batch", *act(obs, noise).shape[1:]]}
    assert (told["history"], told["executed"]) == (policy.config.history, policy.config.executed_chunk)
    assert (told["policy"], told["metadata"]["task"]) == (policy.type, {"name": "reach"})


def test_actions_depend_on_what_was_observed_and_a_chains_on_its_noise(tmp_path: Path) -> None:
    act = FORMATS["torchscript"].load(written("torchscript", policy := made("mlp"), tmp_path))
    obs, noise = inputs(policy, 3)
    assert not torch.allclose(act(obs, noise), act(obs + 0.5, noise), atol=1e-3)
    assert not torch.allclose(act(obs, noise), act(obs, noise + 0.5), atol=1e-3)


def test_exporting_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    policy = made("mlp").train()
    written("torchscript", policy, tmp_path)
    assert policy.training and all(weights.requires_grad for weights in policy.network.parameters())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_flow_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    flow = Policy.from_config({"type": "diffusion_ode", "obs_dim": 3, "action_dim": 2, "network": MLP})
    with pytest.raises(
        UserError, match=r"a diffusion_ode policy cannot be exported.* categorical, diffusion, gaussian"
    ):
        written(name, flow, tmp_path)


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"format=onnx needs the library onnx: pip install 'dppo\[onnx\]'"):
        FORMATS["onnx"].write(made("gaussian"), tmp_path / "policy.onnx")


def test_what_acts_otherwise_is_found_out() -> None:
    policy = made("gaussian")
    with pytest.raises(UserError, match=r"does not act as the policy does: actions differ by up to 0\.5"):
        largest_difference(policy, lambda obs, noise: policy.sample(obs, noise=noise, deterministic=True).action + 0.5)
    with pytest.raises(UserError, match="does not act as the policy does"):
        largest_difference(policy, lambda obs, noise: torch.tensor(torch.nan))
