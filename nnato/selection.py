"""How an operator is fitted and chosen: penalty, coordinates, and the rows that decide; a pure function of moments (METHODS §4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from nnato.errors import MomentsError
from nnato.lowrank import reduced_rank
from nnato.metrics import Weighting, check_metric, squared_errors, weighting
from nnato.regression import Frame, Regression
from nnato.ridge import KAPPAS, Path, RidgeSource, Trial, direct_errors, score_path, score_path_gcv, screen, solve_ridge
from nnato.sparse import SparseFit, check_l1_ratio, elastic_net, zero_penalty

SELECTIONS = ("validation", "kfold", "gcv")
SEARCHES = ("full", "screened")
PENALTIES = ("ridge", "lasso", "elastic-net")
PRIORS = ("zero", "identity")
SPARSE_KAPPAS: tuple[float, ...] = tuple(10.0 ** (-exponent / 2) for exponent in range(1, 11))
"""Grid of lasso penalties in units of the smallest that leaves no weight, 0.3 … 1e-5, two a decade."""
PAPER_ALPHAS: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0, 2000.0, 5000.0, 10000.0)
"""Ridge penalties of the paper, in scikit-learn's units (METHODS §2.2 C)."""
PAPER_FOLDS = 5
PAPER_NOTE = (
    "preset paper: ridge with α of {0.1, 1, 10, 100, 1000, 2000, 5000, 10000} by the mean uniform R² of 5 folds of training documents; "
    "ordinary tokens, so without BOS, and folds of documents, since moments hold no contiguous token folds"
)
"""What the preset does, in one line."""


@dataclass(frozen=True)
class Method:
    """How operators are fitted and chosen.

    Attributes:
        metric: R² that chooses: one of `metrics.METRICS`.
        select: Rows that choose the penalty: `validation`, `kfold` (folds of training documents), or `gcv` (generalised cross-validation,
            ridge only, takes tokens for independent).
        search: How the grid is searched: `full` scores every penalty exactly. `screened` estimates scores by random projections and
            compares exactly only penalties that these cannot tell apart: for wide residuals, few penalties and one target of a source.
        average: With folds: `pooled` errors, or the `mean` of the folds' scores.
        groups: With folds: merge them into so many; None keeps them as they are.
        penalty: `ridge`, `lasso` or `elastic-net`.
        l1_ratio: Share of the l1 penalty of an elastic net.
        standardize: Divide every coordinate by its standard deviation in the training rows before the penalty acts.
        shrink_to: What a large penalty leaves: `zero`, or the `identity` (the natural null of a residual stream).
        rank: Rank of the operator, or of its difference from the identity if it is shrunk to that; None for full rank. Ridge only.
        kappas: Penalties, relative to tr(C_xx) / d_x (ridge) or to the smallest that leaves no weight (others); None for the usual grid.
        alphas: Penalties in scikit-learn's units instead.

    Raises:
        MomentsError: On construction: an unknown word, or words that do not go together.
    """

    metric: str = "variance_weighted"
    select: str = "validation"
    search: str = "full"
    average: str = "pooled"
    groups: int | None = None
    penalty: str = "ridge"
    l1_ratio: float = 0.5
    standardize: bool = False
    shrink_to: str = "zero"
    rank: int | None = None
    kappas: tuple[float, ...] | None = None
    alphas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        for name, value, known in (
            ("selection", self.select, SELECTIONS),
            ("search", self.search, SEARCHES),
            ("penalty", self.penalty, PENALTIES),
            ("prior", self.shrink_to, PRIORS),
        ):
            if value not in known:
                raise MomentsError(f"unknown {name} {value!r}; known are {', '.join(known)}")
        if self.penalty != "ridge" and self.select == "gcv":
            raise MomentsError(f"generalised cross-validation is of ridge only: choose the {self.penalty} on validation or by kfold")
        if self.search == "screened" and (self.penalty != "ridge" or self.select == "gcv"):
            raise MomentsError("a screened search is of ridge, on validation or by kfold")
        if self.penalty != "ridge" and self.rank is not None:
            raise MomentsError(f"the {self.penalty} has no rank to choose: use ridge")
        if self.rank is not None and self.rank < 1:
            raise MomentsError(f"rank {self.rank}: give at least 1")
        if self.groups is not None and self.groups < 2:
            raise MomentsError(f"{self.groups} folds: give at least 2")
        check_l1_ratio(self.ratio)
        for grid, values in (("kappas", self.kappas), ("alphas", self.alphas)):
            if values is not None and (not values or not all(0 < value < float("inf") for value in values)):
                raise MomentsError(f"{grid} {tuple(values)}: give positive numbers")
        if self.kappas is not None and self.alphas is not None:
            raise MomentsError("give penalties as kappas or as alphas, not both")

    @staticmethod
    def paper() -> Method:
        """The paper's: its raw penalties, 5 folds (here of documents), the mean of the folds' uniform R² (METHODS §2.2 C)."""
        return Method(metric="uniform", select="kfold", average="mean", groups=PAPER_FOLDS, alphas=PAPER_ALPHAS)

    @property
    def ratio(self) -> float:
        """Share of the l1 penalty."""
        return 1.0 if self.penalty == "lasso" else self.l1_ratio

    def frame(self, train: Regression) -> Frame:
        """Coordinates to solve in, with scales from these rows."""
        prior = torch.eye(*train.xy.shape, dtype=torch.float64, device=train.xy.device) if self.shrink_to == "identity" else None
        return Frame.of(train, self.standardize, prior)


