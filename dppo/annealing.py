"""Settings of a denoising chain that change while it is trained (Ren et al. 2024, appendix)."""

from __future__ import annotations

from dataclasses import dataclass

from policies import DiffusionPolicy, Policy, UserError


@dataclass(frozen=True)
class Annealing:
    """What they have become by the end of training, evenly over its environment steps; None: they stay."""

    finetuned_steps: int | None = None
    """K', at most what it is at first. Steps that are no longer trained are frozen as they are then."""
    exploration_std: float | None = None
    """Floor of the std while exploring, in normalised units."""

    def __post_init__(self) -> None:
        if self.finetuned_steps is not None and self.finetuned_steps < 1:
            raise ValueError(f"finetuned_steps must be at least 1, not {self.finetuned_steps}")
        if self.exploration_std is not None and not self.exploration_std >= 0:
            raise ValueError(f"exploration_std must not be negative, but is {self.exploration_std}")

    def check(self, policy: Policy) -> None:
        """Raise UserError for a policy that has nothing to anneal, or too few steps."""
        if self == Annealing():
            return
        if not isinstance(policy, DiffusionPolicy):
            raise UserError(f"a {policy.type} policy has nothing to anneal; leave anneal.* out")
        if self.finetuned_steps is not None and self.finetuned_steps > policy.num_steps:
            raise UserError(
                f"anneal.finetuned_steps={self.finetuned_steps} must not exceed the {policy.num_steps} steps that are "
                f"fine-tuned at first"
            )

    def steps_at(self, progress: float, first: int) -> int:
        """K' when this share of the training is done, of ``first`` at the beginning."""
        last = first if self.finetuned_steps is None else self.finetuned_steps
        return last + int((first - last) * (1 - progress) + 0.5)

    def now(self, policy: Policy) -> dict[str, float]:
        """What is annealed, as metrics."""
        attributes = {"finetuned_steps": "num_steps", "exploration_std": "exploration_std"}
        return {name: getattr(policy, own) for name, own in attributes.items() if getattr(self, name) is not None}

    def apply(self, policy: Policy, progress: float) -> None:
        """Set the exploration that belongs to this share of the training."""
        if self.exploration_std is not None:
            assert isinstance(policy, DiffusionPolicy)
            first = policy.config.exploration_std
            policy.exploration_std = first + (self.exploration_std - first) * progress
