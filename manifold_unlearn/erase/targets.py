"""Targets of landmarks, one function a mode; all but the geodesic and the diffusion ones."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.erase.aim import Aim
from manifold_unlearn.manifold.charts import Charts, surface_charts
from manifold_unlearn.manifold.dimension import estimate_dimension
from manifold_unlearn.manifold.neighbors import nearest_neighbors
from manifold_unlearn.manifold.tangent import TangentBundle

_BUNDLE = 40  # distinct rows from which a manifold is fitted; fewer are one or a few flat charts
_PROBES = 32  # landmarks whose feet are looked for first
_ENTRIES = 2**24


class Targets(NamedTuple):
    """Where landmarks go.

    Attributes
    ----------
    points : Tensor of shape (n_landmarks, n_features)
    bases : Tensor of shape (n_landmarks, n_features, k) or None
        Tangent bases there, along which rows near a landmark keep their difference from it.
    """

    points: Tensor
    bases: Tensor | None


def tangent_targets(
    landmarks: Tensor,
    aim: Aim,
    *,
    dimension: int | Literal["auto"],
    n_neighbors: int,
) -> Targets:
    """Feet of landmarks on the manifold of the rows aimed at, with the tangent spaces there.

    Without a choice the manifold is the surface that the rows sample (:class:`TangentBundle`);
    landmarks that find no foot on it are projected on the flat chart of their nearest rows. So are
    all where none of 32 landmarks, evenly spaced, finds one, for noise hides the surface there and
    the search is most of the work; and where there are fewer than 40 distinct rows. With pairs the
    foot is the pair, with semantic neighbors it lies on the flat chart through them.

    Parameters
    ----------
    landmarks : Tensor of shape (n_landmarks, n_features)
    aim : Aim
    dimension : int or "auto"
        Of the charts.
    n_neighbors : int
        Rows of a chart.
    """
    rows = aim.rows
    if (points := aim.pairs) is not None:
        near = _nearest(points, rows, n_neighbors)
        charts = flat_charts(points, rows, near, _dimension(rows, dimension))
        return Targets(points, charts.bases)
    if aim.choice is not None:
        return flat_charts(landmarks, rows, aim.choice, _dimension(rows, dimension))
    distinct = torch.unique(rows, dim=0)
    if len(distinct) < _BUNDLE:
        k = _dimension(distinct, dimension)
        near = _nearest(landmarks, distinct, max(n_neighbors, k + 1))
        return flat_charts(landmarks, distinct, near, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of doubt: unsettled rows are caught below
        bundle = TangentBundle(dimension, n_neighbors=max(n_neighbors, 8)).fit(distinct)
    k = bundle.dimension_

    def feet(points: Tensor) -> Charts:
        return surface_charts(
            points,
            bundle.landmarks_,
            dimension=k,
            n_neighbors=bundle.n_neighbors_,
            order=bundle.order_,
        )

    few = max(n_neighbors, k + 1)
    if len(landmarks) > _PROBES:
        probes = torch.arange(_PROBES, device=landmarks.device) * len(landmarks) // _PROBES
        if not bool(feet(landmarks[probes]).settled.any()):
            return flat_charts(landmarks, distinct, _nearest(landmarks, distinct, few), k)
    found = feet(landmarks)
    points, bases = found.feet, found.bases
    if not bool(found.settled.all()):
        lost = ~found.settled
        near = _nearest(landmarks[lost], distinct, few)
        flat = flat_charts(landmarks[lost], distinct, near, k)
        points[lost] = flat.points
        bases[lost] = torch.as_tensor(flat.bases)
    return Targets(points, bases)


def flat_charts(points: Tensor, rows: Tensor, near: Tensor, dimension: int) -> Targets:
    """Feet of points on the principal planes of their neighbors, and bases of these planes.

    Parameters
    ----------
    points : Tensor of shape (n, n_features)
    rows : Tensor of shape (n_rows, n_features)
    near : Tensor of shape (n, k), int64
        Neighbors of each point among the rows.
    dimension : int
        Of the planes, at most; directions in which the neighbors do not spread are left out
        (columns of zeros).
    """
    n, d = points.shape
    q = max(1, min(dimension, near.shape[1] - 1, d))
    feet, bases = points.double().clone(), points.new_zeros(n, d, q, dtype=torch.float64)
    for part in row_blocks(n, max(1, _ENTRIES // (near.shape[1] * d))):
        local = rows[near[part]].double()
        mean = local.mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh((local - mean) @ (local - mean).mT)
        values, vectors = values[:, -q:].flip(1), vectors[:, :, -q:].flip(2)
        spread = values > 1e-10 * values[:, :1].clamp_min(1e-300)
        inverse = torch.where(spread, values.clamp_min(1e-300).rsqrt(), 0.0)
        axes = (local - mean).mT @ vectors * inverse[:, None]
        bases[part, :, : axes.shape[2]] = axes
        offsets = feet[part] - mean[:, 0]
        feet[part] = mean[:, 0] + (axes @ (axes.mT @ offsets[:, :, None]))[:, :, 0]
    return Targets(feet, bases)


def transport_targets(landmarks: Tensor, aim: Aim) -> Targets:
    """One row for each landmark, by the assignment of least total squared distance.

    No row is taken a second time before all have been taken once; rows are never averaged. Pairs
    are taken as they are. With semantic neighbors a landmark is assigned one of its own where the
    assignment allows it.

    Parameters
    ----------
    landmarks : Tensor of shape (n_landmarks, n_features)
    aim : Aim
    """
    rows = aim.rows
    if (points := aim.pairs) is not None:
        return Targets(points, None)
    cost = torch.cdist(landmarks.double(), rows.double()).square()
    if aim.choice is not None:
        strangers = torch.ones_like(cost, dtype=torch.bool).scatter(1, aim.choice, False)
        cost = cost + strangers * cost.max()
    rounds = -(-len(landmarks) // len(rows))
    _, columns = linear_sum_assignment(cost.repeat(1, rounds).cpu().numpy())
    return Targets(rows[torch.from_numpy(columns).to(rows.device) % len(rows)], None)


def _nearest(points: Tensor, rows: Tensor, n_neighbors: int) -> Tensor:
    return nearest_neighbors(points.to(rows), min(n_neighbors, len(rows)), rows).indices


def _dimension(rows: Tensor, dimension: int | Literal["auto"]) -> int:
    """The dimension asked for, or that estimated from the rows; 1 where these are too few."""
    if dimension != "auto":
        return int(dimension)
    distinct = torch.unique(rows, dim=0)
    if len(distinct) < _BUNDLE:
        return max(1, min(len(distinct) - 1, rows.shape[1]) // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return max(1, round(estimate_dimension(distinct, "two_nn").value))
