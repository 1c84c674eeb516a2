"""Update rules that take steps of Adam on a surrogate, over the inner steps of any policy: VPG, A2C, PPO, PPO-KL.

Schulman et al. 2017; Ren et al. 2024, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from dppo.advantages import inner_discount
from dppo.critic import AnyCritic, SharedCritic
from dppo.precision import computing_in
from dppo.surrogates import approximate_kl, divergence_terms, entropy_terms, log_ratio
from dppo.threads import single_thread
from dppo.updates.batch import Batch, PairOrder, Pairs, minibatches
from dppo.updates.critic_fit import CriticFit
from dppo.updates.extra import ExtraLoss, Scored, SharedValueLoss
from dppo.updates.first_order_config import FirstOrderConfig
from dppo.updates.objective import Objective, Outcome, Rows
from dppo.updates.optimizer import FlatAdamW
from dppo.updates.reference import Reference
from dppo.updates.schedule import schedule_factor
from dppo.updates.step import make_step
from policies import Policy, UserError, log_prob_factors


class FirstOrder:
    """Minibatch epochs with Adam on a surrogate; the critic is fitted after it, or with it if it is shared."""

    def __init__(
        self,
        config: FirstOrderConfig,
        policy: Policy,
        critic: AnyCritic | None,
        generator: torch.Generator,
        extras: Sequence[ExtraLoss] = (),
    ) -> None:
        """``generator`` draws the minibatches; ``extras`` are further losses of the policy.

        Raises:
            UserError: there are to be more inner steps than the policy has.
        """
        if config.inner_steps is not None and config.inner_steps > policy.num_steps:
            raise UserError(f"algo.inner_steps={config.inner_steps}, but the policy has {policy.num_steps} in all")
        self.config = config
        self.policy = policy
        self.generator = generator
        shared = isinstance(critic, SharedCritic)
        self.critic_fit = None if shared or critic is None else CriticFit(config, policy, critic, generator)
        self.extras = [*extras, *([SharedValueLoss(critic, config.value_clip)] if shared else [])]
        trained = nn.ModuleList([policy, critic]) if shared else policy
        self.optimizer = FlatAdamW(
            trained.parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            what="policy",
        )
        device = next(policy.parameters()).device
        self.surrogate = config.surrogate(policy.num_steps, device)
        self.old = Reference(policy) if self.surrogate.of_divergences else None
        """The policy that sampled."""
        self.discount = inner_discount(policy.num_steps, config.inner_gamma).to(device)  # [K]
        self.order = PairOrder(config.inner_steps, whole_chains=config.minibatches_of == "chains")
        self.speed = 1.0
        """What the KL has made of the learning rate."""
        limit = config.target_kl if config.target_kl_of == "minibatch" else None
        self.objective = Objective(
            trained,
            self.rows,
            prepare=self.weighted,
            allow=None if limit is None else lambda rows: ~(approximate_kl(rows[1]) > limit),  # NaN is found later
        )
        self._step = make_step(self.objective, self.optimizer, compile=config.compile)
        beside = ("policy_loss", *(extra.name for extra in self.extras)) if self.extras else ()
        # Of metrics that are means over pairs.
        self._names = ("loss" if self.extras else "policy_loss", "approx_kl", *self.surrogate.known, *beside)

    def weighted(self, pairs: Pairs) -> Pairs:
        """A minibatch with advantages as the surrogate takes them."""
        return replace(pairs, advantages=self.config.weights(pairs.advantages, self.discount[pairs.step]))

    def rows(self, pairs: Pairs) -> Rows:
        """Of B `weighted` pairs: losses, log-ratios, and what the surrogate knows."""
        with computing_in(self.config.precision, pairs.obs.device):
            law = self.policy.transition(pairs.obs, pairs.latent, pairs.step)
            old = None if self.old is None else self.old.law(pairs)
        config, executed = self.config, self.policy.config.executed_part
        factors = log_prob_factors(law, pairs.following)
        log_ratios = log_ratio(factors, pairs.log_prob_factors, config.log_ratio, config.log_prob_clamp, executed)
        divergences = None if old is None else divergence_terms(old, law, log_ratios, executed)
        losses, *known = self.surrogate.rows(log_ratios, pairs.advantages, pairs.step, divergences)
        if config.entropy_coefficient > 0:
            losses = losses - config.entropy_coefficient * entropy_terms(law, factors, log_ratios, executed)
        if self.extras:
            known.append(losses)
            scored = Scored(pairs, law, factors, log_ratios, self.log_likelihoods)
            with computing_in(config.precision, pairs.obs.device):
                terms = [extra.losses(self.policy, scored) for extra in self.extras]
            known += terms
            losses = sum((extra.coefficient * term for extra, term in zip(self.extras, terms, strict=True)), losses)
        return losses, log_ratios, *known

    def log_likelihoods(self, law: Distribution, value: Tensor) -> Tensor:
        """[B], of latents under a law, reduced as log-ratios are."""
        factors, config = log_prob_factors(law, value), self.config
        nothing = torch.zeros_like(factors)
        return log_ratio(factors, nothing, config.log_ratio, config.log_prob_clamp, self.policy.config.executed_part)

    def gather(self, batch: Batch, indices: Tensor) -> Pairs:
        """Copies of the pairs at these indices [B], with what the extra losses have to know."""
        pairs = batch.pairs(indices)
        if not self.extras:
            return pairs
        gathered = (extra.gather(batch, indices, self.generator) for extra in self.extras)
        return replace(pairs, extra={name: column for extra in gathered for name, column in extra.items()})

    @single_thread()
    def update(self, batch: Batch, *, progress: float, iteration: int) -> dict[str, float | None]:
        """One update of policy and critic; its metrics.

        Args:
            batch: the transitions of one rollout.
            progress: share of the training that is done, in [0, 1], for the schedules.
            iteration: how many updates came before.

        Raises:
            NotFiniteError: too many updates in a row were skipped; the parameters are those before them.
        """
        config = self.config
        factor = schedule_factor(config.schedule, progress, final=config.final_learning_rate_share)
        count = self.order.count(batch, config.batch_size)
        self.optimizer.learning_rate = factor * self.speed * config.learning_rate
        metrics: dict[str, float | None] = dict.fromkeys(self._names)
        steps = 0
        if iteration >= config.critic_warmup_iterations:
            learned, steps = self._epochs(batch, count)
            metrics |= learned
            if config.epochs * count == 1:
                metrics["approx_kl"] = None  # it is that before the only step, where nothing has changed yet
        if self.critic_fit is not None:
            metrics |= self.critic_fit.fit(
                batch,
                epochs=config.epochs,
                # Those that all inner steps would make: the critic learns from all of a rollout in any case.
                minibatches_per_epoch=replace(self.order, inner_steps=None).count(batch, config.batch_size),
                learning_rate_factor=factor,
            )
        return {
            **metrics,
            **batch.statistics(),
            "actor_learning_rate": self.optimizer.learning_rate,
            "actor_steps": steps,
            "skipped_updates": self.optimizer.skips.since_last(),
        }

    def _epochs(self, batch: Batch, count: int) -> tuple[dict[str, float], int]:
        """Learn from a rollout in ``count`` minibatches an epoch; metrics over all pairs seen, and the steps taken."""
        config = self.config
        of_epochs: list[tuple[Tensor, int]] = []  # metrics, and over how many pairs they are
        steps, kl = 0, 0.0
        if self.old is not None:
            self.old.follow(self.policy)
        for extra in self.extras:
            extra.begin(batch, self.generator)
        for _ in range(config.epochs):
            seen: list[Rows] = []
            outcome = Outcome.TAKEN
            for pairs in minibatches(partial(self.gather, batch), self.order.parts(batch, count, self.generator)):
                rows, outcome = self._step(pairs)
                if outcome is Outcome.SKIPPED:
                    continue
                seen.append(rows)
                if outcome is Outcome.REFUSED:
                    break
                steps += 1
            if not seen:
                continue
            losses, log_ratios, *known = (torch.cat(column) for column in zip(*seen, strict=True))
            means = torch.stack([losses.mean(), approximate_kl(log_ratios), *(column.mean() for column in known)])
            kl = float(means[1])
            of_epochs.append((means, len(losses)))
            if outcome is Outcome.REFUSED or (config.target_kl is not None and kl > config.target_kl):
                break
        if not of_epochs:
            return {}, 0
        metrics = self.surrogate.adapt(kl)
        self.speed = config.next_speed(self.speed, kl)
        total = sum(size for _, size in of_epochs)
        means = torch.stack([mean * (size / total) for mean, size in of_epochs]).sum(0).tolist()
        return {**dict(zip(self._names, means, strict=True)), **metrics}, steps

    def state_dict(self) -> dict[str, Any]:
        """Both optimisers, what was adapted, and the state of the generator."""
        return {
            "actor_optimizer": self.optimizer.state_dict(),
            **({} if self.critic_fit is None else {"critic_optimizer": self.critic_fit.state_dict()}),
            "surrogate": self.surrogate.state_dict(),
            "speed": self.speed,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.optimizer.load_state_dict(state["actor_optimizer"])
        if self.critic_fit is not None:
            self.critic_fit.load_state_dict(state["critic_optimizer"])
        self.surrogate.load_state_dict(state["surrogate"])
        self.speed = state["speed"]
        self.generator.set_state(state["generator"])
