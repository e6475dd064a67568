"""From moments to operators: fit on training documents, choose the penalty, judge on test documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnato.accumulation import Accumulated
from nnato.errors import MomentsError
from nnato.intervals import Interval, share_explained
from nnato.metrics import METRICS, Weighting, squared_deviations, squared_errors, weighting
from nnato.moments import Moments
from nnato.notebook import html_table
from nnato.operators import TransportOperator, baselines, compose, random_rotation, scaled_identity
from nnato.regression import Regression
from nnato.selection import Method, Solution, Solver, group_folds
from nnato.sites import Pair, ResidualSite, make_pair
from nnato.statistics import Progress
from nnato.storage import provenance

BASELINES = ("mean", "identity", "identity_shift", "identity_scaled", "random_orthogonal", "shuffled", "shrunk_to_identity")
"""Maps that every fitted operator is compared with, in this order."""


@dataclass(frozen=True)
class Fit:
    """An operator with its held-out quality.

    Attributes:
        operator: The fitted map.
        method: How it was fitted and chosen.
        alpha: Chosen penalty, in scikit-learn's units.
        kappa: The penalty in its unit: tr(C_xx) / d_x for ridge, the smallest that leaves no weight for others.
        at_edge: Whether the penalty is an end of the grid: the optimum may lie beyond.
        converged: Whether a lasso or elastic net met its tolerance; True for ridge.
        r2: R² on test documents, by metric.
        r2_intervals: The same with 95 % intervals over folds of test documents; they hold for this operator, not for the choice of text it
            was fitted on.
        baselines: R² of the maps of `BASELINES`, by name and metric. `shuffled` is a ridge fitted to pairs of unrelated documents,
            `shrunk_to_identity` a ridge whose large penalties leave the identity.
        mse: Mean squared error on test documents, over tokens and coordinates.
        skill_over_identity: `1 - SSE / SSE(identity_shift)`, by metric.
        skill_intervals: The same with intervals.
        r2_all_tokens: R² of an operator fitted, chosen and scored with special tokens, first positions and sinks, by metric; usually far
            higher, because a few huge tokens dominate, and of a worse map. Empty if the moments hold ordinary tokens only.
        composed: R² of the composition of two fitted operators by way of a site between, by that site and metric; empty unless asked for.
    """

    operator: TransportOperator
    method: Method
    alpha: float
    kappa: float
    at_edge: bool
    converged: bool
    r2: dict[str, float]
    r2_intervals: dict[str, Interval]
    mse: float
    baselines: dict[str, dict[str, float]]
    skill_over_identity: dict[str, float]
    skill_intervals: dict[str, Interval]
    r2_all_tokens: dict[str, float]
    composed: dict[int | str, dict[str, float]]

    def _repr_html_(self) -> str:
        title = f"{self.operator.source} → {self.operator.target}: R² on test documents"
        rows: list[tuple[Any, ...]] = [("operator", *self.r2_intervals.values())]
        rows += [(name, *scores.values()) for name, scores in self.baselines.items()]
        rows.append(("skill over identity + shift", *self.skill_intervals.values()))
        return html_table(title, ("map", *self.r2_intervals), rows, f"penalty κ = {self.kappa:.0e}; 95 % intervals over folds of documents")

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato fit --json`."""
        return {
            "source": self.operator.source.key,
            "target": self.operator.target.key,
            "alpha": self.alpha,
            "kappa": self.kappa,
            "kappa_at_edge": self.at_edge,
            "penalty": self.method.penalty,
            "select": self.method.select,
            "standardize": self.method.standardize,
            "shrink_to": self.method.shrink_to,
            "converged": self.converged,
            "rank": self.method.rank or min(self.operator.weight.shape),
            "r2": {metric: interval.to_json() for metric, interval in self.r2_intervals.items()},
            "mse": self.mse,
            "rmse": self.mse**0.5,
            "skill_over_identity": {metric: interval.to_json() for metric, interval in self.skill_intervals.items()},
            "baselines": self.baselines,
            "r2_all_tokens": self.r2_all_tokens,
            "composed": [{"through": site, "r2": scores} for site, scores in self.composed.items()],
        }


