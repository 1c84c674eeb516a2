"""Multilayer perceptrons, plain and residual, and the denoising network made of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.networks.denoiser import Denoiser, Port

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class MLPConfig:
    """The shape of an `MLP`."""

    hidden_dims: Sequence[int] = (256, 256)
    """Widths of the hidden layers. Residual: all equal and odd in number (an input layer, then blocks of two)."""
    activation: str = "relu"
    """One of `ACTIVATIONS`."""
    residual: bool = False
    """Pre-activation residual blocks of two layers, x + l2(act(l1(act(x))))."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known are {', '.join(ACTIVATIONS)}")
        if not self.hidden_dims or any(width < 1 for width in self.hidden_dims):
            raise ValueError(f"hidden_dims must name at least one positive width, not {list(self.hidden_dims)}")
        if self.residual and (len(set(self.hidden_dims)) > 1 or len(self.hidden_dims) % 2 == 0):
            raise ValueError(
                f"a residual MLP needs an odd number of equal hidden_dims, such as [512, 512, 512], "
                f"not {list(self.hidden_dims)}"
            )


Layer = Callable[[Tensor], Tensor]


def _plain_linear(layer: nn.Linear) -> Layer:
    return partial(F.linear, weight=layer.weight, bias=layer.bias)


class ResidualBlock(nn.Module):
    """x + l2(act(l1(act(x))))."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, width)
        self.l2 = nn.Linear(width, width)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.l2(self.activation(self.l1(self.activation(x))))

    def plain(self) -> Layer:
        """`forward` with less overhead, see `MLP.plain_trunk`."""
        activation, l1, l2 = self.activation.forward, _plain_linear(self.l1), _plain_linear(self.l2)
        return lambda x: x + l2(activation(l1(activation(x))))


def in_float32(layer: Layer, x: Tensor) -> Tensor:
    """``layer(x)``, in float32 inside autocast too."""
    if not torch.is_autocast_enabled(x.device.type):
        return layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.float())


class OutputLayer(nn.Linear):
    """A linear layer in float32, inside autocast too: neither means and logits are rounded nor their likelihoods."""

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(super().forward, x)


class MLP(nn.Module):
    """``trunk(input(x))``: the first layer stands apart so that a caller can compute its shares separately."""

    def __init__(self, in_dim: int, out_dim: int, config: MLPConfig) -> None:
        super().__init__()
        activation = ACTIVATIONS[config.activation]
        widths = list(config.hidden_dims)
        self.input = nn.Linear(in_dim, widths[0])
        if config.residual:  # no activation before the output layer: the original DPPO's residual MLP
            blocks: list[nn.Module] = [ResidualBlock(widths[0], activation) for _ in range(len(widths) // 2)]
        else:
            blocks = [activation()]
            for width_in, width_out in pairwise(widths):
                blocks += [nn.Linear(width_in, width_out), activation()]
        self.trunk = nn.Sequential(*blocks, OutputLayer(widths[-1], out_dim))

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        layer = self.trunk[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def orthogonal_init_(self, output_gain: float) -> None:
        """Orthogonal weights of gain sqrt(2), in the last layer ``output_gain``; zero biases (Engstrom et al. 2020)."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, output_gain if layer is self.output else math.sqrt(2))
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(self.input(x))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees."""
        return self.trunk[:-1](self.input(x))

    def plain(self) -> Layer:
        """`forward` with less overhead, see `plain_trunk`."""
        first, trunk = _plain_linear(self.input), self.plain_trunk()
        return lambda x: trunk(first(x))

    def plain_trunk(self) -> Layer:
        """``trunk`` as a function of the weights as they are now, without the calls of modules and their look-ups.

        These cost a fifth of the time where a few rows go through small layers many times, as they do in sampling.
        """
        layers: list[Layer] = []
        for layer in self.trunk:
            if isinstance(layer, ResidualBlock):
                layers.append(layer.plain())
            else:
                layers.append(_plain_linear(layer) if isinstance(layer, nn.Linear) else layer.forward)

        def trunk(x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x)
            return x

        return trunk


def sinusoidal_embedding(steps: Tensor, dim: int) -> Tensor:
    """Sines and cosines of geometrically spaced frequencies (Vaswani et al. 2017): [S] -> [S, dim], dim even."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
    angles = steps.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@dataclass(frozen=True)
