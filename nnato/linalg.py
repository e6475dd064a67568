"""Dense linear algebra, float64: the only file that calls `eigh`, `svd` and `cholesky`."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from nnato.errors import MomentsError

TOLERANCE = 1e-10
"""Eigenvalues below this fraction of the largest one are outside the support (METHODS: numerics)."""
WHITENING_TOLERANCE = 1e-7
"""The same for the correlation matrix of standardised coordinates, when it is whitened."""
_RESIDUAL = 1e-9
"""How far, relative to the matrix, a device's eigendecomposition may be from orthogonal or exact before the CPU repeats it."""


class Spectrum(NamedTuple):
    """Eigendecomposition `C = Q diag(λ) Qᵀ` of a scatter, restricted to its support.

    Attributes:
        values: float64 (rank,), ascending, all above `TOLERANCE` times the largest.
        vectors: float64 (d, rank), orthonormal columns.
    """

    values: torch.Tensor
    vectors: torch.Tensor

    @property
    def whitener(self) -> torch.Tensor:
        """`F = Q diag(λ)^-1/2`, float64 (d, rank): `Fᵀ C F = 1`, and `F Fᵀ` is the pseudo-inverse of C."""
        return self.vectors / self.values.sqrt()

    @property
    def colourer(self) -> torch.Tensor:
        """`Q diag(λ)^1/2`, float64 (d, rank): the transpose of the pseudo-inverse of `whitener`."""
        return self.vectors * self.values.sqrt()


def spectrum(scatter: torch.Tensor, tolerance: float = TOLERANCE) -> Spectrum:
    """Decompose a symmetric positive semi-definite matrix, float64 (d, d).

    Args:
        scatter: The matrix.
        tolerance: Eigenvalues below this fraction of the largest one are outside the support.

    Raises:
        MomentsError: It is not finite, or zero.
    """
    _check_finite(scatter)
    values, vectors = _eigh(scatter)
    kept = values > tolerance * values[-1]
    if not bool(kept.any()) or float(values[-1]) <= 0:
        raise MomentsError("a scatter matrix is zero: the residuals of this site do not vary (too few tokens?)")
    return Spectrum(values[kept], vectors[:, kept])


class Whitening(NamedTuple):
    """Coordinates in which a scatter is the identity.

    Attributes:
        whitener: F, float64 (d, rank), with `Fᵀ C F = 1`.
        colourer: The transpose of a left inverse of F, float64 (d, rank): `colourerᵀ F = 1`.
    """

    whitener: torch.Tensor
    colourer: torch.Tensor


def whitening(scatter: torch.Tensor) -> Whitening:
    """Whiten by way of standardised coordinates, whose small eigenvalues rounding spoils least; float64 (d, d).

    A few coordinates of a residual stream are thousands of times larger than the rest. In standardised ones, directions below 1e-7 of the
    largest variance are left out: beyond that, rounding alone would push canonical correlations above one.

    Raises:
        MomentsError: The scatter is not finite, or zero.
    """
    deviations = scatter.diagonal().clamp(min=0).sqrt()
    scale = torch.where(deviations > TOLERANCE * deviations.max(), deviations, float("inf"))[:, None]
    decomposed = spectrum(scatter / scale / scale.T, WHITENING_TOLERANCE)
    varying = torch.where(torch.isfinite(scale), scale, 0.0)
    return Whitening(decomposed.whitener / scale, decomposed.colourer * varying)


def principal_axes(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, descending, and orthonormal eigenvectors in columns, of a symmetric matrix, float64 (d, d).

    Raises:
        MomentsError: It is not finite.
    """
    _check_finite(matrix)
    values, vectors = _eigh(matrix)
    return values.flip(0), vectors.flip(1)


def singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin singular value decomposition `M = U diag(s) Vᵀ`: U, s descending, and V (not its transpose), float64.

    Raises:
        MomentsError: It is not finite.
    """
    _check_finite(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.T


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Singular values, descending.

    Raises:
        MomentsError: The matrix is not finite.
    """
    _check_finite(matrix)
    values: torch.Tensor = torch.linalg.svdvals(matrix)
    return values


def solve_positive(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve `A X = B` for a symmetric positive definite A by Cholesky.

    Raises:
        MomentsError: A is not finite, or not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        _check_finite(matrix)
        raise MomentsError("a scatter matrix plus its penalty is not positive definite: use a larger penalty")
    solved: torch.Tensor = torch.cholesky_solve(right, factor)
    return solved


def random_orthogonal(width: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A Haar-distributed orthogonal matrix, float64 (width, width), the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    rotation: torch.Tensor = q * r.diagonal().sign()  # the signs make QR unique, and Q uniform
    return rotation.to(device)


def _check_finite(matrix: torch.Tensor) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise MomentsError("a scatter matrix holds values that are not finite: accumulate again")


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU by LAPACK. Another device's result is checked, and computed again on the CPU if it is not exact, saying so."""
    if matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    values, vectors = torch.linalg.eigh(matrix)
    if decomposes(matrix, values, vectors):
        return values, vectors
    warnings.warn(f"eigh on {matrix.device} was not exact to {_RESIDUAL:.0e}; it was computed on the CPU instead", stacklevel=2)
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


def decomposes(matrix: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> bool:
    """Whether `vectors diag(values) vectorsᵀ` is the matrix and the vectors are orthonormal, to 1e-9 of its norm."""
    eye = torch.eye(len(values), dtype=matrix.dtype, device=matrix.device)
    exact = torch.linalg.matrix_norm(matrix @ vectors - vectors * values) <= _RESIDUAL * torch.linalg.matrix_norm(matrix)
    orthonormal = (vectors.T @ vectors - eye).abs().max() <= _RESIDUAL
    return bool(exact & orthonormal)
