"""Nyström extension: eigenfunctions of a Markov operator at rows it was not fitted on."""

from __future__ import annotations

import math
from typing import NamedTuple

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
from manifold_unlearn.manifold.partition import Index, build_index, taken
from manifold_unlearn.manifold.radius import blocks_within
from manifold_unlearn.manifold.search import exact_neighbors

_ROWS = 2**16  # extended together
_COLUMNS = 16  # a product with any other number of columns takes four times as long
_LEAST_WEIGHT = 1e-12  # over the largest: beyond, sums are made in double precision


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
    sums, held = _kernel_sums(queries, index, fitted, reach, torch.zeros_like(reach), own)
    few = (held < least_held(fitted.n_neighbors, n_landmarks)).nonzero()[:, 0]
    n_far = 0
    if len(few):
        scale = None if own is None else own[few]
        k = min(fitted.n_neighbors, n_landmarks)
        near, _ = exact_neighbors(queries[few], index, k, scale_A=scale)
        nearest = near[:, 0]
        n_far = int((nearest > far).sum())
        reach = support_radius(near, base, far)
        reach = torch.where(nearest > base, torch.maximum(reach, nearest + base), reach)
        start = (nearest - fitted.offset).clamp_min(0)
        sums[few] = _kernel_sums(queries[few], index, fitted, reach, start, scale)[0]
    squared_own = torch.ones_like(sums[:, 0]) if own is None else own.double() ** 2
    eigenvalues = 1 - fitted.rates * squared_own[:, None]
    eigenvalues = torch.where(eigenvalues.abs() < LEAST_EIGENVALUE, LEAST_EIGENVALUE, eigenvalues)
    return sums[:, 1:] / sums[:, :1] / eigenvalues, n_far


def _kernel_sums(
    queries: Tensor,
    index: Index,
    fitted: FittedOperator,
    reach: Tensor,
    start: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums of the weighted kernel, alone and times every eigenfunction; and the rows it holds.

    The kernel is over its value at the squared distance ``start``, that it does not vanish.
    """
    width = 4 * fitted.bandwidth
    weights = fitted.weights / fitted.weights.max()
    summed = torch.cat([weights[:, None], weights[:, None] * fitted.eigenfunctions], 1)
    n_sums = summed.shape[1]
    summed = torch.nn.functional.pad(summed, (0, -n_sums % _COLUMNS))
    if float(weights.min()) > _LEAST_WEIGHT:
        summed = summed.to(queries.dtype)
    sums = summed.new_zeros(len(queries), summed.shape[1], dtype=torch.float64)
    held = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    shift = start + fitted.offset
    within = blocks_within(queries, index, reach, fitted.squared_support, scale_Q=scale)
    for rows, columns, squared in within:
        held[rows] += (squared <= width * fitted.cutoff).sum(1)
        exponent = squared.sub_(shift[rows, None]).clamp_min_(0).mul_(-math.log2(math.e) / width)
        kernel = exponent.exp2_()  # exp takes ten times as long where it vanishes
        sums[rows] += (kernel.to(summed.dtype) @ taken(summed, columns)).double()
    return sums[:, :n_sums], held
