"""DiffusionPolicy directories of LeRobot: ``config.json``, ``model.safetensors`` and the statistics of normalisation.

Since September 2025 these are files of the processors before and after the policy; earlier, they lay inside the weights
as ``normalize_inputs.buffer_*`` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from policies.chain import DiffusionConfig, DiffusionPolicy
from policies.config import config_from_dict
from policies.errors import UserError
from policies.features import Feature
from policies.imports.files import filled, one_line, renamed, without_prefix
from policies.imports.scaling import Scaling, check_finite, put_scaling
from policies.normalization import Affine
from policies.schedulers import scheduler_settings

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
UNET = "diffusion.unet."
"""What the names of the network's weights begin with."""
FINAL_GROUPS = 8
"""Of the block before the output, whatever ``n_groups`` is."""
EPS = 1e-8
"""What LeRobot adds to a standard deviation, and takes for a range of zero."""

NAMES = [
    (r"^diffusion_step_encoder\.1\.", "step_encoder.0."),
    (r"^diffusion_step_encoder\.3\.", "step_encoder.2."),
    (r"^(down|up)_modules\.(\d+)\.2\.", r"\1.\2.resample."),
    (r"^(down|up)_modules\.(\d+)\.(\d)\.", r"\1.\2.blocks.\3."),
    (r"^mid_modules\.", "middle."),
    (r"^final_conv\.1\.", "output."),
    (r"^final_conv\.0\.block\.0\.", "final.conv."),
    (r"^final_conv\.0\.block\.1\.", "final.norm."),
    (r"\.conv1\.block\.0\.", ".first.conv."),
    (r"\.conv1\.block\.1\.", ".first.norm."),
    (r"\.conv2\.block\.0\.", ".second.conv."),
    (r"\.conv2\.block\.1\.", ".second.norm."),
    (r"\.residual_conv\.", ".direct."),
    (r"\.cond_encoder\.1\.", ".film.input."),
]
SCHEDULER = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"),
    *("prediction_type", "clip_sample", "clip_sample_range"),
)


def is_lerobot(directory: Path) -> bool:
    """Whether it looks like a policy of LeRobot's: its configuration names features."""
    try:
        return "input_features" in _json(directory / CONFIG)
    except UserError:
        return False


def import_lerobot(directory: Path) -> DiffusionPolicy:
    """The policy of a directory; its `metadata` names what it sees (``inputs``) and does (``outputs``).

    Raises:
        UserError: another kind of policy, images among the inputs, or files that are missing, damaged or do not fit.
    """
    config = _json(directory / CONFIG)
    if config.get("type") != "diffusion":
        raise UserError(
            f"{directory} holds a LeRobot policy of type {config.get('type')!r}; only 'diffusion' can be imported"
        )
    inputs, action = _features(config, directory)
    weights = _tensors(directory / WEIGHTS)
    try:
        chain = scheduler_settings(
            str(config["noise_scheduler_type"]),
            {name: config[name] for name in SCHEDULER},
            config.get("num_inference_steps"),
            str(directory / CONFIG),
        )
        values = {
            **chain,
            "obs_dim": sum(feature.dim for feature in inputs),
            "action_dim": action.dim,
            "history": config["n_obs_steps"],
            "chunk": config["horizon"],
            "executed": config["n_action_steps"],
            "first_executed": config["n_obs_steps"] - 1,
            "noise_clip": None,
            "network": {
                "type": "unet",
                "down_dims": config["down_dims"],
                "kernel_size": config["kernel_size"],
                "groups": config["n_groups"],
                "final_groups": FINAL_GROUPS,
                "scale": config["use_film_scale_modulation"],
                "step_dim": config["diffusion_step_embed_dim"],
            },
        }
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{directory / CONFIG} is no whole configuration of a DiffusionPolicy: {one_line(error)}"
        ) from error
    network = renamed(without_prefix(weights, UNET), NAMES)
    settings = config_from_dict(DiffusionConfig, values, str(directory / CONFIG))
    policy = filled(settings, {"network": network}, str(directory / WEIGHTS))
    assert isinstance(policy.obs_scaler, Affine)
    scalings = _scalings(directory, config, weights, [*inputs, action])
    put_scaling(policy.obs_scaler, [scalings[feature.name] for feature in inputs])
    put_scaling(policy.action_scaler, [scalings[action.name]])
    policy.metadata["inputs"] = [[feature.name, feature.dim] for feature in inputs]
    policy.metadata["outputs"] = [[action.name, action.dim]]
    return policy.eval()


