"""Operators of every rank from one decomposition: reduced-rank ridge in a metric, and truncation for comparison (METHODS §4.6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnato.errors import MomentsError
from nnato.linalg import principal_axes, singular
from nnato.metrics import Weighting
from nnato.regression import Regression
from nnato.ridge import RidgeSource


@dataclass(frozen=True)
class RankPath:
    """Maps of rank 1, 2, …: the map of rank r is `left[:, :r] @ right[:r]`, so that factors are nested.

    Attributes:
        left: float64 (d_x, ranks).
        right: float64 (ranks, d_y).
        gains: What each rank takes off the training objective, descending, float64 (ranks,); of a truncated map its singular values.
    """

    left: torch.Tensor
    right: torch.Tensor
    gains: torch.Tensor

    @property
    def ranks(self) -> int:
        """The highest rank."""
        return self.right.shape[0]

    def weight(self, rank: int) -> torch.Tensor:
        """The map of one rank, float64 (d_x, d_y).

        Raises:
            MomentsError: There is no such rank.
        """
        if not 1 <= rank <= self.ranks:
            raise MomentsError(f"rank {rank}: choose from 1 to {self.ranks}")
        return self.left[:, :rank] @ self.right[:rank]

    def errors(self, rows: Regression, weigh: Weighting) -> torch.Tensor:
        """`tr(Γ R)` of the maps of all ranks on some rows: a cumulative sum, O(d²) after four products.

        Args:
            rows: Rows with second moments about the training means: `heldout.about(train)`, or training rows.
            weigh: Γ.

        Returns:
            float64 (ranks,); the entry r-1 is of rank r. It may rise: a direction that overfits costs more than it explains.
        """
        weighted = weigh.apply(self.right)
        linear = ((self.left.T @ rows.xy) * weighted).sum(1)
        quadratic = (self.left.T @ rows.xx @ self.left) * (weighted @ self.right.T)
        added = 2 * quadratic.tril(-1).sum(1) + quadratic.diagonal()
        return weigh.trace(rows.yy) - (2 * linear - added).cumsum(0)


def reduced_rank(source: RidgeSource, train: Regression, alpha: float, weigh: Weighting) -> RankPath:
    """The minimisers of `tr Γ(Y-XW)ᵀ(Y-XW) + α tr ΓWᵀW` over maps W of every rank (METHODS §4.6).

    Args:
        source: The decomposed source of the training rows.
        train: Training rows.
        alpha: Ridge penalty, in scikit-learn's units.
        weigh: Γ; the maps live on its support.
    """
    values, vectors = source.spectrum
    factor, inverse = weigh.factors(train.yy.shape[0], train.yy.device)
    projected = (vectors.T @ train.xy @ factor) / (values + alpha).sqrt()[:, None]
    gains, axes = principal_axes(projected.T @ projected)
    ranks = min(projected.shape)
    axes = axes[:, :ranks]
    left = vectors @ ((projected @ axes) / (values + alpha).sqrt()[:, None])
    return RankPath(left, axes.T @ inverse, gains[:ranks].clamp(min=0))


def truncated(weight: torch.Tensor) -> RankPath:
    """A map with only its largest singular values kept: what the paper does. Not the best map of its rank; for comparison only.

    Args:
        weight: float64 (d_x, d_y).
    """
    left, values, right = singular(weight)
    return RankPath(left * values, right.T, values)
