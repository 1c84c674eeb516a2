"""Policies of the original DPPO implementation: its ``.pt`` files and ``normalization.npz``.

A pretrained file is ``{epoch, model, ema}``, of which ``ema`` is what is fine-tuned; a fine-tuned one ``{itr, model}``,
whose model holds the frozen network as ``actor`` (and again as ``network``), its fine-tuned copy ``actor_ft``, the
critic and eta. Of what the networks are, their weights say nearly all; the rest is in the YAML that trained them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policies.chain import DiffusionConfig, DiffusionPolicy
from policies.config import config_from_dict
from policies.errors import UserError
from policies.imports.files import (
    MOST_REFERENCES,
    entry_at,
    filled,
    load_arrays,
    load_plain_pickle,
    renamed,
    tensors_under,
    without_prefix,
)
from policies.networks.mlp import ACTIVATIONS
from policies.normalization import Affine
from policies.samplers import Sampler

RANGE_MARGIN = 1e-6
"""What the original adds to the range of an observation before it divides by it."""

MLP_NAMES = [
    (r"^time_embedding\.1\.", "step_encoder.0."),
    (r"^time_embedding\.3\.", "step_encoder.2."),
]
UNET_NAMES = [
    (r"^time_mlp\.1\.", "step_encoder.0."),
    (r"^time_mlp\.3\.", "step_encoder.2."),
    (r"^(down|up)_modules\.(\d+)\.2\.conv\.", r"\1.\2.resample."),
    (r"^(down|up)_modules\.(\d+)\.(\d)\.", r"\1.\2.blocks.\3."),
    (r"^mid_modules\.", "middle."),
    (r"^final_conv\.1\.", "output."),
    (r"^final_conv\.0\.block\.0\.", "final.conv."),
    (r"^final_conv\.0\.block\.2\.", "final.norm."),
    (r"\.blocks\.0\.block\.0\.", ".first.conv."),
    (r"\.blocks\.0\.block\.2\.", ".first.norm."),
    (r"\.blocks\.1\.block\.0\.", ".second.conv."),
    (r"\.blocks\.1\.block\.2\.", ".second.norm."),
    (r"\.residual_conv\.", ".direct."),
]


@dataclass(frozen=True)
class OriginalSettings:
    """What the original's YAML says, under this project's names; None where weights say it too, or must say it."""

    obs_dim: int | None = None
    """Checked against the normalisation."""
    action_dim: int | None = None
    """Likewise."""
    history: int | None = None
    """``cond_steps``; the weights say it."""
    chunk: int | None = None
    """``horizon_steps``; the weights of an MLP say it."""
    executed: int | None = None
    """``act_steps``; None: the whole chunk."""
    denoising_steps: int | None = None
    """Nothing else says it."""
    finetuned_steps: int | None = None
    """``ft_denoising_steps``; needed for a fine-tuned file, and for no other."""
    ddim_steps: int | None = None
    """Steps of DDIM; None: DDPM."""
    activation: str | None = None
    """``activation_type``; nothing else says it of an MLP. A UNet's is Mish unless told otherwise."""
    groups: int | None = 8
    """``n_groups`` of a UNet that is normalised."""
    norm_eps: float = 1e-5
    """``groupnorm_eps``."""
    predict_epsilon: bool = True
    x0_clip: float | None = 1.0
    """``denoised_clip_value``."""
    noise_clip: float | None = 3.0
    """``randn_clip_value``."""
    final_clip: float | None = None
    """``final_action_clip_value``."""
    epsilon_clip: float | None = None
    """``eps_clip_value``, under DDIM."""
    exploration_std: float = 0.1
    """``min_sampling_denoising_std``."""
    likelihood_std: float = 0.1
    """``min_logprob_denoising_std``."""
    eta: float = 1.0
    """``base_eta``, where the file holds none."""
    eta_range: tuple[float, float] = (0.1, 1.0)
    """``min_eta``, ``max_eta``."""
    learn_eta: bool = False


