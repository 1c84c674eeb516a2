"""Policies as short Markov chains from a start latent to an action; usable without the ``dppo`` package."""

from policies.base import Policy, Sample, log_prob_factors
from policies.categorical import CategoricalPolicy
from policies.chain import DiffusionPolicy
from policies.errors import UserError
from policies.gaussian import GaussianPolicy

__all__ = [
    "CategoricalPolicy",
    "DiffusionPolicy",
    "GaussianPolicy",
    "Policy",
    "Sample",
    "UserError",
    "log_prob_factors",
]
