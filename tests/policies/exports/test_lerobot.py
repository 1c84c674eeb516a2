"""A policy goes into LeRobot's files and comes back, and what LeRobot's policy cannot be is refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from policies import DiffusionPolicy, Policy, UserError
from policies.exports.lerobot import export_lerobot, name_inputs
from policies.imports.files import inverted, renamed
from policies.imports.lerobot import NAMES, import_lerobot

DATA = Path(__file__).parents[2] / "data" / "imports"
RECORDED = ["lerobot_ddpm", "lerobot_ddim"]
UNET = {"type": "unet", "down_dims": [8, 16], "groups": 4, "final_groups": 8, "step_dim": 8}
DDPM = {"history": 2, "first_executed": 1, "chunk": 8, "denoising_steps": 6, "noise_clip": None}
DDIM = {**DDPM, "denoising_steps": 20, "noise_clip": 3.0}
DDIM |= {"sampler": {"steps": 4, "evaluation_eta": 0.0, "rederive_noise": False}}
PLAIN = {"history": 1, "chunk": 4, "executed": 3, "x0_clip": None, "prediction": "sample", "beta_schedule": "linear"}
PLAIN |= {"denoising_steps": 6, "beta_range": (0.01, 0.3), "sampler": {"steps": 3, "evaluation_eta": 0.0}}
CASES: dict[str, dict[str, Any]] = {
    "DDPM": DDPM,
    "DDPM, the whole chain fine-tuned": {**DDPM, "finetuned_steps": 6},
    "DDPM of fewer steps, part of the chunk": {**DDPM, "sampler": {"steps": 3}, "executed": 4, "x0_clip": 1.5},
    "DDIM": DDIM,
    "DDIM, predicts x0, no clip": PLAIN,
}


def made(network: dict[str, Any] | None = None, **settings: Any) -> Policy:
    torch.manual_seed(0)
    settings = {"type": "diffusion", "obs_dim": 5, "action_dim": 2, "network": {**UNET, **(network or {})}, **settings}
    policy = Policy.from_config(settings)
    with torch.no_grad():
        for weights in policy.parameters():
            weights.add_(0.1 * torch.randn(weights.shape))
    policy.fit_observations(torch.tensor([-4.0, 0.0, 5.0, 100.0, -1e-3]), torch.tensor([4.0, 1.0, 9.0, 100.5, 1e-3]))
    policy.fit_actions(torch.tensor([-3.0, 10.0]), torch.tensor([1.0, 30.0]))
    return policy


def act(policy: Policy, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return policy.sample(obs, noise=noise, deterministic=True).action


@pytest.mark.parametrize("case", CASES)
def test_a_policy_that_went_there_and_back_acts_as_before(case: str, tmp_path: Path) -> None:
    policy = made(**CASES[case])
    name_inputs(policy, 2)
    export_lerobot(policy, tmp_path / "policy")
    again = import_lerobot(tmp_path / "policy")
    obs = torch.tensor([0.0, 0.5, 7.0, 100.2, 0.0]) + 1e-3 * torch.randn(3, policy.config.history, 5)
    noise = policy.draw_noise(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(act(again, obs, noise), act(policy, obs, noise), rtol=1e-5, atol=1e-5)
    assert again.metadata["inputs"] == [["observation.state", 2], ["observation.environment_state", 3]]


@pytest.mark.parametrize("case", RECORDED)
def test_what_lerobot_wrote_is_written_again_under_the_same_names(case: str, tmp_path: Path) -> None:
    export_lerobot(import_lerobot(DATA / case), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DATA / case).glob("[!e]*")}
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (tmp_path, DATA / case))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    ours, theirs = (json.loads((directory / "config.json").read_text()) for directory in (tmp_path, DATA / case))
    assert ours.keys() <= theirs.keys()
    own = {"drop_n_last_frames", "normalization_mapping", "num_inference_steps"}
    assert {name for name in ours if ours[name] != theirs[name]} <= own
    assert ours["num_inference_steps"] == (theirs["num_inference_steps"] or theirs["num_train_timesteps"])

    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        ours, theirs = (json.loads((directory / name).read_text()) for directory in (tmp_path, DATA / case))
        for content in (ours, theirs):
            for step in content["steps"]:
                step["config"].pop("norm_map", None)
        assert ours == theirs


def test_rules_for_names_lead_there_and_back() -> None:
    theirs = {name.removeprefix("diffusion.unet."): 0 for name in load_file(DATA / RECORDED[0] / "model.safetensors")}
    assert renamed(renamed(theirs, NAMES), inverted(NAMES)) == theirs
    assert inverted([(r"^(a|b)\.(\d+)\.x\.", r"\1_\2.y.")]) == [(r"^(a|b)_(\d+)\.y\.", r"\1.\2.x.")]


# --- refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(finetuned_steps=2), "two networks, a frozen one for its first 4 steps .* with policy.finetuned_steps=6"),
        (dict(first_executed=0), "first_executed=0 cannot be exported: .* has history - 1 = 1"),
        (dict(chunk=6), "chunk=6 cannot be exported: .* multiples of 2.levels = 4"),
        (dict(prediction="v_prediction"), "prediction=v_prediction .* epsilon and sample"),
        (dict(final_clip=1.0), "final_clip=1.0 .* has none"),
        (dict(noise_clip=3.0), "noise_clip=3.0 .* has none; sampler=ddim adds no noise"),
        (dict(observation_scaling="running"), "observation_scaling=running .* no clip of observations"),
        (dict(sampler={"evaluation_eta": 0.5}), r"sampler.evaluation_eta=0.5 .* 0 \(DDIM\) and 1 \(DDPM\)"),
        (dict(sampler={"steps": 2, "offset": 1}), "sampler.offset=1 .* has 0"),
        (dict(sampler={"epsilon_clip": 2.0}), "sampler.epsilon_clip=2.0 .* has none"),
        (dict(sampler={"evaluation_eta": 0.0}), "sampler.rederive_noise=True .* False where .*evaluation_eta=0.0"),
        (dict(sampler={"rederive_noise": False}), "sampler.rederive_noise=False .* True where"),
        (dict(beta_schedule="linear", beta_range=(1e-8, 1e-8)), "the floor of the std=0.001 .* at a step"),
        (dict(network={"activation": "relu"}), "network.activation=relu .* mish"),
        (dict(network={"groups": None}), "network.groups=None .* a number"),
        (dict(network={"final_groups": 4}), "network.final_groups=4 .* has 8"),
        (dict(network={"norm_eps": 1e-3}), "network.norm_eps=0.001 .* 1e-5"),
        (dict(network={"deep_film": True}), "network.deep_film=True .* one layer"),
        (dict(network={"obs_dims": [8, 4]}), r"network.obs_dims=.* no encoder"),
    ],
)
def test_what_lerobot_would_do_otherwise_is_refused_by_its_name(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    policy = made(**{**DDPM, **changes})
    name_inputs(policy, 2)
    with pytest.raises(UserError, match=says):
        export_lerobot(policy, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"type": "gaussian"}, "a gaussian policy cannot be exported: LeRobot's DiffusionPolicy is a denoising chain"),
        ({"type": "diffusion"}, "network=mlp cannot be exported: LeRobot's DiffusionPolicy has a unet"),
    ],
)
def test_other_policies_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        export_lerobot(Policy.from_config({"obs_dim": 5, "action_dim": 2, **settings}), tmp_path)


def test_an_observation_has_two_parts_that_somebody_has_to_name(tmp_path: Path) -> None:
    policy = made(**DDPM)
    with pytest.raises(UserError, match=r"does not say which part .* set state_dim=\.\.\., how many of the 5 entries"):
        export_lerobot(policy, tmp_path)
    policy.metadata["inputs"] = [["observation.state"], 3]
    with pytest.raises(UserError, match="does not say which part"):
        export_lerobot(policy, tmp_path / "policy")
    for state_dim in (0, 5):
        with pytest.raises(UserError, match=f"state_dim must lie between 1 and 4, not {state_dim}"):
            name_inputs(policy, state_dim)
    policy.metadata["inputs"] = [["observation.state", 5]]
    with pytest.raises(UserError, match=r"this policy sees observation\.state; LeRobot wants"):
        export_lerobot(policy, tmp_path)


def test_the_exported_policy_is_a_diffusion_policy_that_can_be_fine_tuned_again(tmp_path: Path) -> None:
    policy = made(**DDPM, finetuned_steps=6)
    name_inputs(policy, 4)
    export_lerobot(policy, tmp_path)
    again = import_lerobot(tmp_path)
    assert isinstance(again, DiffusionPolicy) and again.frozen is None
    assert again.adjusted(finetuned_steps=2).frozen is not None
