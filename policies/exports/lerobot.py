"""DiffusionPolicy directories of LeRobot, in the layout since September 2025: the way back of `imports.lerobot`.

LeRobot has one UNet for the whole chain, and its schedulers add to it neither clips nor floors of their own. What acts
otherwise is refused, not approximated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from policies.base import Policy
from policies.chain import EVALUATION_STD, DiffusionConfig, DiffusionPolicy
from policies.config import config_from_dict
from policies.errors import UserError
from policies.features import Feature, features_in
from policies.imports import lerobot
from policies.imports.files import inverted, renamed
from policies.networks.unet1d import DenoisingUNetConfig
from policies.normalization import Affine

MODES = dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "MEAN_STD")
"""How each type of feature is normalised: a mean and a std say any affine scaling, with no difference to round."""


def export_lerobot(policy: Policy, directory: Path) -> None:
    """Write ``config.json``, ``model.safetensors``, both processors and their statistics.

    Args:
        policy: whose ``metadata["inputs"]``, of an import or of `name_inputs`, says what is what in an observation.
        directory: made if it is not there.

    Raises:
        UserError: a policy that LeRobot's DiffusionPolicy cannot be, by what of it that is.
    """
    chain = _representable(policy)
    inputs = _inputs(chain)
    action = Feature(lerobot.ACTION, chain.config.action_dim)
    features = {feature.name: _described(feature) for feature in (*inputs, action)}
    weights = renamed(chain.network.state_dict(), inverted(lerobot.NAMES))
    statistics = _statistics(chain, inputs)

    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / lerobot.CONFIG, _config(chain, features))
    _save(directory / lerobot.WEIGHTS, {f"{lerobot.UNET}{name}": value for name, value in weights.items()})
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        _device_step(),
        _normalizer("normalizer_processor", features, f"{Path(lerobot.BEFORE).stem}_step_3_normalizer_processor"),
    ]
    only_action = {action.name: features[action.name]}
    after = [
        _normalizer("unnormalizer_processor", only_action, f"{Path(lerobot.AFTER).stem}_step_0_unnormalizer_processor"),
        _device_step(),
    ]
    for name, steps in ((lerobot.BEFORE, before), (lerobot.AFTER, after)):
        _write_json(directory / name, {"name": Path(name).stem, "steps": steps})
        for step in steps:
            if "state_file" in step:
                _save(directory / step["state_file"], statistics)


def load_lerobot(directory: Path) -> Any:
    """What acts as the directory says."""
    policy = lerobot.import_lerobot(directory)
    return lambda obs, noise: policy.sample(obs, noise=noise, deterministic=True).action


def name_inputs(policy: Policy, state_dim: int) -> None:
    """Let the first entries of an observation be LeRobot's ``observation.state``, the others the environment's state.

    Raises:
        UserError: one of the parts would be empty.
    """
    total = policy.config.obs_dim
    if not 1 <= state_dim < total:
        raise UserError(
            f"state_dim must lie between 1 and {total - 1}, not {state_dim}: of an observation's {total} entries "
            f"LeRobot wants some as {lerobot.STATE} and some as {lerobot.ENVIRONMENT} where there are no images"
        )
    policy.metadata["inputs"] = [[lerobot.STATE, state_dim], [lerobot.ENVIRONMENT, total - state_dim]]


# --- what can be represented


def _representable(policy: Policy) -> DiffusionPolicy:
    """The policy itself, if LeRobot's acts the same in evaluation."""
    if not isinstance(policy, DiffusionPolicy):
        raise UserError(f"a {policy.type} policy cannot be exported: LeRobot's DiffusionPolicy is a denoising chain")
    if policy.config.network["type"] != "unet":
        raise UserError(
            f"network={policy.config.network['type']} cannot be exported: LeRobot's DiffusionPolicy has a unet"
        )
    if policy.frozen is not None:
        steps = len(policy.timesteps)
        raise UserError(
            f"this policy has two networks, a frozen one for its first {steps - policy.num_steps} steps and one "
            f"fine-tuned for the last {policy.num_steps}; LeRobot's DiffusionPolicy has one for all: fine-tune with "
            f"policy.finetuned_steps={steps}, or export in another format"
        )
    for name, value, theirs in _differences(policy):
        raise UserError(f"{name}={value} cannot be exported: LeRobot's DiffusionPolicy has {theirs}")
    return policy