@dataclass(frozen=True)
class Solution:
    """A fitted map with its choice of penalty.

    Attributes:
        weight: float64 (d_x, d_y), in raw coordinates.
        path: Scores along the grid.
        alpha: Chosen penalty, in scikit-learn's units (in the coordinates in which it was solved).
        kappa: The penalty in its unit.
        sparse: Convergence of the lasso or elastic net.
    """

    weight: torch.Tensor = field(repr=False)
    path: Path
    alpha: float
    kappa: float
    sparse: SparseFit | None = None


class Solver:
    """Solves for all targets of one source, sharing the decompositions of its scatter.

    Args:
        method: How.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._sources: dict[int, RidgeSource] = {}

    def solve(self, train: Regression, validation: Regression | None = None, folds: Sequence[Regression] = ()) -> Solution:
        """Fit on training rows, with the penalty that the method chooses.

        Args:
            train: All training rows.
            validation: Rows that choose, if the method selects by `validation`.
            folds: The training rows by fold, if it selects by `kfold`. Every call has to bring the same folds of the same source.

        Raises:
            MomentsError: The rows that choose are missing, or rows do not vary.
        """
        method = self.method
        frame = method.frame(train)
        framed = frame.apply(train)
        source = self._source(-1, framed)
        unit = source.scale if method.penalty == "ridge" else zero_penalty(framed, method.ratio)
        kappas = method.kappas or (KAPPAS if method.penalty == "ridge" else SPARSE_KAPPAS)
        alphas = method.alphas or tuple(kappa * unit for kappa in kappas)
        if method.select == "gcv":
            path = score_path_gcv(source, train, frame, alphas, method.metric)
        else:
            path = self._search(train, validation, folds, alphas, Trial(train, train, frame, source))
        kappa = path.penalty / unit if method.alphas else kappas[path.best]
        if method.penalty != "ridge":
            fitted = elastic_net_path(framed, [alpha for alpha in alphas if alpha >= path.penalty], method.ratio)[-1]
            return Solution(frame.restore(fitted.weight), path, path.penalty, kappa, fitted)
        if method.rank is None and method.search == "screened":
            weight = solve_ridge(framed.xx, framed.xy, path.penalty)
        elif method.rank is None:
            weight = source.weight(framed.xy, path.penalty)
        else:
            weigh = weighting(method.metric, train.yy, train.yy).scaled(frame.y_scale)
            weight = reduced_rank(source, framed, path.penalty, weigh).weight(method.rank)
        return Solution(frame.restore(weight), path, path.penalty, kappa)

    def _search(
        self, train: Regression, validation: Regression | None, folds: Sequence[Regression], alphas: Sequence[float], whole: Trial
    ) -> Path:
        """Scores of all penalties on the rows that choose."""
        method = self.method
        heldout = folds if method.select == "kfold" else [self._validation(validation)]

        def trials() -> Iterable[Trial]:
            return self._trials(train, folds) if method.select == "kfold" else [replace(whole, heldout=heldout[0])]

        rest = (train, method.metric, method.average)
        if method.search == "full":
            return score_path(trials(), heldout, alphas, *rest, Trial.errors if method.penalty == "ridge" else self._sparse_errors)
        estimated, kept = screen(trials(), heldout, alphas, *rest)
        if len(kept) == 1:
            return estimated
        exact = score_path(trials(), heldout, [alphas[index] for index in kept], *rest, direct_errors)
        scores = dict.fromkeys(range(len(alphas)), -math.inf) | dict(zip(kept, exact.scores, strict=True))
        return Path(estimated.penalties, tuple(scores.values()))

    def _validation(self, validation: Regression | None) -> Regression:
        if validation is None:
            raise MomentsError("selection on validation needs validation rows")
        return validation

    def _trials(self, train: Regression, folds: Sequence[Regression]) -> Iterator[Trial]:
        if len(folds) < 2:
            raise MomentsError(f"selection by kfold needs at least two folds of training documents, and there are {len(folds)}")
        for number, fold in enumerate(folds):
            rest = train.without(fold)
            frame = self.method.frame(rest)
            yield Trial(rest, fold, frame, self._source(number, frame.apply(rest)))

    def _source(self, number: int, framed: Regression) -> RidgeSource:
        if number not in self._sources:
            self._sources[number] = RidgeSource(framed.xx)
        return self._sources[number]

    def _sparse_errors(self, trial: Trial, weigh: Weighting, alphas: torch.Tensor) -> torch.Tensor:
        train, heldout = trial.frame.apply(trial.train), trial.frame.apply(trial.heldout)
        order = alphas.argsort(descending=True)
        errors = torch.empty_like(alphas)
        for index, fitted in zip(order, elastic_net_path(train, alphas[order].tolist(), self.method.ratio), strict=True):
            bias = train.y_mean - train.x_mean @ fitted.weight
            errors[index] = squared_errors(fitted.weight, bias, [heldout], weigh.scaled(trial.frame.y_scale))[0]
        return errors


def elastic_net_path(rows: Regression, alphas: Sequence[float], l1_ratio: float) -> list[SparseFit]:
    """Solve for several penalties, largest first, each starting from the one before."""
    fits: list[SparseFit] = []
    for alpha in sorted(alphas, reverse=True):
        fits.append(elastic_net(rows, alpha, l1_ratio, start=fits[-1].weight if fits else None))
    return fits


def group_folds(folds: Sequence[Regression], groups: int | None) -> list[Regression]:
    """Merge folds into fewer, as even in number as possible.

    Raises:
        MomentsError: There are fewer folds than groups.
    """
    if groups is None:
        return list(folds)
    if len(folds) < groups:
        raise MomentsError(f"{groups} folds were asked for, and training documents are kept in {len(folds)}: accumulate with more folds")
    return [Regression.merge(folds[group::groups]) for group in range(groups)]
