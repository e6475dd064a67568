"""How much of what any linear map could carry do operators of each rank carry? (METHODS §5.5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nnato.accumulation import Accumulated
from nnato.cca import (
    CanonicalCorrelations,
    EffectiveSize,
    NullPairs,
    canonical_correlations,
    debias,
    noise_edge,
    participation_ratio,
    participation_ratio_squared,
    principal_angles,
)
from nnato.errors import MomentsError
from nnato.intervals import Interval, jackknife, ratio_spread, share_explained
from nnato.linalg import principal_axes, singular_values, whitening
from nnato.lowrank import RankPath, reduced_rank, truncated
from nnato.metrics import Weighting, squared_deviations, weighting
from nnato.notebook import cell, html_table
from nnato.regression import Regression
from nnato.ridge import RidgeSource
from nnato.selection import Method, Solver, group_folds
from nnato.sites import Pair, make_pair
from nnato.statistics import Progress

CEILINGS = ("in_sample", "cross_fitted", "debiased")
SHARES = (0.9, 0.95)
"""Shares of the debiased ceiling whose rank is reported."""
POINTS = 24
"""Ranks of a curve by default."""
PAPER_STEP = 100
PAPER_NOTE = (
    "preset paper: α of {0.1, 1, 10, 100, 1000, 2000, 5000, 10000} by the mean uniform R² of 5 folds of training documents; ordinary "
    "tokens, so without BOS, and folds of documents, since moments hold no contiguous token folds; SVD truncation at ranks 1, 101, …; "
    "uncentred whitening; in-sample ceiling of training rows, eigenvalues raised to 1e-12; no value where the ceiling is below 1e-8"
)
"""What the preset does, in one line."""


@dataclass(frozen=True)
class RankPoint:
    """An operator of one rank against the ceilings of that rank.

    Attributes:
        rank: r.
        r2: Whitened R² on test documents of the best operator of rank r, with its interval over test documents. Unlike that of `fit`, it is
            relative to the error of the training mean, the operator of rank 0: at small ranks, the difference of the means of training and
            test documents would outweigh all that is explained.
        efficiency: R² over the debiased ceiling, with an interval over training and test documents; may exceed 1 within it.
        ceilings: Whitened R² of the best map of rank r by `CEILINGS`; a cross-fitted one is absent without folds.
    """

    rank: int
    r2: Interval
    efficiency: Interval
    ceilings: dict[str, float]


@dataclass(frozen=True)
class Efficiency:
    """Ceiling, transport subspace and efficiency of one pair.

    Attributes:
        pair: (source, target).
        correlations: The canonical correlations.
        alpha: Ridge penalty of the operators, in scikit-learn's units, chosen on validation documents in the whitened metric.
        kappa: The same in units of tr(C_xx) / d_x.
        sum_debiased: Σρ̃² with its interval over training documents.
        points: By rank.
        angles: Principal angles in degrees to the transport subspaces of other sources of the same target, by source.
    """

    pair: Pair
    correlations: CanonicalCorrelations = field(repr=False)
    alpha: float
    kappa: float
    sum_debiased: Interval
    points: tuple[RankPoint, ...]
    angles: dict[int | str, torch.Tensor] = field(repr=False)

    def _repr_html_(self) -> str:
        rows = [(point.rank, point.efficiency, point.r2, point.ceilings["debiased"]) for point in self.points]
        found = self.correlations
        note = f"Σρ² debiased {cell(self.sum_debiased)} of {found.width} dimensions; transport subspace of {found.dimensions}"
        title = f"{self.pair[0]} → {self.pair[1]}: how much of what any linear map could carry"
        return html_table(title, ("rank", "efficiency η", "whitened R²", "debiased ceiling"), rows, note)

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato efficiency --json`."""
        found = self.correlations
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            "metric": "whitened",
            "sum_rho2": {
                "in_sample": float(found.rho.square().sum()),
                "cross_fitted": float(found.cross_fitted.sum()) if len(found.cross_fitted) else None,
                "debiased": float(found.debiased.sum()),
            },
            "sum_rho2_debiased": self.sum_debiased.to_json(),
            "noise_floor": found.noise_floor,
            "n": found.n,
            "n_eff": found.size.n,
            "retained_ranks": list(found.ranks),
            "noise_edge": found.size.edge,
            "spikes": found.spikes,
            "position_only_dimensions": found.size.position_only,
            "lts_dimensions": found.dimensions,
            "lts_rank_for": {str(share): found.rank_for(share) for share in SHARES},
            "participation_ratio": participation_ratio(found.rho),
            "participation_ratio_shuffled": participation_ratio(found.null),
            "participation_ratio_squared": participation_ratio_squared(found.rho),
            "participation_ratio_squared_shuffled": participation_ratio_squared(found.null),
            "alpha": self.alpha,
            "kappa": self.kappa,
            "efficiency": [
                {"rank": point.rank, **point.efficiency.to_json(), "r2": point.r2.to_json(), "ceiling": point.ceilings}
                for point in self.points
            ],
            "overlaps": [
                {
                    "source": source,
                    "rank": len(angles),
                    "median_angle": float(angles.median()) if len(angles) else None,
                    "mean_squared_cosine": float(torch.deg2rad(angles).cos().square().mean()) if len(angles) else None,
                    "mean_squared_cosine_of_random": len(angles) / found.ranks[1],
                }
                for source, angles in self.angles.items()
            ],
        }


