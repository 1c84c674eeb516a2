"""The UNet against chains of other implementations, and against its formulas written out without modules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from policies.chain import DiffusionConfig, DiffusionPolicy
from policies.imports import diffusion_policy, lerobot
from policies.imports.files import renamed
from policies.networks.unet1d import DenoisingUNet, DenoisingUNetConfig

DATA = Path(__file__).parents[2] / "data" / "other_unets"
LATENT, OBS, TIMESTEPS = (8, 2), (2, 3), 7

RENAMED = {"diffusion_policy": diffusion_policy.UNET_NAMES, "lerobot": lerobot.NAMES}
SETTINGS: dict[str, dict[str, Any]] = {
    "diffusion_policy": {"kernel_size": 5, "scale": True},
    "lerobot": {"kernel_size": 3, "scale": False},
}


def unet(latent: tuple[int, int] = LATENT, **settings: Any) -> DenoisingUNet:
    torch.manual_seed(0)
    small = {"down_dims": [8, 12, 16], "groups": 4, "final_groups": 2, "step_dim": 8}
    network = DenoisingUNet(latent, OBS, TIMESTEPS, DenoisingUNetConfig(**{**small, **settings}))
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.1 * torch.randn(weights.shape))
    return network


def inputs(batch: int, latent: tuple[int, int] = LATENT) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    timestep = torch.arange(batch) % TIMESTEPS
    return (
        torch.randn(batch, *latent, generator=generator),
        timestep,
        torch.randn(batch, OBS[0] * OBS[1], generator=generator),
    )


def formula(network: DenoisingUNet, config: DenoisingUNetConfig, latent: Tensor, step: Tensor, obs: Tensor) -> Tensor:
    """What the network computes, by its weights' names."""
    w = dict(network.named_parameters())
    act = {"mish": F.mish, "relu": F.relu}[config.activation]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv_block(name: str, x: Tensor, groups: int | None) -> Tensor:
        x = F.conv1d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], padding=config.kernel_size // 2)
        if groups is not None:
            apart = x.unflatten(1, (groups, -1))
            mean, variance = apart.mean((2, 3), keepdim=True), apart.var((2, 3), keepdim=True, unbiased=False)
            x = ((apart - mean) / (variance + config.norm_eps).sqrt()).flatten(1, 2)
            x = x * w[f"{name}.norm.weight"][:, None] + w[f"{name}.norm.bias"][:, None]
        return act(x)

    half = config.step_dim // 2
    angles = step[:, None] * 10000 ** (-torch.arange(half) / (half - 1))
    embedded = linear("step_encoder.0", torch.cat([angles.sin(), angles.cos()], 1))
    condition = [linear("step_encoder.2", F.mish(embedded)), obs]
    if config.obs_dims is not None:
        x = linear("obs_encoder.input", obs)
        for index in range(len(config.obs_dims) // 2 - 1):
            name = f"obs_encoder.trunk.{index}"
            x = x + linear(f"{name}.l2", act(linear(f"{name}.l1", act(x))))
        condition[1] = linear(f"obs_encoder.trunk.{len(config.obs_dims) // 2 - 1}", x)
    film_input = torch.cat(condition, 1)

    def block(name: str, x: Tensor) -> Tensor:
        if config.deep_film:
            film = act(linear(f"{name}.film.input", film_input))
            film = linear(f"{name}.film.trunk.3", act(linear(f"{name}.film.trunk.1", film)))
        else:
            film = linear(f"{name}.film.input", act(film_input))
        hidden, film = conv_block(f"{name}.first", x, config.groups), film[:, :, None]
        channels = hidden.shape[1]
        hidden = film[:, :channels] * hidden + film[:, channels:] if config.scale else hidden + film
        hidden = conv_block(f"{name}.second", hidden, config.groups)
        direct = f"{name}.direct.weight"
        return hidden + (F.conv1d(x, w[direct], w[f"{name}.direct.bias"]) if direct in w else x)

    def resampled(name: str, x: Tensor) -> Tensor:
        weights = w[f"{name}.resample.weight"], w[f"{name}.resample.bias"]
        how = F.conv1d if name.startswith("down") else F.conv_transpose1d
        return how(x, *weights, stride=2, padding=1)

    x, skips, levels = latent.transpose(1, 2), [], len(config.down_dims)
    for level in range(levels):
        x = block(f"down.{level}.blocks.1", block(f"down.{level}.blocks.0", x))
        skips.append(x)
        x = resampled(f"down.{level}", x) if level < levels - 1 else x
    x = block("middle.1", block("middle.0", x))
    for level in range(levels - 1):
        x = torch.cat([x, skips[levels - 1 - level]], 1)
        x = resampled(f"up.{level}", block(f"up.{level}.blocks.1", block(f"up.{level}.blocks.0", x)))
    x = conv_block("final", x, config.final_groups)
    return F.conv1d(x, w["output.weight"], w["output.bias"]).transpose(1, 2)


@pytest.mark.parametrize("project", RENAMED)
def test_a_chain_with_another_projects_weights_ends_in_its_own_actions(project: str) -> None:
    with np.load(DATA / f"{project}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    obs, chunk, start, added = (arrays[name] for name in ("obs", "chunk", "initial_noise", "step_noise"))
    network = {"type": "unet", "down_dims": [16, 32], "step_dim": 16, **SETTINGS[project]}
    config = DiffusionConfig(
        obs_dim=obs.shape[2],
        history=obs.shape[1],
        action_dim=chunk.shape[2],
        chunk=chunk.shape[1],
        denoising_steps=len(added) + 1,
        noise_clip=None,
        network=network,
    )
    policy = DiffusionPolicy(config)
    weights = {name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}
    policy.network.load_state_dict(renamed(weights, RENAMED[project]))
    noise = torch.stack([start, *added, torch.zeros_like(start)], dim=1)
    sample = policy.sample(obs, deterministic=True, noise=noise)
    torch.testing.assert_close(sample.action, chunk, rtol=1e-4, atol=1e-5)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "shifts only": {"scale": False},
    "deep FiLM": {"deep_film": True},
    "encoded observation": {"obs_dims": [8, 4]},
    "observation encoded by blocks": {"obs_dims": [8, 8, 8, 8, 8, 4], "activation": "relu"},
    "not normalised": {"groups": None, "final_groups": None},
    "two levels, wide kernel": {"down_dims": [8, 16], "kernel_size": 5, "norm_eps": 1e-2},
    "one level": {"down_dims": [8]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_is_its_formula(variant: str) -> None:
    """Among them are all variants of the original DPPO's UNet."""
    network = unet(**VARIANTS[variant])
    config = DenoisingUNetConfig(
        **{"down_dims": [8, 12, 16], "groups": 4, "final_groups": 2, "step_dim": 8, **VARIANTS[variant]}
    )
    latent, timestep, obs = inputs(2 * TIMESTEPS)
    expected = formula(network, config, latent, timestep, obs)
    torch.testing.assert_close(network(latent, timestep, obs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 6, 7])
def test_a_chunk_of_any_length_comes_out_as_long_as_it_went_in(chunk: int) -> None:
    network = unet((chunk, 2))
    latent, timestep, obs = inputs(4, (chunk, 2))
    assert network(latent, timestep, obs).shape == latent.shape


def test_the_end_of_an_odd_chunk_depends_on_its_beginning_and_the_beginning_on_its_end() -> None:
    network = unet((7, 2))
    latent, timestep, obs = inputs(1, (7, 2))
    latent.requires_grad_()
    for here, there in ((0, 6), (6, 0)):
        (gradient,) = torch.autograd.grad(network(latent, timestep, obs)[0, here].sum(), latent)
        assert gradient[0, there].abs().max() > 0


def test_all_that_step_and_observation_say_to_the_blocks_is_computed_once_for_a_chain() -> None:
    network = unet(obs_dims=[8, 4])
    seen: list[tuple[int, ...]] = []
    assert network.obs_encoder is not None
    for module in (network.step_encoder, network.obs_encoder):
        module.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    latent, timestep, obs = inputs(50)
    network(latent, timestep, obs)
    prepared = network.prepare(obs)
    assert sorted(seen) == [(TIMESTEPS, 8)] * 2 + [(50, 6)] * 2  # steps as a table, never on the batch
    for step in range(TIMESTEPS):
        network.forward_prepared(latent, step, prepared)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"down_dims": []}, "down_dims must name at least one positive width"),
        ({"down_dims": [8, 0]}, r"positive width, not \[8, 0\]"),
        ({"down_dims": [8, 20]}, "groups must divide the channels of down_dims, and 8 does not divide 20"),
        ({"down_dims": [4, 8], "groups": 4}, "final_groups must divide .* 8 does not divide 4"),
        ({"groups": 0}, "groups must divide the channels"),
        ({"kernel_size": 4}, "kernel_size must be odd, not 4"),
        ({"activation": "mush"}, "unknown activation 'mush'"),
        ({"step_dim": 7}, "step_dim must be even and at least 4, not 7"),
        ({"obs_dims": [8]}, r"obs_dims needs an odd number of equal widths and .* not \[8\]"),
        ({"obs_dims": [8, 4, 4, 2]}, "obs_dims needs an odd number of equal widths"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DenoisingUNetConfig(**settings)