def _features(config: Mapping[str, Any], directory: Path) -> tuple[list[Feature], Feature]:
    """What the policy sees, in the order of its network's input, and the action."""
    given, made = config.get("input_features"), config.get("output_features")
    if not isinstance(given, Mapping) or not isinstance(made, Mapping):
        raise UserError(f"{directory / CONFIG} does not say input_features and output_features")
    dims = {str(name): _dim(name, feature, directory) for name, feature in {**given, **made}.items()}
    others = [name for name in given if name not in (STATE, ENVIRONMENT)]
    if others or STATE not in given:
        raise UserError(f"{directory} sees {', '.join(given)}; only {STATE} and {ENVIRONMENT} are supported")
    if list(made) != [ACTION]:
        raise UserError(f"{directory} puts out {', '.join(made) or 'nothing'}; only {ACTION!r} is supported")
    return [Feature(name, dims[name]) for name in (STATE, ENVIRONMENT) if name in given], Feature(ACTION, dims[ACTION])


def _dim(name: str, feature: Any, directory: Path) -> int:
    if isinstance(feature, Mapping) and feature.get("type") == "VISUAL":
        raise UserError(f"{directory} sees images ({name}), which cannot be imported yet; only policies of states can")
    shape = feature.get("shape") if isinstance(feature, Mapping) else None
    if not isinstance(shape, list) or len(shape) != 1 or not isinstance(shape[0], int) or shape[0] < 1:
        raise UserError(
            f"{directory / CONFIG}: the feature {name!r} must be a vector of type and shape, not {feature!r}"
        )
    return shape[0]


# --- normalisation


def _scalings(
    directory: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], features: list[Feature]
) -> dict[str, Scaling]:
    """Of each feature by its name."""
    if (directory / BEFORE).is_file():
        found = {**_processor(directory, BEFORE, "normalizer_processor"), **_outputs(directory)}
        old = False
    else:
        statistics = _statistics_in_weights(weights)
        modes, old = _mapping(config.get("normalization_mapping"), "normalization_mapping", directory / CONFIG), True
        described = {**config["input_features"], **config["output_features"]}
        found = {
            name: (_mode(described.get(name, {}), modes, directory / CONFIG), statistics.get(name, {}))
            for name in (STATE, ENVIRONMENT, ACTION)
        }
        if not statistics and any(mode != "IDENTITY" for mode, _ in found.values()):
            raise UserError(
                f"{directory} has no statistics of normalisation: neither {BEFORE} nor any within its weights"
            )
    scalings = {}
    for feature in features:
        mode, statistics = found.get(feature.name, ("IDENTITY", {}))
        scalings[feature.name] = _scaling(feature, mode, statistics, old, str(directory))
    return scalings


def _outputs(directory: Path) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """The action's part of the processor that undoes normalisation."""
    if not (directory / AFTER).is_file():
        raise UserError(f"{directory} has a {BEFORE} but no {AFTER}")
    return {
        name: entry for name, entry in _processor(directory, AFTER, "unnormalizer_processor").items() if name == ACTION
    }


def _processor(directory: Path, name: str, step_name: str) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """How a processor's normalisation treats each feature: its mode, and its statistics."""
    steps = _json(directory / name).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise UserError(f"{directory / name} names no steps")
    for step in steps:
        _refuse_other_steps(step, step_name, directory / name)
    chosen = [step for step in steps if step.get("registry_name") == step_name]
    if len(chosen) != 1:
        raise UserError(f"{directory / name} has {len(chosen)} steps {step_name!r}, not one")
    settings, state = _mapping(chosen[0].get("config"), "config", directory / name), chosen[0].get("state_file")
    statistics: dict[str, dict[str, Tensor]] = {}
    if state is not None:
        for key, value in _tensors(directory / _plain_name(state, directory / name)).items():
            statistics.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = value
    if settings.get("normalize_observation_keys") is not None:
        raise UserError(f"{directory / name}: normalize_observation_keys is not supported")
    if settings.get("eps", EPS) != EPS:
        raise UserError(f"{directory / name} normalises with eps={settings['eps']!r}; only {EPS} is supported")
    modes, features = (_mapping(settings.get(part), part, directory / name) for part in ("norm_map", "features"))
    found = {}
    for key, feature in features.items():
        mode = _mode(_mapping(feature, key, directory / name), modes, directory / name)
        found[str(key)] = (mode if key in statistics else "IDENTITY", statistics.get(key, {}))
    return found


