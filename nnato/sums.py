"""Sums over tokens of a number and its prediction, per feature and fold of documents, and all scores that follow (METHODS §6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy import stats

from nnato.intervals import LEVEL, Interval


@dataclass(frozen=True)
class Estimates:
    """Numbers, one per feature, with their standard errors.

    Attributes:
        value: float64 (features,); NaN where there is nothing to estimate.
        error: Standard error, float64 (features,); NaN with fewer than two folds.
        degrees: Of freedom, float64 (features,).
    """

    value: torch.Tensor
    error: torch.Tensor
    degrees: torch.Tensor

    @property
    def low(self) -> torch.Tensor:
        """Lower end of the 95 % interval by Student's t, float64 (features,)."""
        return self.value - self._half()

    @property
    def high(self) -> torch.Tensor:
        """Upper end."""
        return self.value + self._half()

    def above(self, threshold: torch.Tensor | float) -> torch.Tensor:
        """One-sided p values of "no larger than the threshold", float64 (features,); NaN where there is no error."""
        t = ((self.value - threshold) / self.error).cpu().numpy()
        return torch.from_numpy(stats.t.sf(t, self.degrees.cpu().numpy()))

    def below(self, threshold: torch.Tensor | float) -> torch.Tensor:
        """One-sided p values of "no smaller than the threshold", float64 (features,)."""
        return Estimates(-self.value, self.error, self.degrees).above(-threshold)

    def __getitem__(self, feature: int) -> Interval:
        """One of them as an interval."""
        return Interval(float(self.value[feature]), float(self.low[feature]), float(self.high[feature]))

    def _half(self) -> torch.Tensor:
        quantiles = stats.t.ppf((1 + LEVEL) / 2, self.degrees.cpu().numpy())
        return torch.from_numpy(np.asarray(quantiles)).to(self.error) * self.error


@dataclass(frozen=True)
class PairSums:
    """Six sums over tokens of a number a and its prediction b, float64 (folds, features) each.

    Attributes:
        n: Number of tokens.
        a: Σ a.
        b: Σ b.
        aa: Σ a².
        bb: Σ b².
        ab: Σ a b.
    """

    n: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    aa: torch.Tensor
    bb: torch.Tensor
    ab: torch.Tensor

    @staticmethod
    def of(true: torch.Tensor, predicted: torch.Tensor) -> PairSums:
        """Of one fold's tokens, float (tokens, features) each."""
        a, b = true.double(), predicted.double()
        parts = (torch.ones_like(a), a, b, a * a, b * b, a * b)
        return PairSums(*(part.sum(0, keepdim=True) for part in parts))

    @staticmethod
    def stack(folds: Sequence[PairSums]) -> PairSums:
        """Several folds of the same features."""
        return PairSums(*(torch.cat([getattr(fold, name) for fold in folds]) for name in SUMS))

    def total(self) -> PairSums:
        """All folds as one."""
        return PairSums(*(getattr(self, name).sum(0, keepdim=True) for name in SUMS))

    def take(self, features: torch.Tensor) -> PairSums:
        """Of some features, int64 or bool (features,)."""
        return PairSums(*(getattr(self, name)[:, features] for name in SUMS))

    def moved(self, offset: torch.Tensor) -> PairSums:
        """Of a + offset and b + offset, float64 (features,)."""
        return PairSums(
            self.n,
            self.a + offset * self.n,
            self.b + offset * self.n,
            self.aa + 2 * offset * self.a + offset**2 * self.n,
            self.bb + 2 * offset * self.b + offset**2 * self.n,
            self.ab + offset * (self.a + self.b) + offset**2 * self.n,
        )

    @property
    def errors(self) -> torch.Tensor:
        """Σ (a - b)², float64 (folds, features)."""
        return (self.aa - 2 * self.ab + self.bb).clamp(min=0)

    @property
    def deviations(self) -> torch.Tensor:
        """Σ (a - ā)² with the mean of all folds, float64 (folds, features)."""
        mean = self.a.sum(0) / self.n.sum(0)
        return (self.aa - 2 * mean * self.a + mean**2 * self.n).clamp(min=0)

    # ---- scores --------------------------------------------------------------------------------------------------------

    def r2(self) -> Estimates:
        """`1 - Σ(a-b)² / Σ(a-ā)²`, with errors by linearisation over folds (METHODS §9); NaN where a does not vary."""
        return share(self.errors, self.deviations, self.n, self._varies())

    def over(self, other: PairSums) -> Estimates:
        """R² above that of another prediction of the same numbers, `Σ(a-c)² - Σ(a-b)²` over `Σ(a-ā)²`."""
        return share(self.errors - other.errors + self.deviations, self.deviations, self.n, self._varies())

    def pearson(self) -> torch.Tensor:
        """Correlation, float64 (features,)."""
        one = self.total()
        covariance = one.ab - one.a * one.b / one.n
        spread = (one.aa - one.a**2 / one.n).clamp(min=0) * (one.bb - one.b**2 / one.n).clamp(min=0)
        return (covariance / positive(spread).sqrt())[0]

    def slope(self) -> torch.Tensor:
        """Slope of a regressed on b, float64 (features,): 1 for a calibrated prediction, below for one that is too large."""
        one = self.total()
        return ((one.ab - one.a * one.b / one.n) / positive(one.bb - one.b**2 / one.n))[0]

    def cosine(self) -> torch.Tensor:
        """`Σab / √(Σa² Σb²)`, float64 (features,): the paper's calibration."""
        one = self.total()
        return (one.ab / positive(one.aa * one.bb).sqrt())[0]

    def rms_ratio(self) -> torch.Tensor:
        """`√(Σb² / Σa²)`, float64 (features,)."""
        one = self.total()
        return (one.bb / positive(one.aa)).sqrt()[0]

    def mean_ratio(self) -> torch.Tensor:
        """`Σb / Σa`, float64 (features,)."""
        one = self.total()
        return (one.b / torch.where(one.a != 0, one.a, float("nan")))[0]

    def mse(self) -> torch.Tensor:
        """Mean squared error, float64 (features,)."""
        return self.errors.sum(0) / positive(self.n.sum(0))

    def fvu(self) -> torch.Tensor:
        """`Σ(a-b)² / Σa²`, uncentred, float64 (features,)."""
        return self.errors.sum(0) / positive(self.aa.sum(0))

    def _varies(self) -> torch.Tensor:
        """Whether a varies beyond rounding, bool (features,)."""
        one = self.total()
        return ((one.n > 1) & (one.aa - one.a**2 / one.n > 1e-12 * one.aa))[0]


