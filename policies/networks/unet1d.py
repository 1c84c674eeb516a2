"""A UNet along the action chunk, conditioned by scaling and shifting its channels (Chi et al. 2023, Diffusion Policy).

Its levels see the chunk at half the length of the one before, and are joined on the way back. What conditions it, the
denoising step and the observation, changes every block by FiLM (Perez et al. 2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.errors import UserError
from policies.networks.denoiser import Denoiser, Port
from policies.networks.mlp import ACTIVATIONS, MLP, MLPConfig, in_float32, sinusoidal_embedding


@dataclass(frozen=True)
class DenoisingUNetConfig:
    """The shape of a `DenoisingUNet`."""

    down_dims: Sequence[int] = (32, 64)
    """Channels of each level; each sees the chunk at half the length of the one before (rounded up)."""
    kernel_size: int = 3
    """Of the convolutions; odd."""
    groups: int | None = 8
    """Into which the channels of a level are divided to be normalised; None: no normalisation."""
    final_groups: int | None = 8
    """The same for the block before the output (in Diffusion Policy always 8)."""
    norm_eps: float = 1e-5
    """What is added to the variances of normalised groups."""
    activation: str = "mish"
    """One of `ACTIVATIONS`. The embedding of the step has Mish always."""
    scale: bool = True
    """Let what conditions the network scale its channels, beside shifting them."""
    deep_film: bool = False
    """Three layers, in place of one, from what conditions the network to scales and shifts."""
    obs_dims: Sequence[int] | None = None
    """Widths of a residual MLP that encodes the observation, the last its output's. None: the network sees it as is."""
    step_dim: int = 32
    """Dimension of the embedding of a denoising step."""

    def __post_init__(self) -> None:
        if not self.down_dims or any(width < 1 for width in self.down_dims):
            raise ValueError(f"down_dims must name at least one positive width, not {list(self.down_dims)}")
        for name, widths in (("groups", self.down_dims), ("final_groups", self.down_dims[:1])):
            groups = getattr(self, name)
            for width in widths:
                if groups is not None and (groups < 1 or width % groups):
                    raise ValueError(
                        f"{name} must divide the channels of down_dims, and {groups} does not divide {width}"
                    )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known are {', '.join(ACTIVATIONS)}")
        if self.step_dim < 4 or self.step_dim % 2:
            raise ValueError(f"step_dim must be even and at least 4, not {self.step_dim}")
        dims = self.obs_dims
        if dims is not None and (len(dims) < 2 or len(dims) % 2 or min(dims) < 1 or len(set(dims[:-1])) > 1):
            wanted = "an odd number of equal widths and then the output's, such as [128, 32]"
            raise ValueError(f"obs_dims needs {wanted}, not {list(dims)}")


