"""What is read off diffusers' schedulers, and the chains that come of it."""

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from policies import DiffusionPolicy, UserError
from policies.chain import DiffusionConfig
from policies.samplers import Sampler
from policies.schedulers import scheduler_settings, settings_of_scheduler


@pytest.mark.parametrize(
    ("kind", "config", "complaint"),
    [
        ("PNDMScheduler", {}, "the noise scheduler 'PNDM' is not supported; DDPM and DDIM are"),
        ("DDPM", {"thresholding": True}, "thresholding=True"),
        ("DDPM", {"timestep_spacing": "trailing"}, "timestep_spacing='trailing'"),
        ("DDPM", {"variance_type": "fixed_large"}, "variance_type='fixed_large'"),
        ("DDPM", {"trained_betas": [0.1]}, "trained_betas"),
        ("DDPM", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ("DDPM", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("DDIM", {"set_alpha_to_one": False}, "set_alpha_to_one=False"),
        ("DDIM", {"prediction_type": "flow"}, "prediction_type='flow'"),
        ("DDIM", {"lower_order_final": True}, "has a setting lower_order_final=True, which is not known here"),
        ("DDIM", {"steps_offset": -1}, "offset must not be negative"),
    ],
)
def test_a_scheduler_for_which_there_is_no_chain_is_refused_by_the_name_of_its_setting(
    kind: str, config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        scheduler_settings(kind, config, None, "there")


@pytest.mark.parametrize("scheduler", [DDPMScheduler(50), DDIMScheduler(50, beta_schedule="scaled_linear")])
def test_the_whole_configuration_of_a_scheduler_of_diffusers_can_be_read(scheduler: Any) -> None:
    settings = scheduler_settings(type(scheduler).__name__, scheduler.config, None, "there")
    assert settings["denoising_steps"] == 50
    assert settings["beta_schedule"] == scheduler.config.beta_schedule
    assert settings["x0_clip"] == 1.0
    deterministic = isinstance(scheduler, DDIMScheduler)
    assert settings["sampler"] == (
        Sampler(50, evaluation_eta=0.0, rederive_noise=False) if deterministic else Sampler()
    )


@pytest.mark.parametrize("scheduler", [DDPMScheduler(50, clip_sample_range=0.5), DDIMScheduler(50, steps_offset=1)])
def test_a_scheduler_and_its_saved_configuration_say_the_same(scheduler: Any) -> None:
    saved = {**scheduler.config, "_class_name": type(scheduler).__name__}
    assert settings_of_scheduler(saved) == settings_of_scheduler(scheduler)


def test_timesteps_of_ones_own_choice_are_refused() -> None:
    scheduler = DDPMScheduler(50)
    scheduler.set_timesteps(timesteps=[40, 20, 0])
    with pytest.raises(UserError, match="timesteps of one's own choice are not supported"):
        settings_of_scheduler(scheduler)


def test_a_configuration_that_names_no_scheduler_is_refused() -> None:
    with pytest.raises(UserError, match="the noise scheduler 'None' is not supported"):
        settings_of_scheduler({"num_train_timesteps": 50})


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_chain_of_a_scheduler_ends_where_its_own_steps_end(steps: int | None, prediction: str) -> None:
    scheduler = DDIMScheduler(20, beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    scheduler.set_timesteps(steps or 20)
    torch.manual_seed(0)
    settings = settings_of_scheduler(scheduler)
    policy = DiffusionPolicy(DiffusionConfig(obs_dim=3, action_dim=2, chunk=4, **settings))
    assert policy.num_steps == (steps or 20)
    obs = torch.randn(6, 1, 3)
    noise = policy.draw_noise(6, torch.Generator().manual_seed(1))
    latent = noise[:, 0]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            out = policy.network(latent, torch.full((6,), int(timestep)), obs.flatten(1))
            latent = scheduler.step(out, int(timestep), latent).prev_sample
    chain = policy.sample(obs, deterministic=True, noise=noise).chain
    torch.testing.assert_close(chain[:, -1], latent, atol=1e-5, rtol=1e-5)
