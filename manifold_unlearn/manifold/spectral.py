"""Leading eigenpairs of a Markov operator, through its symmetric conjugate."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch
from torch import Tensor

from manifold_unlearn.manifold.twogrid import Product, coarse_grid, leading_eigenpairs

_DENSE = 400  # components up to this size are solved densely
_AFFORDABLE = 3000  # and up to this size where ARPACK fails
_CELLS, _CELL_ROWS = 2048, 16  # most cells of the coarse grid, and least rows of a cell
_SPARE = 5  # vectors iterated beyond those wanted
_CHECKED = 40  # most steps that look for an eigenvalue missed
_TOLERANCE = 1e-10
_RESTARTS = 60


class Eigenpairs(NamedTuple):
    """Non-trivial eigenpairs of a Markov operator, and the graph's connected components.

    Attributes
    ----------
    eigenvalues : array of shape (n_components,)
        Descending, without the trivial 1. With c components the first c - 1 are 1.
    eigenvectors : array of shape (n_samples, n_components)
        Right eigenvectors of unit variance; the largest absolute entry is positive.
    component : array of shape (n_samples,), int
        Connected component of each row, the largest is 0.
    """

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    component: np.ndarray


def markov_eigenpairs(
    symmetric: scipy.sparse.csr_matrix,
    root: np.ndarray,
    n_components: int,
    device: torch.device | str = "cpu",
) -> Eigenpairs:
    """Leading eigenpairs of the Markov operator ``diag(1 / root) @ symmetric @ diag(root)``.

    Components are solved one by one, so a repeated eigenvalue 1 is exact and the coordinates of
    one component are not mixed with another's. Up to 400 rows densely; up to 3,000 on the CPU by
    ARPACK with a fixed start; beyond, and on another device, by two grids
    (:mod:`~manifold_unlearn.manifold.twogrid`). Where these do not converge or miss an eigenvalue
    densely up to 3,000 rows, and beyond by :func:`block_eigenpairs`.

    Parameters
    ----------
    symmetric : csr_matrix of shape (n_samples, n_samples)
        Largest eigenvalue 1, with eigenvector ``root`` on each connected component. Rows of near
        points should stand together: runs of them are the cells of the coarse grid.
    root : array of shape (n_samples,)
        Positive; its square is the stationary distribution up to a factor.
    n_components : int
    device : torch.device or str

    Raises
    ------
    ValueError
        ``n_components`` exceeds ``n_samples - 1``.
    """
    n_samples = symmetric.shape[0]
    if not 1 <= n_components <= n_samples - 1:
        raise ValueError(
            f"n_components={n_components} must lie between 1 and {n_samples - 1}, one less than "
            "the samples. Lower n_components or add data."
        )
    component = _components(symmetric)
    n_parts = int(component.max()) + 1
    values, vectors = [np.ones(n_parts - 1)], [_contrasts(component, root**2)]
    for part in range(n_parts):
        rows = np.flatnonzero(component == part)
        wanted = min(n_components, len(rows) - 1)
        if wanted < 1 or n_parts - 1 >= n_components:
            continue
        block = symmetric if n_parts == 1 else symmetric[rows][:, rows]
        found, basis = _leading(block, root[rows], wanted, device)
        spread = np.zeros((n_samples, wanted))
        spread[rows] = basis / root[rows, None]
        values.append(found)
        vectors.append(spread)
    eigenvalues, eigenvectors = np.concatenate(values), np.concatenate(vectors, axis=1)
    order = np.argsort(-eigenvalues, kind="stable")[:n_components]
    return Eigenpairs(eigenvalues[order], fix_signs(_unit(eigenvectors[:, order])), component)


def _components(symmetric: scipy.sparse.csr_matrix) -> np.ndarray:
    """Component of each row, numbered by decreasing size, then by first row."""
    _, label = scipy.sparse.csgraph.connected_components(symmetric, directed=False)
    _, first, inverse, counts = np.unique(
        label, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[inverse]


def _contrasts(component: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Functions constant on components, orthogonal under ``mass`` to each other and to 1.

    The j-th tells component j + 1 from the components before it.
    """
    n_parts = int(component.max()) + 1
    masses = np.bincount(component, weights=mass, minlength=n_parts)
    before = np.cumsum(masses)
    result = np.zeros((len(component), n_parts - 1))
    for part in range(1, n_parts):
        result[component < part, part - 1] = -masses[part] / before[part - 1]
        result[component == part, part - 1] = 1.0
    return result


