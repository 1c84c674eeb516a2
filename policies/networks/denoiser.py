"""What a chain asks of a denoising network, whichever it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """The noise (or sample, or velocity) that a chunk holds, given the observation and the denoising step.

    Made from the shape of a chunk (Tp, Da), that of an observation history (To, Do), the number S of timesteps, and the
    network's own configuration. Nothing is kept between calls: several threads may call it at once.
    """

    def forward(self, latent: Tensor, timestep: Tensor, obs: Tensor, *dropout: Tensor) -> Tensor:
        """latent [B, Tp, Da], timestep [B] integers in [0, S), obs [B, To*Do] -> [B, Tp, Da].

        ``dropout`` is what `draw_dropout` drew; nothing is dropped without it.
        """
        raise NotImplementedError

    def prepare(self, obs: Tensor) -> Any:
        """All that stays the same along a chain on the observations [B, To*Do], for `forward_prepared`."""
        raise NotImplementedError

    def forward_prepared(self, latent: Tensor, timestep: int, prepared: Any) -> Tensor:
        """`forward` where the whole batch is at one timestep."""
        raise NotImplementedError

    def draw_dropout(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The randomness of dropout for so many rows, as tensors [B]; none where the network drops nothing.

        It is an argument and not a mode of the network, since of all that a policy does, imitation alone wants it: the
        likelihoods that a rollout keeps must be those that an update finds.
        """
        return ()