def import_original(path: Path, normalization: Path, settings: OriginalSettings) -> DiffusionPolicy:
    """The policy in a ``.pt`` file.

    Args:
        path: what the original saved, pretrained or fine-tuned.
        normalization: its ``normalization.npz``: obs_min, obs_max, action_min, action_max.
        settings: what the weights do not say.

    Raises:
        UserError: a file that is no such thing, holds something else than weights, or does not fit the settings.
    """
    pretrained, finetuned, eta = read_networks(path)
    scales = read_normalization(normalization)
    obs_dim, action_dim = len(scales["obs_min"]), len(scales["action_min"])
    _agree("obs_dim", settings.obs_dim, obs_dim, normalization)
    _agree("action_dim", settings.action_dim, action_dim, normalization)
    shape = _network_shape(pretrained, obs_dim, action_dim, settings, path)
    _agree("history", settings.history, shape.history, path)
    _agree("chunk", settings.chunk, shape.chunk, path)
    finetuned_steps = _finetuned_steps(finetuned is not None, settings, path)
    values = {
        "obs_dim": obs_dim,
        "action_dim": action_dim,
        "history": shape.history,
        "chunk": shape.chunk,
        "executed": settings.executed,
        "network": shape.network,
        "denoising_steps": _needed(settings.denoising_steps, "denoising_steps", path),
        "sampler": _sampler(settings, eta, path),
        "finetuned_steps": finetuned_steps,
        "prediction": "epsilon" if settings.predict_epsilon else "sample",
        "x0_clip": settings.x0_clip,
        "noise_clip": settings.noise_clip,
        "final_clip": settings.final_clip,
        "exploration_std": settings.exploration_std,
        "likelihood_std": settings.likelihood_std,
    }
    config = config_from_dict(DiffusionConfig, values, str(path))
    networks = {"network": shape.renamed(pretrained if finetuned is None else finetuned)}
    if finetuned_steps is not None and finetuned_steps < len(config.sampler.timesteps(config.denoising_steps)):
        networks["frozen"] = shape.renamed(pretrained)
    policy = filled(config, networks, str(path))
    if policy.eta is not None:
        policy.eta.logit.data = 2 * eta["eta_logit"]  # (1 + tanh(x)) / 2 = sigmoid(2 x)
    assert isinstance(policy.obs_scaler, Affine)
    policy.obs_scaler.place(scales["obs_min"], scales["obs_max"] - scales["obs_min"] + RANGE_MARGIN)
    policy.action_scaler.place(scales["action_min"], scales["action_max"] - scales["action_min"])
    return policy.eval()


def read_networks(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Tensor]]:
    """The frozen or pretrained network, the fine-tuned one (None: there is none) and eta, as the original names them.

    Raises:
        UserError: it holds neither.
    """
    content = load_plain_pickle(path)
    kinds = [name for name in ("ema", "model") if isinstance(content, Mapping) and name in content]
    if not kinds:
        raise UserError(f"{path} is no checkpoint of the original DPPO, which holds 'ema' or 'model'")
    weights = tensors_under(content[kinds[0]], f"{path}, {kinds[0]!r},")
    finetuned = without_prefix(weights, "actor_ft.")
    network = without_prefix(weights, "actor." if finetuned else "network.")
    if not any(name.startswith(("time_embedding.", "time_mlp.")) for name in network):
        parts = sorted({name.split(".")[0] for name in weights})
        raise UserError(f"{path} holds no denoising network of the original DPPO; its parts are {', '.join(parts)}")
    return network, finetuned or None, without_prefix(weights, "eta.")


def read_normalization(path: Path) -> dict[str, Tensor]:
    """The ranges in ``normalization.npz``, each [Do] or [Da].

    Raises:
        UserError: one is missing or of another shape than its partner.
    """
    arrays = load_arrays(path, [f"{kind}_{end}" for kind in ("obs", "action") for end in ("min", "max")])
    for kind in ("obs", "action"):
        names = [f"{kind}_min", f"{kind}_max"]
        low, high = (arrays[name] for name in names)
        if low.dim() != 1 or low.shape != high.shape or not bool((low <= high).all()):
            raise UserError(f"{path}: {names[0]} and {names[1]} must be vectors of one length, the second the larger")
    return arrays


NAMES_IN_YAML = {
    "obs_dim": "obs_dim",
    "action_dim": "action_dim",
    "history": "cond_steps",
    "chunk": "horizon_steps",
    "executed": "act_steps",
    "denoising_steps": "denoising_steps",
    "finetuned_steps": "ft_denoising_steps",
    "ddim_steps": "model.ddim_steps",
    "activation": "model.network.activation_type",
    "groups": "model.network.n_groups",
    "norm_eps": "model.network.groupnorm_eps",
    "predict_epsilon": "model.predict_epsilon",
    "x0_clip": "model.denoised_clip_value",
    "noise_clip": "model.randn_clip_value",
    "final_clip": "model.final_action_clip_value",
    "epsilon_clip": "model.eps_clip_value",
    "exploration_std": "model.min_sampling_denoising_std",
    "likelihood_std": "model.min_logprob_denoising_std",
    "eta": "model.eta.base_eta",
    "learn_eta": "model.learn_eta",
}
"""Of each of `OriginalSettings`; what ``model.network`` is while pretraining, is ``model.actor`` while fine-tuning."""


