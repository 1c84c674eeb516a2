"""The diffusion policy: a denoising chain whose last K' steps are an inner MDP (Ren et al. 2024, section 4.1).

| code | paper |
|---|---|
| denoising_steps | S, the timesteps that the network was pretrained on; the chain takes K of them, for DDPM all |
| finetuned_steps, num_steps | K', the last ones, which RL trains on a copy of the network |
| step k = 0 .. K'-1 | denoising index k = K'-1 .. 0 (here: row K'-1-k of the kernel) |
| exploration_std, likelihood_std | sigma_exp^min, sigma_prob^min |
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from policies.base import Policy, PolicyConfig, Sample
from policies.errors import UserError
from policies.eta import Eta
from policies.networks.denoiser import Denoiser
from policies.networks.registry import build_denoiser
from policies.normalization import Affine
from policies.samplers import Kernel, Sampler
from policies.schedules import BetaSchedule, Prediction, check_timesteps, denoising_exercise, noise_levels

EVALUATION_STD = 1e-3
"""Floor of the std while evaluating, at every step but the last, which adds no noise."""


@dataclass(frozen=True)
class DiffusionConfig(PolicyConfig):
    """Settings of a `DiffusionPolicy`."""

    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    """The denoising network as plain data, see `policies.networks.registry`."""
    denoising_steps: int = 20
    """S, the timesteps of the noise schedule, all of which the network is pretrained on."""
    sampler: Sampler = field(default_factory=Sampler)
    """The K steps of the chain: by default all timesteps (DDPM)."""
    finetuned_steps: int | None = None
    """K' in [1, K]: the last steps are trained on a copy, the others stay frozen. None: all of them, nothing frozen."""
    prediction: Prediction = "epsilon"
    """What the network predicts."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """Noise schedule, by its diffusers name."""
    beta_range: tuple[float, float] = (1e-4, 0.02)
    """The first and the last beta of a linear schedule."""
    x0_clip: float | None = 1.0
    """Clip of the predicted clean chunk, in normalised units."""
    noise_clip: float | None = 3.0
    """Clip of the standard normal noise that each step adds."""
    final_clip: float | None = None
    """Clip of the chunk that leaves the chain, in normalised units; scored is what was sampled."""
    exploration_std: float = 0.1
    """Floor of the std while exploring, including at the last step, in normalised units."""
    exploring_steps: Literal["all", "last"] = "all"
    """Which steps have that floor; the others keep the sampler's own std, that of DDIM with eta = 0 none."""
    likelihood_std: float = 0.1
    """Floor of the std while scoring."""

    adjustable: ClassVar[frozenset[str]] = frozenset(
        {"executed", "finetuned_steps", "sampler", "x0_clip", "noise_clip", "final_clip", "likelihood_std"}
        | {"exploration_std", "exploring_steps"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_timesteps(self.denoising_steps)
        steps = len(self.sampler.timesteps(self.denoising_steps))
        if self.finetuned_steps is not None and not 1 <= self.finetuned_steps <= steps:
            what = "denoising_steps" if self.sampler.steps is None else "sampler.steps"
            raise ValueError(f"finetuned_steps must lie between 1 and {what} = {steps}, not {self.finetuned_steps}")
        if not 0 < self.beta_range[0] <= self.beta_range[1] < 1:
            raise ValueError(f"beta_range must be two numbers that grow within (0, 1), not {list(self.beta_range)}")
        if not (self.likelihood_std > 0 and self.exploration_std >= 0):
            raise ValueError("likelihood_std must be positive and exploration_std not negative")
        for name in ("x0_clip", "noise_clip", "final_clip"):
            clip = getattr(self, name)
            if clip is not None and not clip > 0:
                raise ValueError(f"{name} must be positive, or null for no clip, not {clip}")


Stds = Sequence[Any]
"""Of each row of a kernel: numbers, or tensors [B or 1, 1, Da or 1]."""


class DiffusionPolicy(Policy, type="diffusion"):
    """A denoising chain (DDPM, DDIM) over action chunks, conditioned on the observation history."""

    Config = DiffusionConfig
    config: DiffusionConfig

    action_scaler: Affine
    alpha_bar: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self.timesteps = config.sampler.timesteps(config.denoising_steps)
        """Those of the K steps, growing: the chain goes through them backwards."""
        self.num_steps = config.finetuned_steps or len(self.timesteps)
        self.latent_shape = (config.chunk, config.action_dim)
        obs_shape = (config.history, config.obs_dim)
        self.network = build_denoiser(config.network, self.latent_shape, obs_shape, config.denoising_steps)
        """The denoiser of the last K' steps: what pretraining and RL train."""
        self.frozen = None
        """The denoiser of the steps before them; None where there are none."""
        if self.num_steps < len(self.timesteps):
            self.frozen = copy.deepcopy(self.network).requires_grad_(False)
        self.eta = None
        """Where it is learned."""
        if config.sampler.learned_eta is not None:
            self.eta = Eta(config.sampler, config.history * config.obs_dim, config.action_dim)
        with torch.device("cpu"):  # also where the weights are to have no memory yet: these are numbers to compute with
            levels = noise_levels(config.denoising_steps, config.beta_schedule, config.beta_range)
            kernel = partial(Kernel, levels, config.prediction, config.sampler, x0_clip=config.x0_clip)
            self.kernel = kernel(eta=None if self.eta is not None else config.sampler.eta)
            """The steps while exploring, and as they are scored."""
            self.evaluation_kernel = self.kernel
            """The steps in evaluation."""
            if self.eta is not None or config.sampler.eta != config.sampler.evaluation_eta:
                self.evaluation_kernel = kernel(eta=config.sampler.evaluation_eta)
        self.register_buffer("alpha_bar", levels.alpha_bar, persistent=False)  # [S]
        self._unit_stds: list[float] = self.kernel.unit_std.tolist()
        self.exploration_std = config.exploration_std
        """The floor now, which may be annealed."""

    @property
    def network_timesteps(self) -> int:
        """``network`` serves the timesteps below this one, ``frozen`` those from there on."""
        return self.config.denoising_steps if self.frozen is None else self.timesteps[self.num_steps - 1] + 1

    # --- other settings for the same weights -------------------------------------------------------------------------

    def with_sampler(self, sampler: Sampler) -> Self:
        """The same networks under another sampler, each at the timesteps that it serves now.

        Raises:
            UserError: none of its steps is among those that were fine-tuned, or it does not fit the schedule.
        """
        finetuned = None
        if self.frozen is not None:
            timesteps = _timesteps(sampler, self.config.denoising_steps)
            finetuned = sum(timestep < self.network_timesteps for timestep in timesteps)
            if not finetuned:
                raise UserError(
                    f"sampler.offset={sampler.offset} leaves no step to what was fine-tuned, which are the timesteps "
                    f"below {self.network_timesteps}"
                )
        return self.adjusted(sampler=dataclasses.asdict(sampler), finetuned_steps=finetuned)

    def with_fewer_finetuned_steps(self, steps: int) -> Self:
        """A copy that goes on training its last ``steps`` steps, and whose frozen steps are what was learned so far."""
        shorter = type(self)(dataclasses.replace(self.config, finetuned_steps=steps))
        weights = {name: weight for name, weight in self.state_dict().items() if not name.startswith("frozen.")}
        shorter.load_state_dict(weights | _frozen(weights))
        return self.handed_on(shorter)

    def _weights_for(self, other: Self) -> dict[str, Tensor]:
        """A pretrained policy's weights serve both as the frozen denoiser and as the fine-tuned copy's start."""
        weights = self.state_dict()
        if self.frozen is None and other.frozen is not None:
            weights |= _frozen(weights)
        elif self.frozen is not None and [t < self.network_timesteps for t in other.timesteps] != [
            index < other.num_steps for index in range(len(other.timesteps))
        ]:
            raise UserError(
                f"policy.finetuned_steps={other.num_steps} does not fit a checkpoint that was already fine-tuned on "
                f"its last {self.num_steps} steps; leave it out, or start from the pretrained checkpoint"
            )
        if other.frozen is None:
            weights = {name: weight for name, weight in weights.items() if not name.startswith("frozen.")}
        if _eta_settings(self.config.sampler) == _eta_settings(other.config.sampler):
            return weights
        weights = {name: weight for name, weight in weights.items() if not name.startswith("eta.")}
        return weights | {name: weight for name, weight in other.state_dict().items() if name.startswith("eta.")}

    # --- acting --------------------------------------------------------------------------------------------------

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal [B, 1 + K, Tp, Da]: the start, then one draw for each denoising step."""
        shape = (batch, 1 + len(self.timesteps), *self.latent_shape)
        return torch.randn(shape, generator=generator, device=self.alpha_bar.device)

    @cached_property
    def products_per_sample(self) -> int:
        return len(self.timesteps) * sum(parameter.numel() for parameter in self.network.parameters())

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        clip = self.config.noise_clip
        added = noise if clip is None else noise.clamp(-clip, clip)
        context = self.normalize_obs(obs).flatten(1)
        kernel = self.evaluation_kernel if deterministic else self.kernel
        eta = self._eta(context, deterministic)
        natural = self._natural_stds(eta)
        stds = self._evaluation_stds() if deterministic else self._exploring_stds(natural)

        outputs, means, latents = [], [], [noise[:, 0]]
        for network, rows in self._stages():
            prepared = network.prepare(context)
            for i in rows:
                outputs.append(network.forward_prepared(latents[-1], self.timesteps[i], prepared))
                means.append(kernel.mean(outputs[-1], latents[-1], kernel.row(i), eta))
                latents.append(_with_noise(means[-1], added[:, -1 - i], stds[i]))

        chain = torch.stack(latents[-1 - self.num_steps :], dim=1)  # [B, K'+1, Tp, Da]
        if kernel is not self.kernel:  # what is scored is not how it acted
            eta = self._eta(context, deterministic=False)
            natural = self._natural_stds(eta)
            means = self._means(outputs[-self.num_steps :], chain, eta)
        law = Normal(torch.stack(means[-self.num_steps :], dim=1), self._scoring_stds(natural), validate_args=False)
        return Sample(self._action(latents[-1]), chain, law.log_prob(chain[:, 1:]))

    def _stages(self) -> list[tuple[Denoiser, range]]:
        """Each network with the rows of the kernel that it serves, in the order of denoising."""
        trained = (self.network, range(self.num_steps - 1, -1, -1))
        if self.frozen is None:
            return [trained]
        return [(self.frozen, range(len(self.timesteps) - 1, self.num_steps - 1, -1)), trained]

    def _means(self, outputs: list[Tensor], chain: Tensor, eta: Tensor | float) -> list[Tensor]:
        """Of the K' steps, as they are scored, from the network's outputs."""
        rows = range(self.num_steps - 1, -1, -1)
        steps = zip(outputs, chain.unbind(1), rows, strict=False)
        return [self.kernel.mean(out, latent, self.kernel.row(i), eta) for out, latent, i in steps]

    def _eta(self, context: Tensor, deterministic: bool) -> Tensor | float:
        """A number or, where it is learned, [B or 1, 1, Da or 1]."""
        if deterministic:
            return self.config.sampler.evaluation_eta
        return self.config.sampler.eta if self.eta is None else self.eta(context)

    @torch.no_grad()
    def watched(self, obs: Tensor) -> dict[str, float]:
        return {} if self.eta is None else {"eta": float(self.eta(self.normalize_obs(obs).flatten(1)).mean())}

    def _natural_stds(self, eta: Tensor | float) -> Stds:
        """eta unit_std of each row of the kernel, before any floor: numbers, or [B or 1, 1, Da or 1]."""
        return [eta * std for std in self._unit_stds]

    def _evaluation_stds(self) -> Stds:
        eta = self.config.sampler.evaluation_eta
        if eta == 0:
            return [0.0] * len(self._unit_stds)
        return [0.0, *(max(eta * std, EVALUATION_STD) for std in self._unit_stds[1:])]

    def _exploring_stds(self, natural: Stds) -> Stds:
        if self.config.exploring_steps == "last":
            return [_at_least(self.exploration_std, natural[0]), *natural[1:]]
        return [_at_least(self.exploration_std, std) for std in natural]

    def _scoring_stds(self, natural: Stds) -> Tensor:
        """[B or 1, K', 1, Da or 1]."""
        stds = [torch.as_tensor(natural[i], device=self.alpha_bar.device) for i in range(self.num_steps - 1, -1, -1)]
        floored = torch.stack(stds).clamp(min=self.config.likelihood_std)
        return floored[:, None, None] if self.eta is None else floored.transpose(0, 1)

    def _action(self, latent: Tensor) -> Tensor:
        clip, latent = self.config.final_clip, latent[:, self.config.executed_part]
        return self.action_scaler.denormalize(latent if clip is None else latent.clamp(-clip, clip))

    # --- scoring -------------------------------------------------------------------------------------------------

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        row = self.num_steps - 1 - step
        context = self.normalize_obs(obs).flatten(1)
        out = self.network(latent, self.timesteps.start + self.timesteps.step * row, context)
        eta = self._eta(context, deterministic=False)
        natural = eta * self.kernel.unit_std[row][:, None, None]
        mean = self.kernel.mean(out, latent, self.kernel.rows(row), eta)
        std = natural.clamp(min=self.config.likelihood_std)
        return Independent(Normal(mean, std, validate_args=False), 2, validate_args=False)

    # --- behaviour cloning ---------------------------------------------------------------------------------------

    def imitation_exercise(
        self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Observations [B, To, Do], noisy chunks [B, Tp, Da], timesteps [B] that ``network`` serves, and targets.

        Besides, its `Denoiser.draw_dropout`.
        """
        x0 = self.action_scaler.normalize(action)
        served = self.alpha_bar[: self.network_timesteps]
        latent, timestep, target = denoising_exercise(x0, served, self.config.prediction, generator)
        return obs, latent, timestep, target, *self.network.draw_dropout(len(x0), generator)

    def exercise_losses(
        self, obs: Tensor, latent: Tensor, timestep: Tensor, target: Tensor, *dropout: Tensor
    ) -> Tensor:
        """Mean squared error of the denoiser's output, [B]."""
        output = self.network(latent, timestep, self.normalize_obs(obs).flatten(1), *dropout)
        return (output - target).square().flatten(1).mean(1)


def _with_noise(mean: Tensor, noise: Tensor, std: Any) -> Tensor:
    return torch.addcmul(mean, noise, std) if isinstance(std, Tensor) else torch.add(mean, noise, alpha=std)


def _at_least(floor: float, std: Any) -> Any:
    return std.clamp(min=floor) if isinstance(std, Tensor) else max(std, floor)


def _frozen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained network's weights, as a frozen copy of it names them."""
    return {name.replace("network.", "frozen.", 1): w for name, w in weights.items() if name.startswith("network.")}


def _eta_settings(sampler: Sampler) -> tuple[Any, ...]:
    """What a learned eta begins with and means; where that is changed, it begins anew."""
    return (sampler.learned_eta, sampler.eta, sampler.eta_range) if sampler.learned_eta else ()


def _timesteps(sampler: Sampler, num_timesteps: int) -> range:
    try:
        return sampler.timesteps(num_timesteps)
    except ValueError as error:
        raise UserError(str(error)) from error