def transport_efficiency(
    accumulated: Accumulated,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Efficiency]:
    """Ceilings, transport subspaces and efficiencies of pairs, of ordinary tokens.

    Args:
        accumulated: What `accumulate` or `load_moments` returned.
        pairs: (source, target) pairs; by default all that the moments hold.
        ranks: Ranks of the curve; by default some two dozen, closer together where they are small.
        force: Go on with fewer than 5 effective tokens per dimension.
        progress: Told of each pair.

    Returns:
        One result per pair, sorted.

    Raises:
        MomentsError: The moments lack a pair or folds, hold too few tokens, or a rank does not exist.
        SiteError: Not a pair.
    """
    chosen = accumulated.moments.pairs if pairs is None else tuple(sorted({make_pair(*pair) for pair in pairs}))
    _check_ranks(ranks, accumulated.moments.d_model)
    results: list[Efficiency] = []
    for number, pair in enumerate(chosen):
        if progress is not None:
            progress("canonical correlations", number, len(chosen))
        rows = PairRows.of(accumulated, pair)
        results.append(efficiency(pair, rows, ranks, force))
    if progress is not None:
        progress("canonical correlations", len(chosen), len(chosen))
    return [_with_angles(result, results) for result in results]


@dataclass(frozen=True)
class PairRows:
    """All rows of a pair that an efficiency is a function of.

    Attributes:
        folds: Training rows by fold of documents.
        validation: Rows that choose the penalty.
        tests: Test rows by fold.
        null: Shuffled pairs of training rows.
    """

    folds: list[Regression]
    validation: Regression
    tests: list[Regression]
    null: NullPairs | None

    @staticmethod
    def of(accumulated: Accumulated, pair: Pair) -> PairRows:
        """Those of ordinary tokens.

        Raises:
            MomentsError: A split is empty.
        """
        moments = accumulated.moments
        folds, tests = (
            [Regression.of(moments.of(split, "ordinary", [pair], [fold]), pair) for fold in moments.folds(split)]
            for split in ("train", "test")
        )
        if not folds or not tests:
            raise MomentsError(f"there are no ordinary tokens in the {'test' if folds else 'train'} split")
        shuffled = moments.shuffled
        null = NullPairs(shuffled.n, shuffled.scatter_of(*pair)) if shuffled.n else None
        return PairRows(folds, Regression.of(moments.of("validation", "ordinary", [pair]), pair), tests, null)


def efficiency(pair: Pair, rows: PairRows, ranks: Sequence[int] | None = None, force: bool = False) -> Efficiency:
    """Ceiling and efficiency of one pair: a pure function of its moments.

    The operator of rank r is reduced-rank ridge in the whitened metric with one penalty for all ranks, and the ceiling is in the same
    metric. Intervals join the variance over training documents (jackknife over folds: operator and ceiling are made anew without each) with
    that over test documents (ratio of sums over folds).

    Args:
        pair: (source, target).
        rows: Its rows.
        ranks: Ranks of the curve.
        force: Go on with fewer than 5 effective tokens per dimension.

    Raises:
        MomentsError: There are too few effective tokens, or sites do not vary.
    """
    train = Regression.merge(rows.folds)
    several = rows.folds if len(rows.folds) > 1 else []
    found = canonical_correlations(train, several, rows.null, force)
    highest = len(found.rho)
    chosen = [rank for rank in (ranks or default_ranks(highest)) if rank <= highest]
    choice = Solver(Method(metric="whitened")).solve(train, rows.validation)
    weigh = weighting("whitened", train.yy, train.yy)
    test = Regression.merge(rows.tests)
    path = reduced_rank(RidgeSource(train.xx), train, choice.alpha, weigh)
    errors = torch.stack([_at(path.errors(fold.about(train), weigh), chosen) for fold in rows.tests])
    totals = squared_deviations(rows.tests, train.y_mean, weigh)
    ceilings = _ceilings(found, chosen)
    replicates = [_without(train, fold, test, choice.alpha, found.size, chosen) for fold in several]
    points = []
    for column, rank in enumerate(chosen):
        r2 = share_explained(errors[:, column], totals)
        ceiling = {name: float(values[column]) for name, values in ceilings.items()}
        points.append(RankPoint(rank, r2, _ratio(r2.value, ceiling["debiased"], column, errors, totals, replicates), ceiling))
    spread = jackknife([replicate.total for replicate in replicates])
    total = float(found.debiased.sum())
    interval = Interval(total) if spread is None else spread.around(total)
    return Efficiency(pair, found, choice.alpha, choice.kappa, interval, tuple(points), {})


