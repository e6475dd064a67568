"""Ridge regression from moments: one eigendecomposition per source serves every penalty and every target (METHODS: §§4.2-4.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from nnato.errors import MomentsError
from nnato.linalg import Spectrum, solve_positive, spectrum
from nnato.metrics import Weighting, weighting
from nnato.regression import Frame, Regression

KAPPAS: tuple[float, ...] = tuple(10.0 ** (exponent / 2) for exponent in range(-16, 5))
"""Grid of κ, 1e-8 … 1e2, two a decade. The penalty is α = κ · tr(C_xx) / d_x, so that it means the same at every scale and token count."""

SKETCH = 64
"""Random projections of the target by which penalties are screened."""
AVERAGES = ("pooled", "mean")
"""How scores of several folds become one."""


class RidgeSource:
    """The decomposed source of a family of ridge regressions, shared by all its targets and penalties.

    Args:
        xx: `C_xx` of training, float64 (d_x, d_x).

    Attributes:
        scale: tr(C_xx) / d_x, the unit of the penalty.
    """

    def __init__(self, xx: torch.Tensor) -> None:
        self._xx: torch.Tensor | Spectrum = xx
        self.scale = float(xx.trace()) / xx.shape[0]

    @property
    def spectrum(self) -> Spectrum:
        """Eigendecomposition of `C_xx` on its support, made when it is first asked for; it then takes the place of the scatter.

        What lies outside (below 1e-10 of the largest eigenvalue) has no weight.
        """
        if isinstance(self._xx, torch.Tensor):
            self._xx = spectrum(self._xx)
        return self._xx

    def weight(self, xy: torch.Tensor, alpha: float) -> torch.Tensor:
        """`W = Q diag(1 / (λ + α)) Qᵀ C_xy`, from C_xy, float64 (d_x, d_y), and α; float64 (d_x, d_y)."""
        values, vectors = self.spectrum
        return vectors @ ((vectors.T @ xy) / (values + alpha)[:, None])

    def heldout_errors(self, train: Regression, heldout: Regression, weigh: Weighting, alphas: torch.Tensor) -> torch.Tensor:
        """`tr(Γ R)` on held-out rows for every penalty, at O(d²) each (METHODS §4.3).

        Args:
            train: Training rows, whose `C_xx` was decomposed.
            heldout: Held-out rows.
            weigh: The metric Γ.
            alphas: float64 (penalties,).

        Returns:
            float64 (penalties,).
        """
        values, vectors = self.spectrum
        rows = heldout.about(train)  # the fitted intercept refers to the *training* means
        b = vectors.T @ train.xy
        weighted = weigh.apply(b)
        linear = (weighted * (vectors.T @ rows.xy)).sum(1)
        quadratic = (vectors.T @ rows.xx @ vectors) * (weighted @ b.T)
        filters = 1 / (values + alphas[:, None])
        errors: torch.Tensor = weigh.trace(rows.yy) - 2 * filters @ linear + ((filters @ quadratic) * filters).sum(1)
        return errors

    def gcv_errors(self, train: Regression, weigh: Weighting, alphas: torch.Tensor) -> torch.Tensor:
        """`tr(Γ R) / (1 - df / n)²` of training rows for every penalty, at O(d) each: generalised cross-validation (METHODS §4.4).

        It takes tokens for independent, which they are not: a quick look only.

        Args:
            train: Training rows.
            weigh: Γ.
            alphas: float64 (penalties,).

        Returns:
            float64 (penalties,); infinite where there are (nearly) as many degrees of freedom as tokens.
        """
        values, vectors = self.spectrum
        b = vectors.T @ train.xy
        power = (weigh.apply(b) * b).sum(1)
        filters = 1 / (values + alphas[:, None])
        errors = weigh.trace(train.yy) - (2 * filters - values * filters**2) @ power
        freedom = 1 + filters @ values
        infinite = torch.full_like(errors, float("inf"))
        left = 1 - freedom / train.n
        return torch.where(left > 1e-6, errors / left**2, infinite)  # a saturated fit leaves rounding errors only


@dataclass(frozen=True)
class Trial:
    """Rows to fit on and rows to score on.

    Attributes:
        train: Training rows.
        heldout: Held-out rows.
        frame: Coordinates to solve in.
        source: The decomposed source of the training rows in these coordinates.
    """

    train: Regression
    heldout: Regression
    frame: Frame
    source: RidgeSource

    def errors(self, weigh: Weighting, alphas: torch.Tensor) -> torch.Tensor:
        """`tr(Γ R)` of ridge regression on the held-out rows for every penalty, float64 (penalties,), Γ in raw coordinates."""
        train, heldout = self.frame.apply(self.train), self.frame.apply(self.heldout)
        return self.source.heldout_errors(train, heldout, weigh.scaled(self.frame.y_scale), alphas)


@dataclass(frozen=True)
class Path:
    """Scores along a grid of penalties.

    Attributes:
        penalties: The grid.
        scores: R² of each in the metric of the choice.
    """

    penalties: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def best(self) -> int:
        """Index of the highest score, the first if several are equal."""
        return max(range(len(self.scores)), key=lambda index: self.scores[index])

    @property
    def penalty(self) -> float:
        """The chosen penalty."""
        return self.penalties[self.best]

    @property
    def at_edge(self) -> bool:
        """Whether the chosen penalty is an end of the grid: the optimum may lie beyond."""
        return len(self.penalties) > 1 and self.best in (0, len(self.penalties) - 1)


def score_path(
    trials: Iterable[Trial],
    heldout: Sequence[Regression],
    penalties: Sequence[float],
    train: Regression,
    metric: str,
    average: str = "pooled",
    errors: Callable[[Trial, Weighting, torch.Tensor], torch.Tensor] = Trial.errors,
) -> Path:
    """Held-out R² of every penalty, over one trial (validation) or several (folds).

    Args:
        trials: What to fit on and to score on; taken one at a time, so that a generator holds the sums of one in memory.
        heldout: The held-out rows of all trials.
        penalties: The grid, in raw units.
        train: All training rows, which give the whitening when errors are pooled.
        metric: One of `metrics.METRICS`.
        average: `pooled`: one minus the ratio of the sums over trials. `mean`: the mean of the trials' R², as scikit-learn's
            `GridSearchCV` does.
        errors: The solver: `tr(Γ R)` of every penalty on the held-out rows of a trial, float64 (penalties,).

    Raises:
        MomentsError: Held-out targets do not vary, or the metric or way of averaging is unknown.
    """
    if average not in AVERAGES:
        raise MomentsError(f"unknown average {average!r}; known are {', '.join(AVERAGES)}")
    alphas = torch.tensor(penalties, dtype=torch.float64, device=train.xx.device)
    pooled = _pooled_weighting(heldout, train, metric) if average == "pooled" else None
    found, totals = [], []
    for trial in trials:
        weigh = pooled or weighting(metric, trial.train.yy, trial.heldout.yy)
        totals.append(weigh.trace(trial.heldout.yy))
        if not totals[-1] > 0:
            raise MomentsError("the held-out residuals of the target do not vary: there are too few tokens for an R²")
        found.append(errors(trial, weigh, alphas))
    if average == "mean":
        scores = 1 - torch.stack([error / total for error, total in zip(found, totals, strict=True)]).mean(0)
    else:
        scores = 1 - torch.stack(found).sum(0) / sum(totals)
    return Path(tuple(penalties), tuple(scores.tolist()))


def _pooled_weighting(heldout: Sequence[Regression], train: Regression, metric: str) -> Weighting:
    """The metric in which errors of several trials are added: uniform weights come from all their held-out rows together."""
    return weighting(metric, train.yy, Regression.merge(heldout).yy if metric == "uniform" else train.yy)


def screen(
    trials: Iterable[Trial],
    heldout: Sequence[Regression],
    penalties: Sequence[float],
    train: Regression,
    metric: str,
    average: str = "pooled",
) -> tuple[Path, tuple[int, ...]]:
    """Estimated scores of penalties, and which of them can be the best; for wide residuals and few penalties.

    The error `tr(Γ R)` of a penalty is estimated by its mean over `SKETCH` random projections of the target (Hutchinson), the same for all
    penalties. That needs a Cholesky factor for each of them, but no eigendecomposition and no products of full width. A penalty is out when
    its error exceeds the smallest by more than 8 standard errors of their difference.

    Args:
        trials: As in `score_path`.
        heldout: As in `score_path`.
        penalties: The grid, in raw units.
        train: As in `score_path`.
        metric: As in `score_path`.
        average: As in `score_path`.

    Returns:
        The path with estimated scores, and the indices of the penalties left.

    Raises:
        MomentsError: A penalty is too small for a Cholesky factor.
    """
    width = train.yy.shape[0]
    signs = torch.randint(0, 2, (width, SKETCH), generator=torch.Generator().manual_seed(0)).to(train.yy) * 2 - 1
    pooled = _pooled_weighting(heldout, train, metric) if average == "pooled" else None
    errors = torch.zeros(len(penalties), SKETCH, dtype=torch.float64, device=train.yy.device)
    total = 0.0
    for trial in trials:
        weigh = pooled or weighting(metric, trial.train.yy, trial.heldout.yy)
        factor = weigh.scaled(trial.frame.y_scale).factors(width, train.yy.device)[0]
        sketch = factor @ signs[: factor.shape[1]]
        fitted = trial.frame.apply(trial.train)
        rows = trial.frame.apply(trial.heldout).about(fitted)
        targets, cross = fitted.xy @ sketch, rows.xy @ sketch
        power, deviations = (sketch * (rows.yy @ sketch)).sum(0), weigh.trace(trial.heldout.yy)
        unit = deviations if average == "mean" else 1.0
        total += deviations / unit
        penalised, diagonal = fitted.xx.clone(), fitted.xx.diagonal()
        for number, penalty in enumerate(penalties):
            penalised.diagonal().copy_(diagonal + penalty)
            weight = solve_positive(penalised, targets)
            errors[number] += (power + (weight * (rows.xx @ weight - 2 * cross)).sum(0)) / unit
    estimates = errors.mean(1)
    differences = errors - errors[estimates.argmin()]
    kept = differences.mean(1) <= 8 * differences.std(1) / SKETCH**0.5
    return Path(tuple(penalties), tuple((1 - estimates / total).tolist())), tuple(torch.nonzero(kept)[:, 0].tolist())


def direct_errors(trial: Trial, weigh: Weighting, alphas: torch.Tensor) -> torch.Tensor:
    """As `Trial.errors`, with a Cholesky factor and two products for each penalty: cheaper for one or two of them."""
    fitted = trial.frame.apply(trial.train)
    rows = trial.frame.apply(trial.heldout).about(fitted)
    scaled = weigh.scaled(trial.frame.y_scale)
    errors = []
    for alpha in alphas.tolist():
        weight = solve_ridge(fitted.xx, fitted.xy, alpha)
        errors.append(scaled.trace(rows.yy) + float((scaled.apply(weight) * (rows.xx @ weight - 2 * rows.xy)).sum()))
    return torch.tensor(errors, dtype=torch.float64, device=alphas.device)


def solve_ridge(xx: torch.Tensor, xy: torch.Tensor, alpha: float) -> torch.Tensor:
    """`(C_xx + α)⁻¹ C_xy` by Cholesky: for a single penalty; float64 (d_x, d_x) and (d_x, targets).

    Raises:
        MomentsError: The penalty is too small.
    """
    penalised = xx.clone()
    penalised.diagonal().add_(alpha)
    return solve_positive(penalised, xy)


def score_path_gcv(source: RidgeSource, train: Regression, frame: Frame, penalties: Sequence[float], metric: str) -> Path:
    """R² of every penalty by generalised cross-validation on training rows alone (METHODS §4.4).

    Args:
        source: The decomposed source of the training rows, in the coordinates of the frame.
        train: Training rows.
        frame: Coordinates to solve in.
        penalties: The grid, in raw units.
        metric: One of `metrics.METRICS`.
    """
    alphas = torch.tensor(penalties, dtype=torch.float64, device=train.xx.device)
    weigh = weighting(metric, train.yy, train.yy)
    errors = source.gcv_errors(frame.apply(train), weigh.scaled(frame.y_scale), alphas)
    return Path(tuple(penalties), tuple((1 - errors / weigh.trace(train.yy)).tolist()))


@dataclass(frozen=True)
class Readouts:
    """A ridge regression for each of many directions of the target, each with the penalty that suits it: `â_f = x·w_f + b_f`.

    Not a map between residuals: two directions may have different penalties.

    Attributes:
        weight: float64 (d_x, directions).
        bias: float64 (directions,).
        alphas: Chosen penalties, float64 (directions,).
        scores: Held-out R² by direction and penalty, float64 (directions, penalties); NaN for a direction that does not vary. The
            chosen ones are optimistic: score on other rows.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    alphas: torch.Tensor
    scores: torch.Tensor


