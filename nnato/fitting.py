"""From moments to operators: fit on training, choose the penalty on validation, judge on test documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnato.accumulation import Accumulated
from nnato.errors import MomentsError
from nnato.metrics import METRICS, Weighting, error_matrix, r2, weighting
from nnato.operators import TransportOperator, baselines
from nnato.ridge import KAPPAS, RidgeFit, RidgeSource, fit_ridge
from nnato.sites import Pair, ResidualSite, make_pair
from nnato.statistics import Progress
from nnato.storage import provenance


@dataclass(frozen=True)
class Fit:
    """An operator with its held-out quality.

    Attributes:
        operator: The fitted map.
        alpha: Chosen ridge penalty, in scikit-learn's units.
        kappa: The penalty in units of tr(C_xx) / d_x.
        at_edge: Whether κ is an end of the grid: the optimum may lie beyond.
        r2: R² on test documents, by metric.
        baselines: The same of `mean`, `identity`, `identity_shift` and `shuffled` (fitted to pairs of unrelated documents), by name
            and metric.
        skill_over_identity: `1 - SSE / SSE(identity_shift)`, by metric.
        r2_all_tokens: R² of an operator fitted, chosen and scored with special tokens, first positions and sinks, by metric; usually far
            higher, because a few huge tokens dominate, and of a worse map.
    """

    operator: TransportOperator
    alpha: float
    kappa: float
    at_edge: bool
    r2: dict[str, float]
    baselines: dict[str, dict[str, float]]
    skill_over_identity: dict[str, float]
    r2_all_tokens: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The entry of `nnato fit --json`. Intervals of R² need per-document statistics, which moments of one split do not hold."""

        def spread(values: dict[str, float]) -> dict[str, dict[str, float | None]]:
            return {metric: {"value": value, "low": None, "high": None} for metric, value in values.items()}

        return {
            "source": self.operator.source.key,
            "target": self.operator.target.key,
            "alpha": self.alpha,
            "kappa": self.kappa,
            "kappa_at_edge": self.at_edge,
            "rank": min(self.operator.weight.shape),
            "r2": spread(self.r2),
            "skill_over_identity": spread(self.skill_over_identity),
            "baselines": self.baselines,
            "r2_all_tokens": self.r2_all_tokens,
        }


def fit(
    accumulated: Accumulated,
    pairs: Iterable[tuple[int | str, int | str]] | None = None,
    *,
    metric: str = "variance_weighted",
    tokens: str = "ordinary",
    kappas: tuple[float, ...] = KAPPAS,
    progress: Progress | None = None,
) -> list[Fit]:
    """Fit ridge operators.

    Args:
        accumulated: What `accumulate` or `load_moments` returned.
        pairs: (source, target) pairs; by default all that the moments hold.
        metric: R² that chooses the penalty on validation documents: `variance_weighted`, `uniform` or `whitened`.
        tokens: `ordinary`, or `all` to let special tokens, first positions and sinks take part.
        kappas: Grid of penalties in units of tr(C_xx) / d_x; a single one fixes it.
        progress: Told of each pair.

    Returns:
        One result per pair, sorted; every R² is of test documents.

    Raises:
        MomentsError: The moments lack a pair, a split has too few tokens, or the metric is unknown.
        SiteError: Not a pair.
    """
    if metric not in METRICS:
        raise MomentsError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    moments = accumulated.moments
    chosen = moments.pairs if pairs is None else tuple(sorted({make_pair(*pair) for pair in pairs}))
    results: list[Fit] = []
    whitenings: dict[tuple[str, ResidualSite], Weighting] = {}
    for source in sorted({pair[0] for pair in chosen}):
        mine = [pair for pair in chosen if pair[0] == source]
        if progress is not None:
            progress("fitting operators", len(results), len(chosen))
        fitted = _fit_source(accumulated, mine, metric, tokens, kappas, whitenings)
        contrast = fitted if tokens == "all" else _fit_source(accumulated, mine, metric, "all", kappas, whitenings, alone=True)
        for pair in mine:
            ridge, scores = fitted[pair]
            results.append(_result(accumulated, pair, ridge, scores, contrast[pair][1]["transport"], metric, tokens))
    if progress is not None:
        progress("fitting operators", len(chosen), len(chosen))
    return results