class DenoisingMLPConfig(MLPConfig):
    """The shape of a `DenoisingMLP`."""

    hidden_dims: Sequence[int] = (256, 256, 256)
    residual: bool = True
    step_dim: int = 16
    """Dimension of the embedding of a denoising step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_dim < 4 or self.step_dim % 2:
            raise ValueError(f"step_dim must be even and at least 4, not {self.step_dim}")


@dataclass(frozen=True)
class Prepared:
    """What of a `DenoisingMLP` stays the same along a chain."""

    obs: Tensor
    """[B, H]: what the observation adds to the first layer, with the bias."""
    steps: Tensor
    """[S, H]: what each denoising step adds to it."""
    latent_weight: Tensor
    """[Ta*Da, H]: the first layer's weights on the latent."""
    trunk: Layer
    """The other layers."""


class DenoisingMLP(Denoiser):
    """An MLP of everything side by side.

    The input of the first layer is [flattened chunk, step embedding, flattened observation history]. Its product is a
    sum of three shares, so the embedding network runs on a table of ``num_timesteps`` rows, never on the batch, and the
    observation's share is computed once for a whole chain (`prepare`).
    """

    Config = DenoisingMLPConfig
    steps: Tensor

    def __init__(
        self, latent_shape: tuple[int, int], obs_shape: tuple[int, int], num_timesteps: int, config: DenoisingMLPConfig
    ) -> None:
        super().__init__()
        obs_dim = obs_shape[0] * obs_shape[1]
        self.latent_shape, self.history = latent_shape, obs_shape[0]
        self.latent_dim = latent_shape[0] * latent_shape[1]
        dim = config.step_dim
        self.step_encoder = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Mish(), nn.Linear(2 * dim, dim))
        self.mlp = MLP(self.latent_dim + dim + obs_dim, self.latent_dim, config)
        self.register_buffer("steps", sinusoidal_embedding(torch.arange(num_timesteps), dim), persistent=False)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's weights by input: latent [H, Ta*Da], step [H, step_dim], observation [H, To*Do]."""
        weight, dim = self.mlp.input.weight, self.steps.shape[1]
        latent, step, obs = weight.split([self.latent_dim, dim, weight.shape[1] - self.latent_dim - dim], dim=1)
        return latent, step, obs

    def _step_shares(self) -> Tensor:
        return F.linear(self.step_encoder(self.steps), self._weights()[1])  # [S, H]

    def forward(self, latent: Tensor, timestep: Tensor, obs: Tensor, *dropout: Tensor) -> Tensor:
        """latent [B, Tp, Da], timestep [B] integers, obs [B, To*Do] -> [B, Tp, Da].

        A one-hot row picks the step's share inside the same matrix product as the other inputs: no gather forward, no
        scatter backward.
        """
        latent_weight, _, obs_weight = self._weights()
        shares = self._step_shares()
        one_hot = F.one_hot(timestep, shares.shape[0]).to(latent.dtype)
        inputs = torch.cat([latent.flatten(1), one_hot, obs], dim=1)
        weight = torch.cat([latent_weight, shares.T, obs_weight], dim=1)
        hidden = F.linear(inputs, weight, self.mlp.input.bias)
        return self.mlp.trunk(hidden).unflatten(1, self.latent_shape)

    def prepare(self, obs: Tensor) -> Prepared:
        latent_weight, _, obs_weight = self._weights()
        obs_share = F.linear(obs, obs_weight, self.mlp.input.bias)
        return Prepared(obs_share, self._step_shares(), latent_weight.T, self.mlp.plain_trunk())

    def forward_prepared(self, latent: Tensor, timestep: int, prepared: Prepared) -> Tensor:
        share = prepared.obs + prepared.steps[timestep]
        hidden = torch.addmm(share, latent.flatten(1), prepared.latent_weight)
        return prepared.trunk(hidden).view(latent.shape)

    def observation_ports(self) -> list[Port]:
        return [Port("mlp.input.weight", 1, self.latent_dim + self.steps.shape[1], self.history)]

    def action_ports(self) -> list[Port]:
        chunk, last = self.latent_shape[0], f"mlp.trunk.{len(self.mlp.trunk) - 1}"
        return [
            Port(name, axis, 0, chunk)
            for name, axis in (("mlp.input.weight", 1), (f"{last}.weight", 0), (f"{last}.bias", 0))
        ]
