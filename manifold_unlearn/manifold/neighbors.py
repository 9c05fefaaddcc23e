"""Exact neighbors by blocked matrix products: the k nearest, and all within a radius."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, restore, row_blocks

NeighborMethod: TypeAlias = Literal["auto", "exact"]

_SPARE = 8  # candidates kept beyond k, so that rounding in the matrix product reorders none away
_ROUNDING = 8.0  # multiple of the machine epsilon that bounds the error of |x|^2 + |y|^2 - 2 x.y
_REFINE = 1e-5  # part of the squared radius up to which that error is left standing
_CHUNK = 2**22  # elements of one gathered difference


class Neighbors(NamedTuple):
    """The k nearest rows of each row, nearest first.

    ``squared_distances`` (n_samples, k), in squared units of the data; ``indices`` (n_samples, k),
    int64, into the rows searched. Equal distances are ordered by index.
    """

    squared_distances: Any
    indices: Any


class Pairs(NamedTuple):
    """Pairs of rows within a radius: ``rows``, ``columns`` int64 and ``squared_distances``."""

    rows: Tensor
    columns: Tensor
    squared_distances: Tensor


def check_method(neighbors: str) -> None:
    """Raise ``ValueError`` unless ``neighbors`` names a search that exists."""
    if neighbors not in ("auto", "exact"):
        raise ValueError(f"neighbors={neighbors!r} is not known. Use 'auto' or 'exact'.")


def center_of(X: Tensor) -> Tensor:
    """Robust center ``(1, n_features)``: the median of at most 1,000 rows, in X's dtype.

    Distances do not depend on it; their rounding does, and a mean would follow one far outlier.
    """
    return X[:: -(-X.shape[0] // 1000)].median(dim=0, keepdim=True).values


def rounding_error(squared_norms: Tensor) -> Tensor:
    """Bound on a row's share of the rounding error of its squared distances."""
    return _ROUNDING * torch.finfo(squared_norms.dtype).eps * squared_norms


def squared_distance_block(X: Tensor, Y: Tensor, squared_X: Tensor, squared_Y: Tensor) -> Tensor:
    """``(len(X), len(Y))`` squared distances by one matrix product; rounding may leave < 0."""
    return torch.addmm(squared_Y[None, :], X, Y.T, alpha=-2).add_(squared_X[:, None])


