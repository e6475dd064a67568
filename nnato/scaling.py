"""R² against the amount of training text, from merged folds: no second pass over text (METHODS §2.2 H)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nnato.accumulation import Accumulated
from nnato.efficiency import PairRows
from nnato.errors import MomentsError
from nnato.intervals import Interval, share_explained
from nnato.metrics import METRICS, squared_deviations, squared_errors, weighting
from nnato.notebook import html_table
from nnato.regression import Regression
from nnato.selection import Method, Solver
from nnato.sites import Pair, make_pair
from nnato.statistics import Progress


@dataclass(frozen=True)
class ScalingPoint:
    """An operator fitted on some of the training folds.

    Attributes:
        folds: How many: the first ones, so that amounts are nested.
        tokens: Training tokens in them.
        kappa: Chosen penalty, in units of tr(C_xx) / d_x.
        r2: On all test documents, by metric, with intervals.
    """

    folds: int
    tokens: int
    kappa: float
    r2: dict[str, Interval]


@dataclass(frozen=True)
class Scaling:
    """R² of one pair against training tokens.

    Attributes:
        pair: (source, target).
        points: By number of folds.
    """

    pair: Pair
    points: tuple[ScalingPoint, ...]

    def per_doubling(self, metric: str) -> float:
        """What the last doubling of the tokens brought in R²: from about half of the folds to all, per factor of two."""
        half, whole = self.points[(len(self.points) - 1) // 2], self.points[-1]
        return (whole.r2[metric].value - half.r2[metric].value) / math.log2(whole.tokens / half.tokens)

    def _repr_html_(self) -> str:
        metrics = list(self.points[0].r2)
        rows = [(point.tokens, *point.r2.values()) for point in self.points]
        return html_table(f"{self.pair[0]} → {self.pair[1]}: R² on test against training tokens", ("tokens", *metrics), rows)

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato scaling --json`."""
        return {
            "source": self.pair[0].key,
            "target": self.pair[1].key,
            "points": [
                {
                    "folds": point.folds,
                    "tokens": point.tokens,
                    "kappa": point.kappa,
                    "r2": {metric: interval.to_json() for metric, interval in point.r2.items()},
                }
                for point in self.points
            ],
            "r2_per_doubling": {metric: self.per_doubling(metric) for metric in METRICS},
        }


def scaling_study(
    accumulated: Accumulated,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    method: Method | None = None,
    progress: Progress | None = None,
) -> list[Scaling]:
    """Fit operators on growing parts of the training documents, of ordinary tokens.

    Args:
        accumulated: What `accumulate` or `load_moments` returned.
        pairs: (source, target) pairs; by default all that the moments hold.
        method: How to fit and to choose; by default ridge, with the penalty that does best on validation documents.
        progress: Told of each pair.

    Returns:
        One result per pair, sorted.

    Raises:
        MomentsError: The moments lack a pair, or have fewer than two training folds.
        SiteError: Not a pair.
    """
    chosen = accumulated.moments.pairs if pairs is None else tuple(sorted({make_pair(*pair) for pair in pairs}))
    if len(accumulated.moments.folds("train")) < 2:
        raise MomentsError("a scaling study needs at least two folds of training documents: accumulate with --folds 5 or more text")
    method = method or Method()
    if method.select == "kfold":
        raise MomentsError("a scaling study chooses on validation documents or by gcv: the smallest amount is one fold")
    results = []
    for number, pair in enumerate(chosen):
        if progress is not None:
            progress("fitting operators", number, len(chosen))
        results.append(scale(pair, PairRows.of(accumulated, pair), method))
    if progress is not None:
        progress("fitting operators", len(chosen), len(chosen))
    return results


def scale(pair: Pair, rows: PairRows, method: Method) -> Scaling:
    """R² of one pair against training tokens: a pure function of its moments.

    Args:
        pair: (source, target).
        rows: Its rows.
        method: How to fit and to choose.
    """
    test, points = Regression.merge(rows.tests), []
    for count in range(1, len(rows.folds) + 1):
        train = Regression.merge(rows.folds[:count])
        solution = Solver(method).solve(train, rows.validation)
        bias = train.y_mean - train.x_mean @ solution.weight
        r2 = {}
        for metric in METRICS:
            weigh = weighting(metric, train.yy, test.yy)
            errors = squared_errors(solution.weight, bias, rows.tests, weigh)
            r2[metric] = share_explained(errors, squared_deviations(rows.tests, test.y_mean, weigh))
        points.append(ScalingPoint(count, train.n, solution.kappa, r2))
    return Scaling(pair, tuple(points))
