"""A map of rows given at landmarks: between them it is interpolated, and nothing is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks, working_dtype

_BLOCK = 2**27  # bytes of one block of distances, or of gathered neighbors
_CACHED = 2**22  # bytes of the latter on a CPU
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
    intercepts: Tensor = field(init=False, repr=False)
    """(m, d): ``t_j - B_j B_j' z_j``, without bases ``t_j - z_j``; follows from the above"""

    def __post_init__(self) -> None:
        if self.bases is None:
            intercepts = self.targets - self.landmarks
        else:
            # both products over a row's gathered bases run along memory that lies together
            frames = self.bases.mT.contiguous()
            object.__setattr__(self, "bases", frames.mT)
            origins = frames @ self.landmarks[:, :, None]
            intercepts = self.targets - (origins.mT @ frames)[:, 0]
        object.__setattr__(self, "intercepts", intercepts)

    def __call__(self, h: Tensor) -> Tensor:
        """Moved rows ``(n, d)``, in the dtype and on the device of the map's arrays.

        A row reads ``n_neighbors * d * (k + 2)`` numbers beside its product with the landmarks;
        rows go in blocks, on a CPU such as its cache holds.
        """
        rows = h - self.center
        near = _in_blocks(self._nearest, 8 * len(self.landmarks), _BLOCK, rows)
        wide = near.shape[1] * rows.shape[1] * rows.itemsize
        moved = _in_blocks(self._moved, wide, _room(rows), rows, near)
        return moved + (h if self.bases is None else self.center)

    def _nearest(self, rows: Tensor) -> Tensor:
        """Indices (n, k + 1), or all, of the nearest landmarks of centered rows, ascending."""
        nearness = torch.addmm(self.squared_norms, rows, self.landmarks.T, alpha=-2)
        n = min(self.n_neighbors + 1, len(self.landmarks))
        return nearness.topk(n, dim=1, largest=False).indices

    def _moved(self, rows: Tensor, near: Tensor) -> Tensor:
        """Shifts of centered rows; with bases the moved rows, centered."""
        distances = (rows[:, None] - _gathered(self.landmarks, near)).norm(dim=2)
        k = min(self.n_neighbors, len(self.landmarks))
        weights, near = shepard_weights(distances, k), near[:, :k]
        moved = (weights[:, None] @ _gathered(self.intercepts, near))[:, 0]
        if self.bases is None:
            return moved
        wide = k * self.bases[0].numel() * rows.itemsize
        return moved + _in_blocks(self._along, wide, _room(rows), rows, near, weights)

    def _along(self, rows: Tensor, near: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of the projections of rows on the spaces of their landmarks."""
        assert self.bases is not None
        frames = _gathered(self.bases.mT, near).flatten(1, 2)
        along = (rows[:, None] @ frames.mT)[:, 0].unflatten(1, (near.shape[1], -1))
        return ((along * weights[:, :, None]).flatten(1)[:, None] @ frames)[:, 0]

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
    frames = None if bases is None else bases.double()
    return LandmarkMap(center, z, z.square().sum(1), t, frames, n_neighbors)


def _room(rows: Tensor) -> int:
    return _CACHED if rows.device.type == "cpu" else _BLOCK


def _in_blocks(function: Callable[..., Tensor], wide: int, room: int, *rows: Tensor) -> Tensor:
    """Results put together of blocks of rows that fill ``room`` bytes, ``wide`` of them a row.

    In a trace, which is to hold for any number of rows, all are one block.
    """
    size = max(1, room // max(1, wide))
    if torch.compiler.is_compiling() or len(rows[0]) <= size:
        return function(*rows)
    parts = row_blocks(len(rows[0]), size)
    return torch.cat([function(*(values[part] for values in rows)) for part in parts])


def _gathered(values: Tensor, near: Tensor) -> Tensor:
    """``values[near]`` of contiguous values, two to three times as fast."""
    flat = values.flatten(1).index_select(0, near.flatten())
    return flat.reshape(*near.shape, *values.shape[1:])


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
