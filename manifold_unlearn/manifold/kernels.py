"""Gaussian kernels on neighbor graphs: fixed and variable bandwidth, normalization."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from manifold_unlearn.manifold.bandwidth import FAR_CUTOFF, Bandwidth
from manifold_unlearn.manifold.partition import build_index
from manifold_unlearn.manifold.radius import Pairs, pairs_within, radius_neighbors
from manifold_unlearn.manifold.search import exact_neighbors

NEAR = 8
"""Neighbors that the variable bandwidth is made from."""

_FEW, _FEW_OF_MANY = 1024, 8  # rows that are few, and rows enough in a support of many


class KernelGraph(NamedTuple):
    """Symmetric sparse kernel with unit diagonal, and each row's squared support radius."""

    matrix: scipy.sparse.csr_matrix
    squared_support: Tensor


def bandwidth_function(squared_distances: Tensor, intrinsic_dimension: float) -> Tensor:
    """Variable bandwidth ``rho`` of rows: their distance to near neighbors, to the d / (d + 2).

    The root mean square distance to the nearest 8 is a density estimate ``q ~ r**-d``, and
    ``rho = q**(-1 / (d + 2))`` (Berry and Harlim 2016, beta = -1 / (d + 2)). Not normalized.

    Parameters
    ----------
    squared_distances : Tensor of shape (n_samples, n_near)
        To the nearest others; rows that coincide count with 0.
    intrinsic_dimension : float

    Returns
    -------
    Tensor of shape (n_samples,)
        In units of the data to the power ``d / (d + 2)``; 0 where all near rows coincide.
    """
    exponent = intrinsic_dimension / (intrinsic_dimension + 2)
    return squared_distances.mean(1).sqrt().pow(exponent)


def relative_bandwidth_function(
    squared_distances: Tensor, intrinsic_dimension: float, typical: float | None = None
) -> tuple[Tensor, float]:
    """:func:`bandwidth_function` over its ``typical`` value, within 1/30 to 30; and that value.

    Default of ``typical``: the median of the positive values.
    """
    rho = bandwidth_function(squared_distances, intrinsic_dimension)
    if typical is None:
        positive = rho[rho > 0]
        typical = float(positive.median()) if len(positive) else 1.0
    return (rho / typical).clamp(1 / 30, 30), typical


def kernel_graph(
    X: Tensor,
    tuned: Bandwidth,
    *,
    n_neighbors: int,
    scale: Tensor | None = None,
    in_order: bool = False,
) -> KernelGraph:
    """Gaussian kernel on the union of the fixed-radius and the nearest-neighbor graph.

    Every pair with ``r**2 <= 4 * bandwidth * cutoff`` is kept, whatever the density, since a
    kernel cut after k neighbors brings the density back that ``alpha=1`` takes out. Rows that hold
    fewer rows there than :func:`least_held` reach on to ``n_neighbors``, as far as weight 1e-8.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
        Centered.
    tuned : Bandwidth
    n_neighbors : int
    scale : Tensor of shape (n_samples,), optional
        Variable bandwidth ``rho``: distances are ``r**2 / (rho_i * rho_j)``.
    in_order : bool
        Whether the rows stand as :func:`~manifold_unlearn.manifold.partition.leaf_order` puts them.
    """
    n_samples = len(X)
    width = 4 * tuned.bandwidth
    base = width * tuned.cutoff
    index = build_index(X, scale, in_order=in_order)
    pairs = radius_neighbors(index, base)
    held = 1 + torch.bincount(pairs.rows, minlength=n_samples)
    held += torch.bincount(pairs.columns, minlength=n_samples)
    support = torch.full((n_samples,), base, dtype=X.dtype, device=X.device)
    few = (held < least_held(n_neighbors, n_samples)).nonzero()[:, 0]
    extra = Pairs(*(part[:0] for part in pairs))
    if len(few):
        own = None if scale is None else scale[few]
        k = min(n_neighbors, n_samples)
        near = exact_neighbors(X[few], index, k, scale_A=own)[0]
        support[few] = support_radius(near, base, tuned.offset + width * FAR_CUTOFF)
        beyond = torch.zeros_like(support)
        wide = pairs_within(X[few], index, support[few], beyond, scale_Q=own)
        keep = (wide.squared_distances > base) & (few[wide.rows] != wide.columns)
        extra = Pairs(few[wide.rows[keep]], wide.columns[keep], wide.squared_distances[keep])
    return KernelGraph(symmetric_kernel(*extra, tuned, n_samples, once=pairs), support)


