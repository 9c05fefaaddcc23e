"""From coordinates back to the data: geometric harmonics over several scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.neighbors import nearest_neighbors

_ANCHORS = 800
_SCALES = 6
_CONDITIONING = 1e-4  # least kept over largest singular value
_ENOUGH = 1e-6  # part of the variance at which finer scales add nothing
_FAR = 4.0  # distance to the fitted points, over what is usual among them, that is far


class Lifted(NamedTuple):
    """Values at the queries, and which of them lie far from every fitted point."""

    values: Tensor
    far: Tensor


def lift(points: Tensor, values: Tensor, queries: Tensor, *, n_neighbors: int) -> Lifted:
    """Extend ``values`` from ``points`` to ``queries``.

    Geometric harmonics (Coifman and Lafon 2006): expand the values in the singular functions of
    a Gaussian kernel whose singular values are above 1e-4 of the largest, and extend those; what
    the wide kernel leaves is expanded in one of a quarter of its scale, and so on, down to the
    spacing of the points. Queries far from all points, where harmonics fall to the mean, are
    answered by :func:`local_linear`.

    Parameters
    ----------
    points : Tensor of shape (n_points, k)
        Coordinates of comparable spread.
    values : Tensor of shape (n_points, n_features)
    queries : Tensor of shape (n_queries, k)
    n_neighbors : int
        Of the local fit.

    Returns
    -------
    Lifted
        ``values`` (n_queries, n_features), ``far`` (n_queries,) bool.
    """
    n_points = len(points)
    mean = values.mean(0)
    residual = values - mean
    total = float(residual.square().sum())
    step = torch.arange(min(_ANCHORS, n_points), device=points.device)
    anchors = points[step * n_points // len(step)]
    near = nearest_neighbors(points, min(8, n_points - 1)).squared_distances
    spacing = float(near[:, -1].median().clamp_min(1e-12))
    width = max(float(torch.cdist(anchors, anchors).square().median()), spacing)
    result = mean.expand(len(queries), -1).clone()
    for _ in range(_SCALES):
        if total == 0 or float(residual.square().sum()) <= _ENOUGH * total:
            break
        kernel = _gaussian(points, anchors, width)
        eigenvalues, basis = torch.linalg.eigh(kernel.T @ kernel)
        kept = eigenvalues > _CONDITIONING**2 * eigenvalues[-1]
        basis = basis[:, kept] / eigenvalues[kept]
        weights = basis @ (basis * eigenvalues[kept]).T @ (kernel.T @ residual)
        residual = residual - kernel @ weights
        for part in row_blocks(len(queries), 4096):
            result[part] += _gaussian(queries[part], anchors, width) @ weights
        if width <= spacing:
            break
        width = max(width / 4, spacing)
    reach = nearest_neighbors(queries, 1, points).squared_distances[:, 0]
    far = reach > _FAR**2 * near[:, -1].quantile(0.95)
    if bool(far.any()):
        result[far] = local_linear(points, values, queries[far], n_neighbors=n_neighbors)
    return Lifted(result, far)


def _gaussian(points: Tensor, anchors: Tensor, width: float) -> Tensor:
    return torch.exp(torch.cdist(points, anchors).square_().mul_(-1 / width))


def local_linear(points: Tensor, values: Tensor, queries: Tensor, *, n_neighbors: int) -> Tensor:
    """Values at ``queries`` from an affine fit to the values at the nearest ``points``.

    Directions of the coordinates that vary too little near the query to be fitted (local
    principal components under a thousandth of the largest variance) are left out.
    """
    k = min(n_neighbors, len(points))
    near = nearest_neighbors(queries, k, points).indices
    result = torch.empty(len(queries), values.shape[1], dtype=values.dtype, device=values.device)
    for part in row_blocks(len(queries), 256):
        coordinates, targets = points[near[part]], values[near[part]]
        middle, level = coordinates.mean(1, keepdim=True), targets.mean(1, keepdim=True)
        slopes = torch.linalg.pinv(coordinates - middle, rtol=0.03) @ (targets - level)
        step = queries[part, None] - middle
        result[part] = (level + step @ slopes)[:, 0]
    return result
