"""What holds for every denoising network. A new one is one more line in `CASES`."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.networks.denoiser import Denoiser
from policies.networks.registry import DENOISERS, build_denoiser

LATENT, OBS, TIMESTEPS = (5, 2), (2, 3), 7

CASES: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "hidden_dims": [16, 16, 16]},
    "unet": {"type": "unet", "down_dims": [8, 16], "groups": 4, "final_groups": 4, "step_dim": 8},
    "unet, deep FiLM": {"type": "unet", "down_dims": [16], "deep_film": True, "obs_dims": [8, 4]},
    "transformer": {"type": "transformer", "width": 16},
    "transformer, encoder": {"type": "transformer", "width": 16, "condition_layers": 1, "chunk_start": "first"},
}


@pytest.fixture(params=CASES)
def network(request: pytest.FixtureRequest) -> Denoiser:
    torch.manual_seed(0)
    network = build_denoiser(CASES[request.param], LATENT, OBS, TIMESTEPS)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.2 * torch.randn(weights.shape))
    return network


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, *LATENT, generator=generator)
    return latent, torch.arange(batch) % TIMESTEPS, torch.randn(batch, OBS[0] * OBS[1], generator=generator)


def test_every_registered_network_has_a_case() -> None:
    assert {case["type"] for case in CASES.values()} == set(DENOISERS)


@pytest.mark.parametrize("timestep", range(TIMESTEPS))
def test_a_prepared_evaluation_is_the_plain_one_at_every_timestep(network: Denoiser, timestep: int) -> None:
    latent, _, obs = inputs(5)
    prepared = network.forward_prepared(latent, timestep, network.prepare(obs))
    expected = network(latent, torch.full((5,), timestep), obs)
    torch.testing.assert_close(prepared, expected, rtol=1e-4, atol=1e-5)


def test_the_output_depends_on_the_timestep_and_on_each_observation(network: Denoiser) -> None:
    latent, timestep, obs = inputs(1)
    out = network(latent, timestep, obs.requires_grad_())
    (gradient,) = torch.autograd.grad(out.sum(), obs)
    assert (gradient != 0).all()
    assert not torch.allclose(network(latent, timestep + 1, obs), out)


def test_rows_of_a_batch_do_not_mix(network: Denoiser) -> None:
    batch = inputs(4)
    alone = [network(*(x[i : i + 1] for x in batch)) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), network(*batch), rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_in_several_threads_are_the_parts_one_after_another(network: Denoiser) -> None:
    parts = [tuple(x[i : i + 10] for x in inputs(200)) for i in range(0, 200, 10)]

    def gradients(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(network(*part).square().sum(), list(network.parameters()))

    expected = [gradients(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(gradients, parts), expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_last_layer_computes_in_float32_inside_autocast_too(network: Denoiser) -> None:
    batch = inputs(20)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(*batch)
    assert out.dtype == torch.float32
    assert not torch.equal(out, out.bfloat16().float())
    exact = network(*batch)
    assert 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_output_has_second_derivatives(network: Denoiser) -> None:
    """Natural gradients need them: the curvature along a direction, against differences of first derivatives."""
    network = network.double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in inputs(6))
    weights = list(network.parameters())
    direction = [torch.randn_like(weight) for weight in weights]

    def slope() -> Tensor:
        gradient = torch.autograd.grad(network(*batch).square().mean(), weights, create_graph=True)
        return sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))  # type: ignore[return-value]

    curvature = torch.autograd.grad(slope(), weights)
    along = sum((c * d).sum() for c, d in zip(curvature, direction, strict=True))
    size, slopes = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for weight, d in zip(weights, direction, strict=True):
                weight.add_(d, alpha=sign * size)
        slopes.append(slope().detach())
    torch.testing.assert_close(along, (slopes[0] - slopes[1]) / (2 * size), rtol=1e-4, atol=1e-6)
