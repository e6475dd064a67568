"""95 % intervals from folds of documents: ratio estimators over held-out folds, the jackknife over training folds (METHODS §9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats

LEVEL = 0.95
"""Coverage of every interval."""


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; the ends are NaN where there is nothing to estimate them from.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def to_json(self) -> dict[str, float]:
        """As in `--json`."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Spread:
    """A variance with its degrees of freedom.

    Attributes:
        variance: Of the estimate, not of one fold.
        degrees: Of freedom: one less than the number of folds.
    """

    variance: float
    degrees: float

    def __add__(self, other: Spread) -> Spread:
        """Of a sum of independent parts, with Satterthwaite's degrees of freedom."""
        total = self.variance + other.variance
        parts = [spread.variance**2 / spread.degrees for spread in (self, other) if spread.variance > 0]
        return Spread(total, total**2 / sum(parts) if parts else min(self.degrees, other.degrees))

    def scaled(self, factor: float) -> Spread:
        """Of the estimate times a constant."""
        return Spread(self.variance * factor**2, self.degrees)

    def around(self, value: float) -> Interval:
        """The 95 % interval by Student's t."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.degrees)) * math.sqrt(self.variance)
        return Interval(value, value - half, value + half)


def ratio_spread(numerators: torch.Tensor, denominators: torch.Tensor) -> Spread | None:
    """Variance of `Σ numerators / Σ denominators` over independent folds, by linearisation (METHODS §9).

    Args:
        numerators: float64 (folds,), e.g. squared errors.
        denominators: float64 (folds,), e.g. squared deviations from the pooled mean.

    Returns:
        None with fewer than two folds.
    """
    folds = len(numerators)
    if folds < 2:
        return None
    total = float(denominators.sum())
    ratio = float(numerators.sum()) / total
    squares = float((numerators - ratio * denominators).square().sum())
    return Spread(folds / (folds - 1) * squares / total**2, folds - 1)


def share_explained(errors: torch.Tensor, totals: torch.Tensor) -> Interval:
    """`1 - Σ errors / Σ totals` over folds with its interval, e.g. an R² or a skill; float64 (folds,) each."""
    value = 1 - float(errors.sum()) / float(totals.sum())
    spread = ratio_spread(errors, totals)
    return Interval(value) if spread is None else spread.around(value)


def jackknife(leave_one_out: Sequence[float]) -> Spread | None:
    """Variance of an estimate from its values without each fold in turn: `(G-1)/G Σ (θ_g - θ̄)²` (METHODS §9).

    Returns:
        None with fewer than two folds, or when a value is NaN.
    """
    folds = len(leave_one_out)
    if folds < 2 or any(math.isnan(value) for value in leave_one_out):
        return None
    mean = math.fsum(leave_one_out) / folds
    return Spread((folds - 1) / folds * math.fsum((value - mean) ** 2 for value in leave_one_out), folds - 1)
