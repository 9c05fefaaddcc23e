"""Curves drawn in diffusion coordinates and brought back to the data."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Device
from manifold_unlearn.manifold.diffusion import DiffusionMap
from manifold_unlearn.steer.path_curve import CubicCurve, cubic_curve
from manifold_unlearn.steer.path_order import Layout

_KNOTS = 16  # of the lifted curve between two centroids
_MARGIN = 0.25  # by which an open curve is prolonged, for rows beyond its ends
_ANCHORS = 1000  # rows that the regression is fitted to
_WIDTHS = (4.0, 1.0, 0.25, 0.0625, 0.015625)  # of the kernel, over the median squared distance
_RIDGES = 10.0 ** np.arange(-10.0, 3.0)


def joined_diffusion(
    rows: Tensor, n_components: int, n_neighbors: int, device: Device
) -> DiffusionMap:
    """Diffusion map of rows that hang together.

    Raises
    ------
    ValueError
        The graph falls into parts.
    """
    near = min(n_neighbors, len(rows) - 1)
    diffusion = DiffusionMap(n_components, n_neighbors=near, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*falls into.*")
        diffusion.fit(rows)
    if diffusion.n_components_connected_ > 1:
        raise ValueError(
            f"the diffusion graph falls into {diffusion.n_components_connected_} parts: no curve "
            "along the data joins them. Raise n_neighbors, add data between, or use "
            "coordinates='pca'."
        )
    return diffusion


def commute_coordinates(diffusion: DiffusionMap) -> Tensor:
    """Embedding (n_samples, k) whose columns are divided by the roots of their rates.

    Their distances are those of commute times, in which fine waves count little: the curve of a
    one-dimensional feature is smooth in them.
    """
    rates = torch.as_tensor(diffusion.generator_eigenvalues_).clamp_min(1e-300)
    embedding = torch.as_tensor(diffusion.embedding_)
    return embedding * (rates[0] / rates).sqrt().to(embedding)


def lifted_curve(
    embedding: Tensor,
    rows: Tensor,
    layout: Layout,
    along: Tensor,
    centroids: Tensor,
    *,
    period: float | None,
    smoothing: float,
) -> CubicCurve:
    """Curve through centroids that follows the rows between them.

    A spline through the centroids' diffusion coordinates gives each row its place, the parameter
    of the nearest point on it; what the rows are off the spline through the centroids themselves
    is regressed on their places (one step of a principal curve: Hastie and Stuetzle 1989), so that
    between classes without a row the curve is that spline; and the spline of what the regression
    misses at the centroids is added: classes that are spread out have means that lie off the data.

    Parameters
    ----------
    embedding : Tensor of shape (n_samples, k), float64
        Diffusion coordinates of the rows.
    rows : Tensor of shape (n_samples, d), float64
    layout : Layout
    along : Tensor of shape (n_classes, k)
        Diffusion coordinates of the classes, in the order that ``layout`` refers to.
    centroids : Tensor of shape (n_classes, d)
        Likewise.
    period, smoothing
        See :func:`~manifold_unlearn.steer.path_curve.cubic_curve`.
    """
    at, order = layout.parameter, layout.order
    inner = cubic_curve(at, along[order], period=period, smoothing=smoothing)
    steps = torch.arange(_KNOTS).to(at) / _KNOTS
    widths = inner.knots[1:] - inner.knots[:-1]
    knots = (inner.knots[:-1, None] + steps * widths[:, None]).reshape(-1)
    straight = cubic_curve(at, centroids[order], period=period, smoothing=smoothing)
    if period is None:
        knots = torch.cat([knots, inner.knots[-1:]])
        inner, straight = inner.prolonged(_MARGIN), straight.prolonged(_MARGIN)
    places = inner.nearest(embedding)[0]
    off = rows - straight(places)
    lifted = straight(knots) + regressed(_phases(places, period), off, _phases(knots, period))
    missed = centroids[order] - lifted[::_KNOTS]
    repaired = cubic_curve(at, missed, period=period, smoothing=smoothing)
    return cubic_curve(knots, lifted + repaired(knots), period=period)


def _phases(places: Tensor, period: float | None) -> Tensor:
    """Parameters as points (n, 1) of a line or (n, 2) of a circle."""
    if period is None:
        return places[:, None]
    angle = places * (2 * math.pi / period)
    return torch.stack([angle.cos(), angle.sin()], 1)


def regressed(points: Tensor, values: Tensor, queries: Tensor) -> Tensor:
    """Values (n_queries, d) at ``queries``, regressed on noisy ones at ``points``.

    Ridge regression on a Gaussian kernel whose width and ridge minimize the generalized
    cross-validation error ``|residual|**2 / (1 - trace / n)**2`` (Golub, Heath and Wahba 1979).

    Parameters
    ----------
    points : Tensor of shape (n_points, k), float64
        At most 1000 of them, evenly chosen, are used.
    values : Tensor of shape (n_points, d), float64
    queries : Tensor of shape (n_queries, k), float64
    """
    n = min(_ANCHORS, len(points))
    chosen = torch.arange(n, device=points.device) * len(points) // n
    points, values = points[chosen], values[chosen]
    level = values.mean(0)
    squared = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    unit = float(squared.median())
    ridges = torch.from_numpy(_RIDGES).to(points)
    best, fit = float("inf"), (unit, torch.zeros_like(values))
    for width in _WIDTHS:
        eigenvalues, basis = torch.linalg.eigh(torch.exp(squared / (-width * unit)))
        eigenvalues = eigenvalues.clamp_min(0)
        share = basis.mT @ (values - level)
        left = ridges / (eigenvalues[:, None] + ridges)
        free = left.mean(0).clamp_min(1e-12)
        errors = (left.square() * share.square().sum(1)[:, None]).sum(0) / free.square()
        at = int(errors.argmin())
        if float(errors[at]) < best:
            best = float(errors[at])
            fit = width * unit, basis @ (share / (eigenvalues + ridges[at])[:, None])
    apart = torch.cdist(queries, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    return level + torch.exp(-apart / fit[0]) @ fit[1]