Scores = dict[str, dict[str, float]]


def _fit_source(
    accumulated: Accumulated,
    pairs: list[Pair],
    metric: str,
    tokens: str,
    kappas: tuple[float, ...],
    whitenings: dict[tuple[str, ResidualSite], Weighting],
    alone: bool = False,
) -> dict[Pair, tuple[RidgeFit, Scores]]:
    """Fit all pairs of one source; R² on test of the operator (`transport`), its baselines and `skill`, by name and metric.

    With `alone`, of the operator only. Whitenings, one eigendecomposition each, are shared by all sources of a target.
    """
    train, validation, test = (accumulated.moments.of(split, tokens, pairs) for split in ("train", "validation", "test"))
    for split, held in (("train", train), ("validation", validation), ("test", test)):
        if held.n < 2:
            raise MomentsError(f"the {split} split holds {held.n} {tokens} token: accumulate more text")
    source = RidgeSource(train, pairs[0][0])
    shuffled = accumulated.moments.shuffled
    results = {}
    for pair in pairs:
        target = pair[1]
        train_yy, test_yy = train.scatter_of(target, target), test.scatter_of(target, target)
        if (tokens, target) not in whitenings:
            whitenings[tokens, target] = weighting("whitened", train_yy, test_yy)
        whitened = whitenings[tokens, target]
        weigh = whitened if metric == "whitened" else weighting(metric, train_yy, validation.scatter_of(target, target))
        ridge = fit_ridge(source, target, validation, weigh, kappas)
        maps = {"transport": _operator(train, pair, ridge)}
        if not alone:
            maps |= baselines(pair, train.mean_of(pair[0]), train.mean_of(target))
            if shuffled.n:
                null = shuffled.scatter_of(*pair) * (train.n / shuffled.n)
                maps["shuffled"] = _operator(train, pair, fit_ridge(source, target, validation, weigh, kappas, null))
        errors = {name: error_matrix(test, pair, operator.weight, operator.bias) for name, operator in maps.items()}
        gammas = {name: whitened if name == "whitened" else weighting(name, train_yy, test_yy) for name in METRICS}
        scores = {key: {name: r2(error, test_yy, gamma) for name, gamma in gammas.items()} for key, error in errors.items()}
        if not alone:
            scores["skill"] = {name: r2(errors["transport"], errors["identity_shift"], gamma) for name, gamma in gammas.items()}
        results[pair] = ridge, scores
    return results


def _operator(train: Any, pair: Pair, ridge: RidgeFit) -> TransportOperator:
    return TransportOperator(*pair, ridge.weight, train.mean_of(pair[0]), train.mean_of(pair[1]))


def _result(
    accumulated: Accumulated,
    pair: Pair,
    ridge: RidgeFit,
    scores: Scores,
    all_tokens: dict[str, float],
    metric: str,
    tokens: str,
) -> Fit:
    train = accumulated.moments.of("train", tokens, [pair])
    details = {
        "alpha": ridge.alpha,
        "kappa": ridge.kappa,
        "selection_metric": metric,
        "tokens": tokens,
        "training_tokens": train.n,
        "r2": scores["transport"],
        "model": accumulated.model,
        "text": accumulated.text,
        "medians": accumulated.medians,
        "provenance": provenance(),
    }
    operator = TransportOperator(*pair, ridge.weight, train.mean_of(pair[0]).clone(), train.mean_of(pair[1]).clone(), "transport", details)
    names = [name for name in ("mean", "identity", "identity_shift", "shuffled") if name in scores]
    return Fit(
        operator=operator,
        alpha=ridge.alpha,
        kappa=ridge.kappa,
        at_edge=ridge.at_edge,
        r2=scores["transport"],
        baselines={name: scores[name] for name in names},
        skill_over_identity=scores["skill"],
        r2_all_tokens=all_tokens,
    )


def operator_file(folder: Path, pair: Pair) -> Path:
    """Where the operator of a pair lies in a folder of operators."""
    return folder / f"{pair[0]}-{pair[1]}.safetensors"