class ConvBlock(nn.Module):
    """Convolution, normalisation over groups of channels, activation: [B, C, L] -> [B, C', L]."""

    def __init__(self, in_channels: int, channels: int, groups: int | None, config: DenoisingUNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, config.kernel_size, padding=config.kernel_size // 2)
        self.norm = nn.Identity() if groups is None else nn.GroupNorm(groups, channels, config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class FiLM(nn.Module):
    """From what conditions a block, [step, observation], to the scales and shifts of its channels.

    The first layer, ``input``, is linear in what it sees, so its shares of the step and of the observation are computed
    apart, and all blocks' at once (`DenoisingUNet.film_shares`).
    """

    def __init__(self, condition_dim: int, channels: int, config: DenoisingUNetConfig) -> None:
        super().__init__()
        self.out_dim = 2 * channels if config.scale else channels
        self.input = nn.Linear(condition_dim, self.out_dim)
        layers: list[nn.Module] = []
        for _ in range(2 if config.deep_film else 0):
            layers += [ACTIVATIONS[config.activation](), nn.Linear(self.out_dim, self.out_dim)]
        self.trunk = nn.Sequential(*layers)
        self.scale = config.scale

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        """Scale and shift x [B, C, L]; ``share`` is what ``input`` makes of the condition, [B, C or 2 C]."""
        film = self.trunk(share)[:, :, None]
        if not self.scale:
            return x + film
        scale, shift = film.chunk(2, dim=1)
        return torch.addcmul(shift, scale, x)


class ResidualBlock(nn.Module):
    """Two convolutions with FiLM between them, beside a direct connection: [B, C, L] -> [B, C', L]."""

    def __init__(self, in_channels: int, channels: int, condition_dim: int, config: DenoisingUNetConfig) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, channels, config.groups, config)
        self.film = FiLM(condition_dim, channels, config)
        self.second = ConvBlock(channels, channels, config.groups, config)
        self.direct = nn.Identity() if in_channels == channels else nn.Conv1d(in_channels, channels, 1)

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        return self.second(self.film(self.first(x), share)) + self.direct(x)


class Level(nn.Module):
    """Two blocks, and the change of length on the way to the next level."""

    blocks: Any

    def __init__(self, first: ResidualBlock, second: ResidualBlock, resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([first, second])
        self.resample = resample

    def forward(self, x: Tensor, shares: Iterator[Tensor]) -> Tensor:
        """The blocks, without the change of length."""
        for block in self.blocks:
            x = block(x, next(shares))
        return x


class OutputConv(nn.Conv1d):
    """A convolution in float32, inside autocast too, see `mlp.OutputLayer`."""

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(super().forward, x)


@dataclass(frozen=True)
class Prepared:
    """What of a `DenoisingUNet` stays the same along a chain."""

    obs: Tensor
    """[B, F]: the observation's share in the first layers of all FiLMs, with their biases."""
    steps: Tensor
    """[S, F]: the share of each denoising step."""


class DenoisingUNet(Denoiser):
    """Diffusion Policy's ConditionalUnet1D with global conditioning, and the variants of LeRobot and the original DPPO.

    A chunk of any length will do: halved, a length is rounded up, and what comes back from a level is cut to the length
    of the level it joins. Where no length is odd, there is nothing to cut, and this is the usual UNet.
    """

    Config = DenoisingUNetConfig
    steps: Tensor
    down: Any
    """Each a `Level`, as those of ``up``."""
    up: Any

    def __init__(
        self, latent_shape: tuple[int, int], obs_shape: tuple[int, int], num_timesteps: int, config: DenoisingUNetConfig
    ) -> None:
        super().__init__()
        dim, obs_dim = config.step_dim, obs_shape[0] * obs_shape[1]
        self.history = obs_shape[0]
        self.step_encoder = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.obs_encoder = None
        if config.obs_dims is not None:
            shape = MLPConfig(config.obs_dims[:-1], config.activation, residual=True)
            self.obs_encoder = MLP(obs_dim, obs_dim := config.obs_dims[-1], shape)
        # One layer of FiLM follows an activation; three have theirs between them.
        self.condition_activation = nn.Identity() if config.deep_film else ACTIVATIONS[config.activation]()

        def block(in_channels: int, channels: int) -> ResidualBlock:
            return ResidualBlock(in_channels, channels, dim + obs_dim, config)

        widths = list(config.down_dims)
        self.down = nn.ModuleList()
        for index, (width_in, width) in enumerate(pairwise([latent_shape[1], *widths])):
            deepest = index == len(widths) - 1
            halve = nn.Identity() if deepest else nn.Conv1d(width, width, 3, stride=2, padding=1)
            self.down.append(Level(block(width_in, width), block(width, width), halve))
        self.middle = nn.ModuleList([block(widths[-1], widths[-1]) for _ in range(2)])
        self.up = nn.ModuleList()
        for deeper, width in pairwise(widths[::-1]):
            double = nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)
            self.up.append(Level(block(2 * deeper, width), block(width, width), double))
        self.final = ConvBlock(widths[0], widths[0], config.final_groups, config)
        self.output = OutputConv(widths[0], latent_shape[1], 1)
        self.register_buffer("steps", sinusoidal_embedding(torch.arange(num_timesteps), dim), persistent=False)
        self.film_dims = [film.out_dim for film in self._films()]

    def _films(self) -> list[FiLM]:
        """Those of all blocks, in the order of their use."""
        blocks = [*(block for level in self.down for block in level.blocks), *self.middle]
        blocks += [block for level in self.up for block in level.blocks]
        return [block.film for block in blocks]

    def film_shares(self, obs: Tensor) -> Prepared:
        """What the first layers of all FiLMs make of the observations [B, To*Do], and of every denoising step."""
        films = self._films()
        weight = torch.cat([film.input.weight for film in films])  # [F, step_dim + observation]
        bias = torch.cat([film.input.bias for film in films])
        step_weight, obs_weight = weight.split([self.steps.shape[1], weight.shape[1] - self.steps.shape[1]], dim=1)
        encoded = obs if self.obs_encoder is None else self.obs_encoder(obs)
        return Prepared(
            F.linear(self.condition_activation(encoded), obs_weight, bias),
            F.linear(self.condition_activation(self.step_encoder(self.steps)), step_weight),
        )

    def forward(self, latent: Tensor, timestep: Tensor, obs: Tensor, *dropout: Tensor) -> Tensor:
        shares = self.film_shares(obs)
        return self._denoise(latent, shares.obs + F.embedding(timestep, shares.steps))

    def prepare(self, obs: Tensor) -> Prepared:
        return self.film_shares(obs)

    def forward_prepared(self, latent: Tensor, timestep: int, prepared: Prepared) -> Tensor:
        return self._denoise(latent, prepared.obs + prepared.steps[timestep])

    def _denoise(self, latent: Tensor, shares: Tensor) -> Tensor:
        """latent [B, Tp, Da], shares [B, F] -> [B, Tp, Da]."""
        of_blocks = iter(shares.split(self.film_dims, dim=1))
        x = latent.transpose(1, 2)  # [B, C, L] from here on
        skipped: list[Tensor] = []
        for level in self.down:
            x = level(x, of_blocks)
            skipped.append(x)
            x = level.resample(x)
        for block in self.middle:
            x = block(x, next(of_blocks))
        skip = skipped.pop()
        for level in self.up:
            x = level.resample(level(torch.cat([x, skip], dim=1), of_blocks))
            skip = skipped.pop()
            x = x[:, :, : skip.shape[2]]
        return self.output(self.final(x)).transpose(1, 2)

    def observation_ports(self) -> list[Port]:
        if self.obs_encoder is not None:
            return [Port("obs_encoder.input.weight", 1, 0, self.history)]
        films = [name for name, module in self.named_modules() if isinstance(module, FiLM)]
        return [Port(f"{name}.input.weight", 1, self.steps.shape[1], self.history) for name in films]

    def action_ports(self) -> list[Port]:
        direct = self.down[0].blocks[0].direct
        if isinstance(direct, nn.Identity):
            raise UserError("a UNet whose first level is as wide as an action passes it on as it is: no other order")
        names = ("down.0.blocks.0.first.conv.weight", "down.0.blocks.0.direct.weight")
        return [*(Port(name, 1) for name in names), Port("output.weight", 0), Port("output.bias", 0)]
