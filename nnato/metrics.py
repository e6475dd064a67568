"""R² of affine maps in several metrics, as functions of moments (METHODS: §§1, 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnato.errors import MomentsError
from nnato.linalg import spectrum, whitening
from nnato.regression import Regression

METRICS = ("variance_weighted", "uniform", "whitened")
"""`variance_weighted`: share of the total variance (Γ = I). `uniform`: mean of per-coordinate R². `whitened`: Γ = C_yy⁻¹ of training."""


@dataclass(frozen=True)
class Weighting:
    """A metric Γ on the target residual.

    Attributes:
        gamma: float64: None for the identity, (d_y,) for a diagonal Γ, else (d_y, d_y).
        root: For a dense Γ: F, float64 (d_y, rank), with `Γ = F Fᵀ`, and its pseudo-inverse, float64 (rank, d_y).
    """

    gamma: torch.Tensor | None = None
    root: tuple[torch.Tensor, torch.Tensor] | None = None

    def apply(self, matrix: torch.Tensor) -> torch.Tensor:
        """`M Γ` for M (k, d_y)."""
        if self.gamma is None:
            return matrix
        return matrix * self.gamma if self.gamma.dim() == 1 else matrix @ self.gamma

    def trace(self, matrix: torch.Tensor) -> float:
        """`tr(Γ M)` for M (d_y, d_y)."""
        if self.gamma is None:
            return float(matrix.trace())
        return float((matrix.diagonal() * self.gamma).sum() if self.gamma.dim() == 1 else (matrix.T * self.gamma).sum())

    def factors(self, width: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """F with `Γ = F Fᵀ` and its pseudo-inverse, float64 (d_y, rank) and (rank, d_y), on the support of Γ.

        Args:
            width: d_y.
            device: Where to make them if Γ does not say.
        """
        if self.root is not None:
            return self.root
        if self.gamma is None:
            eye = torch.eye(width, dtype=torch.float64, device=device)
            return eye, eye
        if self.gamma.dim() == 1:
            scale = self.gamma.sqrt()
            return torch.diag(scale), torch.diag(torch.where(scale > 0, 1 / scale, 0.0))
        decomposed = spectrum(self.gamma)
        return decomposed.colourer, decomposed.whitener.T

    def scaled(self, y_scale: torch.Tensor | None) -> Weighting:
        """The same metric for targets divided by a scale, float64 (d_y,): `diag(scale) Γ diag(scale)`."""
        if y_scale is None:
            return self
        if self.gamma is None:
            return Weighting(y_scale**2)
        if self.gamma.dim() == 1:
            return Weighting(self.gamma * y_scale**2)
        root = None if self.root is None else (self.root[0] * y_scale[:, None], self.root[1] / y_scale)
        return Weighting(self.gamma * torch.outer(y_scale, y_scale), root)


def weighting(metric: str, train_yy: torch.Tensor, heldout_yy: torch.Tensor) -> Weighting:
    """The metric Γ of `R²_Γ = 1 - tr(Γ R) / tr(Γ C_yy)`.

    Args:
        metric: One of `METRICS`.
        train_yy: Scatter of the target in training; gives the whitening.
        heldout_yy: Scatter of the target in the held-out rows; gives the uniform weights, as in scikit-learn.

    Raises:
        MomentsError: The metric is unknown.
    """
    if metric == "variance_weighted":
        return Weighting()
    if metric == "uniform":
        variance = heldout_yy.diagonal()
        return Weighting(torch.where(variance > 0, 1 / variance, 0.0))
    check_metric(metric)
    whitener, colourer = whitening(train_yy)
    return Weighting(whitener @ whitener.T, (whitener, colourer.T))


def check_metric(metric: str) -> None:
    """Refuse a metric that nobody knows.

    Raises:
        MomentsError: The metric is unknown.
    """
    if metric not in METRICS:
        raise MomentsError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")


def error_matrix(heldout: Regression, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`R = Σ (y - ŷ)ᵀ(y - ŷ)` of the map `ŷ = x W + b` on held-out rows, from their moments (METHODS §4.1).

    Args:
        heldout: The rows.
        weight: float64 (d_x, d_y).
        bias: float64 (d_y,).

    Returns:
        float64 (d_y, d_y).
    """
    mean = heldout.y_mean - heldout.x_mean @ weight - bias
    cross = weight.T @ heldout.xy
    return heldout.yy - cross - cross.T + weight.T @ heldout.xx @ weight + heldout.n * torch.outer(mean, mean)


def r2(error: torch.Tensor, total: torch.Tensor, weigh: Weighting) -> float:
    """`1 - tr(Γ R) / tr(Γ C_yy)`.

    Args:
        error: R, float64 (d_y, d_y).
        total: C_yy of the same rows about their own mean; or another error matrix, which gives the skill over that map.
        weigh: Γ.

    Raises:
        MomentsError: The total is zero.
    """
    denominator = weigh.trace(total)
    if not denominator > 0:
        raise MomentsError("the held-out residuals of the target do not vary: there are too few tokens for an R²")
    return 1 - weigh.trace(error) / denominator


def squared_errors(weight: torch.Tensor, bias: torch.Tensor, folds: Sequence[Regression], weigh: Weighting) -> torch.Tensor:
    """`tr(Γ R)` of the map `ŷ = x W + b` on each of some held-out folds; O(d²) a fold after two products (METHODS §4.1).

    Args:
        weight: float64 (d_x, d_y).
        bias: float64 (d_y,).
        folds: Held-out rows.
        weigh: Γ.

    Returns:
        float64 (folds,).
    """
    weighted = weigh.apply(weight)
    square = weighted @ weight.T
    errors = []
    for fold in folds:
        explained = 2 * float((weighted * fold.xy).sum()) - float((square * fold.xx).sum())
        errors.append(weigh.trace(fold.yy) - explained + fold.n * _norm2(fold.y_mean - fold.x_mean @ weight - bias, weigh))
    return torch.tensor(errors, dtype=torch.float64)


def squared_deviations(folds: Sequence[Regression], centre: torch.Tensor, weigh: Weighting) -> torch.Tensor:
    """`tr(Γ Σ (y - c)ᵀ(y - c))` of each of some held-out folds, the denominators of R².

    Args:
        folds: Held-out rows.
        centre: c, float64 (d_y,); usually the mean of all folds together.
        weigh: Γ.

    Returns:
        float64 (folds,).
    """
    return torch.tensor([weigh.trace(fold.yy) + fold.n * _norm2(fold.y_mean - centre, weigh) for fold in folds], dtype=torch.float64)


def _norm2(vector: torch.Tensor, weigh: Weighting) -> float:
    return float((weigh.apply(vector[None])[0] * vector).sum())
