"""Ridge regression from moments: one eigendecomposition per source serves every penalty and every target (METHODS: §§4.2, 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnato.errors import MomentsError
from nnato.linalg import Spectrum, spectrum
from nnato.metrics import Weighting
from nnato.moments import Moments
from nnato.sites import ResidualSite

KAPPAS: tuple[float, ...] = tuple(10.0 ** (exponent / 2) for exponent in range(-16, 5))
"""Grid of κ, 1e-8 … 1e2, two a decade. The penalty is α = κ · tr(C_xx) / d_x, so that it means the same at every scale and token count."""


class RidgeSource:
    """The decomposed source of a family of ridge regressions, shared by all its targets and penalties.

    Args:
        train: Training moments.
        source: The site.

    Attributes:
        spectrum: Eigendecomposition of `C_xx` on its support. What lies outside (below 1e-10 of the largest eigenvalue) has no weight.
        scale: tr(C_xx) / d_x, the unit of the penalty.
    """

    def __init__(self, train: Moments, source: ResidualSite) -> None:
        c_xx = train.scatter_of(source, source)
        self.train, self.source = train, source
        self.spectrum: Spectrum = spectrum(c_xx)
        self.scale = float(c_xx.trace()) / c_xx.shape[0]

    def weight(self, c_xy: torch.Tensor, alpha: float) -> torch.Tensor:
        """`W = Q diag(1 / (λ + α)) Qᵀ C_xy`, from C_xy, float64 (d_x, d_y), and α; float64 (d_x, d_y)."""
        values, vectors = self.spectrum
        return vectors @ ((vectors.T @ c_xy) / (values + alpha)[:, None])

    def heldout_errors(
        self,
        target: ResidualSite,
        heldout: Moments,
        weigh: Weighting,
        alphas: torch.Tensor,
        c_xy: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`tr(Γ R)` on held-out rows for every penalty, at O(d²) each (METHODS §4.3).

        Args:
            target: The target site.
            heldout: Moments of the held-out rows.
            weigh: The metric Γ.
            alphas: float64 (penalties,).
            c_xy: Cross scatter to fit; by default that of training.

        Returns:
            float64 (penalties,).
        """
        values, vectors = self.spectrum
        b = vectors.T @ (self.train.scatter_of(self.source, target) if c_xy is None else c_xy)
        dx = heldout.mean_of(self.source) - self.train.mean_of(self.source)
        dy = heldout.mean_of(target) - self.train.mean_of(target)
        # Held-out second moments about the *training* means, which the fitted intercept refers to.
        m_xx = heldout.scatter_of(self.source, self.source) + heldout.n * torch.outer(dx, dx)
        m_xy = heldout.scatter_of(self.source, target) + heldout.n * torch.outer(dx, dy)
        m_yy = heldout.scatter_of(target, target) + heldout.n * torch.outer(dy, dy)
        weighted = weigh.apply(b)
        linear = (weighted * (vectors.T @ m_xy)).sum(1)
        quadratic = (vectors.T @ m_xx @ vectors) * (weighted @ b.T)
        filters = 1 / (values + alphas[:, None])
        errors: torch.Tensor = weigh.trace(m_yy) - 2 * filters @ linear + ((filters @ quadratic) * filters).sum(1)
        return errors


@dataclass(frozen=True)
class RidgeFit:
    """A ridge regression with its chosen penalty.

    Attributes:
        weight: float64 (d_x, d_y), in raw coordinates: the transpose of scikit-learn's `coef_`.
        bias: float64 (d_y,).
        alpha: The penalty, in scikit-learn's units.
        kappa: α in units of tr(C_xx) / d_x.
        scores: Held-out R² for each κ of the grid, in the metric of the choice; empty if nothing was chosen.
        at_edge: Whether the best κ is an end of the grid.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    alpha: float
    kappa: float
    scores: tuple[float, ...]
    at_edge: bool


def fit_ridge(
    source: RidgeSource,
    target: ResidualSite,
    validation: Moments,
    weigh: Weighting,
    kappas: tuple[float, ...] = KAPPAS,
    c_xy: torch.Tensor | None = None,
) -> RidgeFit:
    """Fit on training moments, with the penalty that does best on validation moments.

    Args:
        source: The decomposed source.
        target: The target site.
        validation: Moments that choose κ.
        weigh: The metric to choose in.
        kappas: The grid; one value fixes the penalty.
        c_xy: Cross scatter to fit instead of that of training (for the shuffled baseline).

    Raises:
        MomentsError: A κ is not positive and finite.
    """
    if not kappas or not all(0 < kappa < float("inf") for kappa in kappas):
        raise MomentsError(f"kappas {kappas}: give positive numbers")
    alphas = torch.tensor(kappas, dtype=torch.float64, device=source.spectrum.values.device) * source.scale
    errors = source.heldout_errors(target, validation, weigh, alphas, c_xy)
    scores = 1 - errors / weigh.trace(validation.scatter_of(target, target))
    best = int(scores.argmax())
    alpha = float(alphas[best])
    weight = source.weight(source.train.scatter_of(source.source, target) if c_xy is None else c_xy, alpha)
    bias = source.train.mean_of(target) - source.train.mean_of(source.source) @ weight
    at_edge = len(kappas) > 1 and best in (0, len(kappas) - 1)
    return RidgeFit(weight, bias, alpha, kappas[best], tuple(scores.tolist()), at_edge)
