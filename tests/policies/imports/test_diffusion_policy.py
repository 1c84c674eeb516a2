"""Checkpoints of real-stanford/diffusion_policy give its own actions, and nothing in them is executed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from reference_transformer import LATENT, OBS, Reference
from torch import Tensor

from policies import DiffusionPolicy, UserError
from policies.imports.diffusion_policy import STAND_INS, Inert, import_diffusion_policy, plain
from policies.imports.files import load_plain_pickle, without_prefix

DATA = Path(__file__).parents[2] / "data"
REAL = DATA / "imports" / "diffusion_policy_unet_ddim"
NAMESPACE = "diffusion_policy.policy.diffusion_{}_lowdim_policy.Diffusion{}LowdimPolicy"


def actions(policy: DiffusionPolicy, obs: Tensor, start: Tensor, added: list[Tensor]) -> Tensor:
    noise = torch.stack([start, *added, torch.zeros_like(start)], dim=1)
    return policy.sample(obs, noise=noise, deterministic=True).action


def test_the_recorded_noise_gives_the_recorded_actions() -> None:
    with np.load(REAL / "expected.npz") as file:
        obs, start, executed = (
            torch.from_numpy(file[name]) for name in ("raw_obs", "initial_noise", "executed_physical")
        )
    policy = import_diffusion_policy(REAL / "latest.ckpt")
    config = policy.config
    assert (config.history, config.chunk, config.first_executed, config.executed) == (2, 16, 2, 8)
    action = actions(policy, obs, start, [torch.zeros_like(start)] * 9)
    torch.testing.assert_close(action, executed, rtol=0, atol=2e-5)


# --- files as their workspaces save them


def saved(path: Path, config: dict[str, Any], weights: dict[str, Tensor], **more: Any) -> Path:
    states = {"model": {name: torch.zeros_like(value) for name, value in weights.items()}, "ema_model": weights}
    torch.save(
        {"cfg": OmegaConf.create(config), "state_dicts": states, "pickles": {"epoch": b"\x80\x04K\x01."}, **more}, path
    )
    return path


def normalizer(obs_dim: int, action_dim: int) -> dict[str, Tensor]:
    """Observations x -> 2 x + 1; actions stay as they are."""
    fields = {"obs": (torch.full((obs_dim,), 2.0), torch.ones(obs_dim)), "action": (torch.ones(1), torch.zeros(1))}
    return {
        f"normalizer.params_dict.{name}.{part}": value
        for name, pair in fields.items()
        for part, value in zip(("scale", "offset"), pair, strict=True)
    }


def scheduler(**settings: Any) -> dict[str, Any]:
    common = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small"}
    return {"_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler", **common, **settings}


def unet_config(**changes: Any) -> dict[str, Any]:
    policy = {
        "_target_": NAMESPACE.format("unet", "Unet"),
        **{"horizon": "${horizon}", "obs_dim": "${obs_dim}", "action_dim": "${action_dim}"},
        **{"n_obs_steps": "${n_obs_steps}", "n_action_steps": 4, "num_inference_steps": 20},
        **{"obs_as_global_cond": True, "obs_as_local_cond": False, "oa_step_convention": True},
        "model": {"_target_": "x", "down_dims": [16, 32], "n_groups": 8, "cond_predict_scale": True},
        "noise_scheduler": scheduler(),
    }
    return {"policy": {**policy, **changes}, "name": "${now:%Y}"}


def unet_file(path: Path, **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    """A file with the UNet of `tests/data/other_unets`, and what was recorded of it."""
    with np.load(DATA / "other_unets" / "diffusion_policy.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    (_, history, obs_dim), (_, chunk, action_dim) = arrays["obs"].shape, arrays["chunk"].shape
    weights = {f"model.{name}": value for name, value in without_prefix(arrays, "weights/").items()}
    weights |= {"_dummy_variable": torch.zeros(0), "model._dummy_variable": torch.zeros(0)}
    config = {"horizon": chunk, "obs_dim": obs_dim, "action_dim": action_dim, "n_obs_steps": history}
    return saved(path, {**config, **unet_config(**changes)}, weights | normalizer(obs_dim, action_dim)), arrays


def test_a_ddpm_chain_of_the_averaged_weights_gives_the_recorded_chunk(tmp_path: Path) -> None:
    path, recorded = unet_file(tmp_path / "latest.ckpt")
    policy = import_diffusion_policy(path)
    obs = (recorded["obs"] - 1) / 2
    action = actions(policy, obs, recorded["initial_noise"], list(recorded["step_noise"]))
    first = recorded["obs"].shape[1] - 1
    torch.testing.assert_close(action, recorded["chunk"][:, first : first + 4], rtol=1e-4, atol=1e-5)


def test_without_the_convention_actions_are_executed_one_later_as_there(tmp_path: Path) -> None:
    policy = import_diffusion_policy(unet_file(tmp_path / "a.ckpt", oa_step_convention=False)[0])
    assert policy.config.first_executed == policy.config.history
    policy = import_diffusion_policy(unet_file(tmp_path / "b.ckpt", pred_action_steps_only=True)[0])
    assert (policy.config.first_executed, policy.config.chunk, policy.config.executed) == (0, 4, 4)


@pytest.mark.parametrize("condition_layers", [0, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_computes_what_torchs_layers_do(tmp_path: Path, condition_layers: int, causal: bool) -> None:
    torch.manual_seed(0)
    shape = {"width": 16, "layers": 2, "heads": 2, "condition_layers": condition_layers, "causal": causal}
    reference = Reference(shape)
    with torch.no_grad():
        for weights in reference.parameters():
            weights.add_(0.2 * torch.randn(weights.shape))
    policy_config = {
        "_target_": NAMESPACE.format("transformer", "Transformer"),
        **{"horizon": LATENT[0], "action_dim": LATENT[1], "n_obs_steps": OBS[0], "obs_dim": OBS[1]},
        **{"n_action_steps": 2, "num_inference_steps": 7, "obs_as_cond": True, "pred_action_steps_only": False},
        "model": {"_target_": "x", "n_head": 2, "causal_attn": causal, "time_as_cond": True, "p_drop_attn": 0.3},
        "noise_scheduler": scheduler(num_train_timesteps=7),
    }
    state = {f"model.{name}": weights.detach() for name, weights in reference.state_dict().items()}
    if causal:
        state |= {"model.mask": torch.zeros(5, 5), "model.memory_mask": torch.zeros(5, 4)}
    path = saved(tmp_path / "latest.ckpt", {"policy": policy_config}, state | normalizer(OBS[1], LATENT[1]))
    policy = import_diffusion_policy(path)
    assert policy.config.network["attention_dropout"] == 0.3
    assert (policy.config.first_executed, policy.config.executed) == (2, 2)
    latent, obs, step = torch.randn(7, *LATENT), torch.randn(7, *OBS), torch.arange(7)
    expected = reference(latent, step, obs)
    torch.testing.assert_close(policy.network(latent, step, obs.flatten(1)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"obs_as_global_cond": False}, r"paints actions into observations \(inpainting"),
        ({"obs_as_global_cond": False, "obs_as_local_cond": True}, "obs_as_local_cond"),
        ({"_target_": "a.b.DiffusionUnetImagePolicy"}, "holds a DiffusionUnetImagePolicy; only"),
        ({"eta": 0.5}, "its policy has a setting 'eta', which is not known here"),
        ({"noise_scheduler": scheduler(thresholding=True)}, "thresholding=True"),
        ({"horizon": "${eval:'2 * 8'}"}, "not whole, or not computed"),
        ({"horizon": "${policy.horizon}"}, "not whole, or not computed"),
        ({"obs_dim": 5}, "does not fit|normalises .* dimensions of 'obs', but its policy has 5"),
        ({"model": {"down_dims": [16]}}, "does not fit"),
        ({"n_action_steps": 99}, "executed must lie between"),
    ],
)
def test_a_policy_that_cannot_be_imported_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        import_diffusion_policy(unet_file(tmp_path / "latest.ckpt", **changes)[0])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="no checkpoint of diffusion_policy"):
        import_diffusion_policy(tmp_path / "a.pt")


# --- hostile files


class Calls:
    """A pickle of it calls a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def test_a_pickle_that_asks_for_anything_else_is_refused_by_its_name_and_nothing_runs(tmp_path: Path) -> None:
    sentinel = tmp_path / "was_here"
    attacks = {
        r"(posix|os)\.system": Calls(os.system, f"touch {sentinel}"),
        "asks for eval": Calls(eval, f"open({str(sentinel)!r}, 'w')"),
        "asks for getattr": Calls(getattr, "a", "upper"),
        "asks for pathlib": Path("somewhere"),
    }
    for name, attack in attacks.items():
        path = tmp_path / "evil.ckpt"
        torch.save({"cfg": OmegaConf.create({"a": 1}), "state_dicts": {}, "evil": attack}, path)
        with pytest.raises(UserError, match=rf"evil\.ckpt is refused: .*({name})"):
            import_diffusion_policy(path)
    assert not sentinel.exists()