def exact_squared_distances(X: Tensor, Y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of the pairs ``X[rows], Y[columns]`` from their differences."""
    result = torch.empty(len(rows), dtype=X.dtype, device=X.device)
    for part in row_blocks(len(rows), max(1, _CHUNK // X.shape[1])):
        result[part] = (X[rows[part]] - Y[columns[part]]).square_().sum(dim=1)
    return result


def nearest_neighbors(
    X: Array,
    k: int,
    Y: Array | None = None,
    *,
    neighbors: NeighborMethod = "auto",
    block_rows: int = 1024,
    block_columns: int = 16384,
    device: Device = "auto",
) -> Neighbors:
    """Exact k nearest neighbors of the rows of ``X`` among the rows of ``Y``.

    Blocks of a matrix product feed a running selection, so memory is
    ``O(block_rows * block_columns)`` and never ``n * n``. The data are centered first, and the
    distances selected are computed again from differences: duplicates are at exactly 0.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
        Any float dtype; half precision is accumulated in float32.
    k : int
        Neighbors of each row.
    Y : array or Tensor of shape (n_searched, n_features), optional
        Rows to search. Default: ``X`` itself, each row's own entry left out.
    neighbors : {"auto", "exact"}, default="auto"
        Both are exact.
    block_rows, block_columns : int
        Size of one block of distances. The answer does not depend on it.
    device : str or torch.device, default="auto"
        Where to compute: for ``"auto"`` the device of a tensor ``X``, else a GPU, else the CPU.

    Returns
    -------
    Neighbors
        ``squared_distances`` and ``indices`` of shape (n_samples, k), of the kind of ``X``.

    Raises
    ------
    ValueError
        ``k`` is below 1 or above the rows there are, the features differ in number, an entry is
        not finite, or ``neighbors`` is not known.
    """
    check_method(neighbors)
    A = as_rows(X, device=device)
    B = A if Y is None else as_rows(Y, device=A.device, name="Y").to(A.dtype)
    if B.shape[1] != A.shape[1]:
        raise ValueError(
            f"Y has {B.shape[1]} features, X has {A.shape[1]}. Give both the same columns."
        )
    available = len(B) - (Y is None)
    if not 1 <= k <= available:
        raise ValueError(
            f"k={k} must lie between 1 and {available}, the rows there are to search. "
            "Lower k or add data."
        )
    found = _search(A, B, k, Y is None, block_rows, block_columns)
    return Neighbors(restore(found.squared_distances, X), restore(found.indices, X))


def _search(
    A: Tensor, B: Tensor, k: int, skip_self: bool, block_rows: int, block_columns: int
) -> Neighbors:
    center = center_of(B)
    numbers = torch.arange(len(A), device=A.device) if skip_self else None
    distances = torch.empty(len(A), k, dtype=A.dtype, device=A.device)
    indices = torch.empty(len(A), k, dtype=torch.int64, device=A.device)
    certain = torch.empty(len(A), dtype=torch.bool, device=A.device)
    for part in row_blocks(len(A), block_rows):
        own = None if numbers is None else numbers[part]
        distances[part], indices[part], certain[part] = _search_rows(
            A[part], B, k, own, center, block_columns
        )
    if A.dtype == torch.float32 and not bool(certain.all()):
        doubtful = (~certain).nonzero()[:, 0]
        wide, middle = B.double(), center.double()
        for part in row_blocks(len(doubtful), block_rows):
            rows = doubtful[part]
            own = None if numbers is None else rows
            exact, at, _ = _search_rows(A[rows].double(), wide, k, own, middle, block_columns)
            distances[rows], indices[rows] = exact.float(), at
    return Neighbors(distances, indices)


def _search_rows(
    A: Tensor, B: Tensor, k: int, own: Tensor | None, center: Tensor, block_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, indices and certainty for one block of rows.

    A row is certain when no row of ``B`` left out can be nearer than the k-th kept, given the
    rounding error of the matrix product.
    """
    C = A - center
    squared_A = C.square().sum(1)
    kept = min(k + _SPARE, len(B) - (own is not None))
    best = torch.full((len(A), 0), float("inf"), dtype=A.dtype, device=A.device)
    at = torch.empty((len(A), 0), dtype=torch.int64, device=A.device)
    for part in row_blocks(len(B), block_columns):
        other = B[part] - center
        block = squared_distance_block(C, other, squared_A, other.square().sum(1))
        if own is not None:
            inside = ((own >= part.start) & (own < part.stop)).nonzero()[:, 0]
            block[inside, own[inside] - part.start] = float("inf")
        nearest = block.topk(min(kept, block.shape[1]), dim=1, largest=False, sorted=False)
        best = torch.cat([best, nearest.values], dim=1)
        at = torch.cat([at, nearest.indices + part.start], dim=1)
        if best.shape[1] > kept:
            best, order = best.topk(kept, dim=1, largest=False, sorted=False)
            at = at.gather(1, order)
    at = at.sort(dim=1).values
    rows = torch.arange(len(A), device=A.device).repeat_interleave(kept)
    exact = exact_squared_distances(A, B, rows, at.reshape(-1)).reshape(len(A), kept)
    exact, order = exact.sort(dim=1, stable=True)
    # rounding of a far row grows with its norm, but so does its distance: |y| <= |x| + |x - y|
    worst = best.amax(dim=1)
    slack = 3 * rounding_error(squared_A) + 2 * rounding_error(worst.clamp_min(0))
    certain = (exact[:, k - 1] + slack <= worst) | (kept == len(B) - (own is not None))
    return exact[:, :k], at.gather(1, order)[:, :k], certain


def radius_neighbors(
    X: Tensor, squared_radius: float, *, scale: Tensor | None = None, block: int = 1024
) -> Pairs:
    """All pairs of rows within a radius, each once with ``rows < columns``.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
        Centered (see :func:`center_of`), else rounding grows with the distance to the origin.
    squared_radius : float
        Squared units of the data, or of the scaled distances.
    scale : Tensor of shape (n_samples,), optional
        Squared distances are divided by the product of the two rows' scales.
    block : int
        Rows of a block of distances; pairs whose rounding matters are computed again, so that the
        answer does not depend on it.

    Returns
    -------
    Pairs
        ``squared_distances`` are scaled when ``scale`` is given.
    """
    squared = X.square().sum(1)
    inverse = torch.ones_like(squared) if scale is None else 1 / scale
    # (|x|^2, 1, -2 x) . (1, |y|^2, y): the distance is one product, with no further pass over it
    ends = torch.stack([squared, torch.ones_like(squared)], 1)
    left = torch.cat([ends, -2 * X], 1) * inverse[:, None]
    right = torch.cat([ends.flip(1), X], 1) * inverse[:, None]
    error = rounding_error(squared)
    negligible = _REFINE * squared_radius
    found = []
    for part, other in _upper_blocks(len(X), block):
        distances = left[part] @ right[other].T
        largest = float(inverse[part].max() * inverse[other].max())
        if largest * float(error[part].max() + error[other].max()) <= negligible:
            inside = distances <= squared_radius
        else:  # far rows round coarsely: keep what may be inside, and look again below
            margin = error[part, None] + error[None, other]
            margin *= inverse[part, None] * inverse[None, other]
            inside = distances - margin <= squared_radius
        if part.start == other.start:
            inside = inside.triu(1)
        rows, columns = inside.nonzero(as_tuple=True)
        values = distances[rows, columns].clamp_min_(0)
        found.append(Pairs(rows + part.start, columns + other.start, values))
    rows, columns, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    if float(inverse.max()) ** 2 * 2 * float(error.max()) > negligible:
        product = inverse[rows] * inverse[columns]
        coarse = ((error[rows] + error[columns]) * product > negligible).nonzero()[:, 0]
        exact = exact_squared_distances(X, X, rows[coarse], columns[coarse])
        values[coarse] = exact * product[coarse]
    keep = values <= squared_radius
    if not bool(keep.all()):
        rows, columns, values = rows[keep], columns[keep], values[keep]
    return Pairs(rows, columns, values)


def _upper_blocks(n_rows: int, block: int) -> Iterator[tuple[slice, slice]]:
    for part in row_blocks(n_rows, block):
        for other in row_blocks(n_rows - part.start, block):
            yield part, slice(other.start + part.start, other.stop + part.start)
