"""The diffusion policy: a denoising chain whose last K' steps are an inner MDP (Ren et al. 2024, section 4.1).

| code | paper |
|---|---|
| denoising_steps | K, all denoising steps |
| finetuned_steps, num_steps | K', the last ones, which RL trains on a copy of the network |
| step k = 0 .. K'-1 | denoising index k = K'-1 .. 0 (here: timestep t = K'-1-k) |
| exploration_std, likelihood_std | sigma_exp^min, sigma_prob^min |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from policies.base import Policy, PolicyConfig, Sample
from policies.errors import UserError
from policies.networks.mlp import DenoisingMLP
from policies.networks.registry import build_denoiser
from policies.normalization import Affine
from policies.schedules import BetaSchedule, Prediction, ddpm_table, training_target

EVALUATION_STD = 1e-3
"""Floor of the std while evaluating, at every step but the last, which adds no noise."""


@dataclass(frozen=True)
class DiffusionConfig(PolicyConfig):
    """Settings of a `DiffusionPolicy`."""

    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    """The denoising network as plain data, see `policies.networks.registry`."""
    denoising_steps: int = 20
    """K, steps of the whole denoising chain."""
    finetuned_steps: int | None = None
    """K' in [1, K]: the last steps are trained on a copy, the others stay frozen. None: all of them, nothing frozen."""
    prediction: Prediction = "epsilon"
    """What the network predicts."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """Noise schedule, by its diffusers name."""
    x0_clip: float | None = 1.0
    """Clip of the predicted clean chunk, in normalised units."""
    noise_clip: float | None = 3.0
    """Clip of the standard normal noise that each step adds."""
    final_clip: float | None = None
    """Clip of the chunk that leaves the chain, in normalised units; scored is what was sampled."""
    exploration_std: float = 0.1
    """Floor of the std while exploring, at every step including the last, in normalised units."""
    likelihood_std: float = 0.1
    """Floor of the std while scoring."""

    adjustable: ClassVar[frozenset[str]] = frozenset(
        {"executed", "finetuned_steps", "x0_clip", "noise_clip", "final_clip", "exploration_std", "likelihood_std"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denoising_steps < 1:
            raise ValueError(f"denoising_steps must be at least 1, not {self.denoising_steps}")
        if self.finetuned_steps is not None and not 1 <= self.finetuned_steps <= self.denoising_steps:
            raise ValueError(
                f"finetuned_steps must lie between 1 and denoising_steps = {self.denoising_steps}, "
                f"not {self.finetuned_steps}"
            )
        if not (self.likelihood_std > 0 and self.exploration_std >= 0):
            raise ValueError("likelihood_std must be positive and exploration_std not negative")
        for name in ("x0_clip", "noise_clip", "final_clip"):
            clip = getattr(self, name)
            if clip is not None and not clip > 0:
                raise ValueError(f"{name} must be positive, or null for no clip, not {clip}")


class DiffusionPolicy(Policy, type="diffusion"):
    """DDPM over action chunks, conditioned on the observation history."""

    Config = DiffusionConfig
    config: DiffusionConfig

    action_scaler: Affine
    scoring_std: Tensor
    alpha_bar: Tensor
    mean_coefficients: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self.num_steps = config.finetuned_steps or config.denoising_steps
        self.latent_shape = (config.chunk, config.action_dim)
        obs_dim = config.history * config.obs_dim
        self.network = build_denoiser(config.network, self.latent_shape, obs_dim, config.denoising_steps)
        """The denoiser of the last K' steps: what pretraining and RL train."""
        self.frozen = None
        """The denoiser of the steps before them; None where there are none."""
        if self.num_steps < config.denoising_steps:
            self.frozen = copy.deepcopy(self.network).requires_grad_(False)
        self.table = ddpm_table(config.denoising_steps, config.beta_schedule, config.prediction)
        scoring_std = self.table.std.clamp(min=config.likelihood_std)
        self.register_buffer("scoring_std", scoring_std, persistent=False)  # [K]
        self.register_buffer("alpha_bar", self.table.alpha_bar, persistent=False)  # [K]
        self.register_buffer("mean_coefficients", self.table.mean_coefficients(), persistent=False)  # [K, 4]
        self._coefficients: list[list[float]] = self.mean_coefficients.tolist()

    def _sampling_std(self, deterministic: bool) -> list[float]:
        """The std at each timestep while acting: of evaluation, or with the exploration floor at every step."""
        if deterministic:
            return [0.0, *self.table.std[1:].clamp(min=EVALUATION_STD).tolist()]
        return self.table.std.clamp(min=self.config.exploration_std).tolist()

    def _weights_for(self, other: Self) -> dict[str, Tensor]:
        """A pretrained policy's weights serve both as the frozen denoiser and as the fine-tuned copy's start."""
        weights = self.state_dict()
        if self.frozen is None and other.frozen is not None:
            trained = {name: weight for name, weight in weights.items() if name.startswith("network.")}
            weights.update({name.replace("network.", "frozen.", 1): weight for name, weight in trained.items()})
        elif self.num_steps != other.num_steps:
            raise UserError(
                f"policy.finetuned_steps={other.num_steps} does not fit a checkpoint that was already fine-tuned on "
                f"its last {self.num_steps} steps; leave it out, or start from the pretrained checkpoint"
            )
        return weights

    # --- acting --------------------------------------------------------------------------------------------------

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal [B, 1 + K, Tp, Da]: the start, then one draw for each denoising step."""
        shape = (batch, 1 + self.config.denoising_steps, *self.latent_shape)
        return torch.randn(shape, generator=generator, device=self.alpha_bar.device)

    @property
    def products_per_sample(self) -> int:
        return self.config.denoising_steps * sum(parameter.numel() for parameter in self.network.parameters())

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        clip, stds = self.config.noise_clip, self._sampling_std(deterministic)
        added = noise if clip is None else noise.clamp(-clip, clip)
        context = self.normalize_obs(obs).flatten(1)

        means, latents = [], [noise[:, 0]]
        for network, timesteps in self._stages():
            prepared = network.prepare(context)
            for t in timesteps:
                out = network.forward_prepared(latents[-1], t, prepared)
                means.append(self._mean(out, latents[-1], self._coefficients[t]))
                latents.append(torch.add(means[-1], added[:, -1 - t], alpha=stds[t]))

        chain = torch.stack(latents[-1 - self.num_steps :], dim=1)  # [B, K'+1, Tp, Da]
        std = self.scoring_std[: self.num_steps].flip(0)[:, None, None]
        law = Normal(torch.stack(means[-self.num_steps :], dim=1), std, validate_args=False)
        return Sample(self._action(latents[-1]), chain, law.log_prob(chain[:, 1:]))

    def _stages(self) -> list[tuple[DenoisingMLP, range]]:
        """Each network with the timesteps it serves, in the order of denoising."""
        trained = (self.network, range(self.num_steps - 1, -1, -1))
        if self.frozen is None:
            return [trained]
        return [(self.frozen, range(self.config.denoising_steps - 1, self.num_steps - 1, -1)), trained]

    def _action(self, latent: Tensor) -> Tensor:
        clip, latent = self.config.final_clip, latent[:, : self.config.executed_chunk]
        return self.action_scaler.denormalize(latent if clip is None else latent.clamp(-clip, clip))

    # --- scoring -------------------------------------------------------------------------------------------------

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        timestep = self.num_steps - 1 - step
        out = self.network(latent, timestep, self.normalize_obs(obs).flatten(1))
        mean = self._mean(out, latent, self.mean_coefficients[timestep][:, :, None, None].unbind(1))
        std = self.scoring_std[timestep][:, None, None]
        return Independent(Normal(mean, std, validate_args=False), 2, validate_args=False)

    def _mean(self, out: Tensor, latent: Tensor, coefficients: Sequence[Any]) -> Tensor:
        """Mean of the next latent from the network's output (see `policies.schedules`)."""
        x0_latent, x0_output, mean_x0, mean_latent = coefficients
        x0 = x0_latent * latent + x0_output * out
        if self.config.x0_clip is not None:
            x0 = x0.clamp(-self.config.x0_clip, self.config.x0_clip)
        return mean_x0 * x0 + mean_latent * latent

    # --- behaviour cloning ---------------------------------------------------------------------------------------

    def imitation_exercise(
        self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Observations [B, To, Do], noisy chunks [B, Tp, Da], timesteps [B] that ``network`` serves, and targets."""
        x0 = self.action_scaler.normalize(action)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        timestep = torch.randint(self.num_steps, (len(x0),), generator=generator, device=x0.device)
        alpha_bar = self.alpha_bar[timestep][:, None, None]
        latent = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        return obs, latent, timestep, training_target(self.config.prediction, x0, noise, alpha_bar)

    def exercise_losses(self, obs: Tensor, latent: Tensor, timestep: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the denoiser's output, [B]."""
        output = self.network(latent, timestep, self.normalize_obs(obs).flatten(1))
        return (output - target).square().flatten(1).mean(1)