SUMS = tuple(one.name for one in fields(PairSums))


def positive(value: torch.Tensor) -> torch.Tensor:
    """Denominators: NaN for what is not positive."""
    return torch.where(value > 0, value, float("nan"))


def share(errors: torch.Tensor, deviations: torch.Tensor, n: torch.Tensor, known: torch.Tensor) -> Estimates:
    """`1 - Σ errors / Σ deviations` over folds, with errors by linearisation.

    Args:
        errors: float64 (folds, features).
        deviations: float64 (folds, features).
        n: Tokens, float64 (folds, features); folds without any are left out.
        known: bool (features,); NaN elsewhere.
    """
    whole = torch.where(known, deviations.sum(0), float("nan"))
    ratio = errors.sum(0) / whole
    folds = (n > 0).sum(0).double()
    spread = (errors - ratio * deviations).square().sum(0)
    error = (torch.where(folds > 1, folds / (folds - 1), float("nan")) * spread).sqrt() / whole
    return Estimates(1 - ratio, error, torch.where(folds > 1, folds - 1, float("nan")))


def jackknifed(value: torch.Tensor, without: Sequence[torch.Tensor]) -> Estimates:
    """An estimate with errors from its values without each fold, `(G-1)/G Σ (θ_g - θ̄)²` (METHODS §9).

    Args:
        value: float64 (features,).
        without: The same without each fold in turn.
    """
    folds = len(without)
    if folds < 2:
        unknown = torch.full_like(value, float("nan"))
        return Estimates(value, unknown, unknown)
    spread = (torch.stack(list(without)) - torch.stack(list(without)).mean(0)).square().sum(0)
    return Estimates(value, ((folds - 1) / folds * spread).sqrt(), torch.full_like(value, folds - 1))


def benjamini_hochberg(p: torch.Tensor) -> torch.Tensor:
    """Adjusted p values (q values): calling all with q ≤ 0.05 keeps the expected share of false calls at 5 % (Benjamini & Hochberg 1995).

    Args:
        p: float64 (features,); NaN takes no part.

    Returns:
        float64 (features,), NaN where p is.
    """
    q = torch.full_like(p, float("nan"))
    known = torch.nonzero(~torch.isnan(p)).flatten()
    ordered, order = p[known].sort()
    ranks = torch.arange(1, len(known) + 1, dtype=p.dtype, device=p.device)
    stepped = (ordered * len(known) / ranks).flip(0).cummin(0).values.flip(0).clamp(max=1) if len(known) else ordered
    q[known[order]] = stepped
    return q


def quantiles(values: torch.Tensor, shares: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Mapping[str, float | int]:
    """Median and quantiles of what is not NaN, with how much that is: `features`, `known`, and each share as a string."""
    known = values[~torch.isnan(values)]
    found: dict[str, float | int] = {"features": len(values), "known": len(known)}
    for one in shares:
        found[f"{one:g}"] = float(torch.quantile(known, one)) if len(known) else float("nan")
    return found