def symmetric_kernel(
    rows: Tensor,
    columns: Tensor,
    squared_distances: Tensor,
    tuned: Bandwidth,
    n_samples: int,
    *,
    once: Pairs | None = None,
) -> scipy.sparse.csr_matrix:
    """Kernel of pairs, each listed one way or both, and 1 on the diagonal.

    ``once`` are further pairs, none twice, with rows before columns.
    """
    smaller, larger = torch.minimum(rows, columns), torch.maximum(rows, columns)
    _, first = np.unique((smaller * n_samples + larger).cpu().numpy(), return_index=True)
    parts = [part.cpu().numpy()[first] for part in (smaller, larger, squared_distances)]
    if once is not None:
        lists = zip(once, parts, strict=True)
        parts = [np.concatenate([whole.cpu().numpy(), part]) for whole, part in lists]
    excess = np.maximum(parts[2].astype(np.float64) - tuned.offset, 0)
    weights = np.exp(-excess / (4 * tuned.bandwidth))
    shape = (n_samples, n_samples)
    upper = scipy.sparse.coo_matrix((weights, (parts[0], parts[1])), shape).tocsr()
    return scipy.sparse.csr_matrix(upper + upper.T + scipy.sparse.eye_array(n_samples))


def two_sided(
    matrix: scipy.sparse.csr_matrix, left: np.ndarray, right: np.ndarray
) -> scipy.sparse.csr_matrix:
    """``diag(left) @ matrix @ diag(right)``."""
    data = matrix.data * np.repeat(left, np.diff(matrix.indptr)) * right[matrix.indices]
    return scipy.sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def least_held(n_neighbors: int, n_samples: int) -> int:
    """Rows in its support, itself too, below which a row reaches beyond it.

    ``n_neighbors`` of at most 1,024 rows, which costs little; of more rows 8 do.
    """
    return n_neighbors if n_samples <= _FEW else min(n_neighbors, _FEW_OF_MANY)


def support_radius(squared_distances: Tensor, base: float, far: float) -> Tensor:
    """Squared support radius of rows with ``squared_distances`` to their nearest rows, ascending.

    Reaches the last of these, but at least to ``base`` and at most to ``far``.
    """
    largest = torch.finfo(squared_distances.dtype).max
    reach = squared_distances[:, -1] * (1 + 1e-4)
    return reach.clamp(min=base, max=min(max(base, far), largest))


def density_normalized(
    kernel: scipy.sparse.csr_matrix,
    alpha: float,
    scale: np.ndarray | None,
    dimension: float,
    target: np.ndarray | None = None,
) -> tuple[scipy.sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Kernel times ``weights_i * weights_j``, ``q**-alpha``; the weights and the kernel sums ``q``.

    Parameters
    ----------
    kernel : csr_matrix of shape (n_samples, n_samples)
    alpha : float
        1: the sampling density drops out (Coifman and Lafon 2006); 0: the graph Laplacian.
    scale : array of shape (n_samples,) or None
        Variable bandwidth ``rho``; ``q`` is divided by ``rho**dimension``.
    dimension : float
    target : array of shape (n_samples,), optional
        Density that takes the place of the sampling density: the weights are multiplied by
        ``sqrt(target)`` (Banisch, Trstanova, Bittracher, Klus and Koltai 2020).
    """
    q = np.asarray(kernel.sum(axis=1)).ravel()
    if scale is not None:
        q = q / scale**dimension
    weights = q**-alpha if target is None else q**-alpha * target**0.5
    return two_sided(kernel, weights, weights), weights, q