def fit(
    accumulated: Accumulated,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    method: Method | None = None,
    metric: str = "variance_weighted",
    tokens: str = "ordinary",
    kappas: tuple[float, ...] | None = None,
    compositions: bool = False,
    progress: Progress | None = None,
) -> list[Fit]:
    """Fit operators.

    Args:
        accumulated: What `accumulate` or `load_moments` returned.
        pairs: (source, target) pairs; by default all that the moments hold.
        method: How to fit and to choose; by default ridge, with the penalty that does best on validation documents.
        metric: Short for `method=Method(metric=…)`: the R² that chooses: `variance_weighted`, `uniform` or `whitened`.
        tokens: `ordinary`, or `all` to let special tokens, first positions and sinks take part (without intervals: folds are kept of
            ordinary tokens only).
        kappas: Short for `method=Method(kappas=…)`: grid of penalties in units of tr(C_xx) / d_x; a single one fixes it.
        compositions: Also score the composition of every two fitted operators that make up a third pair.
        progress: Told of each pair.

    Returns:
        One result per pair, sorted; every R² is of test documents.

    Raises:
        MomentsError: The moments lack a pair, a split or fold has too few tokens, or the method is unknown.
        SiteError: Not a pair.
    """
    if method is not None and (metric, kappas) != ("variance_weighted", None):
        raise MomentsError("give a metric and kappas as part of the method, or no method")
    method = method or Method(metric=metric, kappas=kappas)
    if method.select == "kfold" and tokens == "all":
        raise MomentsError("selection by kfold is of ordinary tokens: folds are kept of these only")
    moments = accumulated.moments
    chosen = moments.pairs if pairs is None else tuple(sorted({make_pair(*pair) for pair in pairs}))
    bench = _Bench(accumulated, method, tokens)
    contrast = bench if tokens == "all" else _Bench(accumulated, Method(metric=method.metric, kappas=kappas), "all")
    results: dict[Pair, Fit] = {}
    for source in sorted({pair[0] for pair in chosen}):
        mine = [pair for pair in chosen if pair[0] == source]
        if progress is not None:
            progress("fitting operators", len(results), len(chosen))
        judged = bench.judge(mine)
        others = judged if tokens == "all" else contrast.judge(mine, alone=True) if moments.has_excluded else {}
        for pair in mine:
            results[pair] = _result(judged[pair], others[pair].scores["transport"] if others else {}, method)
    if compositions:
        results = _with_compositions(results, bench)
    if progress is not None:
        progress("fitting operators", len(chosen), len(chosen))
    return list(results.values())


@dataclass(frozen=True)
class _Judged:
    """A fitted operator with the scores of itself (`transport`) and of its baselines, by name and metric."""

    operator: TransportOperator
    solution: Solution
    scores: dict[str, dict[str, Interval]]
    skill: dict[str, Interval]
    mse: float


class _Bench:
    """Fits and judges the pairs of a source at a time, reading every part of the moments once for each source.

    Whitenings, one eigendecomposition each, are shared by all sources of a target.
    """

    def __init__(self, accumulated: Accumulated, method: Method, tokens: str) -> None:
        self.accumulated, self.method, self.tokens = accumulated, method, tokens
        self._whitenings: dict[ResidualSite, Weighting] = {}

    def judge(self, pairs: list[Pair], alone: bool = False) -> dict[Pair, _Judged]:
        """Fit all pairs of one source and score them on test; with `alone`, without their baselines."""
        train, validation = (self._read(split, pairs) for split in ("train", "validation"))
        tests = self._test_folds(pairs)
        folds = self._folds("train", pairs) if self.method.select == "kfold" else []
        solver, plain = Solver(self.method), Solver(Method(metric=self.method.metric))
        back = Solver(Method(metric=self.method.metric, shrink_to="identity"))
        judged = {}
        for pair in pairs:
            rows, chooser = Regression.of(train, pair), Regression.of(validation, pair)
            groups = group_folds([Regression.of(fold, pair) for fold in folds], self.method.groups if folds else None)
            solution = solver.solve(rows, chooser, groups)
            maps = {"transport": _operator(rows, pair, solution.weight)}
            if not alone:
                maps |= self._baselines(pair, rows, chooser, plain, back)
            judged[pair] = self._score(pair, maps, solution, rows, [Regression.of(fold, pair) for fold in tests])
        return judged

    def _baselines(
        self, pair: Pair, train: Regression, validation: Regression, plain: Solver, back: Solver
    ) -> dict[str, TransportOperator]:
        maps = baselines(pair, train.x_mean, train.y_mean)
        maps["identity_scaled"] = scaled_identity(pair, train)
        maps["random_orthogonal"] = random_rotation(pair, train.x_mean, train.y_mean)
        return maps | fitted_baselines(pair, train, validation, self.accumulated.moments.shuffled, plain, back)

    def _score(
        self, pair: Pair, maps: dict[str, TransportOperator], solution: Solution, train: Regression, tests: Sequence[Regression]
    ) -> _Judged:
        test = Regression.merge(tests)
        scores: dict[str, dict[str, Interval]] = {name: {} for name in maps}
        skill = {}
        for metric in METRICS:
            weigh = self.weighting(metric, pair[1], train, test)
            totals = squared_deviations(tests, test.y_mean, weigh)
            if not float(totals.sum()) > 0:
                raise MomentsError("the held-out residuals of the target do not vary: there are too few tokens for an R²")
            errors = {name: squared_errors(one.weight, one.bias, tests, weigh) for name, one in maps.items()}
            for name in maps:
                scores[name][metric] = share_explained(errors[name], totals)
            if "identity_shift" in maps:
                skill[metric] = share_explained(errors["transport"], errors["identity_shift"])
        operator = self._with_details(maps["transport"], solution, train, scores["transport"])
        mse = float(squared_errors(operator.weight, operator.bias, tests, Weighting()).sum()) / (test.n * len(test.y_mean))
        return _Judged(operator, solution, scores, skill, mse)

    def score_composed(self, operator: TransportOperator) -> dict[str, float]:
        """R² on test of a composition, by metric."""
        train, tests = Regression.of(self._read("train", [operator.pair]), operator.pair), self._test_folds([operator.pair])
        folds = [Regression.of(fold, operator.pair) for fold in tests]
        test = Regression.merge(folds)
        found = {}
        for metric in METRICS:
            weigh = self.weighting(metric, operator.target, train, test)
            errors = squared_errors(operator.weight, operator.bias, folds, weigh)
            found[metric] = share_explained(errors, squared_deviations(folds, test.y_mean, weigh)).value
        return found

    def weighting(self, metric: str, target: ResidualSite, train: Regression, test: Regression) -> Weighting:
        """The metric of scores on test; whitening by training rows."""
        if metric != "whitened":
            return weighting(metric, train.yy, test.yy)
        if target not in self._whitenings:
            self._whitenings[target] = weighting(metric, train.yy, test.yy)
        return self._whitenings[target]

    def _with_details(
        self, operator: TransportOperator, solution: Solution, train: Regression, scores: dict[str, Interval]
    ) -> TransportOperator:
        method, accumulated = self.method, self.accumulated
        details = {
            "alpha": solution.alpha,
            "kappa": solution.kappa,
            "selection_metric": method.metric,
            "select": method.select,
            "penalty": method.penalty,
            "standardize": method.standardize,
            "shrink_to": method.shrink_to,
            "rank": method.rank,
            "tokens": self.tokens,
            "training_tokens": train.n,
            "r2": {metric: interval.value for metric, interval in scores.items()},
            "model": accumulated.model,
            "text": accumulated.text,
            "medians": accumulated.medians,
            "provenance": provenance(),
        }
        means = train.x_mean.clone(), train.y_mean.clone()
        return TransportOperator(*operator.pair, operator.weight, *means, "transport", details)

    def _read(self, split: str, pairs: Iterable[Pair]) -> Moments:
        held = self.accumulated.moments.of(split, self.tokens, pairs)
        if held.n < 2:
            raise MomentsError(f"the {split} split holds {held.n} {self.tokens} token: accumulate more text")
        return held

    def _folds(self, split: str, pairs: Iterable[Pair]) -> list[Moments]:
        moments = self.accumulated.moments
        return [moments.of(split, "ordinary", pairs, [fold]) for fold in moments.folds(split)]

    def _test_folds(self, pairs: list[Pair]) -> list[Moments]:
        whole = self._read("test", pairs)
        return [whole] if self.tokens == "all" else self._folds("test", pairs)