def test_no_resolver_runs_and_no_target_is_looked_up(tmp_path: Path) -> None:
    seen: list[str] = []
    OmegaConf.register_new_resolver("eval", lambda text: seen.append(text), replace=True)
    try:
        path, _ = unet_file(tmp_path / "latest.ckpt", n_action_steps="${eval:4}")
        with pytest.raises(UserError, match="not computed"):
            import_diffusion_policy(path)
    finally:
        OmegaConf.clear_resolver("eval")
    assert seen == []


def test_the_stand_ins_are_called_and_are_nothing(tmp_path: Path) -> None:
    config = OmegaConf.create({"a": [1, {"b": None}], "c": "${a}", "d": 2.5})
    torch.save({"cfg": config}, tmp_path / "a.ckpt")
    content = load_plain_pickle(tmp_path / "a.ckpt", STAND_INS)
    assert not OmegaConf.is_config(content["cfg"])
    assert plain(content["cfg"]) == {"a": [1, {"b": None}], "c": "${a}", "d": 2.5}
    with pytest.raises(UserError, match="asks for omegaconf"):
        load_plain_pickle(tmp_path / "a.ckpt")


def test_a_configuration_whose_parts_are_the_same_part_again_and_again_is_refused() -> None:
    node: Any = "x"
    for _ in range(25):
        shared = Inert()
        shared.__setstate__({"_content": [node, node]})
        node = shared
    with pytest.raises(UserError, match="more than 100,000 entries"):
        plain(node)
