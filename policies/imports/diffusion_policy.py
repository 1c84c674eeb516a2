"""Checkpoints of real-stanford/diffusion_policy: ``.ckpt`` files with low-dimensional UNets and transformers.

Such a file is a pickle, made with dill, of ``{cfg, state_dicts, pickles}``: an OmegaConf configuration, weights, and
further pickles as bytes, which are left alone. torch's restricted reader loads it with inert stand-ins for the globals
that OmegaConf and dill need, and anything else is refused by its name. The configuration is read as data: no resolver
runs, and no ``_target_`` is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.chain import DiffusionConfig, DiffusionPolicy
from policies.config import config_from_dict
from policies.errors import UserError
from policies.imports.files import (
    counter,
    filled,
    load_plain_pickle,
    one_line,
    referred,
    renamed,
    tensors_under,
    without_prefix,
)
from policies.imports.scaling import Scaling, check_finite, put_scaling
from policies.normalization import Affine
from policies.schedulers import scheduler_settings

UNET, TRANSFORMER = "DiffusionUnetLowdimPolicy", "DiffusionTransformerLowdimPolicy"
UNET_NAMES = [
    (r"^diffusion_step_encoder\.1\.", "step_encoder.0."),
    (r"^diffusion_step_encoder\.3\.", "step_encoder.2."),
    (r"^(down|up)_modules\.(\d+)\.2\.conv\.", r"\1.\2.resample."),
    (r"^(down|up)_modules\.(\d+)\.(\d)\.", r"\1.\2.blocks.\3."),
    (r"^mid_modules\.", "middle."),
    (r"^final_conv\.1\.", "output."),
    (r"^final_conv\.0\.block\.0\.", "final.conv."),
    (r"^final_conv\.0\.block\.1\.", "final.norm."),
    (r"\.blocks\.0\.block\.0\.", ".first.conv."),
    (r"\.blocks\.0\.block\.1\.", ".first.norm."),
    (r"\.blocks\.1\.block\.0\.", ".second.conv."),
    (r"\.blocks\.1\.block\.1\.", ".second.norm."),
    (r"\.residual_conv\.", ".direct."),
    (r"\.cond_encoder\.1\.", ".film.input."),
]
TRANSFORMER_NAMES = [
    (r"^pos_emb$", "action_positions"),
    (r"^cond_pos_emb$", "memory_positions"),
    (r"^input_emb\.", "action_embedding."),
    (r"^cond_obs_emb\.", "obs_embedding."),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
    (r"\.self_attn\.in_proj_", ".self_attention.attention.project."),
    (r"\.self_attn\.out_proj\.", ".self_attention.attention.out."),
    (r"\.multihead_attn\.in_proj_", ".cross_attention.attention.project."),
    (r"\.multihead_attn\.out_proj\.", ".cross_attention.attention.out."),
    (r"\.linear1\.", ".feedforward.expand."),
    (r"\.linear2\.", ".feedforward.contract."),
    (r"^(encoder\.\d+)\.norm1\.", r"\1.self_attention.norm."),
    (r"^(encoder\.\d+)\.norm2\.", r"\1.feedforward.norm."),
    (r"^(decoder\.\d+)\.norm1\.", r"\1.self_attention.norm."),
    (r"^(decoder\.\d+)\.norm2\.", r"\1.cross_attention.norm."),
    (r"^(decoder\.\d+)\.norm3\.", r"\1.feedforward.norm."),
    (r"^ln_f\.", "norm."),
    (r"^head\.", "output."),
]
NOT_WEIGHTS = ("_dummy_variable", "mask", "memory_mask")
"""Entries of a network's state that are none."""


# --- stand-ins


