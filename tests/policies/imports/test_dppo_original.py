"""Files of the original DPPO give the policies whose figures were recorded when they were saved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from original import Figures
from torch import Tensor

from policies import DiffusionPolicy, UserError
from policies.config import config_from_dict
from policies.imports.dppo_original import OriginalSettings, import_original, settings_in_yaml

DATA = Path(__file__).parents[2] / "data" / "imports"
CASES = {"original_mlp_ddpm": "ddpm_partial", "original_mlp_ddim": "ddim_5_of_100"}
"""Folders of checkpoints, and the recorded figures of the same networks."""


def yaml_of(folder: str) -> dict[str, Any]:
    """What the original's YAML would say."""
    c = json.loads((DATA / folder / "settings.json").read_text())
    model = {
        "denoised_clip_value": c["x0_clip"],
        "randn_clip_value": c["randn_clip"],
        "min_sampling_denoising_std": c["min_sampling_std"],
        "min_logprob_denoising_std": c["min_logprob_std"],
        "use_ddim": c.get("use_ddim", False),
        "ddim_steps": c.get("ddim_steps"),
        "denoising_steps": "${denoising_steps}",
        "actor": {
            "_target_": "model.diffusion.mlp_diffusion.DiffusionMLP",
            "activation_type": c["activation"],
            "cond_dim": "${eval:'${obs_dim} * ${cond_steps}'}",
        },
    }
    return {
        "logdir": "${oc.env:DPPO_LOG_DIR}/here",
        "obs_dim": c["Do"],
        "action_dim": c["Da"],
        "denoising_steps": c["K"],
        "ft_denoising_steps": c["ft"],
        "cond_steps": c["To"],
        "horizon_steps": c["Ta"],
        "act_steps": "${horizon_steps}",
        "model": model,
    }


def imported(folder: str, file: str = "finetuned.pt", **settings: Any) -> DiffusionPolicy:
    said = {**settings_in_yaml(yaml_of(folder)), **settings}
    path = DATA / folder
    return import_original(
        path / file, path / "normalization.npz", config_from_dict(OriginalSettings, said, "settings")
    )


def in_units(figures: Figures, folder: str, normalized: Tensor) -> tuple[Tensor, Tensor]:
    """The recorded, normalised observations in the environment's units, and what actions become there."""
    with np.load(DATA / folder / "normalization.npz") as file:
        low, high, action_low, action_high = (
            torch.from_numpy(file[name]).double() for name in ("obs_min", "obs_max", "action_min", "action_max")
        )
    obs = (figures["obs"].double() / 2 + 0.5) * (high - low + 1e-6) + low
    return obs.float(), ((normalized.double() + 1) / 2 * (action_high - action_low) + action_low).float()


