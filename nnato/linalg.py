"""Dense linear algebra, float64: the only file that calls `eigh`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nnato.errors import MomentsError

TOLERANCE = 1e-10
"""Eigenvalues below this fraction of the largest one are outside the support (METHODS: numerics)."""


class Spectrum(NamedTuple):
    """Eigendecomposition `C = Q diag(λ) Qᵀ` of a scatter, restricted to its support.

    Attributes:
        values: float64 (rank,), ascending, all above `TOLERANCE` times the largest.
        vectors: float64 (d, rank), orthonormal columns.
    """

    values: torch.Tensor
    vectors: torch.Tensor


def spectrum(scatter: torch.Tensor) -> Spectrum:
    """Decompose a symmetric positive semi-definite matrix, float64 (d, d).

    Raises:
        MomentsError: It is not finite, or zero.
    """
    if not bool(torch.isfinite(scatter).all()):
        raise MomentsError("a scatter matrix holds values that are not finite: accumulate again")
    values, vectors = torch.linalg.eigh(scatter)
    kept = values > TOLERANCE * values[-1]
    if not bool(kept.any()) or float(values[-1]) <= 0:
        raise MomentsError("a scatter matrix is zero: the residuals of this site do not vary (too few tokens?)")
    return Spectrum(values[kept], vectors[:, kept])


def pseudo_inverse(scatter: torch.Tensor) -> torch.Tensor:
    """Inverse of a symmetric positive semi-definite matrix on its support; float64 (d, d) to (d, d).

    Raises:
        MomentsError: It is not finite, or zero.
    """
    values, vectors = spectrum(scatter)
    return (vectors / values) @ vectors.T