class Inert:
    """Takes whatever a pickle gives it, and does nothing."""

    def __new__(cls, *args: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _nothing(*args: Any) -> None:
    """In place of a function: the result is not looked at."""


TYPES = ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")
NODES = ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")
STAND_INS: dict[str, Any] = {
    **dict.fromkeys(("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"), Inert),
    **dict.fromkeys(("omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata"), Inert),
    **dict.fromkeys((f"omegaconf.nodes.{kind}Node" for kind in NODES), Inert),
    **dict.fromkeys((f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Union")), Inert),
    **dict.fromkeys((f"builtins.{name}" for name in TYPES), Inert),
    **dict.fromkeys(("dill._dill._load_type", "collections.defaultdict"), _nothing),
}
"""Of each global that OmegaConf's nodes, and the pickles within the pickle, name."""


def plain(node: Any) -> Any:
    """What OmegaConf's nodes hold, as mappings, lists and values; their other state is dropped.

    Raises:
        UserError: they are nested too deeply, or too many.
    """
    return _plain(node, 32, counter())


def _plain(node: Any, depth: int, count: Callable[[], None]) -> Any:
    count()
    if depth == 0:
        raise UserError("the configuration in the checkpoint is nested too deeply")
    if not isinstance(node, Inert):
        return node
    state = getattr(node, "state", None)
    if isinstance(state, tuple):  # slots beside the rest
        state = {name: value for part in state if isinstance(part, Mapping) for name, value in part.items()}
    if not isinstance(state, Mapping):
        return None
    content = state.get("_content", state.get("_val"))
    if isinstance(content, Mapping):
        return {str(key): _plain(value, depth - 1, count) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value, depth - 1, count) for value in content]
    return _plain(content, depth - 1, count)


# --- importing


def import_diffusion_policy(path: Path) -> DiffusionPolicy:
    """The policy in a ``.ckpt`` file, with the averaged weights where it has them.

    Raises:
        UserError: a pickle that asks for anything else than such a file does, another kind of policy, or weights that
            do not fit.
    """
    content = load_plain_pickle(path, STAND_INS)
    if not isinstance(content, Mapping) or not {"cfg", "state_dicts"} <= content.keys():
        raise UserError(f"{path} is no checkpoint of diffusion_policy, which holds 'cfg' and 'state_dicts'")
    config = plain(content["cfg"])
    policy = referred(config, config.get("policy")) if isinstance(config, Mapping) else None
    if not isinstance(policy, Mapping):
        raise UserError(f"{path}: its configuration names no policy")
    kind = str(policy.get("_target_")).rpartition(".")[2]
    if kind not in (UNET, TRANSFORMER):
        raise UserError(f"{path} holds a {kind}; only {UNET} and {TRANSFORMER} can be imported")
    states = content["state_dicts"]
    averaged = isinstance(states, Mapping) and "ema_model" in states
    name = "ema_model" if averaged else "model"
    weights = tensors_under(states.get(name) if isinstance(states, Mapping) else None, f"{path}, state_dicts.{name},")
    network = without_prefix(weights, "model.")
    network = {key: value for key, value in network.items() if key not in NOT_WEIGHTS}
    try:
        settings = _settings(policy, kind, network, path)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its configuration is not whole, or not computed: {one_line(error)}") from error
    network = renamed(network, UNET_NAMES if kind == UNET else TRANSFORMER_NAMES)
    made = filled(config_from_dict(DiffusionConfig, settings, str(path)), {"network": network}, str(path))
    assert isinstance(made.obs_scaler, Affine)
    put_scaling(made.obs_scaler, [_scaling(weights, "obs", made.config.obs_dim, path)])
    put_scaling(made.action_scaler, [_scaling(weights, "action", made.config.action_dim, path)])
    made.metadata["inputs"] = [["obs", made.config.obs_dim]]
    made.metadata["outputs"] = [["action", made.config.action_dim]]
    return made.eval()


def _settings(policy: Mapping[str, Any], kind: str, network: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Of the `DiffusionPolicy`, whose network has these weights."""
    model, scheduler = policy["model"], dict(policy["noise_scheduler"])
    conditioned = policy.get("obs_as_global_cond" if kind == UNET else "obs_as_cond", False)
    if policy.get("obs_as_local_cond") or any(name.startswith("local_cond_encoder") for name in network):
        raise UserError(f"{path}: observations condition each action apart (obs_as_local_cond), which is not supported")
    if not conditioned:
        raise UserError(
            f"{path} paints actions into observations (inpainting: it has neither obs_as_global_cond nor obs_as_cond), "
            f"which is not supported; only policies that observations condition are"
        )
    _refuse_arguments_of_steps(policy, path)
    history, executed = int(policy["n_obs_steps"]), int(policy["n_action_steps"])
    # Of a UNet, the action at index i may belong to the time before observation i.
    first = history if kind == UNET and not policy.get("oa_step_convention", False) else history - 1
    whole = not policy.get("pred_action_steps_only", False)
    chain = scheduler_settings(
        str(scheduler.pop("_target_")).rpartition(".")[2], scheduler, policy.get("num_inference_steps"), str(path)
    )
    return {
        **chain,
        "obs_dim": int(policy["obs_dim"]),
        "action_dim": int(policy["action_dim"]),
        "history": history,
        "chunk": int(policy["horizon"]) if whole else executed,
        "executed": executed,
        "first_executed": first if whole else 0,
        "noise_clip": None,
        "network": _unet(model, network) if kind == UNET else _transformer(model, network, path, whole),
    }


def _refuse_arguments_of_steps(policy: Mapping[str, Any], path: Path) -> None:
    """What a policy does not know, it hands to its scheduler at each step."""
    known = {
        *("_target_", "model", "noise_scheduler", "horizon", "obs_dim", "action_dim", "n_action_steps", "n_obs_steps"),
        *("num_inference_steps", "obs_as_local_cond", "obs_as_global_cond", "obs_as_cond", "pred_action_steps_only"),
        "oa_step_convention",
    }
    others = sorted(set(policy) - known)
    if others:
        raise UserError(f"{path}: its policy has a setting {others[0]!r}, which is not known here")


def _unet(model: Mapping[str, Any], network: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "type": "unet",
        "down_dims": list(model["down_dims"]),
        "kernel_size": network["final_conv.0.block.0.weight"].shape[2],
        "groups": model.get("n_groups", 8),
        "final_groups": 8,
        "scale": bool(model.get("cond_predict_scale", False)),
        "step_dim": network["diffusion_step_encoder.3.weight"].shape[0],
    }


def _transformer(model: Mapping[str, Any], network: Mapping[str, Tensor], path: Path, whole: bool) -> dict[str, Any]:
    if not model.get("time_as_cond", True) or "cond_obs_emb.weight" not in network:
        raise UserError(f"{path}: its transformer sees the denoising step among the actions, which is not supported")
    layers = [re.match(r"(encoder|decoder)\.layers\.(\d+)\.", name) for name in network]
    counts = {
        part: len({found[2] for found in layers if found and found[1] == part}) for part in ("encoder", "decoder")
    }
    return {
        "type": "transformer",
        "width": network["input_emb.weight"].shape[0],
        "layers": counts["decoder"],
        "heads": model["n_head"],
        "condition_layers": counts["encoder"],
        "causal": bool(model.get("causal_attn", False)),
        "chunk_start": "first",
        "embedding_dropout": model.get("p_drop_emb", 0.1),
        "attention_dropout": model.get("p_drop_attn", 0.1),
    }


def _scaling(weights: Mapping[str, Tensor], name: str, dim: int, path: Path) -> Scaling:
    """normalised = scale x + offset, of a LinearNormalizer."""
    parts = []
    for part in ("scale", "offset"):
        value = weights.get(f"normalizer.params_dict.{name}.{part}")
        if value is None:
            raise UserError(
                f"{path} does not say how {name!r} is normalised: there is no normalizer.params_dict.{name}"
            )
        parts.append(value.double().flatten().expand(dim) if value.numel() == 1 else value.double().flatten())
    scale, offset = parts
    if len(scale) != dim or len(offset) != dim:
        raise UserError(f"{path} normalises {len(scale)} dimensions of {name!r}, but its policy has {dim}")
    return check_finite(Scaling(-offset / scale, 1 / scale), name, str(path))
