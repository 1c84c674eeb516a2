"""The one interface of every policy, and its records.

A policy is a Markov chain of ``K`` inner steps from a start latent ``z_0`` to an action (Ren et al. 2024, section 4):

    z_0 = start(o),    z_{k+1} ~ pi(. | o, z_k, k),    a = action(z_K)

A Gaussian or categorical policy has ``K = 1``; a diffusion policy has as many as there are fine-tuned denoising steps.

Legend, everywhere: T rollout steps, N environments, B batch, K inner steps, To observation history, Tp predicted chunk,
Ta executed chunk, Do observation dimension, Da action dimension. Axis order: time, env, inner step, chunk, dimension.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

import policies
from policies import pretrained
from policies.config import config_from_dict
from policies.errors import UserError
from policies.normalization import Affine, RunningStandardizer

ObservationScaling = Literal["min_max", "running"]
Other = TypeVar("Other", bound="Policy")
LONGEST = 10_000
"""Most observations or actions in a row."""


@dataclass(frozen=True)
class Sample:
    """What a policy drew for a batch of observations."""

    action: Tensor
    """[B, Ta, Da] in the environment's units; discrete: [B] integers."""
    chain: Tensor
    """[B, K+1, *latent]: the latents z_0 .. z_K."""
    log_prob_factors: Tensor
    """[B, K, *F]: log-likelihood of each inner step, one entry per independent factor (see `log_prob_factors`)."""

    @property
    def log_prob(self) -> Tensor:
        """[B, K]: joint log-likelihood of each inner step."""
        return self.log_prob_factors.flatten(2).sum(-1) if self.log_prob_factors.dim() > 2 else self.log_prob_factors


