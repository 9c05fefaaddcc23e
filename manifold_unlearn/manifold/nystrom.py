"""Nyström extension: eigenfunctions of a Markov operator at rows it was not fitted on."""

from __future__ import annotations

from typing import NamedTuple

import scipy.sparse
import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.kernels import (
    NEAR,
    least_held,
    relative_bandwidth_function,
    support_radius,
)
from manifold_unlearn.manifold.markov import LEAST_EIGENVALUE
from manifold_unlearn.manifold.partition import Index, build_index
from manifold_unlearn.manifold.radius import Pairs, pairs_within
from manifold_unlearn.manifold.search import exact_neighbors
from manifold_unlearn.manifold.twogrid import Product

_ROWS = 2**16
"""Rows extended together: their pairs with fitted rows are held at once."""


class FittedOperator(NamedTuple):
    """What the extension needs of a fit; tensors on one device.

    Attributes
    ----------
    landmarks : Tensor of shape (n_landmarks, n_features)
        The rows fitted.
    squared_support : Tensor of shape (n_landmarks,)
        Squared radius of each fitted row's kernel.
    weights : Tensor of shape (n_landmarks,)
        Of the fitted rows in the normalization of the kernel.
    eigenfunctions : Tensor of shape (n_landmarks, n_components)
    rates : Tensor of shape (n_components,)
        Eigenvalues of minus the generator, times the bandwidth.
    scale : Tensor of shape (n_landmarks,) or None
        Variable bandwidth ``rho``, in units of ``typical_scale``; None where it is 1.
    typical_scale, intrinsic_dimension : float
        What ``rho`` of new rows is made with.
    bandwidth, offset : float
    cutoff, far_cutoff : float
        ``r**2 / (4 * bandwidth)`` to which every kernel reaches, and beyond which none does.
    n_neighbors : int
    """

    landmarks: Tensor
    squared_support: Tensor
    weights: Tensor
    eigenfunctions: Tensor
    rates: Tensor
    scale: Tensor | None
    typical_scale: float
    intrinsic_dimension: float
    bandwidth: float
    offset: float
    cutoff: float
    far_cutoff: float
    n_neighbors: int


class Extended(NamedTuple):
    """Eigenfunctions (n_samples, n_components), float64, and how many rows no kernel reaches."""

    eigenfunctions: Tensor
    n_far: int


def extend(X: Tensor, fitted: FittedOperator) -> Extended:
    """Eigenfunctions at the rows of ``X``.

    The rows' kernel to the fitted ones is normalized as in the fit, applied to the eigenfunctions
    and divided by their eigenvalues: fitted rows return their own. Rows beyond the kernel's reach
    are placed by their nearest neighbors.
    """
    n_components = fitted.eigenfunctions.shape[1]
    index = build_index(fitted.landmarks, fitted.scale)
    result = torch.empty(len(X), n_components, dtype=torch.float64, device=X.device)
    n_far = 0
    for part in row_blocks(len(X), _ROWS):
        result[part], far = _extend_rows(X[part].to(fitted.landmarks.dtype), index, fitted)
        n_far += far
    return Extended(result, n_far)


def _extend_rows(queries: Tensor, index: Index, fitted: FittedOperator) -> tuple[Tensor, int]:
    width, n_landmarks = 4 * fitted.bandwidth, len(fitted.landmarks)
    base, far = width * fitted.cutoff, width * fitted.far_cutoff
    own = None
    if fitted.scale is not None:
        near, _ = exact_neighbors(queries, index._replace(scales=None), min(NEAR + 1, n_landmarks))
        own, _ = relative_bandwidth_function(near, fitted.intrinsic_dimension, fitted.typical_scale)
    reach = queries.new_full((len(queries),), base)
    pairs = pairs_within(queries, index, reach, fitted.squared_support, scale_Q=own)
    inside = pairs.rows[pairs.squared_distances <= base]
    held = torch.bincount(inside, minlength=len(queries))
    least = least_held(fitted.n_neighbors, n_landmarks)
    few = (held < least).nonzero()[:, 0]
    n_far = 0
    if len(few):
        scale = None if own is None else own[few]
        k = min(fitted.n_neighbors, n_landmarks)
        near, _ = exact_neighbors(queries[few], index, k, scale_A=scale)
        n_far = int((near[:, 0] > far).sum())
        reach = support_radius(near, base, far)
        reach = torch.where(near[:, 0] > base, torch.maximum(reach, near[:, 0] + base), reach)
        wide = pairs_within(queries[few], index, reach, fitted.squared_support, scale_Q=scale)
        keep = (held >= least)[pairs.rows]
        pairs = Pairs(
            torch.cat([pairs.rows[keep], few[wide.rows]]),
            torch.cat([pairs.columns[keep], wide.columns]),
            torch.cat([pairs.squared_distances[keep], wide.squared_distances]),
        )
    squared = (pairs.squared_distances.double() - fitted.offset).clamp_min_(0)
    nearest = squared.new_full((len(queries),), float("inf"))
    nearest.scatter_reduce_(0, pairs.rows, squared, "amin")
    weights = torch.exp((nearest[pairs.rows] - squared) / width)
    weights *= fitted.weights[pairs.columns]
    kernel = _product(pairs, weights, (len(queries), n_landmarks))
    sums = kernel(torch.ones_like(fitted.eigenfunctions[:, :1]))
    squared_own = torch.ones_like(nearest) if own is None else own.double() ** 2
    eigenvalues = 1 - fitted.rates * squared_own[:, None]
    eigenvalues = torch.where(eigenvalues.abs() < LEAST_EIGENVALUE, LEAST_EIGENVALUE, eigenvalues)
    return kernel(fitted.eigenfunctions) / sums / eigenvalues, n_far


def _product(pairs: Pairs, weights: Tensor, shape: tuple[int, int]) -> Product:
    """The sparse matrix of ``weights`` at ``pairs``, as a function of blocks of vectors."""
    if weights.is_cuda:
        at = torch.stack([pairs.rows, pairs.columns])
        on_device = torch.sparse_coo_tensor(at, weights, shape, check_invariants=False)
        return lambda V: on_device @ V
    places = (pairs.rows.numpy(), pairs.columns.numpy())
    listed = scipy.sparse.coo_matrix((weights.numpy(), places), shape)
    listed.has_canonical_format = True  # no pair is listed twice: no need to sort and sum them
    matrix = listed.tocsr()
    return lambda V: torch.from_numpy(matrix @ V.numpy())
