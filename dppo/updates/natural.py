"""Update rules that take one natural-gradient step: NPG (Kakade 2001) and TRPO (Schulman et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from dppo.advantages import inner_discount
from dppo.critic import Critic, LatentCritic
from dppo.precision import computing_in
from dppo.surrogates import divergence_terms, kl_terms, log_ratio, ratio_of
from dppo.threads import map_in_threads, rows_per_part, single_thread
from dppo.updates.batch import Batch, Pairs, split
from dppo.updates.config import UpdateConfig
from dppo.updates.critic_fit import CriticFit
from dppo.updates.faults import Evidence, Skips, of_network
from dppo.updates.fisher import FisherProduct, Solution, conjugate_gradients
from dppo.updates.flat import FlatParameters
from dppo.updates.gradient import MeanOverParts
from dppo.updates.schedule import schedule_factor
from policies import Policy, log_prob_factors

METRICS = (
    *("policy_loss", "improvement", "kl", "kl_last_step", "ratio_kl", "backtracks", "step_failed"),
    *("cg_iterations", "cg_residual", "actor_steps"),
)
"""That an update has only if the policy learns in it."""
KEPT_PRODUCTS = 50_000_000
"""Multiplications of a forward pass up to which the graphs of the Fisher information stay in memory, and are not made
again for each of its products; some tens of MiB at most, with small networks."""


@dataclass(frozen=True)
class NaturalConfig(UpdateConfig):
    """Settings of `NaturalGradient` without a line search: NPG."""

    inner_gamma: float = 0.99
    """Discount per inner step ("denoising discount"); says nothing where K = 1."""
    critic_epochs: int | None = 10
    critic_batch_size: int | None = 256
    max_kl: float = 0.01
    """KL(old || new) that the step may make, summed over action dimensions and inner steps."""
    iterations: int = 15
    """Of conjugate gradients, at most."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher information."""
    tolerance: float = 1e-5
    """Relative residual at which conjugate gradients stop."""
    fisher_share: float = 1.0
    """Share of the pairs, drawn at random in each update, that the Fisher information is computed of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("max_kl", "fisher_share")
        self.check_shares("inner_gamma", "fisher_share")
        self.check_at_least_one("iterations")
        self.check_not_negative("damping", "tolerance")
        if self.critic_epochs is None or self.critic_batch_size is None:
            raise ValueError("critic_epochs and critic_batch_size must be numbers: there are no minibatches to go by")

    def scales(self) -> Iterator[float]:
        """Shares of the whole step to try, one after the other."""
        yield 1.0

    def accepts(self, before: Judgement, after: Judgement) -> bool:
        """Whether to keep the step between two judgements."""
        return math.isfinite(after.objective) and math.isfinite(after.kl)


@dataclass(frozen=True)
class TRPOConfig(NaturalConfig):
    """Settings of `NaturalGradient` with a line search: TRPO."""

    backtracks: int = 10
    """How often a step is shortened before the search has failed."""
    backtrack_factor: float = 0.8
    """By how much each time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("backtracks")
        if not 0 < self.backtrack_factor < 1:
            raise ValueError(f"backtrack_factor must lie between 0 and 1, not {self.backtrack_factor}")

    def scales(self) -> Iterator[float]:
        return (self.backtrack_factor**attempt for attempt in range(self.backtracks + 1))

    def accepts(self, before: Judgement, after: Judgement) -> bool:
        return after.objective > before.objective and after.kl <= self.max_kl


@dataclass(frozen=True)
class Judgement:
    """What a policy is worth by the rollout of the one before it; per environment step, summed over inner steps."""

    objective: float
    """E[sum_k r_k A_k]"""
    kl: float
    """E[sum_k KL(old || new)], an upper bound of the KL of the actions (chain rule and data processing)."""
    last_kl: float
    """Of the last inner step alone."""
    ratio_kl: float
    """Estimate of ``kl`` from the ratios, which are of what was executed."""


