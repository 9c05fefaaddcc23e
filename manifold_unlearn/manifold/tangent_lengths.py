"""Lengths along a manifold between near points, from the tangent planes at both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks

_BLOCK = 2**22  # entries of one gathered block of neighbors
_GAP = 3.0  # ratio of mean local variances that marks the dimension
_EXPLAINED = 0.95  # of the local variance, where no gap does
_STRAY = 9.0  # squared deviations off both planes beyond which an edge leaves the manifold
_WIDEST = 0.8  # radians between the planes up to which an arc is trusted


class LocalPlanes(NamedTuple):
    """Planes fitted to the neighbors of some points, float64.

    ``bases`` (n, d, k), orthonormal columns; ``residual`` (n,), mean squared distance of the
    neighbors to the plane; ``tilt`` (n,), variance of the angle by which the residuals tilt it.
    """

    bases: Tensor
    residual: Tensor
    tilt: Tensor


class Lengths(NamedTuple):
    """``values`` (m,), and whether each is ``trusted`` (m,): both planes explain the edge."""

    values: Tensor
    trusted: Tensor


def local_planes(points: Tensor, indices: Tensor, dimension: int) -> LocalPlanes:
    """Principal planes of the neighbors ``points[indices]``, ``indices`` (n, n_neighbors)."""
    n, n_neighbors = indices.shape
    d = points.shape[1]
    bases = torch.empty(n, d, dimension, dtype=torch.float64, device=points.device)
    residual = torch.empty(n, dtype=torch.float64, device=points.device)
    tilt = torch.empty_like(residual)
    for part in row_blocks(n, max(1, _BLOCK // (n_neighbors * d))):
        values, vectors = _principal(points[indices[part]].double(), dimension)
        tangential = values[:, -dimension:].sum(1)
        rest = values[:, :-dimension].clamp_min(0).sum(1)
        bases[part], residual[part] = vectors, rest
        tilt[part] = rest / (n_neighbors * (tangential / dimension).clamp_min(1e-300))
    return LocalPlanes(bases, residual, tilt)


def _principal(neighbors: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Ascending variances and the leading directions of (b, m, d) neighbors."""
    _, n_neighbors, d = neighbors.shape
    offsets = neighbors - neighbors.mean(1, keepdim=True)
    if d <= n_neighbors:
        values, vectors = torch.linalg.eigh(offsets.mT @ offsets / n_neighbors)
        return values, vectors[:, :, -dimension:]
    values, vectors = torch.linalg.eigh(offsets @ offsets.mT / n_neighbors)
    return values, torch.linalg.qr(offsets.mT @ vectors[:, :, -dimension:]).Q


def local_dimension(points: Tensor, indices: Tensor) -> int:
    """Dimension of the manifold around the neighborhoods ``points[indices]``.

    The largest ratio of successive mean logarithmic variances along the local principal axes, over
    at most 1000 neighborhoods. Where no ratio exceeds 3, the axes that explain 95 % of the variance
    on average, so that lengths stay near the straight ones.
    """
    chosen = indices[:: -(-len(indices) // 1000)]
    n_neighbors = indices.shape[1]
    blocks = row_blocks(len(chosen), max(1, _BLOCK // (n_neighbors * points.shape[1])))
    spectra = torch.cat([_principal(points[chosen[b]].double(), 1)[0] for b in blocks]).flip(1)
    spectra = spectra[:, : max(1, min(points.shape[1], n_neighbors - 1))].clamp_min(0)
    spectra = spectra / spectra.sum(1, keepdim=True).clamp_min(1e-300)
    most = max(1, n_neighbors // 2)
    logs = spectra.clamp_min(1e-12).log().mean(0)
    gaps = (logs[:-1] - logs[1:])[:most]
    if len(gaps) and float(gaps.max()) > torch.tensor(_GAP).log():
        return int(gaps.argmax()) + 1
    explained = spectra.mean(0).cumsum(0)
    return min(most, int((explained < _EXPLAINED * explained[-1]).sum()) + 1)


def tangent_lengths(
    first: Tensor, first_planes: LocalPlanes, second: Tensor, second_planes: LocalPlanes
) -> Lengths:
    """Arc lengths between the rows of ``first`` and of ``second``, each pair near.

    The chord is projected on the plane at either end, which drops noise off the manifold. The
    angle ``phi`` between the two projections is the turn of a circular arc whose projections have
    length ``p = r sin(phi)``: its length is ``p * phi / sin(phi)``. The angle that the noise of
    the planes explains is taken off, and the projections it shortened are lengthened.

    Parameters
    ----------
    first, second : Tensor of shape (m, d)
    first_planes, second_planes : LocalPlanes
        Of each row.
    """
    values = torch.empty(len(first), dtype=torch.float64, device=first.device)
    trusted = torch.empty(len(first), dtype=torch.bool, device=first.device)
    d, k = first_planes.bases.shape[1:]
    for part in row_blocks(len(first), max(1, _BLOCK // (d * k))):
        a = LocalPlanes(*(field[part] for field in first_planes))
        b = LocalPlanes(*(field[part] for field in second_planes))
        chord = second[part].double() - first[part].double()
        values[part], trusted[part] = _arcs(chord, a, b)
    return Lengths(values, trusted)


def _arcs(chord: Tensor, a: LocalPlanes, b: LocalPlanes) -> tuple[Tensor, Tensor]:
    at_a, at_b = (a.bases.mT @ chord[:, :, None]), (b.bases.mT @ chord[:, :, None])
    length_a, length_b = at_a.norm(dim=(1, 2)), at_b.norm(dim=(1, 2))
    product = ((a.bases @ at_a) * (b.bases @ at_b)).sum((1, 2))
    cosine = product / (length_a * length_b).clamp_min(1e-300)
    tilt = (a.tilt + b.tilt).clamp_max(0.2)
    phi = (torch.arccos(cosine.clamp(-1, 1)).square() - tilt).clamp_min(0).sqrt()
    projected = (length_a + length_b) / 2 * (1 + tilt / 4)
    arcs = projected / torch.sinc(phi.clamp_max(1.2) / torch.pi)
    squared = chord.square().sum(1)
    off = torch.maximum(squared - length_a.square(), squared - length_b.square())
    return arcs, (phi <= _WIDEST) & (off <= _STRAY * (a.residual + b.residual) + 1e-9 * squared)