def settings_in_yaml(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `OriginalSettings` from the original's YAML, read as plain data.

    ``${name}`` means the value of another entry. Anything else that is to be computed, ``${eval:...}`` and the like, is
    not: such a value counts as not given.
    """
    found = {}
    for field, path in NAMES_IN_YAML.items():
        for place in (path, path.replace("model.network.", "model.actor.")):
            known, value = _lookup(content, place)
            if known:
                found[field] = value
    ends = [_lookup(content, f"model.eta.{name}") for name in ("min_eta", "max_eta")]
    if all(known for known, _ in ends):
        found["eta_range"] = [value for _, value in ends]
    if not _lookup(content, "model.use_ddim")[1]:
        found.pop("ddim_steps", None)
    return found


def _lookup(content: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Whether there is an entry that can be read, and its value."""
    value: Any = content
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
        for _ in range(MOST_REFERENCES):
            value = entry_at(content, value)
    computed = isinstance(value, str) and "${" in value
    return (False, None) if computed else (True, value)


@dataclass(frozen=True)
class NetworkShape:
    """What a network's weights say, and how they are called here."""

    network: dict[str, Any]
    history: int
    chunk: int
    rules: list[tuple[str, str]]

    def renamed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under this project's names."""
        return renamed(weights, self.rules)


def _network_shape(
    weights: Mapping[str, Tensor], obs_dim: int, action_dim: int, settings: OriginalSettings, path: Path
) -> NetworkShape:
    unsupported = {r"\.norm\d*(_1)?\.": "layer normalisation (use_layernorm)", r"^(backbone|compress)": "image inputs"}
    unsupported["^cond_mlp"] = "an MLP that encodes the observation (cond_mlp_dims)"
    mlp = any(name.startswith("time_embedding.") for name in weights)
    for pattern, what in unsupported.items():
        if mlp and any(re.search(pattern, name) for name in weights):
            raise UserError(f"{path} holds a network with {what}, which is not supported")
    try:
        shape = _mlp_shape if mlp else _unet_shape
        return shape(weights, obs_dim, action_dim, settings, path)
    except KeyError as error:
        raise UserError(f"{path} holds no whole network of the original DPPO: {error} is missing") from error


def _mlp_shape(
    weights: Mapping[str, Tensor], obs_dim: int, action_dim: int, settings: OriginalSettings, path: Path
) -> NetworkShape:
    residual = "mlp_mean.layers.0.weight" in weights
    if residual:
        blocks = _length(weights, "mlp_mean.layers.{}.l1.weight", first=1)
        first, last = weights["mlp_mean.layers.0.weight"], weights[f"mlp_mean.layers.{blocks + 1}.weight"]
        hidden = [first.shape[0]] * (1 + 2 * blocks)
        layers = [(rf"^mlp_mean\.layers\.{i + 1}\.", f"mlp.trunk.{i}.") for i in range(blocks + 1)]
        rules = [*MLP_NAMES, (r"^mlp_mean\.layers\.0\.", "mlp.input."), *layers]
    else:
        count_layers = _length(weights, "mlp_mean.moduleList.{}.linear_1.weight")
        each = [weights[f"mlp_mean.moduleList.{i}.linear_1.weight"] for i in range(max(count_layers, 1))]
        first, last, hidden = each[0], each[-1], [layer.shape[0] for layer in each[:-1]]
        layers = [(rf"^mlp_mean\.moduleList\.{i}\.linear_1\.", f"mlp.trunk.{2 * i - 1}.") for i in range(1, len(each))]
        rules = [*MLP_NAMES, (r"^mlp_mean\.moduleList\.0\.linear_1\.", "mlp.input."), *layers]
    step_dim, size = weights["time_embedding.1.weight"].shape[1], last.shape[0]
    network = {
        "type": "mlp",
        "hidden_dims": hidden,
        "activation": _activation(_needed(settings.activation, "activation", path)),
        "residual": residual,
        "step_dim": step_dim,
    }
    history = _quotient(first.shape[1] - size - step_dim, obs_dim, "observation inputs", "obs_dim", path)
    return NetworkShape(network, history, _quotient(size, action_dim, "outputs", "action_dim", path), rules)


def _unet_shape(
    weights: Mapping[str, Tensor], obs_dim: int, action_dim: int, settings: OriginalSettings, path: Path
) -> NetworkShape:
    levels = _length(weights, "down_modules.{}.0.blocks.0.block.0.weight")
    first = [weights[f"down_modules.{i}.0.blocks.0.block.0.weight"] for i in range(max(levels, 1))]
    block = "down_modules.0.0.cond_encoder"
    deep = f"{block}.4.weight" in weights
    film = weights[f"{block}.{0 if deep else 1}.weight"]
    step_dim, inputs = weights["time_mlp.1.weight"].shape[1], film.shape[1]
    places = {0: "input", 2: "trunk.1", 4: "trunk.3"} if deep else {1: "input"}
    rules = [*UNET_NAMES, *((rf"\.cond_encoder\.{i}\.", f".film.{place}.") for i, place in places.items())]
    encoder, obs_inputs, obs_dims = "cond_mlp.layers.{}", inputs - step_dim, None
    if "cond_mlp.layers.0.weight" in weights:
        blocks = _length(weights, "cond_mlp.layers.{}.l1.weight", first=1)
        widths = weights[encoder.format(0) + ".weight"], weights[encoder.format(blocks + 1) + ".weight"]
        obs_dims = [widths[0].shape[0]] * (1 + 2 * blocks) + [widths[1].shape[0]]
        obs_inputs = widths[0].shape[1]
        rules += [(r"^cond_mlp\.layers\.0\.", "obs_encoder.input.")]
        rules += [(rf"^cond_mlp\.layers\.{i + 1}\.", f"obs_encoder.trunk.{i}.") for i in range(blocks + 1)]
    normalized = "final_conv.0.block.2.weight" in weights
    groups = _needed(settings.groups, "groups", path) if normalized else None
    outputs = weights["final_conv.1.weight"].shape[0]
    if outputs != action_dim:
        raise UserError(f"{path} has {outputs} action dimensions, its normalisation {action_dim}")
    network = {
        "type": "unet",
        "down_dims": [layer.shape[0] for layer in first],
        "kernel_size": first[0].shape[2],
        "groups": groups,
        "final_groups": groups,
        "norm_eps": settings.norm_eps,
        "activation": _activation(settings.activation or "mish"),
        "scale": film.shape[0] == 2 * first[0].shape[0],
        "deep_film": deep,
        "obs_dims": obs_dims,
        "step_dim": step_dim,
    }
    history = _quotient(obs_inputs, obs_dim, "observation inputs", "obs_dim", path)
    return NetworkShape(network, history, _needed(settings.chunk, "chunk", path), rules)


def _sampler(settings: OriginalSettings, eta: Mapping[str, Tensor], path: Path) -> Sampler:
    if settings.ddim_steps is None:
        if settings.learn_eta:
            raise UserError(
                f"{path}: eta was learned, so it was sampled by DDIM; say in how many steps: "
                f"foreign.given={{ddim_steps: ...}}"
            )
        return Sampler()
    others = sorted(name for name in eta if name != "eta_logit")
    if others and settings.learn_eta:
        raise UserError(
            f"{path}: eta is learned by a network ({others[0]}), which is not supported; only by numbers is it"
        )
    low, high = settings.eta_range
    value, learned = settings.eta, None
    if "eta_logit" in eta:
        values = low + (high - low) * torch.sigmoid(2 * eta["eta_logit"].double())
        value = min(max(float(values.mean()), low), high)
        if settings.learn_eta:
            learned = "action" if values.numel() > 1 else "scalar"
    fields = {"steps": settings.ddim_steps, "eta": value, "evaluation_eta": 0.0, "learned_eta": learned}
    fields |= {"eta_range": settings.eta_range, "epsilon_clip": settings.epsilon_clip}
    return config_from_dict(Sampler, fields, f"{path}, sampler")


def _finetuned_steps(finetuned: bool, settings: OriginalSettings, path: Path) -> int | None:
    """None: the whole chain; what a YAML for fine-tuning says of a pretrained file is still to be done."""
    return _needed(settings.finetuned_steps, "finetuned_steps", path) if finetuned else None


def _activation(name: str) -> str:
    if name.lower() not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r} of the original's network; known are {', '.join(ACTIVATIONS)}")
    return name.lower()


def _length(weights: Mapping[str, Tensor], pattern: str, first: int = 0) -> int:
    """How many names there are with the numbers from ``first`` on."""
    return next(i for i in count() if pattern.format(first + i) not in weights)


def _quotient(size: int, by: int, what: str, name: str, path: Path) -> int:
    if size < 1 or size % by:
        raise UserError(f"{path}: its network has {size} {what}, no multiple of {name} = {by} of the normalisation")
    return size // by


def _agree(name: str, said: int | None, found: int, path: Path) -> None:
    if said is not None and said != found:
        raise UserError(f"{path} has {name} {found}, the settings say {said}")


def _needed(value: Any, name: str, path: Path) -> Any:
    if value is None:
        raise UserError(
            f"{path} does not say its {name}, nor do any settings that were given: name the original's YAML, "
            f"foreign.settings=..., or say it, "
            f"foreign.given={{{name}: ...}}"
        )
    return value
