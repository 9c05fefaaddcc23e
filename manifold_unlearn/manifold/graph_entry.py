"""Where rows that are no nodes of a graph enter it, and their distances through it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.neighbors import nearest_neighbors
from manifold_unlearn.manifold.tangent_lengths import LocalPlanes, local_planes, tangent_lengths

_SAME = 1e-7  # of the spacing: rows this near are one
_FAR = 3.0  # spacings of the nearest node


class Entry(NamedTuple):
    """Nodes (q, k) through which rows reach the graph, and at what length; infinite: not.

    ``far`` (q,) tells rows beyond 3 times the spacing of the nearest node.
    """

    indices: Tensor
    lengths: Tensor
    far: Tensor


def enter(
    rows: Tensor,
    points: Tensor,
    spacing: Tensor,
    *,
    n_neighbors: int,
    n_wide: int,
    planes: LocalPlanes | None,
) -> Entry:
    """Entries of ``rows`` (q, d) to the graph of ``points`` (n, d); a node enters at itself.

    By straight lines to the ``n_wide`` nearest nodes, or, given the ``planes`` of the nodes, by
    tangent lengths, and straight ones to the ``n_neighbors`` nearest where these are not trusted.
    """
    n, d = points.shape
    found = nearest_neighbors(rows, min(n, n_wide), points)
    indices = found.indices
    q, k = indices.shape
    straight = torch.cat([
        (points[indices[b]] - rows[b, None]).norm(dim=2)
        for b in row_blocks(q, max(1, 2**22 // (k * d)))
    ])  # fmt: skip
    lengths = straight
    if planes is not None:
        own = local_planes(points, indices, planes.bases.shape[2])
        repeated, flat = torch.arange(q, device=rows.device).repeat_interleave(k), indices
        edges = tangent_lengths(
            rows[repeated], at_rows(own, repeated),
            points[flat.reshape(-1)], at_rows(planes, flat.reshape(-1)),
        )  # fmt: skip
        trusted = edges.trusted.reshape(q, k)
        near = torch.arange(k, device=rows.device) < n_neighbors
        lengths = torch.where(trusted, edges.values.reshape(q, k), straight)
        lengths = torch.where(trusted | near, lengths, torch.inf)
    same = straight[:, :1] <= _SAME * spacing[indices[:, :1]]
    alone = torch.full_like(lengths, torch.inf)
    alone[:, 0] = 0
    far = straight[:, 0] > _FAR * spacing[indices[:, 0]]
    return Entry(indices, torch.where(same, alone, lengths), far)


def through(table: Tensor, entry: Entry, *, by_row: bool = False) -> Tensor:
    """Least ``table[:, node] + length`` over the entries of each row, (len(table), q)."""
    side = table if by_row else table.mT
    out = torch.empty(len(entry.indices), side.shape[1], dtype=table.dtype, device=table.device)
    lengths = entry.lengths.to(table.dtype)
    for block in row_blocks(len(out), max(1, 2**22 // side.shape[1])):
        best = side[entry.indices[block, 0]] + lengths[block, :1]
        for hop in range(1, entry.indices.shape[1]):
            if bool(torch.isfinite(lengths[block, hop]).any()):
                other = side[entry.indices[block, hop]] + lengths[block, hop : hop + 1]
                best = torch.minimum(best, other)
        out[block] = best
    return out if by_row else out.mT


def at_rows(planes: LocalPlanes, rows: Tensor) -> LocalPlanes:
    """The planes of ``rows``."""
    return LocalPlanes(*(field[rows] for field in planes))


def chords(points: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Straight distances between ``points[rows]`` and ``points[columns]``."""
    size = max(1, 2**24 // points.shape[1])
    return torch.cat(
        [(points[rows[b]] - points[columns[b]]).norm(dim=1) for b in row_blocks(len(rows), size)]
    )
