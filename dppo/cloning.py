"""Behaviour cloning: AdamW on the imitation loss, and the moving average of the weights that is kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dppo.data.demos import WindowDataset
from dppo.output.metrics import Row
from dppo.precision import Precision, computing_in
from dppo.randomness import load_shared_state, shared_state
from dppo.threads import single_thread
from dppo.updates.batch import split
from dppo.updates.faults import evidence_of
from dppo.updates.flat import FlatParameters
from dppo.updates.gradient import MeanGradient
from dppo.updates.objective import Objective, Rows
from dppo.updates.optimizer import FlatAdamW
from dppo.updates.schedule import schedule_factor
from policies import Policy, UserError

VALIDATION_SAMPLES = 4096
"""Windows on which the validation loss is estimated, always the same ones."""
PREPARED_UPDATES = 16
"""How many updates' windows are prepared at once."""


@dataclass(frozen=True)
class CloningConfig:
    """Settings of a `Cloner`; see ``configs/pretrain.yaml``."""

    updates: int
    batch_size: int
    learning_rate: float
    final_learning_rate_share: float
    warmup: float
    weight_decay: float
    ema_decay: float
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.updates < 1 or self.batch_size < 1:
            raise ValueError(f"updates and batch_size must be at least 1, not {self.updates} and {self.batch_size}")
        for name in ("ema_decay", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("learning_rate", "final_learning_rate_share", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")


class Cloner:
    """A policy in behaviour cloning."""

    def __init__(
        self,
        policy: Policy,
        train: WindowDataset,
        validation: WindowDataset | None,
        config: CloningConfig,
        *,
        seed: int,
    ) -> None:
        """The policy is trained in place, on its device, where ``train`` must be; its scaling must be fitted."""
        self.policy = policy.train()
        self.config = config
        self.device = next(policy.parameters()).device
        self.train = train
        self.batch_size = min(config.batch_size, len(train))
        self.validation = None if validation is None else validation.to(self.device)
        self.optimizer = FlatAdamW(
            policy.parameters(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            what="policy",
        )
        self.averaged = copy.deepcopy(policy).eval()
        """The policy with averaged weights; it is evaluated only, and drops nothing."""
        self.average = FlatParameters(self.averaged.parameters()).values
        """[P], the weights themselves."""
        objective = self._objective = Objective[tuple[Tensor, ...]](policy, self._rows)
        self._gradient = MeanGradient(objective, self.optimizer.parameters, threads=torch.get_num_threads())
        seeds = [int(value) for value in np.random.SeedSequence(seed).generate_state(3)]
        self.generator = torch.Generator(self.device).manual_seed(seeds[0])
        self.validation_seed = seeds[1]
        self.order = torch.empty(0, dtype=torch.long, device=self.device)
        """What is left of the current pass over the windows, in random order."""
        self.prepared: list[tuple[Tensor, ...]] = []
        """The exercises (see `Policy.imitation_exercise`) of the next updates."""
        self.updates = 0
        self.wall_clock_s = 0.0

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return self.updates >= self.config.updates

    @single_thread()
    def run(self, updates: int, on_update: Callable[[int], None] = lambda updates: None) -> Row:
        """Up to ``updates`` more gradient steps; a row of metrics about them.

        Steps whose loss or gradient is not finite are skipped. That is decided where the numbers are, and looked at
        once, in the end: no step waits for it.

        Raises:
            NotFiniteError: too many updates in a row were skipped, up to the last one.
        """
        began = time.perf_counter()
        updates = min(updates, self.config.updates - self.updates)
        losses, taken = [], []
        for _ in range(updates):
            exercise = self._next()
            loss, finite = self._update(exercise)
            losses.append(loss)
            taken.append(finite)
            on_update(1)
        kept = torch.stack(losses)[torch.stack(taken)]
        self.optimizer.skips.count(
            torch.stack(taken).tolist(),
            lambda: evidence_of(self._objective, self.optimizer.parameters, exercise),
        )
        self.wall_clock_s += time.perf_counter() - began
        return {
            "updates": self.updates,
            "epoch": self.updates * self.batch_size / len(self.train),
            "wall_clock_s": self.wall_clock_s,
            "updates_per_s": updates / (time.perf_counter() - began),
            "train_loss": float(kept.mean()) if len(kept) else None,
            "skipped_updates": self.optimizer.skips.since_last(),
            "validation_loss": self._validation_loss(),
            "learning_rate": self.optimizer.learning_rate,
        }

    def _update(self, exercise: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss of a step, and whether it was taken: scalars that nobody has waited for."""
        factor = schedule_factor(
            "cosine",
            (self.updates + 1) / self.config.updates,
            warmup=self.config.warmup,
            final=self.config.final_learning_rate_share,
        )
        self.optimizer.learning_rate = factor * self.config.learning_rate
        gradient, (losses,) = self._gradient(exercise)
        loss = losses.mean()
        taken = self.optimizer.step_if_finite(gradient, loss)
        self.average.lerp_(self.optimizer.parameters.values, 1.0 if self.updates == 0 else 1 - self.config.ema_decay)
        self.updates += 1
        return loss, taken

    def _next(self) -> tuple[Tensor, ...]:
        if not self.prepared:
            self._prepare()
        return self.prepared.pop(0)

    def _prepare(self) -> None:
        """Cut out and corrupt the windows of some updates at once: so many small operations fewer in each."""
        count = self.batch_size * PREPARED_UPDATES
        while len(self.order) < count:
            fresh = torch.randperm(len(self.train), generator=self.generator, device=self.device)
            self.order = torch.cat([self.order, fresh])
        indices, self.order = self.order[:count], self.order[count:]
        exercise = self.policy.imitation_exercise(*self.train.batch(indices), generator=self.generator)
        self.prepared = list(split(exercise, self.batch_size))

    def _rows(self, exercise: tuple[Tensor, ...]) -> Rows:
        with computing_in(self.config.precision, self.device):
            return (self.policy.exercise_losses(*exercise),)

    @torch.no_grad()
    def _validation_loss(self) -> float | None:
        """The averaged policy's loss on unseen episodes, with the same windows and noise every time."""
        if self.validation is None:
            return None
        generator = torch.Generator(self.device).manual_seed(self.validation_seed)
        indices = torch.randint(len(self.validation), (VALIDATION_SAMPLES,), generator=generator, device=self.device)
        return float(self.averaged.imitation_loss(*self.validation.batch(indices), generator=generator))

    def state_dict(self) -> dict[str, Any]:
        """All that cloning has learned, as tensors and plain values."""
        return {
            "policy": self.policy.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.order,
            "prepared": self.prepared,
            "windows": len(self.train),
            "randomness": shared_state(),
            "updates": self.updates,
            "wall_clock_s": self.wall_clock_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, of a cloner of the same settings and windows.

        Raises:
            UserError: there are other windows.
        """
        if state["windows"] != len(self.train):
            raise UserError(
                f"it learned from {state['windows']:,} windows of demonstrations, and now there are "
                f"{len(self.train):,}; is the dataset another one?"
            )
        self.policy.load_state_dict(state["policy"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.order = state["order"].to(self.device)
        self.prepared = [tuple(column.to(self.device) for column in exercise) for exercise in state["prepared"]]
        load_shared_state(state["randomness"])
        self.updates = state["updates"]
        self.wall_clock_s = state["wall_clock_s"]
