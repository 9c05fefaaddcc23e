"""Leading eigenpairs of a smoothing operator on points, with a coarse grid of cells of points.

The wanted eigenvectors are smooth: averages over cells of neighboring rows carry them. A solve on
the cells gives the start and preconditions the iteration on the rows, which then takes about
fifteen products with a block of vectors, however close to 1 the eigenvalues are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A symmetric operator applied to a block of vectors, ``(size, m) -> (size, m)``, float64."""

_DROPPED = 1e-10  # part of the largest squared length under which a direction is rounding
_LEAST_RESIDUAL = 1e-11


class Found(NamedTuple):
    """Eigenvalues ``(wanted,)`` descending, orthonormal eigenvectors, and if they converged."""

    values: Tensor
    vectors: Tensor
    converged: bool


class CoarseGrid(NamedTuple):
    """Cells of rows: functions ``root`` times a constant on every cell.

    Attributes
    ----------
    weights : Tensor of shape (size,)
        Entry of each row in its cell's unit vector.
    cell : Tensor of shape (size,), int64
    vectors : Tensor of shape (n_cells, width)
        Leading eigenvectors of the operator on the cells, descending.
    inverse : Tensor of shape (n_cells, n_cells)
        Of 1 minus that operator, the trivial eigenvalue lifted off 0.
    """

    weights: Tensor
    cell: Tensor
    vectors: Tensor
    inverse: Tensor

    def prolong(self, coarse: Tensor) -> Tensor:
        """Function on the rows with the coefficients ``coarse`` (n_cells, m)."""
        return coarse[self.cell] * self.weights[:, None]

    def restrict(self, fine: Tensor) -> Tensor:
        """Coefficients of the projection of ``fine`` (size, m) on the cells."""
        result = fine.new_zeros(len(self.vectors), fine.shape[1])
        return result.index_add_(0, self.cell, fine * self.weights[:, None])

    def precondition(self, residual: Tensor) -> Tensor:
        """Nearly ``(1 - operator)**-1``: on the cells by a solve, elsewhere the identity."""
        coarse = self.restrict(residual)
        return residual + self.prolong(self.inverse @ coarse - coarse)


def coarse_grid(
    symmetric: scipy.sparse.csr_matrix,
    root: np.ndarray,
    cell: np.ndarray,
    width: int,
    device: torch.device | str,
) -> CoarseGrid:
    """Cells of the rows, with the leading ``width`` eigenvectors of the operator on them.

    Parameters
    ----------
    symmetric : csr_matrix of shape (size, size)
        Largest eigenvalue 1 with eigenvector ``root``.
    root : array of shape (size,)
    cell : array of shape (size,), int
        Cell of each row; every cell has a row.
    width : int
    device : torch.device or str
    """
    size, n_cells = len(root), int(cell.max()) + 1
    mass = np.sqrt(np.bincount(cell, weights=root**2, minlength=n_cells))
    weights = root / mass[cell]
    prolongation = scipy.sparse.csr_matrix((weights, cell, np.arange(size + 1)), (size, n_cells))
    operator = prolongation.T @ (symmetric @ prolongation)
    vectors = _leading_on_cells(operator, mass, width)
    dense = operator.toarray()
    smallest = 1 - vectors[:, 1] @ dense @ vectors[:, 1] if vectors.shape[1] > 1 else 1.0
    lifted = np.eye(n_cells) - dense + max(smallest, 1e-12) * np.outer(vectors[:, 0], vectors[:, 0])
    inverse = scipy.linalg.inv(lifted, overwrite_a=True, check_finite=False)
    place: Any = {"device": device, "dtype": torch.float64}
    return CoarseGrid(
        torch.as_tensor(weights, **place),
        torch.as_tensor(cell, device=device, dtype=torch.int64),
        torch.as_tensor(np.ascontiguousarray(vectors), **place),
        torch.as_tensor((inverse + inverse.T) / 2, **place),
    )


def _leading_on_cells(
    operator: scipy.sparse.csr_matrix, mass: np.ndarray, width: int
) -> np.ndarray:
    """About ``width`` leading eigenvectors, descending; the start of the iteration, so roughly."""
    n_cells = len(mass)
    if n_cells <= 4 * width:
        first = n_cells - min(width, n_cells)
        subset = [first, n_cells - 1]
        return scipy.linalg.eigh(operator.toarray(), subset_by_index=subset)[1][:, ::-1]
    start = mass * np.random.default_rng(0).uniform(0.5, 1.5, n_cells)
    values, vectors = scipy.sparse.linalg.eigsh(
        operator, width, which="LA", v0=start, tol=1e-3, ncv=3 * width, maxiter=200
    )
    return vectors[:, np.argsort(-values)]


def leading_eigenpairs(
    apply: Product,
    start: Tensor,
    wanted: int,
    precondition: Product,
    *,
    max_iter: int = 40,
    tol: float = 1e-5,
) -> Found:
    """Largest eigenpairs by locally optimal block preconditioned conjugate gradients.

    Knyazev (2001), in a basis whitened by its Gram matrix in every step, small directions
    dropped, so that neither rounding nor repeated eigenvalues stall it.

    Parameters
    ----------
    apply : callable
        The operator; eigenvalues at most 1.
    start : Tensor of shape (size, width)
        ``width`` above ``wanted``: the spare vectors speed up the convergence.
    wanted : int
    precondition : callable
        Nearly the inverse of 1 minus the operator.
    max_iter : int
    tol : float
        Largest norm of a residual, over 1 minus the last wanted eigenvalue, to stop at.
    """
    V, image, values, _ = _ritz(start, apply(start), start.shape[1])
    P, image_P = V[:, :0], V[:, :0]
    for _ in range(max_iter):
        residual = image - V * values
        norms = torch.linalg.vector_norm(residual, dim=0)
        limit = tol * float(1 - values[wanted - 1]) + _LEAST_RESIDUAL
        if float(norms[:wanted].max()) <= limit:
            return Found(values[:wanted], V[:, :wanted], True)
        H = precondition(residual[:, :wanted][:, norms[:wanted] > 0.1 * limit])
        H = H - V @ (V.T @ H)
        H = H / torch.linalg.vector_norm(H, dim=0).clamp_min(1e-300)
        n_old = V.shape[1]
        Z, image_Z = torch.cat([V, H, P], 1), torch.cat([image, apply(H), image_P], 1)
        V, image, values, mixing = _ritz(Z, image_Z, n_old)
        P, image_P = Z[:, n_old:] @ mixing[n_old:], image_Z[:, n_old:] @ mixing[n_old:]
    return Found(values[:wanted], V[:, :wanted], False)


def _ritz(Z: Tensor, image: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``width`` largest Ritz vectors in the span of ``Z``, descending.

    Returns them, their images, the Ritz values, and the matrix that makes them of ``Z``.
    """
    gram, small = Z.T @ Z, Z.T @ image
    lengths = gram.diagonal().clamp_min(1e-300).sqrt()
    squared, basis = torch.linalg.eigh(gram / lengths[:, None] / lengths)
    kept = squared > _DROPPED * squared[-1]
    basis = basis[:, kept] / squared[kept].sqrt() / lengths[:, None]
    values, rotation = torch.linalg.eigh(basis.T @ ((small + small.T) / 2) @ basis)
    mixing = basis @ rotation[:, -width:].flip(1)
    return Z @ mixing, image @ mixing, values[-width:].flip(0), mixing
