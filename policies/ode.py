"""The probability-flow policy: the deterministic denoising ODE, and with it the exact likelihood of an action.

A chain of one step, whose law is that of what the flow makes of Gaussian noise (Song et al. 2021, "Score-based
generative modeling through stochastic differential equations", eq. 13 for the flow and eq. 39 for its likelihood). It
is what Ren et al. 2024 compare DPPO with: a policy gradient of the action itself instead of the denoising steps.

| code | meaning |
|---|---|
| level | u = asinh(noise / signal), with signal = sqrt(alpha_bar) = sech u and noise = tanh u: 0 is clean |
| predicted | epsilon(z, u), the noise that the network sees in a latent |

A diffusion that preserves variance has the flow dz/dt = (d log signal / dt) (z - epsilon / noise), and by the level in
place of the time it is dz/du = epsilon - tanh(u) z: no coefficient of it is singular, neither at the clean end nor at
the other, and how the schedule runs through the levels no longer matters. So nothing of it has to be interpolated.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from policies.base import Policy, PolicyConfig, Sample
from policies.chain import DiffusionPolicy
from policies.errors import UserError
from policies.networks.registry import build_denoiser
from policies.normalization import Affine
from policies.schedules import (
    MOST_TIMESTEPS,
    BetaSchedule,
    Prediction,
    check_timesteps,
    denoising_exercise,
    noise_coefficients,
    noise_levels,
)

MOST_SOLVER_STEPS = 1000
"""Of one timestep."""

Solver = Literal["euler", "midpoint", "heun2", "heun3", "rk4"]
"""Of fixed steps: a row's solution then depends on no other row, and its derivative is that of what was computed."""


