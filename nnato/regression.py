"""One pair's moments as a regression problem: all that a linear solver needs, and the changes of variables that solvers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nnato.errors import MomentsError
from nnato.moments import Moments
from nnato.sites import Pair


@dataclass(frozen=True)
class Regression:
    """Count, means and scatter sums of rows (x, y) (METHODS §1).

    Attributes:
        n: Number of rows.
        x_mean: float64 (d_x,); second moments are about it.
        y_mean: float64 (d_y,).
        xx: `C_xx`, float64 (d_x, d_x).
        xy: `C_xy`, float64 (d_x, d_y).
        yy: `C_yy`, float64 (d_y, d_y).
    """

    n: int
    x_mean: torch.Tensor
    y_mean: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor

    @staticmethod
    def of(moments: Moments, pair: Pair) -> Regression:
        """The regression of the target on the source of a pair.

        Raises:
            MomentsError: The moments do not hold the pair.
        """
        source, target = pair
        return Regression(
            moments.n,
            moments.mean_of(source),
            moments.mean_of(target),
            moments.scatter_of(source, source),
            moments.scatter_of(source, target).clone(),  # a view would keep all other blocks in memory
            moments.scatter_of(target, target),
        )

    @staticmethod
    def merge(parts: Sequence[Regression]) -> Regression:
        """All rows of some parts together (Chan's formula).

        Raises:
            MomentsError: There are no rows.
        """
        n = sum(part.n for part in parts)
        if not n:
            raise MomentsError("there are no tokens in these folds: accumulate more text")
        x_mean = sum((part.x_mean * (part.n / n) for part in parts[1:]), parts[0].x_mean * (parts[0].n / n))
        y_mean = sum((part.y_mean * (part.n / n) for part in parts[1:]), parts[0].y_mean * (parts[0].n / n))
        whole = Regression(n, x_mean, y_mean, *(torch.zeros_like(block) for block in (parts[0].xx, parts[0].xy, parts[0].yy)))
        for part in parts:
            moved = part.about(whole)
            for total, block in ((whole.xx, moved.xx), (whole.xy, moved.xy), (whole.yy, moved.yy)):
                total += block
        return whole

    def without(self, part: Regression) -> Regression:
        """The other rows, when `part` is of some of ours: at most about half, or digits are lost.

        Raises:
            MomentsError: There are no other rows.
        """
        n = self.n - part.n
        if n <= 0:
            raise MomentsError("there are no tokens outside this fold: accumulate more text")
        share = part.n / n
        x_mean, y_mean = self.x_mean + share * (self.x_mean - part.x_mean), self.y_mean + share * (self.y_mean - part.y_mean)
        dx, dy, weight = x_mean - part.x_mean, y_mean - part.y_mean, n * part.n / self.n
        return Regression(
            n,
            x_mean,
            y_mean,
            self.xx - part.xx - weight * torch.outer(dx, dx),
            self.xy - part.xy - weight * torch.outer(dx, dy),
            self.yy - part.yy - weight * torch.outer(dy, dy),
        )

    def about(self, other: Regression) -> Regression:
        """The same rows, with second moments about the means of `other` (METHODS: `M_uv`); these become its means."""
        dx, dy = self.x_mean - other.x_mean, self.y_mean - other.y_mean
        return Regression(
            self.n,
            other.x_mean,
            other.y_mean,
            self.xx + self.n * torch.outer(dx, dx),
            self.xy + self.n * torch.outer(dx, dy),
            self.yy + self.n * torch.outer(dy, dy),
        )

    def with_cross(self, xy: torch.Tensor) -> Regression:
        """The same with another cross scatter, e.g. that of shuffled pairs, float64 (d_x, d_y)."""
        return replace(self, xy=xy)


@dataclass(frozen=True)
class Frame:
    """Coordinates in which to solve: `x / x_scale` against `(y - x W₀) / y_scale`. Penalties act there, results come back in raw ones.

    Attributes:
        prior: W₀, float64 (d_x, d_y), the map that a large penalty leaves; None for zero.
        x_scale: float64 (d_x,); None for one.
        y_scale: float64 (d_y,); None for one.
    """

    prior: torch.Tensor | None = None
    x_scale: torch.Tensor | None = None
    y_scale: torch.Tensor | None = None

    @staticmethod
    def of(train: Regression, standardize: bool = False, prior: torch.Tensor | None = None) -> Frame:
        """A frame with scales from training rows.

        Args:
            train: The training rows.
            standardize: Divide every coordinate by its standard deviation; constant ones stay as they are.
            prior: W₀, float64 (d_x, d_y).

        Raises:
            MomentsError: The prior has another shape.
        """
        if prior is not None and prior.shape != train.xy.shape:
            raise MomentsError(f"the prior has shape {tuple(prior.shape)}, the operator {tuple(train.xy.shape)}")
        if not standardize:
            return Frame(prior)
        moved = Frame(prior).apply(train)
        return Frame(prior, _deviations(moved.xx, moved.n), _deviations(moved.yy, moved.n))

    def apply(self, rows: Regression) -> Regression:
        """Rows in these coordinates."""
        if self.prior is not None:
            cross = self.prior.T @ rows.xy
            rows = replace(
                rows,
                y_mean=rows.y_mean - rows.x_mean @ self.prior,
                xy=rows.xy - rows.xx @ self.prior,
                yy=rows.yy - cross - cross.T + self.prior.T @ rows.xx @ self.prior,
            )
        if self.x_scale is None or self.y_scale is None:
            return rows
        return Regression(
            rows.n,
            rows.x_mean / self.x_scale,
            rows.y_mean / self.y_scale,
            rows.xx / torch.outer(self.x_scale, self.x_scale),
            rows.xy / torch.outer(self.x_scale, self.y_scale),
            rows.yy / torch.outer(self.y_scale, self.y_scale),
        )

    def restore(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight found in these coordinates, in raw ones; float64 (d_x, d_y)."""
        if self.x_scale is not None and self.y_scale is not None:
            weight = weight / self.x_scale[:, None] * self.y_scale
        return weight if self.prior is None else weight + self.prior


def _deviations(scatter: torch.Tensor, n: int) -> torch.Tensor:
    """Standard deviations (divided by n, as in scikit-learn); one for coordinates that do not vary."""
    deviations = (scatter.diagonal().clamp(min=0) / n).sqrt()
    return torch.where(deviations > 1e-10 * deviations.max(), deviations, 1.0)
