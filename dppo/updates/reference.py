"""A policy as it was."""

from __future__ import annotations

import copy

import torch
from torch.distributions import Distribution

from dppo.updates.batch import Pairs
from policies import Policy


class Reference:
    """A frozen copy of a policy, for laws to be compared with its own."""

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy).requires_grad_(False)

    @torch.no_grad()
    def follow(self, policy: Policy) -> None:
        """Become a copy of the policy as it is now, in place: a compiled step holds on to the tensors."""
        theirs = (*policy.parameters(), *policy.buffers())
        for own, other in zip((*self.policy.parameters(), *self.policy.buffers()), theirs, strict=True):
            own.copy_(other)

    def law(self, pairs: Pairs) -> Distribution:
        """Of the next latents, batch shape [B]."""
        return self.policy.transition(pairs.obs, pairs.latent, pairs.step)
