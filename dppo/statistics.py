"""What an evaluation says, and how sure one can be of it: means and rates with 95 % confidence intervals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.config import config_from_dict

Interval = tuple[float | None, float | None]
"""Lower and upper end; None where one sample does not tell."""

RESAMPLES = 5000


@dataclass(frozen=True)
class EvaluationSummary:
    """Statistics over the episodes of one evaluation."""

    return_mean: float
    return_ci95: Interval
    return_std: float | None
    """Sample standard deviation over episodes (n - 1); None for a single episode."""
    success_rate: float | None
    """Share of episodes in [0, 1]; None for a task without a notion of success."""
    success_ci95: Interval | None
    episodes: int
    dropped_episodes: int = 0
    """Further episodes that were given up, and are in no other number: see `dppo.evaluation.evaluate`."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``summary.json`` holds it; intervals are lists [lo, hi]."""
        content = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> EvaluationSummary:
        """From what `as_dict` gave.

        Raises:
            UserError: it is something else.
        """
        return config_from_dict(EvaluationSummary, content, "an evaluation")


def summarize(
    returns: Sequence[float] | np.ndarray, successes: Sequence[bool] | np.ndarray | None, dropped: int = 0
) -> EvaluationSummary:
    """Summarize episodes.

    Args:
        returns: [episodes] undiscounted sums of rewards.
        successes: [episodes], or None for a task without a notion of success.
        dropped: how many further ones were given up.

    Raises:
        ValueError: no episode, or as many returns as not successes.
    """
    if successes is not None and len(successes) != len(returns):
        raise ValueError(f"{len(returns)} returns but {len(successes)} successes")
    mean, low, high = mean_ci95(returns)
    return EvaluationSummary(
        return_mean=mean,
        return_ci95=(low, high),
        return_std=float(np.std(returns, ddof=1)) if len(returns) > 1 else None,
        success_rate=None if successes is None else float(np.mean(successes)),
        success_ci95=None if successes is None else success_ci95(sum(map(bool, successes)), len(successes)),
        episodes=len(returns),
        dropped_episodes=dropped,
    )


def mean_ci95(values: Sequence[float] | np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean and its 95 % bootstrap interval (BCa), the same for the same values.

    Returns:
        (mean, lo, hi); lo and hi are None for one value, and equal to the mean where all values are equal.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError("needs at least one value, all finite")
    mean = float(sample.mean())
    if sample.size == 1:
        return mean, None, None
    if np.ptp(sample) == 0:
        return mean, mean, mean
    low, high = _bootstrap(sample, "BCa")
    if not (np.isfinite(low) and np.isfinite(high)):  # BCa's correction is 0 / 0 on nearly constant samples
        low, high = _bootstrap(sample, "percentile")
    return mean, low, high


def success_ci95(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate; sensible at 0 and at ``episodes`` successes too."""
    from scipy.stats import binomtest  # 0.8 s

    interval = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _bootstrap(sample: np.ndarray, method: str) -> tuple[float, float]:
    from scipy.stats import bootstrap  # 0.8 s

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # degenerate data: the caller looks at the result
        interval = bootstrap(
            (sample,), np.mean, n_resamples=RESAMPLES, batch=500, method=method, rng=np.random.default_rng(0)
        ).confidence_interval
    return float(interval.low), float(interval.high)
