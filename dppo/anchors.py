"""What keeps a policy near the one that fine-tuning starts from, or near demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dppo.data.demos import WindowDataset
from dppo.rollout import Rollout
from dppo.surrogates import closed_divergences, log_ratio, ratio_of
from dppo.threads import map_in_threads, rows_per_part, sample_in_parts
from dppo.updates.batch import Batch
from dppo.updates.extra import ExtraLoss, Scored
from dppo.updates.reference import Reference
from policies import Policy, log_prob_factors

SAMPLED = 16_384
"""Chains that are sampled at once; bounds the memory of what lies between layers."""


@dataclass(frozen=True)
class AnchorConfig:
    """Settings of any anchor."""

    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if not self.coefficient > 0:
            raise ValueError(f"coefficient must be positive, not {self.coefficient}; for no anchor, choose anchor=none")


@dataclass(frozen=True)
class ReplayConfig(AnchorConfig):
    """Settings of `Replay`."""

    dataset: str | None = None
    """Minari id; None: the task's own."""


CONFIGS: dict[str, type[AnchorConfig]] = {
    "imitation": AnchorConfig,
    "kl": AnchorConfig,
    "kl_reward": AnchorConfig,
    "replay": ReplayConfig,
}
"""The settings of each by its name; there is none, too."""


class KLPenalty(ExtraLoss):
    """KL(new || first) of the laws of inner steps, at the latents that were visited."""

    name = "anchor_kl"

    def __init__(self, coefficient: float, first: Policy) -> None:
        """``first`` is copied as it is now."""
        self.coefficient = coefficient
        self.reference = Reference(first)

    def losses(self, policy: Policy, scored: Scored) -> Tensor:
        executed = policy.config.executed_part
        first = self.reference.law(scored.pairs)
        divergences = closed_divergences(scored.law, first, executed)
        if divergences is not None:
            return divergences
        # Without a closed form: r log(new / first) of what was sampled, whose mean and gradient are those of the KL.
        old = log_prob_factors(first, scored.pairs.following)
        return ratio_of(scored.log_ratios) * log_ratio(scored.factors, old, "sum", executed=executed)


class Imitation(ExtraLoss):
    """- log-likelihood of what the first policy would have done, a chain sampled for each visited observation.

    ``use_bc_loss`` of the original DPPO, after eq. 2 of Torne et al. 2024 (arXiv 2403.03949).
    """

    name = "imitation_loss"

    def __init__(self, coefficient: float, first: Policy) -> None:
        """``first`` is copied as it is now."""
        self.coefficient = coefficient
        self.reference = Reference(first)
        self.threads = torch.get_num_threads()
        self.chain = torch.empty(0)
        """[M, K+1, *latent]"""

    def begin(self, batch: Batch, generator: torch.Generator) -> None:
        policy = self.reference.policy
        chains = []
        for obs in batch.obs.split(SAMPLED):
            noise = policy.draw_noise(len(obs), generator)
            sample = sample_in_parts(policy, obs, noise, deterministic=False, threads=self.threads)
            chains.append(sample.chain)
        self.chain = torch.cat(chains)

    def gather(self, batch: Batch, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        rows, steps = indices // batch.num_steps, indices % batch.num_steps
        return {"teacher_latent": self.chain[rows, steps], "teacher_following": self.chain[rows, steps + 1]}

    def losses(self, policy: Policy, scored: Scored) -> Tensor:
        pairs = scored.pairs
        law = policy.transition(pairs.obs, pairs.extra["teacher_latent"], pairs.step)
        return -scored.log_likelihoods(law, pairs.extra["teacher_following"])


class Replay(ExtraLoss):
    """The imitation loss of demonstrations, as many windows as there are pairs, drawn at random."""

    name = "replay_loss"

    def __init__(self, coefficient: float, policy: Policy, demonstrations: WindowDataset) -> None:
        """The demonstrations are on the policy's device."""
        self.coefficient = coefficient
        self.policy = policy
        self.demonstrations = demonstrations

    def gather(self, batch: Batch, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        size = len(self.demonstrations)
        drawn = torch.randint(size, (len(indices),), generator=generator, device=generator.device)
        exercise = self.policy.imitation_exercise(*self.demonstrations.batch(drawn), generator=generator)
        return {f"replay_{number}": column for number, column in enumerate(exercise)}

    def losses(self, policy: Policy, scored: Scored) -> Tensor:
        extra = scored.pairs.extra
        return policy.exercise_losses(*(column for name, column in extra.items() if name.startswith("replay_")))


class KLReward:
    """Less reward for leaving the first policy: by log(pi / first) of the chain that led to an action.

    Its mean is the KL(pi || first) of the chain, so that an expected return less it is maximised (as Ziegler et al.
    2019, eq. 2, do for single actions).
    """

    def __init__(self, coefficient: float, first: Policy) -> None:
        """``first`` is copied as it is now."""
        self.coefficient = coefficient
        self.reference = Reference(first)

    def adjusted(self, rollout: Rollout) -> tuple[Rollout, dict[str, float]]:
        """The rollout with other rewards, and the mean of the log-ratio as a metric."""
        log_ratios = torch.where(rollout.valid, self._log_ratios(rollout), 0.0)
        rewards = rollout.step_rewards.clone()
        rewards[..., 0] -= self.coefficient * log_ratios
        mean = float(log_ratios.sum() / rollout.valid.sum())
        return replace(rollout, step_rewards=rewards), {"anchor_kl": mean}

    def _log_ratios(self, rollout: Rollout) -> Tensor:
        """[T, N], summed over inner steps."""
        policy = self.reference.policy
        steps = policy.num_steps
        rows = rollout.obs.flatten(0, 1), rollout.chain.flatten(0, 1), rollout.log_prob_factors.flatten(0, 1)
        size = sum(parameter.numel() for parameter in policy.network.parameters())
        at_once = max(1, rows_per_part(len(rows[0]) * steps, size, rows[0].device) // steps)

        @torch.no_grad()
        def of_part(part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            obs, chain, factors = part
            step = torch.arange(steps, device=obs.device).repeat(len(obs))
            law = policy.transition(obs.repeat_interleave(steps, 0), chain[:, :-1].flatten(0, 1), step)
            first = log_prob_factors(law, chain[:, 1:].flatten(0, 1))
            found = log_ratio(factors.flatten(0, 1), first, "sum", executed=policy.config.executed_part)
            return found.view(-1, steps).sum(1)

        parts = list(zip(*(column.split(at_once) for column in rows), strict=True))
        return torch.cat(map_in_threads(of_part, parts, torch.get_num_threads())).view(rollout.rewards.shape)


Anchor = KLPenalty | Imitation | Replay | KLReward


def anchor_state(anchor: Anchor | None) -> dict[str, Any]:
    """The policy that it holds on to, as tensors."""
    reference = getattr(anchor, "reference", None)
    return {} if reference is None else reference.policy.state_dict()


def load_anchor_state(anchor: Anchor | None, state: Mapping[str, Any]) -> None:
    """Let it hold on to what `anchor_state` gave."""
    reference = getattr(anchor, "reference", None)
    if reference is not None:
        reference.policy.load_state_dict(state)
