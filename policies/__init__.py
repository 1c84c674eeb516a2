"""Policies as short Markov chains from a start latent to an action; usable without the ``dppo`` package.

What needs torch is imported when it is first asked for: processes that only step environments do without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from policies.errors import UserError

if TYPE_CHECKING:
    from policies.base import Policy, Sample, log_prob_factors
    from policies.categorical import CategoricalPolicy
    from policies.chain import DiffusionPolicy
    from policies.gaussian import GaussianPolicy
    from policies.mixture import MixturePolicy
    from policies.ode import ODEPolicy

__all__ = [
    "CategoricalPolicy",
    "DiffusionPolicy",
    "GaussianPolicy",
    "MixturePolicy",
    "ODEPolicy",
    "Policy",
    "Sample",
    "UserError",
    "log_prob_factors",
]

_HOMES = {
    "CategoricalPolicy": "policies.categorical",
    "DiffusionPolicy": "policies.chain",
    "GaussianPolicy": "policies.gaussian",
    "MixturePolicy": "policies.mixture",
    "ODEPolicy": "policies.ode",
    "Policy": "policies.base",
    "Sample": "policies.base",
    "log_prob_factors": "policies.base",
}
"""The module of each name that is imported late."""


def import_all() -> None:
    """Import every module of `_HOMES`: a kind of policy is known by name once its module has been imported."""
    for home in _HOMES.values():
        import_module(home)


def __getattr__(name: str) -> Any:
    """Import what a name stands for (PEP 562), and all kinds of policies with it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_all()
    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