@dataclass(frozen=True)
class ODEConfig(PolicyConfig):
    """Settings of an `ODEPolicy`; there is no clip of x0, which would break the flow's smoothness."""

    network: Mapping[str, Any] = field(default_factory=lambda: {"type": "mlp"})
    """The denoising network as plain data, see `policies.networks.registry`."""
    denoising_steps: int = 20
    """S, the timesteps of the noise schedule, all of which the network is pretrained on."""
    prediction: Prediction = "epsilon"
    """What the network predicts."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """Noise schedule, by its diffusers name."""
    beta_range: tuple[float, float] = (1e-4, 0.02)
    """The first and the last beta of a linear schedule."""
    solver: Solver = "rk4"
    """By its torchdiffeq name."""
    solver_steps: int = 1
    """For each timestep that the flow uses."""
    flow_timesteps: int | None = None
    """The flow uses so many of the S timesteps, equally spaced, the first and the last among them; None: all."""
    relu_sharpness: float = 30.0
    """Every ReLU of the network becomes softplus(s x) / s, at most log 2 / s above it."""
    divergence: Literal["exact", "hutchinson"] = "exact"
    """The trace of the flow's Jacobian: ``exact``, a product with it for each dimension of the chunk, or estimated by
    one product with random signs, which are drawn with the action and kept with it (Grathwohl et al. 2019)."""

    adjustable: ClassVar[frozenset[str]] = frozenset(
        {"executed", "solver", "solver_steps", "flow_timesteps", "relu_sharpness", "divergence"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_timesteps(self.denoising_steps)
        if not 1 <= self.solver_steps <= MOST_SOLVER_STEPS:
            raise ValueError(f"solver_steps must lie between 1 and {MOST_SOLVER_STEPS}, not {self.solver_steps}")
        if not self.relu_sharpness > 0:
            raise ValueError(f"relu_sharpness must be positive, not {self.relu_sharpness}")
        if self.flow_timesteps is not None and not 2 <= self.flow_timesteps <= self.denoising_steps:
            raise ValueError(
                f"flow_timesteps must lie between 2 and denoising_steps = {self.denoising_steps}, or be null for all "
                f"of them, not {self.flow_timesteps}"
            )
        steps = (self.flow_timesteps or self.denoising_steps) * self.solver_steps
        if steps > MOST_TIMESTEPS:  # each has a state in memory
            raise ValueError(f"solver_steps must make at most {MOST_TIMESTEPS:,} of all timesteps, not {steps:,}")
        if not 0 < self.beta_range[0] <= self.beta_range[1] < 1:
            raise ValueError(f"beta_range must be two numbers that grow within (0, 1), not {list(self.beta_range)}")


class ODEPolicy(Policy, type="diffusion_ode"):
    """A diffusion policy's probability flow, from standard normal noise at the last timestep to a clean chunk.

    A network knows the timesteps that it was trained on and no other. So the flow takes at each level what the network
    says at the nearest timestep, whose noise prediction also serves below the first timestep, down to the clean end.
    It is the flow of the data but for the distance of timesteps; whatever the network, though, it is a flow, and the
    likelihood is its own. Steps of the solver end where the timestep changes.

    How exact the likelihood is, is a matter of the solver. `sample` scores with the law of `transition`, so that the
    ratio of a policy to itself is 1; but the noise that the way back leads to is where the way there began up to the
    solver's error only. The Jacobian of a network of ReLUs jumps, and the gradient of its divergence has nothing of how
    the jumps move: on the pretrained policy for Hopper, it was several times too long and pointed elsewhere than finite
    differences do. So ReLUs are smoothed.

    The whole chunk is scored, also where it is not executed to its end: there are no factors to leave out. In
    evaluation it acts as it explores: all its noise is that of the start.
    """

    Config = ODEConfig
    config: ODEConfig
    action_scaler: Affine
    alpha_bar: Tensor
    grid: Tensor
    compilable = False
    num_steps = 1

    def __init__(self, config: ODEConfig) -> None:
        super().__init__(config)
        self.latent_shape = (config.chunk, config.action_dim)
        obs_shape = (config.history, config.obs_dim)
        self.network = build_denoiser(config.network, self.latent_shape, obs_shape, config.denoising_steps)
        _smooth(self.network, config.relu_sharpness)
        with torch.device("cpu"):  # also where the weights are to have no memory yet: these are numbers to compute with
            levels = noise_levels(config.denoising_steps, config.beta_schedule, config.beta_range)
            count = config.flow_timesteps or config.denoising_steps
            spread = torch.linspace(0, config.denoising_steps - 1, count, dtype=torch.float64)
            self._timesteps: list[int] = spread.round().long().tolist()
            alpha_bar = levels.alpha_bar.double()[self._timesteps]
            self._edges, grid = _grid((1 / alpha_bar - 1).sqrt().asinh(), config.solver_steps)
        self.register_buffer("alpha_bar", levels.alpha_bar, persistent=False)  # [S]
        self.register_buffer("grid", grid, persistent=False)
        """Levels from 0 on, between which the solver steps."""
        columns = noise_coefficients(alpha_bar, config.prediction)
        self._rows: list[tuple[float, float]] = list(zip(*(column.tolist() for column in columns), strict=True))

    @staticmethod
    def from_diffusion(policy: DiffusionPolicy) -> ODEPolicy:
        """The flow of a diffusion policy, with the same weights, scalings and metadata.

        Raises:
            UserError: the policy has been fine-tuned, and its first steps are those of another network.
        """
        if policy.frozen is not None:
            raise UserError(
                f"a flow has one network, but this diffusion policy was fine-tuned on its last {policy.num_steps} "
                f"steps and has two; start from the pretrained checkpoint, or finetune it with policy.finetuned_steps="
                f"{len(policy.timesteps)}"
            )
        shared = {field.name for field in fields(ODEConfig)} & {field.name for field in fields(policy.config)}
        flow = ODEPolicy(ODEConfig(**{name: getattr(policy.config, name) for name in shared}))
        weights = {name: weight for name, weight in policy.state_dict().items() if not name.startswith("eta.")}
        flow.load_state_dict(weights)
        return policy.handed_on(flow)

    # --- acting and scoring ---------------------------------------------------------------------------------------

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal [B, 1 or 2, Tp, Da]: the start, then what the signs of a probe are taken of, if any."""
        draws = 2 if self.config.divergence == "hutchinson" else 1
        shape = (batch, draws, *self.latent_shape)
        return torch.randn(shape, generator=generator, device=self.alpha_bar.device)

    @property
    def products_per_sample(self) -> int:
        traced = math.prod(self.latent_shape) if self.config.divergence == "exact" else 1
        evaluations = STAGES[self.config.solver] * (len(self.grid) - 1)
        return (2 + traced) * evaluations * sum(parameter.numel() for parameter in self.network.parameters())

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        # A divergence is a derivative, which inference mode forbids, and of tensors made in it, too.
        with torch.inference_mode(False), torch.no_grad():
            law = self._law(obs.clone(), probe := self._probe(noise.clone()))
            latent = law.from_noise(noise[:, 0].clone())
            scores = law.log_prob(latent)
        action = self.action_scaler.denormalize(latent[:, self.config.executed_part])
        return Sample(action, torch.stack([probe, latent], dim=1), scores[:, None])

    def _probe(self, noise: Tensor) -> Tensor:
        """z_0 [B, Tp, Da]: the signs that the divergence is estimated with; where it is exact, zeros."""
        if self.config.divergence == "exact":
            return torch.zeros_like(noise[:, 0])
        return torch.where(noise[:, 1] < 0, -1.0, 1.0)

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        return self._law(obs, latent)

    def _law(self, obs: Tensor, probe: Tensor) -> FlowLaw:
        signs = None if self.config.divergence == "exact" else probe
        context = self.normalize_obs(obs).flatten(1)
        return FlowLaw(self._field, context, self.grid, self.config.solver, signs, self.latent_shape)

    def _field(self, context: Tensor) -> Field:
        """dz/du [B, Tp, Da] on scaled observations [B, To * Do], as a function of level and latents."""
        prepared = self.network.prepare(context)

        def derivative(level: float, latent: Tensor) -> Tensor:
            index = bisect(self._edges, level)
            of_latent, of_output = self._rows[index]
            out = self.network.forward_prepared(latent, self._timesteps[index], prepared)
            return of_output * out + (of_latent - math.tanh(level)) * latent

        return derivative

    # --- behaviour cloning ----------------------------------------------------------------------------------------

    def imitation_exercise(
        self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """As of a `DiffusionPolicy`: the flow is trained as the denoiser that it is made of."""
        x0 = self.action_scaler.normalize(action)
        noised = denoising_exercise(x0, self.alpha_bar, self.config.prediction, generator)
        return obs, *noised, *self.network.draw_dropout(len(x0), generator)

    def exercise_losses(
        self, obs: Tensor, latent: Tensor, timestep: Tensor, target: Tensor, *dropout: Tensor
    ) -> Tensor:
        """Mean squared error of the denoiser's output, [B]."""
        output = self.network(latent, timestep, self.normalize_obs(obs).flatten(1), *dropout)
        return (output - target).square().flatten(1).mean(1)


STAGES: dict[str, int] = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""Evaluations of the network that a step of a solver takes."""

STEP_OVER = {"perturb": True}
"""Of the solver: a step looks at its two ends from within, since beyond them another timestep may be the nearest."""

Field = Callable[[float, Tensor], Tensor]
"""dz/du at a level and latents [B, Tp, Da]."""


class FlowLaw(Distribution):
    """What a flow makes of standard normal noise.

    log p(a) = log N(z) + integral of the divergence of dz/du over the way back from the chunk a to the noise z, which
    is a solution of the same ODE (Chen et al. 2018, theorem 1). Solved in float32, inside autocast too: the likelihood
    is a sum over hundreds of Jacobians.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        make_field: Callable[[Tensor], Field],
        context: Tensor,
        grid: Tensor,
        solver: Solver,
        probe: Tensor | None,
        shape: tuple[int, int],
    ) -> None:
        """Args: ``make_field`` of a context [B, C]; the levels ``grid`` from 0 on; ``probe`` [B, Tp, Da] or None."""
        super().__init__(torch.Size(context.shape[:1]), torch.Size(shape), validate_args=False)
        self._make_field = make_field
        self._context = context
        self._grid = grid
        self._solver = solver
        self._probe = probe

    def from_noise(self, noise: Tensor) -> Tensor:
        """The chunks [B, Tp, Da] that the flow makes of noise [B, Tp, Da]."""
        derivative = self._make_field(self._context)

        def moved(level: Tensor, latent: Tensor) -> Tensor:
            return derivative(float(level), latent)

        way = _odeint()(moved, noise, self._grid.flip(0), method=self._solver, options=STEP_OVER)
        assert isinstance(way, Tensor)
        return way[-1]

    def log_prob(self, value: Tensor) -> Tensor:
        """[B]; with a graph to the network's parameters where gradients are enabled."""
        return self.to_noise(value)[1]

    def to_noise(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The noise [B, Tp, Da] that the flow makes chunks [B, Tp, Da] of, and their log-likelihood [B]."""
        learning = torch.is_grad_enabled()
        with torch.autocast(value.device.type, enabled=False):
            derivative = self._make_field(self._context)
            probes = _unit_vectors(value) if self._probe is None else self._probe[None]

            def moved(level: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                return _with_divergence(derivative, float(level), state[0], probes, learning=learning)

            start = value, value.new_zeros(len(value))
            latents, divergences = _odeint()(moved, start, self._grid, method=self._solver, options=STEP_OVER)
            noise = latents[-1]
            density = -0.5 * (noise.square() + math.log(2 * math.pi)).flatten(1).sum(1)
            return noise, density + divergences[-1]


def _smooth(network: nn.Module, sharpness: float) -> None:
    """Put softplus in place of each ReLU, which has no weights."""
    for name, layer in network.named_children():
        if isinstance(layer, nn.ReLU):
            setattr(network, name, nn.Softplus(sharpness))
        else:
            _smooth(layer, sharpness)


def _unit_vectors(like: Tensor) -> Tensor:
    """[Tp * Da, B, Tp, Da]."""
    size = like[0].numel()
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return eye.view(size, 1, *like.shape[1:]).expand(size, *like.shape)


def _with_divergence(
    derivative: Field, level: float, latent: Tensor, probes: Tensor, *, learning: bool
) -> tuple[Tensor, Tensor]:
    """dz/du [B, Tp, Da], and sums over probes e [P, B, Tp, Da] of e^T J e [B], the trace of J where they are units.

    The Jacobian is that of reverse mode, since torch's forward mode has one state for all threads.
    """
    with torch.enable_grad():
        latent = latent if learning and latent.requires_grad else latent.detach().requires_grad_()
        moved = derivative(level, latent)
        if learning:  # one by one: of some layers, torch has no second derivative of a batch of products
            pulled = torch.stack([torch.autograd.grad(moved, latent, probe, create_graph=True)[0] for probe in probes])
        else:
            (pulled,) = torch.autograd.grad(moved, latent, probes, is_grads_batched=True)
        trace = (pulled * probes).flatten(2).sum(2).sum(0)
    return (moved, trace) if learning else (moved.detach(), trace.detach())


def _grid(levels: Tensor, steps: int) -> tuple[list[float], Tensor]:
    """The levels between those [n] at which the nearest changes, and where the solver steps: ``steps`` in each cell.

    Nearest by the angle, whose tangent is sinh u, since it is by the angle that the flow moves evenly. The first cell,
    of both what lies below the first level and above it, where the flow contracts most, has three times so many.
    """
    angles = levels.sinh().arctan()
    edges = ((angles[1:] + angles[:-1]) / 2).tan().asinh()
    first, last = levels[:1], levels[1:][-1:]  # where there is one level alone, it is not the last of others
    ends = torch.cat([torch.zeros_like(first), first / 2, first, edges, last])
    shares = torch.arange(steps, dtype=levels.dtype) / steps
    inner = ends[:-1, None] + shares * (ends[1:] - ends[:-1])[:, None]
    return edges.float().tolist(), torch.cat([inner.flatten(), ends[-1:]]).float()


def _odeint() -> Callable[..., Any]:
    """torchdiffeq's; imported when needed, since scipy comes with it."""
    from torchdiffeq import odeint

    return odeint
