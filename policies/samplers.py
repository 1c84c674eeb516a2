"""How a denoising chain steps from noise to a chunk: DDPM, and DDIM with fewer steps, as one family.

DDIM with eta = 1 over all timesteps is DDPM (Song et al. 2021, section 4.1), provided that the noise goes with the
clipped x0. So a sampler is a list of timesteps and an eta:

    x0    = x0_latent z + x0_output out                             clipped to x0_clip
    noise = noise_latent z + noise_x0 x0 + noise_output out         clipped to epsilon_clip
    std   = eta unit_std
    mean  = signal x0 + sqrt(1 - signal^2 - std^2) noise            (Song et al. 2021, eq. 12)

where the root is sqrt(1 - signal^2) sqrt(1 - eta^2 removed), which is as precise next to the chunk as elsewhere.

| code | symbol (Song et al. 2021) |
|---|---|
| z, out | x_t, output of the network |
| signal | square root of alpha_{t-1}, which is alpha_bar of the next timestep |
| unit_std | sigma_t for eta = 1, eq. 16 |
| removed | (1 - alpha_t / alpha_{t-1}) / (1 - alpha_t), so that unit_std^2 = (1 - signal^2) removed |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policies.schedules import NoiseLevels, Prediction, noise_coefficients, x0_coefficients

TINY = 1e-12
"""Least argument of a square root that may be differentiated."""

LearnedEta = Literal["scalar", "action", "state"]


@dataclass(frozen=True)
class Sampler:
    """Settings of a denoising chain; the defaults are DDPM."""

    steps: int | None = None
    """K, how many of the S timesteps, equally spaced ("leading": the last one is ``offset``); None: all of them."""
    offset: int = 0
    """The last timestep, next to the chunk."""
    eta: float = 1.0
    """Share of DDPM's noise while exploring and scoring; the floors of the std come after it."""
    evaluation_eta: float = 1.0
    """The same in evaluation; 0 for DDIM's deterministic chain."""
    learned_eta: LearnedEta | None = None
    """RL learns eta, from ``eta`` on: one number, one per action dimension, or as a function of the observation."""
    eta_range: tuple[float, float] = (0.1, 1.0)
    """Within which eta is learned."""
    rederive_noise: bool = True
    """Let the noise be what is left of the latent beside the clipped x0; else it is what the network predicts."""
    epsilon_clip: float | None = None
    """Clip of the predicted noise."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, or null for all timesteps, not {self.steps}")
        if self.offset < 0:
            raise ValueError(f"offset must not be negative, but is {self.offset}")
        for name in ("eta", "evaluation_eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        low, high = self.eta_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"eta_range must be two numbers that grow within [0, 1], not {list(self.eta_range)}")
        if self.learned_eta is not None and not low <= self.eta <= high:
            raise ValueError(f"eta = {self.eta} must lie in eta_range = {list(self.eta_range)}, where it is learned")
        if self.epsilon_clip is not None and not self.epsilon_clip > 0:
            raise ValueError(f"epsilon_clip must be positive, or null for no clip, not {self.epsilon_clip}")

    def timesteps(self, num_timesteps: int) -> range:
        """The K timesteps of S, growing.

        Raises:
            ValueError: there are not so many.
        """
        steps = num_timesteps if self.steps is None else self.steps
        if steps > num_timesteps:
            raise ValueError(f"sampler.steps must not exceed denoising_steps = {num_timesteps}, but is {steps}")
        spacing = num_timesteps // steps
        if self.offset + (steps - 1) * spacing >= num_timesteps:
            raise ValueError(
                f"sampler.offset = {self.offset} leads beyond the last of {num_timesteps} timesteps "
                f"({steps} steps, {spacing} apart)"
            )
        return range(self.offset, self.offset + steps * spacing, spacing)


class Kernel(nn.Module):
    """The steps of a chain, in the order of their timesteps; coefficients are computed in float64, kept in float32."""

    columns: Tensor
    unit_std: Tensor

    def __init__(
        self,
        levels: NoiseLevels,
        prediction: Prediction,
        sampler: Sampler,
        *,
        eta: float | None,
        x0_clip: float | None,
    ) -> None:
        """``eta`` is None where it is learned."""
        super().__init__()
        self.x0_clip, self.epsilon_clip = x0_clip, sampler.epsilon_clip
        self.fused = eta is not None and self.epsilon_clip is None
        """Whether the mean is a plain sum of what x0, the latent and the output contribute."""
        num_timesteps = len(levels.alpha_bar)
        now = torch.tensor(sampler.timesteps(num_timesteps)) + 1
        before = (now - num_timesteps // len(now)).clamp(min=0)
        one = torch.ones(1, dtype=torch.float64)
        padded = torch.cat([one, levels.alpha_bar.double()])
        alpha_bar, previous = padded[now], padded[before]
        # For DDPM the betas themselves, as the original DPPO: float32 has rounded the ratio of alpha_bars.
        alpha = 1 - levels.beta.double() if sampler.steps is None else alpha_bar / previous
        removed, kept = (1 - alpha) / (1 - alpha_bar), alpha * (1 - previous) / (1 - alpha_bar)  # they add up to 1
        unit_std = ((1 - previous) * removed).clamp(min=1e-20).sqrt()
        noise_latent, noise_output = noise_coefficients(alpha_bar, prediction)
        noise_x0 = torch.zeros_like(alpha_bar)
        if sampler.rederive_noise:
            scale = (1 - alpha_bar).sqrt()
            noise_latent, noise_x0, noise_output = 1 / scale, -alpha_bar.sqrt() / scale, noise_x0
        rows = [*x0_coefficients(alpha_bar, prediction)]
        if eta is None or not self.fused:
            rows += [noise_x0, noise_latent, noise_output, previous.sqrt(), (1 - previous).sqrt(), removed]
        else:
            rest = 1 - eta**2 * (1 - kept)
            share = ((1 - previous) * rest).sqrt()  # sqrt(1 - signal^2 - std^2) without cancellation
            of_x0 = torch.ones_like(kept)
            if sampler.rederive_noise:  # signal + share noise_x0, without cancellation either
                of_x0 = removed * (1 + eta**2 * kept) / (1 + (kept * rest).sqrt())
            rows += [previous.sqrt() * of_x0, share * noise_latent, share * noise_output]
        self.register_buffer("columns", torch.stack(rows, dim=1).float(), persistent=False)  # [K, C]
        self.register_buffer("unit_std", unit_std.float(), persistent=False)  # [K]
        self._rows: list[list[float]] = self.columns.tolist()
        self._adds_output = bool(noise_output.any())

    def row(self, index: int) -> list[float]:
        """The coefficients of one step, for `mean`."""
        return self._rows[index]

    def rows(self, index: Tensor) -> Sequence[Tensor]:
        """The coefficients of the steps ``index`` [B], for `mean`."""
        return self.columns[index][:, :, None, None].unbind(1)

    def mean(self, out: Tensor, latent: Tensor, row: Sequence[Any], eta: Tensor | float) -> Tensor:
        """The mean of the next latents.

        Args:
            out: [B, Tp, Da], output of the network.
            latent: [B, Tp, Da].
            row: of `row` or `rows`.
            eta: as of the stds, broadcastable to the latents; a kernel that is fused has its own.
        """
        x0 = row[0] * latent + row[1] * out
        if self.x0_clip is not None:
            x0 = x0.clamp(-self.x0_clip, self.x0_clip)
        mixed = row[2] * x0 + row[3] * latent
        if self._adds_output:
            mixed = mixed + row[4] * out
        if self.fused:
            return mixed
        if self.epsilon_clip is not None:
            mixed = mixed.clamp(-self.epsilon_clip, self.epsilon_clip)
        signal, of_noise, removed = row[5:]
        rest = 1 - eta * eta * removed
        # Not below TINY: next to the chunk, with all of DDPM's noise, it is 0, where a root has no derivative.
        rest = rest.clamp(min=TINY).sqrt() if isinstance(rest, Tensor) else max(rest, 0.0) ** 0.5
        return signal * x0 + of_noise * rest * mixed