@pytest.mark.parametrize("folder", CASES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_recorded_noise_gives_the_recorded_action_in_the_environments_units(
    folder: str, deterministic: bool
) -> None:
    figures, suffix = Figures(CASES[folder]), "_deterministic" if deterministic else ""
    obs, action = in_units(figures, folder, figures[f"action{suffix}"])
    sample = imported(folder).sample(obs, noise=figures[f"noise{suffix}"], deterministic=deterministic)
    torch.testing.assert_close(sample.action, action, rtol=0, atol=5e-6)
    if not deterministic:
        torch.testing.assert_close(sample.chain, figures["chain"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("folder", CASES)
def test_of_a_pretrained_file_the_averaged_weights_are_taken_and_the_whole_chain_is_free(folder: str) -> None:
    policy = imported(folder, "pretrained.pt")
    assert policy.config.finetuned_steps is None and policy.frozen is None
    content = torch.load(DATA / folder / "pretrained.pt", weights_only=True)
    first = "network.mlp_mean.layers.0.weight"
    assert torch.equal(policy.network.state_dict()["mlp.input.weight"], content["ema"][first])
    assert not torch.equal(content["ema"][first], content["model"][first])


def test_what_is_imported_is_saved_and_loaded_like_any_policy(tmp_path: Path) -> None:
    policy = imported("original_mlp_ddpm")
    policy.save_pretrained(tmp_path / "policy")
    again = DiffusionPolicy.from_pretrained(tmp_path / "policy")
    obs, noise = torch.randn(3, 1, 11), policy.draw_noise(3)
    assert torch.equal(policy.sample(obs, noise=noise).action, again.sample(obs, noise=noise).action)


def test_learned_eta_is_taken_over() -> None:
    policy = imported("original_mlp_ddim", learn_eta=True)
    assert policy.config.sampler.learned_eta == "scalar"
    assert policy.eta is not None
    logit = torch.load(DATA / "original_mlp_ddim" / "finetuned.pt", weights_only=True)["model"]["eta.eta_logit"]
    expected = 0.5 * (torch.tanh(logit) + 1) * 0.9 + 0.1
    torch.testing.assert_close(policy.eta(torch.zeros(1, 11)).view(1), expected)


# --- networks as the original names their weights


def network_weights(kind: str) -> dict[str, Tensor]:
    """Random weights of small networks under the original's names; 3 observations, 2 actions."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, inside: int, outside: int, condition: int) -> None:
        for index, width in enumerate((inside, outside)):
            layer(f"{name}.blocks.{index}.block.0", outside, width, 5)
            layer(f"{name}.blocks.{index}.block.2", outside)
        if kind == "large unet":
            for index, width in ((0, condition), (2, 2 * outside), (4, 2 * outside)):
                layer(f"{name}.cond_encoder.{index}", 2 * outside, width)
        else:
            layer(f"{name}.cond_encoder.1", outside, condition)
        if inside != outside:
            layer(f"{name}.residual_conv", outside, inside, 1)

    if kind == "plain mlp":
        layer("time_embedding.1", 16, 8)
        layer("time_embedding.3", 8, 16)
        for index, (inside, outside) in enumerate([(4 + 8 + 6, 12), (12, 10), (10, 4)]):
            layer(f"mlp_mean.moduleList.{index}.linear_1", outside, inside)
    else:
        layer("time_mlp.1", 32, 8)
        layer("time_mlp.3", 8, 32)
        condition = 8 + 6
        if kind == "small unet":
            for index, (inside, outside) in {0: (6, 16), 2: (16, 5)}.items():
                layer(f"cond_mlp.layers.{index}", outside, inside)
            layer("cond_mlp.layers.1.l1", 16, 16)
            layer("cond_mlp.layers.1.l2", 16, 16)
            condition = 8 + 5
        block("down_modules.0.0", 2, 8, condition)
        block("down_modules.0.1", 8, 8, condition)
        layer("down_modules.0.2.conv", 8, 8, 3)
        block("down_modules.1.0", 8, 16, condition)
        block("down_modules.1.1", 16, 16, condition)
        block("mid_modules.0", 16, 16, condition)
        block("mid_modules.1", 16, 16, condition)
        block("up_modules.0.0", 32, 8, condition)
        block("up_modules.0.1", 8, 8, condition)
        layer("up_modules.0.2.conv", 8, 8, 4)
        layer("final_conv.0.block.0", 8, 8, 5)
        layer("final_conv.0.block.2", 8)
        layer("final_conv.1", 2, 8, 1)
    return {f"network.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def normalization(tmp_path: Path) -> Path:
    path = tmp_path / "normalization.npz"
    ranges = {"obs_min": [-1, 0, 2], "obs_max": [1, 3, 2], "action_min": [-1, -2], "action_max": [1, 2]}
    np.savez(path, **{name: np.array(values, np.float32) for name, values in ranges.items()})  # type: ignore[arg-type]
    return path


EXPECTED: dict[str, dict[str, Any]] = {
    "plain mlp": {"type": "mlp", "hidden_dims": [12, 10], "residual": False, "step_dim": 8},
    "large unet": {"down_dims": [8, 16], "kernel_size": 5, "scale": True, "deep_film": True, "obs_dims": None},
    "small unet": {"groups": 4, "scale": False, "deep_film": False, "obs_dims": [16, 16, 16, 5], "step_dim": 8},
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_a_network_is_like_is_read_off_its_weights(kind: str, tmp_path: Path, normalization: Path) -> None:
    weights = network_weights(kind)
    torch.save({"epoch": 1, "model": weights, "ema": weights}, tmp_path / "state.pt")
    settings = OriginalSettings(denoising_steps=5, activation="ReLU", groups=4, chunk=2)
    policy = import_original(tmp_path / "state.pt", normalization, settings)
    assert policy.config.network["activation"] == "relu"
    assert EXPECTED[kind].items() <= dict(policy.config.network).items()
    assert (policy.config.history, policy.config.chunk) == (2, 2)
    assert sum(weight.numel() for weight in policy.network.parameters()) == sum(w.numel() for w in weights.values())


def test_a_plain_mlp_computes_what_its_layers_do(tmp_path: Path, normalization: Path) -> None:
    weights = network_weights("plain mlp")
    torch.save({"epoch": 1, "model": weights, "ema": weights}, tmp_path / "state.pt")
    policy = import_original(
        tmp_path / "state.pt", normalization, OriginalSettings(denoising_steps=5, activation="Mish")
    )
    latent, obs, step = torch.randn(3, 2, 2), torch.randn(3, 6), torch.tensor([0, 2, 4])
    w = {name.removeprefix("network."): value for name, value in weights.items()}
    angles = step[:, None] * torch.exp(torch.arange(4) * -(np.log(10000) / 3))
    time = torch.cat([angles.sin(), angles.cos()], 1).float()
    for index, last in ((1, False), (3, True)):
        time = time @ w[f"time_embedding.{index}.weight"].T + w[f"time_embedding.{index}.bias"]
        time = time if last else torch.nn.functional.mish(time)
    x = torch.cat([latent.flatten(1), time, obs], 1)
    for index in range(3):
        x = x @ w[f"mlp_mean.moduleList.{index}.linear_1.weight"].T + w[f"mlp_mean.moduleList.{index}.linear_1.bias"]
        x = x if index == 2 else torch.nn.functional.mish(x)
    torch.testing.assert_close(policy.network(latent, step, obs), x.view(3, 2, 2), rtol=1e-4, atol=1e-4)


def test_an_observation_that_never_varied_is_normalised_to_minus_one_as_in_the_original(
    tmp_path: Path, normalization: Path
) -> None:
    weights = network_weights("plain mlp")
    torch.save({"model": weights}, tmp_path / "state.pt")
    policy = import_original(
        tmp_path / "state.pt", normalization, OriginalSettings(denoising_steps=5, activation="ReLU")
    )
    obs = policy.normalize_obs(torch.tensor([[-1.0, 3.0, 2.0], [0.5, 1.5, 2.0]]))
    torch.testing.assert_close(obs, torch.tensor([[-1.0, 1.0, -1.0], [0.5, 0.0, -1.0]]), rtol=0, atol=2e-6)


# --- refusals


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


KNOWN = OriginalSettings(denoising_steps=5, activation="ReLU", chunk=2)
REFUSED: dict[str, tuple[Any, OriginalSettings, str]] = {
    "no checkpoint": ({"weights": {}}, KNOWN, "no checkpoint of the original DPPO, which holds 'ema' or 'model'"),
    "not weights": ({"model": {"network.a": 3}}, KNOWN, "'model', is no mapping of names to weights"),
    "a Gaussian": (
        {"model": {"network.mlp.weight": torch.zeros(1)}},
        KNOWN,
        "no denoising network .* parts are network",
    ),
    "no steps": ("plain mlp", OriginalSettings(activation="ReLU"), "does not say its denoising_steps"),
    "no activation": ("plain mlp", OriginalSettings(denoising_steps=5), "does not say its activation"),
    "no chunk": ("small unet", OriginalSettings(denoising_steps=5), "does not say its chunk"),
    "another chunk": (
        "plain mlp",
        OriginalSettings(denoising_steps=5, activation="ReLU", chunk=4),
        "has chunk 2, .* say 4",
    ),
    "odd groups": ("small unet", OriginalSettings(denoising_steps=5, groups=3, chunk=2), "groups must divide"),
    "an activation": ("plain mlp", OriginalSettings(denoising_steps=5, activation="Softplus"), "unknown activation"),
    "too many steps": ("plain mlp", OriginalSettings(denoising_steps=5, activation="ReLU", ddim_steps=9), "not exceed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_does_not_fit_is_said(case: str, tmp_path: Path, normalization: Path) -> None:
    content, settings, complaint = REFUSED[case]
    if isinstance(content, str):
        content = {"model": network_weights(content)}
    with pytest.raises(UserError, match=complaint):
        import_original(saved(tmp_path / "state.pt", content), normalization, settings)


def test_a_layer_that_has_no_counterpart_here_is_refused_by_its_name(tmp_path: Path, normalization: Path) -> None:
    weights = network_weights("plain mlp")
    extra = {"network.mlp_mean.moduleList.0.norm_1.weight": torch.ones(12)}
    with pytest.raises(UserError, match=r"layer normalisation \(use_layernorm\)"):
        import_original(saved(tmp_path / "a.pt", {"model": weights | extra}), normalization, KNOWN)
    with pytest.raises(UserError, match="for surprise the file has"):
        path = saved(tmp_path / "b.pt", {"model": weights | {"network.surprise": torch.ones(2)}})
        import_original(path, normalization, KNOWN)
    del weights["network.mlp_mean.moduleList.1.linear_1.weight"]
    with pytest.raises(UserError, match=r"does not fit|missing|multiple"):
        import_original(saved(tmp_path / "c.pt", {"model": weights}), normalization, KNOWN)


def test_a_finetuned_file_needs_the_number_of_finetuned_steps() -> None:
    with pytest.raises(UserError, match="does not say its finetuned_steps"):
        imported("original_mlp_ddpm", finetuned_steps=None)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(
    tmp_path: Path, normalization: Path, legacy: bool
) -> None:
    sentinel = tmp_path / "was_here"
    content = {"model": network_weights("plain mlp"), "evil": Hostile(f"touch {sentinel}")}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"evil\.pt is refused: its pickle asks for (posix|os)\.system"):
        import_original(tmp_path / "evil.pt", normalization, KNOWN)
    assert not sentinel.exists()


def test_objects_among_the_ranges_are_refused(tmp_path: Path) -> None:
    sentinel = tmp_path / "was_here"
    path = tmp_path / "normalization.npz"
    arrays = dict.fromkeys(("obs_min", "obs_max", "action_min", "action_max"), np.zeros(1))
    np.savez(path, **{**arrays, "obs_min": np.array([Hostile(f"touch {sentinel}")], object)})
    state = saved(tmp_path / "state.pt", {"model": network_weights("plain mlp")})
    with pytest.raises(UserError, match="cannot be read as arrays"):
        import_original(state, path, KNOWN)
    assert not sentinel.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 damaged", b"\x80\x04."])
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, normalization: Path, content: bytes) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"state\.pt (cannot be read as weights|is refused)") as error:
        import_original(path, normalization, KNOWN)
    assert "\n" not in str(error.value)
    path.unlink()


# --- the YAML as data


def test_references_in_the_yaml_are_followed_and_nothing_in_it_is_computed(tmp_path: Path) -> None:
    said = settings_in_yaml(yaml_of("original_mlp_ddpm"))
    assert (said["executed"], said["denoising_steps"], said["activation"]) == (4, 20, "ReLU")
    assert "ddim_steps" not in said
    computed = {
        "obs_dim": '${eval:\'__import__("os").system("true")\'}',
        "horizon_steps": "${oc.env:HOME}",
        "act_steps": "${a}",
    }
    assert settings_in_yaml({**computed, "a": "${b}", "b": "${a}"}) == {}


def test_an_archive_that_is_compressed_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    content = bytearray((DATA / "original_mlp_ddpm" / "normalization.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 10] = 99
    path = tmp_path / "normalization.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as arrays"):
        import_original(DATA / "original_mlp_ddpm" / "pretrained.pt", path, OriginalSettings(denoising_steps=20))
