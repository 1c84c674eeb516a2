"""The networks against their formulas, written out without modules."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.networks.mlp import (
    ACTIVATIONS,
    MLP,
    DenoisingMLP,
    DenoisingMLPConfig,
    MLPConfig,
    ResidualBlock,
    sinusoidal_embedding,
)

LATENT, OBS_DIM, TIMESTEPS = (3, 2), 5, 7
FORMULAS = {
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "mish": lambda x: x * torch.tanh((1 + x.exp()).log()),
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "silu": lambda x: x / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}
each_activation = pytest.mark.parametrize("activation", FORMULAS)
NETWORKS: list[dict[str, Any]] = [
    {"hidden_dims": [8], "residual": False},
    {"hidden_dims": [8, 6], "residual": False},
    {"hidden_dims": [8], "residual": True},
    {"hidden_dims": [8, 8, 8, 8, 8], "residual": True},
]


def linears(mlp: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight.T, layer.bias) for layer in mlp.modules() if isinstance(layer, nn.Linear)]


def plain(mlp: MLP, x: Tensor, act: Any) -> Tensor:
    *hidden, (weight, bias) = linears(mlp)
    for w, b in hidden:
        x = act(x @ w + b)
    return x @ weight + bias


def residual(mlp: MLP, x: Tensor, act: Any) -> Tensor:
    (w_in, b_in), *blocks, (w_out, b_out) = linears(mlp)
    x = x @ w_in + b_in
    for (w1, b1), (w2, b2) in zip(blocks[::2], blocks[1::2], strict=True):
        x = x + act(act(x) @ w1 + b1) @ w2 + b2
    return x @ w_out + b_out


def denoiser(**settings: Any) -> DenoisingMLP:
    torch.manual_seed(0)
    return DenoisingMLP(LATENT, (1, OBS_DIM), TIMESTEPS, DenoisingMLPConfig(**{"hidden_dims": [8, 8, 8], **settings}))


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *LATENT, generator=generator), torch.randn(batch, OBS_DIM, generator=generator)


def test_every_activation_is_tested() -> None:
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@each_activation
@pytest.mark.parametrize("widths", [[8], [8, 6, 4]])
def test_a_plain_mlp_is_affine_maps_with_activations_between(activation: str, widths: list[int]) -> None:
    mlp = MLP(5, 2, MLPConfig(widths, activation))
    x = torch.randn(10, 5)
    assert len(linears(mlp)) == len(widths) + 1
    torch.testing.assert_close(mlp(x), plain(mlp, x, FORMULAS[activation]), rtol=1e-5, atol=1e-6)


@each_activation
@pytest.mark.parametrize("layers", [1, 3, 5])
def test_a_residual_mlp_adds_pre_activated_blocks_of_two_layers(activation: str, layers: int) -> None:
    mlp = MLP(5, 2, MLPConfig([8] * layers, activation, residual=True))
    x = torch.randn(10, 5)
    assert sum(isinstance(module, ResidualBlock) for module in mlp.modules()) == layers // 2
    assert len(linears(mlp)) == layers + 1
    torch.testing.assert_close(mlp(x), residual(mlp, x, FORMULAS[activation]), rtol=1e-5, atol=1e-6)


@each_activation
@pytest.mark.parametrize("widths", [[8], [8, 8, 8]])
@pytest.mark.parametrize("residual", [False, True])
def test_the_plain_trunk_is_the_trunk_also_after_its_weights_changed_in_place(
    activation: str, widths: list[int], residual: bool
) -> None:
    torch.manual_seed(0)
    mlp, other = (MLP(5, 2, MLPConfig(widths, activation, residual)) for _ in range(2))
    x = torch.randn(10, widths[0])
    plain_trunk = mlp.plain_trunk()
    before = mlp.trunk(x)
    assert torch.equal(plain_trunk(x), before)

    mlp.load_state_dict(other.state_dict())
    loaded = plain_trunk(x)
    assert torch.equal(loaded, other.trunk(x))
    assert not torch.equal(loaded, before)

    with torch.no_grad():
        for index, weights in enumerate(mlp.trunk.parameters()):
            weights.add_(0.1 * (index + 1))
            changed = plain_trunk(x)
            assert torch.equal(changed, mlp.trunk(x))
            assert not torch.equal(changed, loaded)
            loaded = changed


@pytest.mark.parametrize("residual", [False, True])
def test_a_gradient_flows_through_the_plain_trunk_as_through_the_trunk(residual: bool) -> None:
    mlp = MLP(5, 2, MLPConfig([8, 8, 8], "mish", residual))
    x = torch.randn(10, 8)
    ours, expected = (
        torch.autograd.grad(trunk(x).square().sum(), list(mlp.trunk.parameters()))
        for trunk in (mlp.plain_trunk(), mlp.trunk)
    )
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("residual", [False, True])
def test_orthogonal_initialisation_has_the_gains_it_promises_and_no_biases(residual: bool) -> None:
    mlp = MLP(16, 4, MLPConfig([16, 16, 16], residual=residual))
    mlp.orthogonal_init_(0.01)
    *hidden, last = linears(mlp)
    for (weight, bias), gain in [*((layer, math.sqrt(2)) for layer in hidden), (last, 0.01)]:
        identity = torch.eye(weight.shape[1])
        torch.testing.assert_close(weight.T @ weight / gain**2, identity, rtol=0, atol=1e-5)
        assert (bias == 0).all()


@pytest.mark.parametrize("dim", [4, 16])
def test_the_step_embedding_is_sines_then_cosines_of_falling_frequencies(dim: int) -> None:
    embedding = sinusoidal_embedding(torch.arange(12), dim)
    half = dim // 2
    for step in range(12):
        angles = [step * 10000 ** (-i / (half - 1)) for i in range(half)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert embedding[step].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", NETWORKS)
def test_the_denoiser_is_an_mlp_of_latent_step_embedding_and_observation_side_by_side(settings: dict[str, Any]) -> None:
    network = denoiser(**settings, activation="mish", step_dim=6)
    latent, obs = inputs(4 * TIMESTEPS)
    timestep = torch.arange(TIMESTEPS).repeat(4)
    (w1, b1), (w2, b2) = linears(network.step_encoder)
    embedded = FORMULAS["mish"](sinusoidal_embedding(timestep, 6) @ w1 + b1) @ w2 + b2
    formula = residual if settings["residual"] else plain
    expected = formula(network.mlp, torch.cat([latent.flatten(1), embedded, obs], 1), FORMULAS["mish"])
    torch.testing.assert_close(network(latent, timestep, obs).flatten(1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", NETWORKS)
@pytest.mark.parametrize("timestep", range(TIMESTEPS))
def test_a_prepared_evaluation_is_the_plain_one_at_every_timestep(settings: dict[str, Any], timestep: int) -> None:
    network = denoiser(**settings)
    latent, obs = inputs(5)
    prepared = network.forward_prepared(latent, timestep, network.prepare(obs))
    torch.testing.assert_close(prepared, network(latent, torch.full((5,), timestep), obs), rtol=1e-5, atol=1e-6)


def test_the_step_embedding_network_runs_on_its_table_and_never_on_the_batch() -> None:
    network = denoiser(step_dim=6)
    shapes = []
    network.step_encoder.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    latent, obs = inputs(50)
    network(latent, torch.arange(50) % TIMESTEPS, obs)
    assert shapes == [(TIMESTEPS, 6)]
    prepared = network.prepare(obs)
    for timestep in range(TIMESTEPS):
        network.forward_prepared(latent, timestep, prepared)
    assert shapes == [(TIMESTEPS, 6)] * 2  # once for a whole chain


def test_rows_of_a_batch_do_not_mix() -> None:
    network = denoiser()
    latent, obs = inputs(4)
    timestep = torch.tensor([0, 6, 3, 3])
    together = network(latent, timestep, obs)
    alone = [network(latent[i : i + 1], timestep[i : i + 1], obs[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"activation": "rellu"}, "unknown activation 'rellu'; known are elu, gelu, mish, relu, silu, tanh"),
        ({"hidden_dims": []}, "hidden_dims must name at least one positive width"),
        ({"hidden_dims": [8, 0]}, r"hidden_dims must .* positive width, not \[8, 0\]"),
        ({"hidden_dims": [8, 8], "residual": True}, r"odd number of equal hidden_dims.*not \[8, 8\]"),
        ({"hidden_dims": [8, 8, 4], "residual": True}, r"odd number of equal hidden_dims.*not \[8, 8, 4\]"),
        ({"step_dim": 7}, "step_dim must be even and at least 4, not 7"),
        ({"step_dim": 2}, "step_dim must be even and at least 4, not 2"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DenoisingMLPConfig(**settings)