def fitted_baselines(
    pair: Pair, train: Regression, validation: Regression, shuffled: Moments, plain: Solver, back: Solver
) -> dict[str, TransportOperator]:
    """Baselines that are fitted: `shuffled`, where there are shuffled pairs, and `shrunk_to_identity`.

    Args:
        pair: (source, target).
        train: Training rows.
        validation: Rows that choose the penalties.
        shuffled: Moments of shuffled pairs.
        plain: Solves for the first.
        back: For the second.
    """
    maps = {}
    if shuffled.n:
        null = train.with_cross(shuffled.scatter_of(*pair) * (train.n / shuffled.n))
        maps["shuffled"] = _operator(train, pair, plain.solve(null, validation).weight)
    maps["shrunk_to_identity"] = _operator(train, pair, back.solve(train, validation).weight)
    return maps


def _operator(train: Regression, pair: Pair, weight: torch.Tensor) -> TransportOperator:
    return TransportOperator(*pair, weight, train.x_mean, train.y_mean)


def _result(judged: _Judged, all_tokens: dict[str, Interval], method: Method) -> Fit:
    solution, scores = judged.solution, judged.scores
    return Fit(
        operator=judged.operator,
        method=method,
        alpha=solution.alpha,
        kappa=solution.kappa,
        at_edge=solution.path.at_edge,
        converged=solution.sparse is None or solution.sparse.converged,
        r2=_values(scores["transport"]),
        r2_intervals=scores["transport"],
        mse=judged.mse,
        baselines={name: _values(scores[name]) for name in BASELINES if name in scores},
        skill_over_identity=_values(judged.skill),
        skill_intervals=judged.skill,
        r2_all_tokens=_values(all_tokens),
        composed={},
    )


def _values(intervals: dict[str, Interval]) -> dict[str, float]:
    return {metric: interval.value for metric, interval in intervals.items()}


def _with_compositions(results: dict[Pair, Fit], bench: _Bench) -> dict[Pair, Fit]:
    """Add the R² of all compositions of two results that make up a third."""
    finished = {}
    for (source, target), result in results.items():
        between = [site for site in sorted({pair[1] for pair in results}) if (source, site) in results and (site, target) in results]
        composed = {
            site.key: bench.score_composed(compose(results[source, site].operator, results[site, target].operator)) for site in between
        }
        finished[source, target] = replace(result, composed=composed)
    return finished


def operator_file(folder: Path, pair: Pair) -> Path:
    """Where the operator of a pair lies in a folder of operators."""
    return folder / f"{pair[0]}-{pair[1]}.safetensors"