def _leading(
    block: scipy.sparse.csr_matrix, root: np.ndarray, wanted: int, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """The ``wanted`` leading eigenpairs after the trivial one."""
    size = block.shape[0]
    if size <= _DENSE or wanted + 1 > size // 4:
        values, basis = scipy.linalg.eigh(
            block.toarray(), subset_by_index=[size - wanted - 1, size - 1]
        )
    elif size <= _AFFORDABLE and torch.device(device).type == "cpu":
        values, basis = _arpack(block, wanted + 1)
    else:
        values, basis = _two_grids(block, root, wanted + 1, device)
    order = np.argsort(-values, kind="stable")
    values, basis = values[order], basis[:, order]
    trivial = root / np.linalg.norm(root)
    basis = basis - trivial[:, None] * (trivial @ basis)  # the known vector, out of every other
    return values[1:], basis[:, 1:]


def _arpack(block: scipy.sparse.csr_matrix, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """By ARPACK, which sees one vector of an exactly repeated eigenvalue; if so, by blocks."""
    spare = wanted + 2
    start = np.random.default_rng(0).standard_normal(block.shape[0])
    try:
        values, basis = scipy.sparse.linalg.eigsh(
            block,
            spare,
            which="LA",
            v0=start,
            tol=_TOLERANCE,
            ncv=max(2 * spare + 1, 24),
            maxiter=_RESTARTS,
        )
    except scipy.sparse.linalg.ArpackNoConvergence:  # eigenvalues crowd near 1
        return _slowly(block, wanted)
    order = np.argsort(-values, kind="stable")
    values, basis = values[order], basis[:, order]
    if _misses_one(block, basis, values, wanted, 150):
        return _slowly(block, wanted)
    return values[:wanted], basis[:, :wanted]


def _misses_one(
    block: scipy.sparse.csr_matrix, basis: np.ndarray, values: np.ndarray, wanted: int, most: int
) -> bool:
    """Whether there is a larger eigenvalue beside the ones found, as far as ``most`` steps see."""
    gap = max(values[1] - values[-1], 1e-12) / (1 + values[-1])
    steps = int(np.clip((np.log(len(basis)) + 3) / (4 * np.sqrt(gap)), 20, most))
    return _top_of_rest(block, basis, steps) > values[wanted - 1] + 1e-9


def _two_grids(
    block: scipy.sparse.csr_matrix, root: np.ndarray, wanted: int, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """By a coarse grid of runs of rows; by other means if it does not converge or misses one."""
    size, width = len(root), wanted + max(_SPARE, wanted // 2)
    n_cells = max(min(_CELLS, 2 ** (size // _CELL_ROWS).bit_length() // 2), min(2 * width, size))
    cell = np.arange(size) * n_cells // size
    grid = coarse_grid(block, root, cell, width, device)
    apply = product(block, device)
    found = leading_eigenpairs(apply, apply(grid.prolong(grid.vectors)), wanted, grid.precondition)
    values, basis = found.values.cpu().numpy(), found.vectors.cpu().numpy()
    if not found.converged or _misses_one(block, basis, values, wanted, _CHECKED):
        return _slowly(block, wanted, device)
    return values, basis


def _slowly(
    block: scipy.sparse.csr_matrix, wanted: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """By a method that crowded and repeated eigenvalues do not mislead."""
    size = block.shape[0]
    if size > _AFFORDABLE:
        values, vectors = block_eigenpairs(product(block, device), size, wanted, device=device)
        return values.cpu().numpy(), vectors.cpu().numpy()
    return scipy.linalg.eigh(block.toarray(), subset_by_index=[size - wanted, size - 1])


def _top_of_rest(block: scipy.sparse.csr_matrix, basis: np.ndarray, steps: int) -> float:
    """Lower bound on the largest eigenvalue orthogonal to ``basis``, by Lanczos steps."""
    size, found = basis.shape
    Q = np.empty((size, found + steps))
    Q[:, :found] = basis
    vector: np.ndarray = np.random.default_rng(1).standard_normal((size,))
    diagonal, beside = [], []
    for step in range(steps):
        known = Q[:, : found + step]
        for _ in range(2):
            vector = vector - known @ (known.T @ vector)
        norm = float(np.linalg.norm(vector))
        if norm < 1e-12:
            break
        if step:
            beside.append(norm)
        Q[:, found + step] = vector / norm
        vector = block @ Q[:, found + step]
        diagonal.append(Q[:, found + step] @ vector)
    return float(scipy.linalg.eigvalsh_tridiagonal(diagonal, beside)[-1])


def product(block: scipy.sparse.csr_matrix, device: torch.device | str) -> Product:
    """The matrix as a function of blocks of vectors on ``device``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(
            torch.from_numpy(block.indptr),
            torch.from_numpy(block.indices),
            torch.from_numpy(block.data),
            size=block.shape,
            device=device,
            check_invariants=False,
        )
    return lambda V: matrix @ V


def block_eigenpairs(
    apply: Product,
    size: int,
    wanted: int,
    *,
    device: torch.device | str = "cpu",
    degree: int = 24,
    max_iter: int = 200,
    tol: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of a symmetric operator with spectrum in [-1, 1].

    Subspace iteration with a Chebyshev filter (Zhou, Saad, Tiago and Chelikowsky 2006): only
    products with blocks of vectors, so that it runs on any device at the speed of those.

    Parameters
    ----------
    apply : callable
        ``(size, m) -> (size, m)``, float64.
    size, wanted : int
    device : torch.device or str
    degree : int
        Of the filter; products per iteration. Doubled every 10 iterations, up to 16 times.
    max_iter : int
    tol : float
        Norm of a residual at which its pair counts as found.

    Returns
    -------
    values : Tensor of shape (wanted,), descending
    vectors : Tensor of shape (size, wanted), orthonormal

    Raises
    ------
    ArithmeticError
        No convergence within ``max_iter`` iterations.
    """
    width = min(size, wanted + max(8, wanted // 2))
    start = np.random.default_rng(0).standard_normal((size, width))
    V = torch.linalg.qr(torch.from_numpy(start).to(device)).Q
    for iteration in range(max_iter):
        image = apply(V)
        values, rotation = torch.linalg.eigh(V.T @ image)
        V, image = V @ rotation, image @ rotation
        residuals = (image - V * values).norm(dim=0)[-wanted:]
        if float(residuals.max()) <= tol:
            return values[-wanted:].flip(0), V[:, -wanted:].flip(1)
        # map [-1, edge], the unwanted part, to [-1, 1], where Chebyshev polynomials stay small
        edge = min(float(values[0]), 1 - 1e-9)
        middle, half = (edge - 1) / 2, (edge + 1) / 2
        previous, current = V, (image - middle * V) / half
        growing = degree * 2 ** min(iteration // 10, 4)  # crowded eigenvalues need sharper filters
        for _ in range(growing - 1):
            previous, current = current, 2 * (apply(current) - middle * current) / half - previous
            if float(current.abs().max()) > 1e100:
                previous, current = previous / 1e100, current / 1e100
        V = torch.linalg.qr(current / current.norm(dim=0)).Q
    raise ArithmeticError(
        f"{wanted} eigenpairs of a {size} x {size} operator did not converge in {max_iter} "
        f"iterations: largest residual {float(residuals.max()):.1e}, tol={tol:.1e}. "
        "Ask for fewer components or a larger bandwidth."
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Columns of variance 1."""
    return vectors / np.std(vectors, axis=0, keepdims=True)


def fix_signs(vectors: np.ndarray) -> np.ndarray:
    """Columns with their largest absolute entry positive."""
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return vectors * np.where(signs == 0, 1.0, signs)