def _differences(policy: DiffusionPolicy) -> Iterator[tuple[str, Any, str]]:
    """Each setting that makes the policy act otherwise: its name, its value, and what LeRobot has in its place."""
    c, sampler, network = policy.config, policy.config.sampler, _network(policy.config)
    scaling, noisy = c.observation_scaling, sampler.evaluation_eta > 0
    divisor = 2 ** len(network.down_dims)
    smallest = min(policy.kernel.unit_std[1:].tolist(), default=1.0)
    clipped = c.x0_clip is not None  # without, both ways to the noise are the same
    rules = [
        ("observation_scaling", scaling, scaling == "min_max", "no clip of observations"),
        ("first_executed", c.first_executed, c.first_executed == c.history - 1, f"history - 1 = {c.history - 1}"),
        ("chunk", c.chunk, c.chunk % divisor == 0, f"multiples of 2^levels = {divisor}"),
        ("prediction", c.prediction, c.prediction in ("epsilon", "sample"), "epsilon and sample"),
        ("final_clip", c.final_clip, c.final_clip is None, "none"),
        ("noise_clip", c.noise_clip, c.noise_clip is None or not noisy, "none; sampler=ddim adds no noise"),
        ("sampler.evaluation_eta", sampler.evaluation_eta, sampler.evaluation_eta in (0, 1), "0 (DDIM) and 1 (DDPM)"),
        ("sampler.offset", sampler.offset, sampler.offset == 0, "0"),
        ("sampler.epsilon_clip", sampler.epsilon_clip, sampler.epsilon_clip is None, "none"),
        (
            *("sampler.rederive_noise", sampler.rederive_noise, sampler.rederive_noise == noisy or not clipped),
            f"{noisy} where sampler.evaluation_eta={sampler.evaluation_eta}, unless x0_clip=null",
        ),
        ("the floor of the std", EVALUATION_STD, not noisy or smallest >= EVALUATION_STD, f"{smallest:.2g} at a step"),
        ("network.groups", network.groups, network.groups is not None, "a number"),
        ("network.final_groups", network.final_groups, network.final_groups == lerobot.FINAL_GROUPS, "8"),
        ("network.norm_eps", network.norm_eps, network.norm_eps == DenoisingUNetConfig.norm_eps, "1e-5"),
        ("network.activation", network.activation, network.activation == "mish", "mish"),
        ("network.deep_film", network.deep_film, not network.deep_film, "one layer"),
        ("network.obs_dims", network.obs_dims, network.obs_dims is None, "no encoder of the observation"),
    ]
    yield from ((name, value, theirs) for name, value, same, theirs in rules if not same)


def _network(config: DiffusionConfig) -> DenoisingUNetConfig:
    fields = {name: value for name, value in config.network.items() if name != "type"}
    return config_from_dict(DenoisingUNetConfig, fields, "network 'unet'")


def _inputs(policy: Policy) -> list[Feature]:
    """The parts of an observation, as LeRobot's network sees them: the state, then the environment's."""
    inputs = list(features_in(policy.metadata.get("inputs"), policy.config.obs_dim))
    if not inputs:
        raise UserError(
            f"LeRobot wants an {lerobot.STATE} and an {lerobot.ENVIRONMENT} of a policy without images, and this "
            f"checkpoint does not say which part of its observation is which: set state_dim=..., how many of the "
            f"{policy.config.obs_dim} entries are the state"
        )
    if [feature.name for feature in inputs] != [lerobot.STATE, lerobot.ENVIRONMENT]:
        raise UserError(
            f"this policy sees {', '.join(feature.name for feature in inputs)}; LeRobot wants {lerobot.STATE} and "
            f"{lerobot.ENVIRONMENT} of one without images: set state_dim=..., how many entries are the state"
        )
    return inputs


# --- the files


def _config(policy: DiffusionPolicy, features: dict[str, Any]) -> dict[str, Any]:
    c, network = policy.config, _network(policy.config)
    return {
        "type": "diffusion",
        "device": "cpu",
        "n_obs_steps": c.history,
        "horizon": c.chunk,
        "n_action_steps": c.executed_chunk,
        "drop_n_last_frames": c.chunk - c.executed_chunk - c.history + 1,
        "input_features": {name: feature for name, feature in features.items() if name != lerobot.ACTION},
        "output_features": {lerobot.ACTION: features[lerobot.ACTION]},
        "normalization_mapping": MODES,
        "crop_shape": None,
        "pretrained_backbone_weights": None,
        "down_dims": list(network.down_dims),
        "kernel_size": network.kernel_size,
        "n_groups": network.groups,
        "diffusion_step_embed_dim": network.step_dim,
        "use_film_scale_modulation": network.scale,
        "noise_scheduler_type": "DDPM" if c.sampler.evaluation_eta else "DDIM",
        "num_train_timesteps": c.denoising_steps,
        "beta_schedule": c.beta_schedule,
        "beta_start": c.beta_range[0],
        "beta_end": c.beta_range[1],
        "prediction_type": c.prediction,
        "clip_sample": c.x0_clip is not None,
        "clip_sample_range": 1.0 if c.x0_clip is None else c.x0_clip,
        "num_inference_steps": len(policy.timesteps),
    }


def _described(feature: Feature) -> dict[str, Any]:
    kinds = {lerobot.STATE: "STATE", lerobot.ENVIRONMENT: "ENV", lerobot.ACTION: "ACTION"}
    return {"type": kinds[feature.name], "shape": [feature.dim]}


def _statistics(policy: DiffusionPolicy, inputs: list[Feature]) -> dict[str, Tensor]:
    """Means and stds; LeRobot divides by the std plus `lerobot.EPS`, and multiplies by the std alone."""
    scaler = policy.obs_scaler
    assert isinstance(scaler, Affine)
    dims = [feature.dim for feature in inputs]
    parts = zip(inputs, scaler.shift.split(dims), scaler.scale.double().split(dims), strict=True)
    statistics = {}
    for feature, shift, scale in parts:
        statistics |= {f"{feature.name}.mean": shift, f"{feature.name}.std": (scale - lerobot.EPS).float()}
    return {
        **statistics,
        f"{lerobot.ACTION}.mean": policy.action_scaler.shift,
        f"{lerobot.ACTION}.std": policy.action_scaler.scale,
    }


def _normalizer(name: str, features: dict[str, Any], state: str) -> dict[str, Any]:
    settings = {"eps": lerobot.EPS, "features": features, "norm_map": MODES}
    return {"registry_name": name, "config": settings, "state_file": f"{state}.safetensors"}


def _device_step() -> dict[str, Any]:
    return {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
    )