def default_ranks(highest: int) -> list[int]:
    """Some two dozen ranks up to the highest, evenly spaced on a log scale."""
    return sorted({round(highest ** (step / (POINTS - 1))) for step in range(POINTS)})


def _check_ranks(ranks: Sequence[int] | None, width: int) -> None:
    if ranks is not None and (not ranks or not all(1 <= rank <= width for rank in ranks)):
        raise MomentsError(f"ranks {list(ranks)}: give numbers from 1 to {width}")


def _at(curve: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Entries of a curve at some ranks; beyond its end, the last."""
    return curve[[min(rank, len(curve)) - 1 for rank in ranks]].cpu()


def _ceilings(found: CanonicalCorrelations, ranks: Sequence[int]) -> dict[str, torch.Tensor]:
    by_name = {"in_sample": found.rho.square(), "cross_fitted": found.cross_fitted, "debiased": found.debiased}
    return {name: _at(by_name[name].cumsum(0), ranks) / found.width for name in CEILINGS if len(by_name[name])}


@dataclass(frozen=True)
class _Replicate:
    """Efficiency at each rank, and the sum of debiased ρ², without one fold of training documents."""

    efficiency: torch.Tensor
    total: float


def _without(train: Regression, fold: Regression, test: Regression, alpha: float, size: EffectiveSize, ranks: Sequence[int]) -> _Replicate:
    rest = train.without(fold)
    share = rest.n / train.n
    x, y = whitening(rest.xx).whitener, whitening(rest.yy).whitener
    dimensions = x.shape[1], y.shape[1]
    smaller = EffectiveSize(size.n * share, size.position_only, noise_edge(*dimensions, size.n * share))
    debiased = debias(singular_values(x.T @ rest.xy @ y).square(), dimensions, smaller)
    weigh = weighting("whitened", rest.yy, rest.yy)
    heldout = test.about(rest)
    errors = reduced_rank(RidgeSource(rest.xx), rest, alpha * share, weigh).errors(heldout, weigh)
    r2 = 1 - _at(errors, ranks) / weigh.trace(heldout.yy)
    return _Replicate(r2 / (_at(debiased.cumsum(0), ranks) / train.yy.shape[0]), float(debiased.sum()))


def _ratio(
    r2: float, ceiling: float, column: int, errors: torch.Tensor, totals: torch.Tensor, replicates: Sequence[_Replicate]
) -> Interval:
    """R² over a ceiling, with the variance over training and over test documents (METHODS §9)."""
    if not ceiling > 0:
        return Interval(math.nan)
    over_train = jackknife([float(replicate.efficiency[column]) for replicate in replicates])
    over_test = ratio_spread(errors[:, column], totals)
    if over_train is None or over_test is None or not math.isfinite(over_train.variance):
        return Interval(r2 / ceiling)
    return (over_train + over_test.scaled(1 / ceiling)).around(r2 / ceiling)


def _with_angles(result: Efficiency, results: Sequence[Efficiency]) -> Efficiency:
    others = [other for other in results if other.pair[1] == result.pair[1] and other.pair != result.pair]
    angles = {}
    for other in others:
        rank = min(result.correlations.dimensions, other.correlations.dimensions)
        subspaces = ((one.correlations.y_directions[:, :rank], one.correlations.y_patterns[:, :rank]) for one in (result, other))
        angles[other.pair[0].key] = principal_angles(*subspaces)
    return Efficiency(result.pair, result.correlations, result.alpha, result.kappa, result.sum_debiased, result.points, angles)


@dataclass(frozen=True)
class PaperEfficiency:
    """Efficiency by the authors' protocol, as far as it is a function of moments (METHODS §2.2 C, D, G-G″).

    Attributes:
        pair: (source, target).
        alpha: Chosen penalty.
        ranks: 1, 101, … and the width.
        r2: On test, of truncated operators with a refitted intercept, in the uncentred whitened metric of training.
        ceilings: `Σ_{i≤r} ρ² / d`, in sample.
        efficiency: Their ratio; NaN where the ceiling is not above 1e-8.
        dim_lin: `(Σρ)² / (Σρ² + 1e-12)`.
    """

    pair: Pair
    alpha: float
    ranks: tuple[int, ...]
    r2: tuple[float, ...]
    ceilings: tuple[float, ...]
    efficiency: tuple[float, ...]
    dim_lin: float

    @property
    def mean_efficiency(self) -> float:
        """The authors' summary: the mean over ranks."""
        found = [value for value in self.efficiency if not math.isnan(value)]
        return math.fsum(found) / len(found) if found else math.nan

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato efficiency --preset paper --json`."""
        curve = zip(self.ranks, self.efficiency, self.r2, self.ceilings, strict=True)
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            "preset": "paper",
            "metric": "whitened, uncentred",
            "alpha": self.alpha,
            "participation_ratio": self.dim_lin,
            "mean_efficiency": self.mean_efficiency,
            "efficiency": [
                {"rank": rank, "value": value, "low": None, "high": None, "r2": r2, "ceiling": {"in_sample": ceiling}}
                for rank, value, r2, ceiling in curve
            ],
        }


def paper_efficiency(pair: Pair, rows: PairRows, ranks: Sequence[int] | None = None) -> PaperEfficiency:
    """Efficiency by the authors' protocol.

    Args:
        pair: (source, target).
        rows: Its rows.
        ranks: Instead of 1, 101, … and the width.

    Raises:
        MomentsError: There are fewer than five folds, or rows do not vary.
    """
    method = Method.paper()
    folds = group_folds(rows.folds, method.groups)
    train, test = Regression.merge(folds), Regression.merge(rows.tests).about(Regression.merge(folds))
    width = train.yy.shape[0]
    solution = Solver(method).solve(train, folds=folds)
    chosen = tuple(ranks or sorted({*range(1, width, PAPER_STEP), width}))
    uncentred = train.yy / train.n + torch.outer(train.y_mean, train.y_mean)
    values, axes = principal_axes(uncentred)
    weigh = Weighting((axes / values.clamp(min=1e-12)) @ axes.T)
    path: RankPath = truncated(solution.weight)
    r2 = 1 - _at(path.errors(test, weigh), chosen) / weigh.trace(test.yy)
    rho = singular_values(_clipped_root(train.xx / train.n) @ (train.xy / train.n) @ _clipped_root(train.yy / train.n))
    ceilings = _at(rho.square().cumsum(0), chosen) / width
    found = torch.where(ceilings > 1e-8, r2 / ceilings, math.nan)
    dim_lin = float(rho.sum() ** 2 / (rho.square().sum() + 1e-12))
    r2s, tops, ratios = (tuple(curve.tolist()) for curve in (r2, ceilings, found))
    return PaperEfficiency(pair, solution.alpha, chosen, r2s, tops, ratios, dim_lin)


def _clipped_root(covariance: torch.Tensor) -> torch.Tensor:
    """Inverse square root with eigenvalues raised to 1e-12, as the authors do; float64 (d, d)."""
    values, axes = principal_axes(covariance)
    return (axes / values.clamp(min=1e-12).sqrt()) @ axes.T


def paper_efficiencies(
    accumulated: Accumulated,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[PaperEfficiency]:
    """As `transport_efficiency`, by the authors' protocol; see `PAPER_NOTE` for what differs.

    Args:
        accumulated: What `accumulate` or `load_moments` returned.
        pairs: (source, target) pairs; by default all that the moments hold.
        ranks: Instead of 1, 101, … and the width.
        progress: Told of each pair.

    Raises:
        MomentsError: As in `transport_efficiency`, or there are fewer than five folds.
    """
    chosen = accumulated.moments.pairs if pairs is None else tuple(sorted({make_pair(*pair) for pair in pairs}))
    _check_ranks(ranks, accumulated.moments.d_model)
    results = []
    for number, pair in enumerate(chosen):
        if progress is not None:
            progress("efficiency as in the paper", number, len(chosen))
        results.append(paper_efficiency(pair, PairRows.of(accumulated, pair), ranks))
    if progress is not None:
        progress("efficiency as in the paper", len(chosen), len(chosen))
    return results