class Explorer:
    """A policy as it is now, for many calls: draws actions, and tells only afterwards what is to be kept of them.

    Where a few rows go through small layers, everything else that a call does takes longer than they. To be called in
    `torch.inference_mode`, or there will be graphs that nobody needs.
    """

    def __init__(self, draw: Callable[[Tensor, Tensor], Sample]) -> None:
        """``draw`` takes observations [B, To, Do] and noise, as of `Policy.draw_noise`."""
        self._draw = draw

    def draw(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Any]:
        """Actions, as of `Sample`, and what `record` wants to know of the call."""
        sample = self._draw(obs, noise)
        return sample.action, sample

    def record(self, calls: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """``chain`` and ``log_prob_factors``, as of `Sample`, of S calls: [S, B, ...] each."""
        chains, factors = zip(*((sample.chain, sample.log_prob_factors) for sample in calls), strict=True)
        return torch.stack(chains), torch.stack(factors)


def log_prob_factors(distribution: Distribution, value: Tensor) -> Tensor:
    """The log-likelihood of ``value`` before its independent factors are summed.

    Args:
        distribution: batch shape [B]; an `Independent` of, say, a Normal over [Ta, Da] has Ta * Da factors.
        value: [B, *event].

    Returns:
        [B, *F]; the sum over F is ``distribution.log_prob(value)``. F is empty where nothing factorises.
    """
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    return base.log_prob(value)


@dataclass(frozen=True)
class PolicyConfig:
    """What every policy's configuration holds: the shapes of its interface."""

    obs_dim: int
    """Do, the dimension of one observation."""
    action_dim: int
    """Da, the dimension of one action; the number of actions where they are discrete."""
    history: int = 1
    """To, how many of the latest observations the policy sees."""
    chunk: int = 1
    """Tp, how many actions are predicted at once."""
    executed: int | None = None
    """Ta, how many of them are executed before the next prediction (update rules score those only); None: all that are
    left from ``first_executed`` on."""
    first_executed: int = 0
    """The action of a chunk that belongs to the latest observation. Those before it belong to earlier ones: such a
    policy, as Diffusion Policy's, predicts anew what was done already, and neither executes nor scores it."""

    observation_scaling: ObservationScaling = "min_max"
    """``min_max``: to [-1, 1] over the demonstrations; ``running``: by the mean and variance of all that was seen."""

    adjustable: ClassVar[frozenset[str]] = frozenset({"executed"})
    """Fields that may change when a trained policy is fine-tuned; all others are fixed by its weights."""

    def __post_init__(self) -> None:
        for name in ("obs_dim", "action_dim", "history", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("history", "chunk"):  # which need not show in the shape of any weight
            if getattr(self, name) > LONGEST:
                raise ValueError(f"{name} must be at most {LONGEST:,}, not {getattr(self, name):,}")
        if not 0 <= self.first_executed < self.chunk:
            raise ValueError(
                f"first_executed must lie between 0 and chunk - 1 = {self.chunk - 1}, not {self.first_executed}"
            )
        left = self.chunk - self.first_executed
        if self.executed is not None and not 1 <= self.executed <= left:
            less = f" - first_executed = {left}" if self.first_executed else f" = {self.chunk}"
            raise ValueError(f"executed must lie between 1 and chunk{less}, not {self.executed}")

    @property
    def executed_chunk(self) -> int:
        """Ta."""
        return self.executed or self.chunk - self.first_executed

    @property
    def executed_part(self) -> slice:
        """Which actions of a chunk are executed and scored: of its axis, or of any other where they are all."""
        first, count = self.first_executed, self.executed_chunk
        return slice(None) if count == self.chunk else slice(first, first + count)


class Policy(nn.Module):
    """A policy as a Markov chain; subclasses register under the name that ``config.json`` stores as ``type``."""

    Config: ClassVar[type[PolicyConfig]]
    type: ClassVar[str]
    discrete: ClassVar[bool] = False
    compilable: ClassVar[bool] = True
    """Whether a step on a loss of its likelihoods can be one compiled function."""
    registry: ClassVar[dict[str, type[Policy]]] = {}

    num_steps: int
    """K, the number of inner steps."""
    network: Any
    """What is trained, but for single parameters beside it."""

    def __init_subclass__(cls, type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if type is not None:  # torch derives classes of its own, while it exports
            cls.type = type
            Policy.registry[type] = cls

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.metadata: dict[str, Any] = {}
        """Anything that travels with the weights, e.g. the task the policy was trained for."""
        self.obs_scaler: Affine | RunningStandardizer
        self.obs_scaler = (
            Affine(config.obs_dim) if config.observation_scaling == "min_max" else RunningStandardizer(config.obs_dim)
        )
        self.action_scaler = None if self.discrete else Affine(config.action_dim)

    # --- the interface that rollouts and update rules use -------------------------------------------------------

    def draw_noise(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """All the randomness of one `sample` for a batch [B, ...], on the policy's device, as is the generator."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        obs: Tensor,
        *,
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Sample:
        """Draw an action for each observation; row by row, so parts of a batch may be sampled apart.

        Args:
            obs: [B, To, Do] in the environment's units.
            deterministic: act as in evaluation (no exploration noise; a diffusion policy still starts from noise).
            generator: source of the noise; must live on the device of ``obs``.
            noise: as of `draw_noise`, in place of a generator.
        """
        return self._sample(obs, self.draw_noise(len(obs), generator) if noise is None else noise, deterministic)

    def _sample(self, obs: Tensor, noise: Tensor, deterministic: bool) -> Sample:
        """What `sample` does, without a graph."""
        raise NotImplementedError

    def explorer(self) -> Explorer:
        """Exploring `sample` for many calls with the weights and scaling as they are now, the same to the last bit."""
        return Explorer(lambda obs, noise: self.sample(obs, noise=noise))

    @cached_property
    def products_per_sample(self) -> int:
        """About how many multiplications `sample` takes for one observation."""
        return sum(parameter.numel() for parameter in self.parameters())

    def transition(self, obs: Tensor, latent: Tensor, step: Tensor) -> Distribution:
        """The law of the next latent, as update rules score it.

        Args:
            obs: [B, To, Do] in the environment's units.
            latent: [B, *latent], z_k.
            step: [B] integers k in [0, K), mixed freely.

        Returns:
            A distribution of batch shape [B] whose event is z_{k+1}.
        """
        raise NotImplementedError

    def imitation_loss(self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Behaviour-cloning loss (scalar) on obs [B, To, Do] and action [B, Tp, Da] (discrete: [B])."""
        return self.exercise_losses(*self.imitation_exercise(obs, action, generator)).mean()

    def imitation_exercise(
        self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """What `exercise_losses` takes, all randomness done: tensors of B rows, so parts of them are exercises, too."""
        return obs, action

    def chunk_of(self, latent: Tensor) -> Tensor:
        """The whole chunk [B, Tp, Da] (discrete: [B]) that a last latent z_K [B, *latent] stands for, to imitate it."""
        return latent if self.action_scaler is None else self.action_scaler.denormalize(latent)

    def exercise_losses(self, *exercise: Tensor) -> Tensor:
        """The imitation loss of each row [B]."""
        raise NotImplementedError

    # --- scaling, saved with the weights -------------------------------------------------------------------------

    def normalize_obs(self, obs: Tensor) -> Tensor:
        """Scale observations [..., Do] as the policy's own network sees them; a critic may share it."""
        return self.obs_scaler.normalize(obs)

    def network_input(self, normalized_obs: Tensor) -> Tensor:
        """[B, To, Do] -> what the network sees of scaled observations, [B, To * Do] or less."""
        return normalized_obs.flatten(1)

    def fit_observations(self, low: Tensor, high: Tensor) -> None:
        """Take min-max scaling from the range [Do], [Do] of demonstrations."""
        if isinstance(self.obs_scaler, Affine):
            self.obs_scaler.fit(low, high)

    def fit_actions(self, low: Tensor, high: Tensor) -> None:
        """Let normalised actions in [-1, 1] stand for the range [Da], [Da]; nothing to do for discrete actions."""
        if self.action_scaler is not None:
            self.action_scaler.fit(low, high)

    def watched(self, obs: Tensor) -> dict[str, float]:
        """Numbers that it learns and that are worth watching, by name; means over observations [B, To, Do]."""
        return {}

    def observe(self, obs: Tensor) -> None:
        """Let running statistics (where the policy keeps any) see fresh observations [B, Do]; between updates only."""
        if isinstance(self.obs_scaler, RunningStandardizer):
            self.obs_scaler.update(obs)

    # --- construction, saving and loading -----------------------------------------------------------------------

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Policy:
        """Build an untrained policy from plain data: ``{"type": ..., **fields of its Config}``.

        Raises:
            UserError: an unknown type or field, or a value of the wrong kind.
        """
        policies.import_all()
        fields = dict(config)
        name = fields.pop("type", None)
        if not isinstance(name, str) or name not in Policy.registry:
            raise UserError(f"unknown policy type {name!r}; known are {', '.join(sorted(Policy.registry))}")
        cls = Policy.registry[name]
        return cls(config_from_dict(cls.Config, fields, f"policy {name!r}"))

    def adjusted(self, **changes: Any) -> Self:
        """A copy with other values of the `PolicyConfig.adjustable` fields, and the same weights.

        Raises:
            UserError: a field that is fixed by the weights or unknown, or a value that does not fit it.
        """
        fields = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        config = config_from_dict(type(self.config), {**fields, **changes}, f"policy {self.type!r}")
        fixed = sorted(set(changes) - self.config.adjustable)
        if fixed:
            raise UserError(
                f"policy.{fixed[0]} is fixed by the checkpoint's weights; it can be chosen when pretraining only "
                f"(free to change are: {', '.join(sorted(self.config.adjustable)) or 'none'})"
            )
        copy = type(self)(config)
        copy.load_state_dict(self._weights_for(copy))
        return self.handed_on(copy)

    def handed_on(self, other: Other) -> Other:
        """``other``, made of this policy's weights, with its metadata, on its device and in its mode.

        Not its ``evaluation``, which is of how this one acts.
        """
        other.metadata = {name: value for name, value in self.metadata.items() if name != "evaluation"}
        return other.to(next(self.parameters()).device).train(self.training)

    def _weights_for(self, other: Self) -> dict[str, Tensor]:
        """This policy's weights as ``other``, of an adjusted configuration, names them."""
        return self.state_dict()

    def save_pretrained(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card, ``README.md``, into ``directory``.

        ``name`` is what the card calls it and loads it by; None: the directory.
        """
        pretrained.save(self, Path(directory), name or str(directory))

    @staticmethod
    def from_pretrained(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> Policy:
        """Load what `save_pretrained` wrote; no file content is executed.

        Args:
            source: a directory, or a repository on the Hugging Face Hub: ``owner/name`` or ``owner/name@revision``.
            device: where the policy is to be.

        Raises:
            UserError: a file that is missing, cut short, or does not fit the configuration; a repository that is not
                there or may not be read.
        """
        return pretrained.load(pretrained.directory_of(source)).to(device).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str = "Upload policy",
        token: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the Hugging Face Hub, made if need be; its URL.

        Args:
            repo_id: ``owner/name``.
            private: whether a new repository is; None: as its owner chose.
            revision: the branch; None: main.
            message: of the commit.
            token: None: that of ``hf auth login``, or of HF_TOKEN.

        Raises:
            UserError: it cannot be reached, or not be written to.
        """
        return pretrained.push(self, repo_id, private=private, revision=revision, message=message, token=token)
