"""A map of rows given at landmarks: between them it is interpolated, and nothing is fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks, working_dtype

_ENTRIES = 2**24  # numbers of one block of gathered neighbors
_EDGE = 1e-3  # by how much the last neighbor lies inside the radius at which weights vanish


@dataclass(frozen=True, eq=False)
class LandmarkMap:
    """Where landmarks go, and by interpolation every other row.

    ``h -> sum_j w_j (t_j + B_j B_j' (h - z_j))`` over the nearest landmarks ``z_j`` with targets
    ``t_j`` and tangent bases ``B_j``; without bases ``h -> h + sum_j w_j (t_j - z_j)``. The weights
    are those of Franke and Little for Shepard's method, ``((R - d_j) / (R d_j))**2`` normalized,
    with the distance ``R`` of the first landmark left out: a landmark goes to its own target, and
    a change of neighbors makes no jump. Make one by :func:`landmark_map`.

    References
    ----------
    Shepard (1968), A two-dimensional interpolation function for irregularly-spaced data.
    Franke and Nielson (1980), Smooth interpolation of large sets of scattered data, Int. J. Numer.
    Methods Eng. 15.
    """

    center: Tensor
    """(d,): mean of the landmarks, from which the arrays below count"""
    landmarks: Tensor
    """(m, d)"""
    squared_norms: Tensor
    """(m,)"""
    targets: Tensor
    """(m, d)"""
    bases: Tensor | None
    """(m, d, k) orthonormal columns, or None for the plain shift"""
    n_neighbors: int

    def __call__(self, h: Tensor) -> Tensor:
        """Moved rows ``(n, d)``, in the dtype and on the device of the map's arrays."""
        k = min(self.n_neighbors, len(self.landmarks))
        if torch.compiler.is_compiling():
            return self._moved(h, k)
        wide = 2 if self.bases is None else 2 + self.bases.shape[2]
        block = max(1, _ENTRIES // ((k + 1) * h.shape[1] * wide))
        if len(h) <= block:
            return self._moved(h, k)
        return torch.cat([self._moved(h[part], k) for part in row_blocks(len(h), block)])

    def _moved(self, h: Tensor, k: int) -> Tensor:
        rows = h - self.center
        nearness = torch.addmm(self.squared_norms, rows, self.landmarks.T, alpha=-2)
        near = nearness.topk(min(k + 1, len(self.landmarks)), dim=1, largest=False).indices
        offsets = rows[:, None] - self.landmarks[near]
        weights = shepard_weights(offsets.norm(dim=2), k)
        near, offsets = near[:, :k], offsets[:, :k]
        if self.bases is None:
            shifts = self.targets[near] - self.landmarks[near]
            return h + (weights[:, None] @ shifts)[:, 0]
        bases = self.bases[near]
        along = (bases @ (bases.mT @ offsets[..., None]))[..., 0]
        return self.center + (weights[:, None] @ (self.targets[near] + along))[:, 0]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LandmarkMap:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        kind = working_dtype(dtype)
        parts = (self.center, self.landmarks, self.squared_norms, self.targets)
        center, landmarks, squared_norms, targets = (part.to(device, kind) for part in parts)
        bases = None if self.bases is None else self.bases.to(device, kind)
        return LandmarkMap(center, landmarks, squared_norms, targets, bases, self.n_neighbors)


def landmark_map(
    landmarks: Tensor, targets: Tensor, bases: Tensor | None, n_neighbors: int
) -> LandmarkMap:
    """:class:`LandmarkMap` that sends ``landmarks`` (m, d) to ``targets`` (m, d), in float64."""
    z, t = landmarks.double(), targets.double()
    center = z.mean(0)
    z, t = z - center, t - center
    frames = None if bases is None else bases.double().contiguous()
    return LandmarkMap(center, z, z.square().sum(1), t, frames, n_neighbors)


def shepard_weights(distances: Tensor, k: int) -> Tensor:
    """Weights (n, k) of sum 1 of the nearest landmarks at ``distances`` (n, k or k + 1), ascending.

    The column behind the k-th is the radius at which weights vanish; where there is none, because
    all landmarks are neighbors, the radius is twice the largest distance. The columns need not be
    strictly ascending: rounding may have swapped near ties.
    """
    if distances.shape[1] > k:
        radius = distances.amax(1, keepdim=True) * (1 + _EDGE)
    else:
        radius = distances.amax(1, keepdim=True) * 2
    distances = distances[:, :k]
    nearest = distances.amin(1, keepdim=True)
    # relative to the nearest, so that a row on a landmark divides nothing by zero
    on_it = distances <= nearest
    closeness = torch.where(on_it, 1.0, nearest / torch.where(on_it, 1.0, distances))
    inside = torch.where(radius > 0, 1 - distances / torch.where(radius > 0, radius, 1.0), 1.0)
    weights = (closeness * inside.clamp_min(0)).square()
    return weights / weights.sum(1, keepdim=True)