def readouts(source: RidgeSource, train: Regression, heldout: Regression, directions: torch.Tensor, alphas: torch.Tensor) -> Readouts:
    """Fit a readout for each direction, with the penalty that does best on held-out rows; O(d²) per direction and penalty (METHODS §4.5).

    Args:
        source: The decomposed source of the training rows.
        train: Training rows.
        heldout: Rows that choose the penalties.
        directions: float64 (directions, d_y), e.g. rows of a dictionary's decoder.
        alphas: float64 (penalties,).

    Raises:
        MomentsError: The directions have another width than the target.
    """
    if directions.dim() != 2 or directions.shape[1] != train.yy.shape[0]:
        raise MomentsError(f"directions have shape {tuple(directions.shape)}, not (directions, {train.yy.shape[0]})")
    values, vectors = source.spectrum
    rows = heldout.about(train)
    coefficients = vectors.T @ train.xy @ directions.T
    cross = vectors.T @ rows.xy @ directions.T
    rotated = vectors.T @ rows.xx @ vectors
    power = ((directions @ rows.yy) * directions).sum(1)
    errors = []
    for alpha in alphas:
        filtered = coefficients / (values + alpha)[:, None]
        errors.append(power - 2 * (filtered * cross).sum(0) + (filtered * (rotated @ filtered)).sum(0))
    total = ((directions @ heldout.yy) * directions).sum(1)
    scores = 1 - torch.stack(errors, 1) / torch.where(total > 0, total, float("nan"))[:, None]
    chosen = alphas[scores.nan_to_num(nan=-float("inf")).argmax(1)]
    weight = vectors @ (coefficients / (values[:, None] + chosen))
    return Readouts(weight, directions @ train.y_mean - train.x_mean @ weight, chosen, scores)
