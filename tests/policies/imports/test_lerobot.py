"""Directories of LeRobot's DiffusionPolicy give the actions that LeRobot itself recorded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policies import DiffusionPolicy, UserError
from policies.imports.lerobot import import_lerobot, is_lerobot

DATA = Path(__file__).parents[2] / "data" / "imports"
CASES = ["lerobot_ddpm", "lerobot_ddim"]
Edit = Callable[[dict[str, Any]], Any]


def recorded(case: str) -> dict[str, Tensor]:
    with np.load(DATA / case / "expected.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def noise_of(policy: DiffusionPolicy, figures: dict[str, Tensor]) -> Tensor:
    start = figures["initial_noise"]
    silent = [torch.zeros_like(start)] * (len(policy.timesteps) - 1)
    added = list(figures["step_noise"]) if figures["step_noise"].numel() else silent
    return torch.stack([start, *added, torch.zeros_like(start)], dim=1)


def observed(figures: dict[str, Tensor]) -> Tensor:
    return torch.cat([figures["raw.observation.state"], figures["raw.observation.environment_state"]], dim=2)


def check_actions(policy: DiffusionPolicy, case: str) -> None:
    figures = recorded(case)
    sample = policy.sample(observed(figures), noise=noise_of(policy, figures), deterministic=True)
    torch.testing.assert_close(sample.chain[:, -1], figures["full_normalized"], rtol=0, atol=2e-5)
    torch.testing.assert_close(sample.action, figures["executed_physical"], rtol=0, atol=2e-5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(DATA / "lerobot_ddpm", tmp_path / "policy"))


def edited(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def before_september_2025(directory: Path, epsilon: bool = False) -> None:
    """Turn a directory into one of the old layout: statistics within the weights, no processors."""
    weights = load_file(directory / "model.safetensors")
    statistics = load_file(directory / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    for part, name in (("normalize_inputs", "observation.state"), ("unnormalize_outputs", "action")):
        for kind in ("min", "max"):
            weights[f"{part}.buffer_{name.replace('.', '_')}.{kind}"] = statistics[f"{name}.{kind}"]
            weights[f"normalize_targets.buffer_action.{kind}"] = statistics[f"action.{kind}"].clone()
    save_file(weights, directory / "model.safetensors")
    for path in directory.glob("policy_p*"):
        path.unlink()


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_noise_gives_the_recorded_actions(case: str) -> None:
    assert is_lerobot(DATA / case)
    check_actions(import_lerobot(DATA / case), case)


def test_statistics_within_the_weights_give_the_same_actions(directory: Path) -> None:
    before_september_2025(directory)
    check_actions(import_lerobot(directory), "lerobot_ddpm")


def test_what_is_imported_is_saved_and_loaded_like_any_policy(tmp_path: Path) -> None:
    policy = import_lerobot(DATA / "lerobot_ddim")
    assert (policy.config.first_executed, policy.config.executed, policy.config.chunk) == (1, 8, 16)
    assert policy.metadata["inputs"] == [["observation.state", 2], ["observation.environment_state", 6]]
    policy.save_pretrained(tmp_path)
    again = DiffusionPolicy.from_pretrained(tmp_path)
    assert isinstance(again, DiffusionPolicy)
    check_actions(again, "lerobot_ddim")


def test_means_and_stds_normalise_too(directory: Path) -> None:
    mean, std = torch.tensor([1.0, 2.0, 0.0, 5.0, -1.0]), torch.tensor([2.0, 1.0, 0.5, 3.0, 1.0])
    name = "policy_preprocessor_step_3_normalizer_processor.safetensors"
    statistics = load_file(directory / name)
    save_file({**statistics, "observation.state.mean": mean, "observation.state.std": std}, directory / name)

    def by_mean(content: dict[str, Any]) -> None:
        content["steps"][3]["config"]["norm_map"]["STATE"] = "MEAN_STD"

    edited(directory / "policy_preprocessor.json", by_mean)
    policy = import_lerobot(directory)
    obs = torch.randn(2, 2, 7)
    normalized = policy.normalize_obs(obs)
    torch.testing.assert_close(normalized[..., :5], (obs[..., :5] - mean) / (std + 1e-8))
    assert torch.equal(normalized[..., 5:], obs[..., 5:]), "an environment's state has no mode: it stays as it is"


# --- refusals


def with_image(config: dict[str, Any]) -> None:
    config["input_features"]["observation.image"] = {"type": "VISUAL", "shape": [3, 96, 96]}


def setting(name: str, value: Any) -> Edit:
    return lambda config: config.update({name: value})


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (with_image, r"sees images \(observation.image\), which cannot be imported yet"),
        (setting("type", "act"), "a LeRobot policy of type 'act'; only 'diffusion'"),
        (setting("noise_scheduler_type", "PNDM"), "the noise scheduler 'PNDM' is not supported"),
        (setting("beta_schedule", "sigmoid"), "beta_schedule='sigmoid' of the noise scheduler is not supported"),
        (setting("down_dims", [16, 48]), "does not fit: for .* the file has .* the network needs"),
        (setting("n_groups", 7), "groups must divide"),
        (setting("n_action_steps", 8), "executed must lie between 1 and chunk - first_executed = 7, not 8"),
        (setting("output_features", {}), "puts out nothing"),
        (lambda config: config.pop("horizon"), "no whole configuration of a DiffusionPolicy: 'horizon'"),
        (lambda config: config["input_features"].pop("observation.state"), "sees observation.environment_state; only"),
    ],
)
def test_a_configuration_that_cannot_be_imported_is_refused_by_name(
    directory: Path, edit: Edit, complaint: str
) -> None:
    edited(directory / "config.json", edit)
    with pytest.raises(UserError, match=complaint):
        import_lerobot(directory)


def step(name: str) -> Edit:
    return lambda content: content["steps"].append({"registry_name": name, "config": {}})


def state_file(name: str) -> Edit:
    return lambda content: content["steps"][3].update(state_file=name)


def mode(name: str) -> Edit:
    return lambda content: content["steps"][3]["config"]["norm_map"].update(STATE=name)


def normalizer(**settings: Any) -> Edit:
    return lambda content: content["steps"][3]["config"].update(settings)


def rename(content: dict[str, Any]) -> None:
    content["steps"][0]["config"]["rename_map"] = {"a": "b"}


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (step("delta_action_processor"), "has a step 'delta_action_processor', which is not supported"),
        (step("normalizer_processor"), "has 2 steps 'normalizer_processor', not one"),
        (rename, "has a step 'rename_observations_processor'"),
        (
            state_file("../../secret.safetensors"),
            "names the file '../../secret.safetensors', which is not one beside it",
        ),
        (state_file("/etc/passwd"), "names the file '/etc/passwd'"),
        (state_file(".."), r"names the file '\.\.'"),
        (state_file("nowhere.safetensors"), "nowhere.safetensors cannot be read as weights"),
        (
            mode("QUANTILES"),
            "'observation.state' is normalised by QUANTILES; supported are IDENTITY, MIN_MAX, MEAN_STD",
        ),
        (lambda content: content.pop("steps"), "names no steps"),
        (normalizer(eps=1e-6), "normalises with eps=1e-06; only 1e-08 is supported"),
        (normalizer(norm_map=["MEAN_STD"]), "norm_map must be an object of names and values"),
        (normalizer(norm_map={"STATE": ["MEAN_STD"]}), r"type 'STATE' is normalised by \['MEAN_STD'\]; both must be"),
        (normalizer(features={"observation.state": "STATE"}), "observation.state must be an object"),
        (normalizer(features={"observation.state": {"type": [1]}}), r"a feature of type \[1\] is normalised by None"),
        (lambda content: content["steps"][3].update(config=[1]), r"config must be an object .*, not \[1\]"),
        (lambda content: content["steps"][2]["config"].update(float_dtype="float16"), "in float_dtype='float16'; only"),
    ],
)
def test_a_processor_that_does_something_else_is_refused_by_name(directory: Path, edit: Edit, complaint: str) -> None:
    edited(directory / "policy_preprocessor.json", edit)
    with pytest.raises(UserError, match=complaint):
        import_lerobot(directory)


def test_a_directory_without_statistics_is_refused(directory: Path) -> None:
    (directory / "policy_postprocessor.json").unlink()
    with pytest.raises(UserError, match=r"has a policy_preprocessor.json but no policy_postprocessor.json"):
        import_lerobot(directory)
    (directory / "policy_preprocessor.json").unlink()
    with pytest.raises(UserError, match=r"neither policy_preprocessor.json nor any within its weights"):
        import_lerobot(directory)


def test_statistics_that_were_never_given_are_refused(directory: Path) -> None:
    before_september_2025(directory)
    weights = load_file(directory / "model.safetensors")
    weights["normalize_inputs.buffer_observation_state.min"].fill_(torch.inf)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"the statistics of 'observation.state' cannot normalise"):
        import_lerobot(directory)