def _refuse_other_steps(step: Mapping[str, Any], step_name: str, where: Path) -> None:
    """What a processor does besides normalising and moving what it gets."""
    kind, settings = step.get("registry_name"), _mapping(step.get("config"), "config", where)
    if kind == "rename_observations_processor" and not settings.get("rename_map"):
        return
    if kind not in ("to_batch_processor", "device_processor", step_name):
        raise UserError(f"{where} has a step {kind or step.get('class')!r}, which is not supported")
    precision = settings.get("float_dtype")
    if kind == "device_processor" and precision not in (None, "float32"):
        raise UserError(f"{where} computes in float_dtype={precision!r}; only float32 is supported")


def _plain_name(name: Any, where: Path) -> str:
    """The name of a file beside its description, and nowhere else."""
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
        raise UserError(f"{where} names the file {name!r}, which is not one beside it")
    return name


def _statistics_in_weights(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Those of the layout before September 2025."""
    found: dict[str, dict[str, Tensor]] = {}
    for name in (STATE, ENVIRONMENT, ACTION):
        part = "unnormalize_outputs" if name == ACTION else "normalize_inputs"
        statistics = without_prefix(weights, f"{part}.buffer_{name.replace('.', '_')}.")
        if statistics:
            found[name] = statistics
    return found


def _mode(feature: Mapping[str, Any], modes: Mapping[str, Any], where: Path) -> str:
    """How a feature of its type is normalised."""
    kind = feature.get("type", "")
    mode = modes.get(kind, "IDENTITY") if isinstance(kind, str) else None
    if not isinstance(mode, str):
        raise UserError(f"{where}: a feature of type {kind!r} is normalised by {mode!r}; both must be names")
    return mode


def _scaling(feature: Feature, mode: str, statistics: Mapping[str, Tensor], old: bool, where: str) -> Scaling:
    needed = {"IDENTITY": (), "MIN_MAX": ("min", "max"), "MEAN_STD": ("mean", "std")}
    if mode not in needed:
        raise UserError(f"{where}: {feature.name!r} is normalised by {mode}; supported are {', '.join(needed)}")
    if mode == "IDENTITY":
        return Scaling.identity(feature.dim)
    values = []
    for name in needed[mode]:
        if name not in statistics or statistics[name].shape != (feature.dim,):
            shape = tuple(statistics[name].shape) if name in statistics else "none"
            raise UserError(
                f"{where}: {feature.name!r} needs the statistics {name!r} of shape ({feature.dim},), has {shape}"
            )
        values.append(statistics[name].double())
    first, second = values
    if mode == "MEAN_STD":
        scale = second if feature.name == ACTION else second + EPS
        # A constant action has a scale of zero, which only its way back to the environment may have.
        return check_finite(Scaling(first, torch.where(scale == 0, EPS, scale)), feature.name, where)
    width = second - first
    width = width + EPS if old and feature.name != ACTION else torch.where(width == 0, EPS, width)
    scaling = Affine(feature.dim)
    check_finite(Scaling(first, width), feature.name, where)
    scaling.place(first, width)
    return Scaling(scaling.shift.double(), scaling.scale.double())


# --- files


def _mapping(content: Any, name: str, where: Path) -> Mapping[str, Any]:
    """What stands under ``name``, where nothing is as good as an empty one."""
    if content is not None and not isinstance(content, Mapping):
        raise UserError(f"{where}: {name} must be an object of names and values, not {content!r}")
    return content or {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object")
    return content


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors and the file system raise a family of their own kinds
        raise UserError(f"{path} cannot be read as weights: {one_line(error)}") from error
