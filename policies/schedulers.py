"""Noise schedulers of diffusers, objects and configurations, as settings of a chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from policies.config import config_from_dict
from policies.errors import UserError
from policies.samplers import Sampler
from policies.schedules import BetaSchedule, Prediction

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    "timestep_spacing": ("leading",),
    "variance_type": ("fixed_small", "fixed_small_log"),  # the same
    "set_alpha_to_one": (True,),
    "beta_schedule": get_args(BetaSchedule),
    "prediction_type": get_args(Prediction),
}
"""Settings of a scheduler with the values that there are chains for."""
WITHOUT_EFFECT = ("dynamic_thresholding_ratio", "sample_max_value")
"""Settings of thresholding."""


def scheduler_settings(kind: str, config: Mapping[str, Any], inference_steps: int | None, where: str) -> dict[str, Any]:
    """The settings of a diffusion policy whose chain is that of a scheduler of diffusers.

    Args:
        kind: its class, ``DDPMScheduler`` or ``DDIMScheduler``, with or without the last word.
        config: what it was made with; what is missing has diffusers' default.
        inference_steps: K; None: all timesteps.
        where: for the errors.

    Returns:
        denoising_steps, beta_schedule, beta_range, prediction, x0_clip, and the `Sampler` of the chain. A DDIM is
        deterministic in evaluation and has the noise of DDPM while exploring, as in the DPPO paper.

    Raises:
        UserError: another scheduler or a setting for which there is no chain, by its name.
    """
    kind = kind.removesuffix("Scheduler")
    if kind not in ("DDPM", "DDIM"):
        raise UserError(f"{where}: the noise scheduler {kind!r} is not supported; DDPM and DDIM are")
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    used = ("num_train_timesteps", "beta_start", "beta_end", "clip_sample", "clip_sample_range", "steps_offset")
    for name, value in config.items():
        if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            raise UserError(
                f"{where}: {name}={value!r} of the noise scheduler is not supported; "
                f"{' and '.join(str(known) for known in UNSUPPORTED[name])} is"
            )
        if name not in (*used, *UNSUPPORTED, *WITHOUT_EFFECT):
            raise UserError(f"{where}: the noise scheduler has a setting {name}={value!r}, which is not known here")
    timesteps = config.get("num_train_timesteps", 1000)
    steps = timesteps if inference_steps is None else inference_steps
    offset = config.get("steps_offset", 0)
    fields: dict[str, Any] = {"steps": steps, "offset": offset}
    if kind == "DDIM":
        fields |= {"evaluation_eta": 0.0, "rederive_noise": False}
    elif steps == timesteps and offset == 0:
        fields = {}
    return {
        "denoising_steps": timesteps,
        "beta_schedule": config.get("beta_schedule", "linear"),
        "beta_range": (config.get("beta_start", 1e-4), config.get("beta_end", 0.02)),
        "prediction": config.get("prediction_type", "epsilon"),
        "x0_clip": config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None,
        "sampler": config_from_dict(Sampler, fields, f"{where}, noise scheduler"),
    }


def settings_of_scheduler(scheduler: DDPMScheduler | DDIMScheduler | Mapping[str, Any]) -> dict[str, Any]:
    """As `scheduler_settings`, of a scheduler itself or of what its ``scheduler_config.json`` holds.

    An object's ``set_timesteps`` counts: its chain has so many steps.

        policy = DiffusionPolicy(DiffusionConfig(obs_dim=11, action_dim=3, **settings_of_scheduler(scheduler)))

    Raises:
        UserError: a scheduler or a setting for which there is no chain, by its name.
    """
    if isinstance(scheduler, Mapping):
        return scheduler_settings(str(scheduler.get("_class_name")), scheduler, None, "scheduler_config.json")
    name = type(scheduler).__name__
    if getattr(scheduler, "custom_timesteps", False):
        raise UserError(f"{name}: timesteps of one's own choice are not supported; set a number of steps")
    return scheduler_settings(name, scheduler.config, scheduler.num_inference_steps, name)
