"""Lasso and elastic net from moments, by coordinate descent with covariance updates (METHODS §4.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnato.errors import MomentsError
from nnato.regression import Regression

BLOCK = 64
"""Coordinates updated one after the other before the gradient of all others is brought up to date by one matrix product."""


@dataclass(frozen=True)
class SparseFit:
    """Coefficients that minimise scikit-learn's objective `‖y - xw‖² / 2n + α l1 ‖w‖₁ + α (1-l1) ‖w‖² / 2`, each target for itself.

    Attributes:
        weight: float64 (d_x, d_y).
        gap: The largest duality gap of a target, relative to its `‖y‖²`.
        sweeps: Passes over all coordinates.
        converged: Whether every gap is below the tolerance.
    """

    weight: torch.Tensor
    gap: float
    sweeps: int
    converged: bool


def zero_penalty(rows: Regression, l1_ratio: float) -> float:
    """The smallest α at which every coefficient is zero, the unit of the grid: `max |C_xy| / (n l1_ratio)`."""
    return float(rows.xy.abs().max()) / (rows.n * l1_ratio)


def check_l1_ratio(l1_ratio: float) -> None:
    """Refuse a share of the l1 penalty outside (0, 1].

    Raises:
        MomentsError: It is.
    """
    if not 0 < l1_ratio <= 1:
        raise MomentsError(f"l1 ratio {l1_ratio}: give a number above 0 and up to 1 (1 is the lasso; for 0 use ridge)")


def elastic_net(
    rows: Regression,
    alpha: float,
    l1_ratio: float = 1.0,
    *,
    start: torch.Tensor | None = None,
    tolerance: float = 1e-4,
    max_sweeps: int = 1000,
) -> SparseFit:
    """Solve for one penalty.

    All targets of a coordinate are updated at once, and targets that have converged leave the iteration. Within a block of coordinates the
    updates are those of cyclic coordinate descent exactly; the rest of the gradient is brought up to date once per block, by a product.

    Args:
        rows: Training rows.
        alpha: Penalty, in scikit-learn's units (per row).
        l1_ratio: Share of the l1 penalty; 1 is the lasso.
        start: Coefficients to start from, float64 (d_x, d_y); zero by default.
        tolerance: A target has converged when its duality gap is below this times its `‖y‖²`.
        max_sweeps: Give up after so many passes.

    Raises:
        MomentsError: The penalty or the share is out of range.
    """
    check_l1_ratio(l1_ratio)
    if not 0 < alpha < float("inf"):
        raise MomentsError(f"penalty {alpha}: give a positive number")
    soft, ridge = rows.n * alpha * l1_ratio, rows.n * alpha * (1 - l1_ratio)
    power = rows.yy.diagonal()
    weight = torch.zeros_like(rows.xy) if start is None else start.clone()
    active = torch.nonzero(power > 0)[:, 0]
    gaps = torch.zeros_like(power)
    sweeps = 0
    while True:
        w, xy = weight[:, active], rows.xy[:, active]
        product = rows.xx @ w
        gaps[active] = _gap(w, xy, power[active], product, soft, ridge) / power[active]
        open_ = gaps[active] > tolerance
        if not bool(open_.any()) or sweeps >= max_sweeps:
            return SparseFit(weight, float(gaps.max()), sweeps, not bool(open_.any()))
        active, w, xy, product = active[open_], w[:, open_], xy[:, open_], product[:, open_]
        for _ in range(min(CHECK_EVERY, max_sweeps - sweeps)):
            _sweep(rows.xx, xy, w, product, soft, ridge)
            sweeps += 1
        weight[:, active] = w


CHECK_EVERY = 5
"""Sweeps between two looks at the duality gaps."""


def _sweep(xx: torch.Tensor, xy: torch.Tensor, weight: torch.Tensor, product: torch.Tensor, soft: float, ridge: float) -> None:
    """One pass of coordinate descent in place; `product` is `C_xx W`, kept up to date."""
    curvature = xx.diagonal()
    steps = torch.where(curvature > 0, 1 / (curvature + ridge), 0.0).tolist()  # a constant coordinate keeps its zero
    for first in range(0, len(weight), BLOCK):
        block = slice(first, first + BLOCK)
        before = weight[block].clone()
        inner, own, now = xx[block, block], product[block].clone(), weight[block]
        for row in range(len(now)):
            partial = xy[first + row] - own[row] + inner[row, row] * now[row]
            updated = torch.nn.functional.softshrink(partial, soft) * steps[first + row]
            own.addr_(inner[:, row], updated - now[row])
            now[row] = updated
        product.addmm_(xx[:, block], now - before)


def _gap(weight: torch.Tensor, xy: torch.Tensor, power: torch.Tensor, product: torch.Tensor, soft: float, ridge: float) -> torch.Tensor:
    """Duality gap of each target, as scikit-learn defines it; float64 (targets,)."""
    linear = (weight * xy).sum(0)
    residual = power - 2 * linear + (weight * product).sum(0)
    squares = weight.square().sum(0)
    slope = (xy - product - ridge * weight).abs().amax(0)
    shrink = (soft / slope).clamp(max=1)
    primal = residual / 2 + ridge * squares / 2 + soft * weight.abs().sum(0)
    dual = shrink * (power - linear) - shrink.square() * (residual + ridge * squares) / 2
    gap: torch.Tensor = primal - dual
    return gap
