"""Canonical correlations of source and target: the ceiling of linear transport, and the Linear Transport Subspace (METHODS §5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nnato.errors import MomentsError
from nnato.linalg import singular, singular_values, whitening
from nnato.regression import Regression

TOKENS_PER_DIMENSION = 5
"""With fewer effective tokens per dimension a ceiling is refused: most of it would be noise."""


@dataclass(frozen=True)
class NullPairs:
    """Cross moments of a source with the target of unrelated documents at the same position (METHODS §3.5).

    Attributes:
        n: Number of such pairs of tokens.
        xy: Their cross scatter, float64 (d_x, d_y).
    """

    n: int
    xy: torch.Tensor


@dataclass(frozen=True)
class EffectiveSize:
    """How many independent tokens the tokens of some documents are worth.

    Attributes:
        n: The number of independent tokens.
        position_only: Dimensions by which unrelated documents still correlate: what position alone predicts. They are left out.
        edge: The largest squared canonical correlation that noise alone reaches at this size.
    """

    n: float
    position_only: int
    edge: float


@dataclass(frozen=True)
class CanonicalCorrelations:
    """Canonical correlations between source and target, best first, and what is left of them beyond noise.

    `Σ ρ² / d_y` is the whitened R² of the best affine map, `Σ_{i≤r} ρ_i² / d_y` that of the best one of rank r.

    Attributes:
        rho: In sample, float64 (k,), descending. Optimistic: independent data give `Σ ρ² ≈ d_x d_y / n_eff`.
        cross_fitted: `sign(ρ) ρ²` of directions found without a fold and scored on it, mean over folds, float64 (k,); pessimistic, since
            directions are learned on fewer documents. Empty without folds.
        debiased: ρ² with the inflation by noise removed, zero below the noise edge, float64 (k,) (METHODS §5.2; exact for few, Gaussian
            dimensions, approximate for hundreds). NaN if there are fewer effective tokens than dimensions.
        null: Canonical correlations of shuffled pairs, float64 (k,); empty without them.
        x_directions: Read-outs `a_i` with unit variance of `x·a_i`, float64 (d_x, k).
        y_directions: Read-outs `b_i` at the target, float64 (d_y, k).
        x_patterns: Covariances of x with `x·a_i`: where the variance lies, float64 (d_x, k).
        y_patterns: The same at the target, float64 (d_y, k); the Linear Transport Subspace is the span of the first of them.
        n: Number of training tokens.
        size: What they are worth. Without shuffled pairs, tokens count as independent.
        ranks: Dimensions of source and target that vary at all.
        width: d_y.
    """

    rho: torch.Tensor = field(repr=False)
    cross_fitted: torch.Tensor = field(repr=False)
    debiased: torch.Tensor = field(repr=False)
    null: torch.Tensor = field(repr=False)
    x_directions: torch.Tensor = field(repr=False)
    y_directions: torch.Tensor = field(repr=False)
    x_patterns: torch.Tensor = field(repr=False)
    y_patterns: torch.Tensor = field(repr=False)
    n: int
    size: EffectiveSize
    ranks: tuple[int, int]
    width: int

    @property
    def noise_floor(self) -> float:
        """What `Σ ρ²` of independent data would be: d_x d_y / n_eff."""
        return self.ranks[0] * self.ranks[1] / self.size.n

    @property
    def spikes(self) -> int:
        """Canonical correlations above the noise edge."""
        return int((self.debiased > 0).sum())

    @property
    def dimensions(self) -> int:
        """Size of the Linear Transport Subspace: correlations above the noise edge, less those that position alone explains."""
        return max(0, self.spikes - self.size.position_only)

    def rank_for(self, share: float) -> int:
        """The smallest rank that reaches a share of the debiased ceiling, e.g. 0.9; 0 if there is none."""
        sums = self.debiased.cumsum(0)
        if not len(sums) or not float(sums[-1]) > 0:
            return 0
        return int((sums < share * sums[-1]).sum()) + 1

    def projector(self, rank: int | None = None) -> torch.Tensor:
        """`P` with `y P` the part of y in the Linear Transport Subspace, oblique, idempotent, float64 (d_y, d_y); acts on centred rows.

        Args:
            rank: Dimensions to keep; by default all above the noise edge.
        """
        kept = slice(self.spikes if rank is None else rank)
        return self.y_directions[:, kept] @ self.y_patterns[:, kept].T

    def membership(self, directions: torch.Tensor, yy: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """Share of the variance along directions that lies in the Linear Transport Subspace; a random one has `rank / d_y`.

        Args:
            directions: float64 (directions, d_y).
            yy: `C_yy` of training, float64 (d_y, d_y).
            rank: Dimensions of the subspace; by default all above the noise edge.

        Returns:
            float64 (directions,); NaN for a direction that does not vary.
        """
        loadings = directions @ self.y_patterns[:, : self.spikes if rank is None else rank]
        variance = ((directions @ yy) * directions).sum(1) / self.n
        return loadings.square().sum(1) / torch.where(variance > 0, variance, float("nan"))


def canonical_correlations(
    train: Regression, folds: Sequence[Regression] = (), null: NullPairs | None = None, force: bool = False
) -> CanonicalCorrelations:
    """Canonical correlations of all training rows, with the estimates that correct for noise.

    Args:
        train: All training rows.
        folds: The same by fold of documents, for cross-fitting.
        null: Shuffled pairs, which say what tokens are worth.
        force: Go on with fewer than 5 effective tokens per dimension.

    Raises:
        MomentsError: There are too few effective tokens, a fold is everything, or a site does not vary.
    """
    x, y = whitening(train.xx), whitening(train.yy)
    ranks = x.whitener.shape[1], y.whitener.shape[1]
    null_rho = torch.zeros(0, dtype=torch.float64, device=train.xy.device)
    size = EffectiveSize(train.n, 0, noise_edge(*ranks, train.n))
    if null is not None:
        null_rho = singular_values(x.whitener.T @ null.xy @ y.whitener) * (train.n / null.n)
        size = effective_size(null_rho, ranks, train.n / null.n)
    check_size(size.n, max(train.xy.shape), force)
    left, rho, right = singular(x.whitener.T @ train.xy @ y.whitener)
    scale = math.sqrt(train.n)
    return CanonicalCorrelations(
        rho=rho,
        cross_fitted=cross_fit(train, folds) if folds else rho[:0],
        debiased=debias(rho.square(), ranks, size),
        null=null_rho,
        x_directions=x.whitener @ left * scale,
        y_directions=y.whitener @ right * scale,
        x_patterns=x.colourer @ left / scale,
        y_patterns=y.colourer @ right / scale,
        n=train.n,
        size=size,
        ranks=ranks,
        width=train.yy.shape[0],
    )


def check_size(n_eff: float, width: int, force: bool) -> None:
    """Refuse too few effective tokens.

    Raises:
        MomentsError: There are fewer than 5 per dimension, and it is not forced.
    """
    if n_eff < TOKENS_PER_DIMENSION * width and not force:
        raise MomentsError(
            f"the training tokens are worth {n_eff:,.0f} independent ones, fewer than {TOKENS_PER_DIMENSION} for each of {width} "
            "dimensions: a ceiling would be mostly noise. Accumulate more text, or force it"
        )


def noise_edge(d_x: int, d_y: int, n: float) -> float:
    """The largest squared canonical correlation of independent data, with an allowance for its fluctuation; at most 1 (METHODS §5.2)."""
    a, b = d_x / n, d_y / n
    if a + b >= 1:
        return 1.0
    edge = a * (1 - b) + b * (1 - a) + 2 * math.sqrt(a * b * (1 - a) * (1 - b))
    return min(1.0, edge * (1 + 2 * math.pow(n, -2 / 3)))


def effective_size(null_rho: torch.Tensor, ranks: tuple[int, int], ratio: float = 1.0) -> EffectiveSize:
    """How many independent tokens shuffled pairs are worth, from `E Σ ρ² = d_x d_y / (n - 1)` (METHODS §5.3).

    Dimensions that position alone predicts survive the shuffle and would count as noise, so what stands out above the noise edge is left
    out, again and again until nothing does.

    Args:
        null_rho: Canonical correlations of shuffled pairs, descending, float64 (k,).
        ranks: d_x and d_y.
        ratio: Tokens for each shuffled pair: some tokens have no partner, and `n` is of all tokens.

    Raises:
        MomentsError: Shuffled pairs do not correlate at all, which no text does.
    """
    squares = null_rho.square()
    removed = 0
    while True:
        rest = float(squares[removed:].sum())
        if not rest > 0:
            raise MomentsError("the shuffled pairs hold no noise to measure the effective sample size by: accumulate more text")
        d_x, d_y = ranks[0] - removed, ranks[1] - removed
        n = 1 + d_x * d_y / rest
        above = int((squares > noise_edge(d_x, d_y, n)).sum())
        if above <= removed:
            return EffectiveSize(n * ratio, removed, noise_edge(*ranks, n * ratio))
        removed = above


def debias(squares: torch.Tensor, ranks: tuple[int, int], size: EffectiveSize) -> torch.Tensor:
    """Population ρ² behind sample ρ² by the theory of spiked canonical correlations (METHODS §5.2).

    Args:
        squares: Sample ρ², descending, float64 (k,).
        ranks: d_x and d_y.
        size: Effective number of tokens.

    Returns:
        float64 (k,), zero for what is not above the noise edge; NaN if there are not more effective tokens than dimensions.
    """
    a, b = ranks[0] / size.n, ranks[1] / size.n
    if a + b >= 1:
        return torch.full_like(squares, math.nan)
    lead, constant = (1 - a) * (1 - b), a * b
    middle = squares - a * (1 - b) - b * (1 - a)
    root = (middle + (middle.square() - 4 * lead * constant).clamp(min=0).sqrt()) / (2 * lead)
    return torch.where(squares > size.edge, root, 0.0)


def cross_fit(train: Regression, folds: Sequence[Regression]) -> torch.Tensor:
    """`sign(ρ) ρ²` of directions found without a fold and scored on it, mean over folds; float64 (k,).

    Args:
        train: All training rows.
        folds: The same by fold.
    """
    found = []
    for fold in folds:
        rest = train.without(fold)
        x, y = whitening(rest.xx).whitener, whitening(rest.yy).whitener
        left, _, right = singular(x.T @ rest.xy @ y)
        a, b = x @ left, y @ right
        cross = (a * (fold.xy @ b)).sum(0)
        power = (a * (fold.xx @ a)).sum(0) * (b * (fold.yy @ b)).sum(0)
        found.append(torch.where(power > 0, cross.sign() * cross.square() / power, 0.0))
    k = min(len(one) for one in found)
    return torch.stack([one[:k] for one in found]).mean(0)


@dataclass(frozen=True)
class DirectionCeilings:
    """How well any linear map can predict each of some directions of the target: `1 - SSE / SST` of the best one (METHODS §5.4).

    Attributes:
        in_sample: float64 (directions,); optimistic.
        null: The same for shuffled pairs: noise, and what position alone predicts. Zero without them.
        debiased: `(in_sample - null) / (1 - null)`.
    """

    in_sample: torch.Tensor
    null: torch.Tensor
    debiased: torch.Tensor


def direction_ceilings(train: Regression, directions: torch.Tensor, null: NullPairs | None = None) -> DirectionCeilings:
    """Ceilings of directions of the target, e.g. rows of a dictionary's decoder.

    Args:
        train: Training rows.
        directions: float64 (directions, d_y).
        null: Shuffled pairs. If they are fewer than the tokens, the noise that this adds to them is taken off.

    Returns:
        NaN for a direction that does not vary.
    """
    x = whitening(train.xx).whitener
    variance = ((directions @ train.yy) * directions).sum(1)
    variance = torch.where(variance > 0, variance, float("nan"))
    in_sample = (x.T @ train.xy @ directions.T).square().sum(0) / variance
    found = torch.zeros_like(in_sample)
    if null is not None:
        ratio = train.n / null.n
        found = (x.T @ null.xy @ directions.T).square().sum(0) * ratio**2 / variance
        y = whitening(train.yy).whitener
        null_rho = singular_values(x.T @ null.xy @ y) * ratio
        worth = effective_size(null_rho, (x.shape[1], y.shape[1]), ratio).n
        found = found - x.shape[1] / worth * (ratio - 1)
    return DirectionCeilings(in_sample, found, (in_sample - found) / (1 - found))


def participation_ratio(rho: torch.Tensor) -> float:
    """`(Σ ρ)² / Σ ρ²`, the paper's size of the subspace; tends to 0.72 d for independent data, so never alone (METHODS §5.6)."""
    return float(rho.sum() ** 2 / rho.square().sum()) if float(rho.square().sum()) > 0 else math.nan


def participation_ratio_squared(rho: torch.Tensor) -> float:
    """`(Σ ρ²)² / Σ ρ⁴`, the other formula that goes by this name."""
    return participation_ratio(rho.square())


def principal_angles(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Angles in degrees, ascending, between two transport subspaces of one site in whitened coordinates, float64 (min rank,).

    Args:
        first: Read-outs and patterns of the first, float64 (d, r) each: the first columns of `y_directions` and `y_patterns`, or of
            `x_directions` and `x_patterns`, of correlations of the same training rows.
        second: Of the second.
    """
    cosines = singular_values(first[0].T @ second[1])
    return torch.rad2deg(torch.arccos(cosines.clamp(max=1)))
