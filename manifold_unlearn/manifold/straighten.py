"""Curves on a sampled surface: equal spacing, and straightening."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_unlearn.manifold.neighbors import nearest_neighbors
from manifold_unlearn.manifold.tangent_lengths import local_planes

_SWEEPS = 100
_LEAST, _MOST = 8, 48  # points of the curve while it is straightened


def resampled(curve: Tensor, n_points: int) -> Tensor:
    """Points (n_points, d) at equal distances along the polygon ``curve`` (m, d), ends kept."""
    steps = (curve[1:] - curve[:-1]).norm(dim=1)
    along = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    wanted = torch.linspace(0, 1, n_points, dtype=curve.dtype, device=curve.device) * along[-1]
    at = torch.searchsorted(along, wanted, right=True).clamp(1, len(steps)) - 1
    part = ((wanted - along[at]) / steps[at].clamp_min(1e-300)).clamp(0, 1)
    points = curve[at] + part[:, None] * (curve[at + 1] - curve[at])
    points[0], points[-1] = curve[0], curve[-1]
    return points


def straightened(curve: Tensor, points: Tensor, dimension: int, n_neighbors: int) -> Tensor:
    """``curve`` shortened on the surface that ``points`` sample, its ends kept.

    Sweeps that move each point to the middle of its neighbors, then to the local quadratic surface,
    then space them evenly.

    Parameters
    ----------
    curve : Tensor of shape (m, d)
    points : Tensor of shape (n, d)
    dimension, n_neighbors : int
        Of the surface, and of its local fits.
    """
    first = nearest_neighbors(curve, min(2 * n_neighbors, len(points)), points).indices
    corridor = points[first.unique()]
    moving = resampled(curve, min(_MOST, max(_LEAST, 2 * len(curve))))
    for _ in range(_SWEEPS):
        middle = (moving[:-2] + moving[2:]) / 2
        middle = on_surface((middle + moving[1:-1]) / 2, corridor, dimension, n_neighbors)
        moving = resampled(torch.cat([moving[:1], middle, moving[-1:]]), len(moving))
    return moving


def on_surface(at: Tensor, points: Tensor, dimension: int, n_neighbors: int) -> Tensor:
    """``at`` (m, d) moved along the normals to a quadratic fit of their nearest ``points``."""
    indices = nearest_neighbors(at, min(n_neighbors, len(points)), points).indices
    bases = local_planes(points, indices, dimension).bases
    offsets = points[indices] - at[:, None]
    u = offsets @ bases
    unit = u.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-300)
    u = u / unit
    a, b = torch.triu_indices(dimension, dimension, device=at.device)
    columns = [torch.ones_like(u[..., :1]), u]
    if len(points) >= 2 * (1 + dimension + len(a)) <= indices.shape[1]:
        columns.append(u[..., a] * u[..., b])
    design = torch.cat(columns, 2)
    gram = design.mT @ design
    gram = gram + 1e-6 * indices.shape[1] * torch.eye(gram.shape[1], dtype=u.dtype).to(u)
    value = torch.linalg.solve(gram, design.mT @ offsets)[:, 0]
    tangential = (bases @ (bases.mT @ value[:, :, None]))[:, :, 0]
    return at + value - tangential
