"""What a chain asks of a denoising network, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Port:
    """Where a weight meets observations, or actions: its entries along an axis stand for theirs."""

    weight: str
    """Its name in the network."""
    axis: int
    first: int = 0
    """The first of these entries."""
    times: int = 1
    """How many observations or actions follow each other there."""

    def moved(self, weight: Tensor, places: Sequence[int], size: int) -> Tensor:
        """The weight where entry i of the ``len(places)`` of each has become entry ``places[i]`` of ``size``.

        What no entry was moved to has no effect: it is zero.
        """
        weight = weight.movedim(self.axis, 0)
        count = self.times * len(places)
        before, entries, after = weight.split([self.first, count, len(weight) - self.first - count])
        entries = entries.unflatten(0, (self.times, len(places)))
        spread = entries.new_zeros(self.times, size, *entries.shape[2:])
        spread[:, list(places)] = entries
        return torch.cat([before, spread.flatten(0, 1), after]).movedim(0, self.axis)


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

    def observation_ports(self) -> list[Port]:
        """Where its weights meet the observations."""
        raise NotImplementedError

    def action_ports(self) -> list[Port]:
        """Where its weights meet the actions of a chunk, as input and as output.

        Raises:
            UserError: they are also passed on in an order of their own.
        """
        raise NotImplementedError

    def draw_dropout(self, batch: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The randomness of dropout for so many rows, as tensors [B]; none where the network drops nothing.

        It is an argument and not a mode of the network, since of all that a policy does, imitation alone wants it: the
        likelihoods that a rollout keeps must be those that an update finds.
        """
        return ()