class NaturalGradient:
    """One step along F^-1 g a rollout, of all its pairs; the critic is fitted with Adam."""

    def __init__(
        self,
        config: NaturalConfig,
        policy: Policy,
        critic: Critic | LatentCritic | None,
        generator: torch.Generator,
    ) -> None:
        """``generator`` draws the critic's minibatches, and the pairs of the Fisher information."""
        self.config = config
        self.policy = policy
        self.generator = generator
        self.critic_fit = None if critic is None else CriticFit(config, policy, critic, generator)
        self.parameters = FlatParameters(policy.parameters())
        device = self.parameters.values.device
        self.discount = inner_discount(policy.num_steps, config.inner_gamma).to(device)  # [K]
        self.threads = torch.get_num_threads()
        self.skips = Skips("policy")
        self._mean = MeanOverParts(self.parameters, threads=self.threads)

    @single_thread()
    def update(self, batch: Batch, *, progress: float, iteration: int) -> dict[str, float | None]:
        """One update of policy and critic; its metrics. See `FirstOrder.update`."""
        factor = schedule_factor(self.config.schedule, progress, final=self.config.final_learning_rate_share)
        metrics: dict[str, float | None] = dict.fromkeys(METRICS)
        if iteration >= self.config.critic_warmup_iterations:
            metrics |= self._learn(batch)
        if self.critic_fit is not None:
            metrics |= self.critic_fit.fit(batch, epochs=1, minibatches_per_epoch=1, learning_rate_factor=factor)
        return {**metrics, **batch.statistics(), "skipped_updates": self.skips.since_last()}

    def weighted(self, batch: Batch) -> Batch:
        """A rollout with advantages as the surrogate takes them."""
        return replace(batch, advantages=self.config.weights(batch.advantages, self.discount))

    def _learn(self, batch: Batch) -> dict[str, float]:
        batch = self.weighted(batch)
        values = self.parameters.values
        self.parameters.check_views()
        laws: list[Distribution] = []
        before = self._judge(batch, laws)
        gradient = self._gradient(batch)
        solution = self._natural(batch, gradient)
        evidence = partial(self._evidence, batch, before, gradient, solution)
        if not self.skips.permits(before.objective, float(gradient.norm()), solution.quadratic, evidence=evidence):
            return {"step_failed": 1.0, "actor_steps": 0}
        old, after, kept = values.clone(), before, False
        attempts = 0
        if solution.quadratic > 0:
            step = math.sqrt(2 * self.config.max_kl / solution.quadratic) * solution.x
            for scale in self.config.scales():
                values.copy_(old + scale * step)
                attempts += 1
                after = self._judge(batch, laws)
                if kept := self.config.accepts(before, after):
                    break
            if not kept:
                values.copy_(old)
                after = before
        return {
            "policy_loss": -before.objective,
            "improvement": after.objective - before.objective,
            "kl": after.kl,
            "kl_last_step": after.last_kl,
            "ratio_kl": after.ratio_kl,
            "backtracks": max(attempts - 1, 0),
            "step_failed": float(not kept),
            "cg_iterations": solution.iterations,
            "cg_residual": solution.residual,
            "actor_steps": int(kept),
        }

    def _law(self, pairs: Pairs) -> Distribution:
        with computing_in(self.config.precision, pairs.obs.device):
            return self.policy.transition(pairs.obs, pairs.latent, pairs.step)

    def _log_ratios(self, law: Distribution, pairs: Pairs) -> Tensor:
        new = log_prob_factors(law, pairs.following)
        return log_ratio(new, pairs.log_prob_factors, "sum", executed=self.policy.config.executed_part)

    def _gradient(self, batch: Batch) -> Tensor:
        """[P], of `Judgement.objective`."""

        def of_part(part: tuple[Tensor, ...], memory: Tensor | None) -> tuple[Tensor, None]:
            pairs = batch.pairs(part[0])
            objective = ratio_of(self._log_ratios(self._law(pairs), pairs)) * pairs.advantages
            return self.parameters.gradient(objective.mean(), memory), None

        gradient, _ = self._mean(of_part, (_all_pairs(batch),))
        return gradient.mul(batch.num_steps)

    def _evidence(self, batch: Batch, judgement: Judgement, gradient: Tensor, solution: Solution) -> Evidence:
        known = {f"batch/{name}": value for name, value in vars(batch).items() if value is not None}
        numbers = {"loss": torch.tensor(-judgement.objective), "curvature": torch.tensor(solution.quadratic)}
        return {**known, **numbers, **of_network(self.policy, self.parameters, gradient)}

    def _natural(self, batch: Batch, gradient: Tensor) -> Solution:
        """F^-1 g, with F the Fisher information of the actions of an environment step, summed over inner steps."""
        indices = _all_pairs(batch)
        if self.config.fisher_share < 1:
            count = math.ceil(self.config.fisher_share * len(indices))
            order = torch.randperm(len(indices), generator=self.generator, device=self.generator.device)
            indices = order[:count]

        kept: dict[int, FisherProduct] = {}  # by the first pair of a part
        keep = len(indices) * len(self.parameters) <= KEPT_PRODUCTS

        def of_pairs(chosen: Tensor) -> FisherProduct:
            name = int(chosen[0])
            if name in kept:
                return kept[name]
            pairs = batch.pairs(chosen)
            made = FisherProduct(self._law(pairs), pairs.following, self.parameters)
            if keep:
                kept[name] = made
            return made

        def product(vector: Tensor) -> Tensor:
            def of_part(part: tuple[Tensor, ...], memory: Tensor | None) -> tuple[Tensor, None]:
                return of_pairs(part[0])(vector, memory), None

            mean, _ = self._mean(of_part, (indices,))
            return mean.mul(batch.num_steps).add_(vector, alpha=self.config.damping)

        return conjugate_gradients(
            product, gradient, iterations=self.config.iterations, tolerance=self.config.tolerance
        )

    def _judge(self, batch: Batch, laws: list[Distribution]) -> Judgement:
        """The policy as it is; ``laws`` are those of the old policy, part by part, and noted down if there are none."""
        indices = _all_pairs(batch)
        parts = list(split((indices,), rows_per_part(len(indices), len(self.parameters), indices.device)))
        fresh = not laws

        @torch.no_grad()
        def sums(number: int) -> tuple[Distribution, Tensor]:
            pairs = batch.pairs(parts[number][0])
            law = self._law(pairs)
            log_ratios = self._log_ratios(law, pairs)
            kl = torch.zeros_like(log_ratios) if fresh else divergence_terms(laws[number], law, log_ratios)
            last = torch.where(pairs.step == batch.num_steps - 1, kl, 0.0)
            columns = ratio_of(log_ratios) * pairs.advantages, kl, last, kl_terms(log_ratios)
            return law, torch.stack([column.double().sum() for column in columns])

        found = map_in_threads(sums, range(len(parts)), self.threads)
        if fresh:
            laws.extend(law for law, _ in found)
        return Judgement(*(torch.stack([of_part for _, of_part in found]).sum(0) / len(batch)).tolist())

    def state_dict(self) -> dict[str, Any]:
        """The critic's optimiser, what is known of skipped steps, and the state of the generator."""
        fit = {} if self.critic_fit is None else {"critic_optimizer": self.critic_fit.state_dict()}
        return {**fit, "skips": self.skips.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if self.critic_fit is not None:
            self.critic_fit.load_state_dict(state["critic_optimizer"])
        self.skips.load_state_dict(state["skips"])
        self.generator.set_state(state["generator"])


def _all_pairs(batch: Batch) -> Tensor:
    return torch.arange(len(batch) * batch.num_steps, device=batch.obs.device)
