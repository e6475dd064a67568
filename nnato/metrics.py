"""R² of affine maps in several metrics, as functions of moments (METHODS: §§1, 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nnato.errors import MomentsError
from nnato.linalg import pseudo_inverse
from nnato.moments import Moments

if TYPE_CHECKING:
    from nnato.sites import ResidualSite

METRICS = ("variance_weighted", "uniform", "whitened")
"""`variance_weighted`: share of the total variance (Γ = I). `uniform`: mean of per-coordinate R². `whitened`: Γ = C_yy⁻¹ of training."""


@dataclass(frozen=True)
class Weighting:
    """A metric Γ on the target residual.

    Attributes:
        gamma: float64: None for the identity, (d_y,) for a diagonal Γ, else (d_y, d_y).
    """

    gamma: torch.Tensor | None = None

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
    if metric == "whitened":
        return Weighting(pseudo_inverse(train_yy))
    raise MomentsError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")


def error_matrix(heldout: Moments, pair: tuple[ResidualSite, ResidualSite], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`R = Σ (y - ŷ)ᵀ(y - ŷ)` of the map `ŷ = x W + b` on held-out rows, from their moments (METHODS §4.1).

    Args:
        heldout: Moments of the held-out rows.
        pair: (source, target).
        weight: float64 (d_x, d_y).
        bias: float64 (d_y,).

    Returns:
        float64 (d_y, d_y).
    """
    source, target = pair
    c_xx, c_xy, c_yy = heldout.scatter_of(source, source), heldout.scatter_of(*pair), heldout.scatter_of(target, target)
    mean = heldout.mean_of(target) - heldout.mean_of(source) @ weight - bias
    cross = weight.T @ c_xy
    return c_yy - cross - cross.T + weight.T @ c_xx @ weight + heldout.n * torch.outer(mean, mean)


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
