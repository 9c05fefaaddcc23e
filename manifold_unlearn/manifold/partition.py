"""Rows in leaves of near neighbors, whose boxes tell which leaves are too far apart to matter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.manifold.distances import center_of, squared_norms

_AXES = 16
_SAMPLED = 256
_ROUNDING = 64.0  # multiple of the machine epsilon by which a projection may be off


class Frame(NamedTuple):
    """Orthonormal ``axes`` (n_features, n_axes) through ``center`` (1, n_features)."""

    center: Tensor
    axes: Tensor


class Leaves(NamedTuple):
    """Rows sorted into leaves, and a box around every leaf.

    Attributes
    ----------
    order : Tensor of shape (n_samples,), int64
        The rows, leaf by leaf.
    starts : list of int
        Leaf ``l`` holds ``order[starts[l]:starts[l + 1]]``.
    low, high : Tensor of shape (n_leaves, n_axes), float64
        Corners of the boxes in the coordinates of the frame, rounding included.
    """

    order: Tensor
    starts: list[int]
    low: Tensor
    high: Tensor


def leaf_rows(device: torch.device) -> int:
    """Rows of a leaf that suit the device: a block of distances stays in the cache of a CPU."""
    return 64 if device.type == "cpu" else 2048


def principal_frame(X: Tensor) -> Frame:
    """The 16 principal axes of at most 256 rows of ``X``; all axes where there are no more.

    Lengths shrink under projection, so distances of projected rows are lower bounds, exact ones,
    whatever the axes; principal axes make them tight.
    """
    center, n_features = center_of(X), X.shape[1]
    if n_features <= _AXES:
        return Frame(center, torch.eye(n_features, dtype=X.dtype, device=X.device))
    step = -(-len(X) // _SAMPLED)
    sampled = (X[::step] - center).double()
    sampled = sampled / sampled.abs().max().clamp_min(torch.finfo(sampled.dtype).tiny)
    values, vectors = torch.linalg.eigh(sampled @ sampled.T)
    kept = values > values[-1] * 1e-12
    vectors, values = vectors[:, kept][:, -_AXES:], values[kept][-_AXES:]
    axes = torch.linalg.qr(sampled.T @ (vectors / values.sqrt())).Q
    return Frame(center, axes.to(X.dtype))


def leaf_order(X: Tensor) -> Tensor:
    """Order of the rows, ``(n_samples,)`` int64, in which near rows stand together.

    Each ``n / 2**m`` of them in turn, down to about 4, are a leaf.
    """
    return partition(X, principal_frame(X), 8).order


def partition(X: Tensor, frame: Frame, rows_per_leaf: int, *, in_order: bool = False) -> Leaves:
    """Sort rows into ``2**m`` leaves of equal size by bisection along the widest axis.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
    frame : Frame
    rows_per_leaf : int
        Leaves hold at most so many rows.
    in_order : bool
        Whether the rows stand as :func:`leaf_order` puts them: they are not sorted again.
    """
    n_samples = len(X)
    centered = X - frame.center
    coordinates = centered @ frame.axes
    margin = _ROUNDING * torch.finfo(X.dtype).eps * squared_norms(centered).sqrt()
    levels = max(0, (-(-n_samples // rows_per_leaf) - 1).bit_length())
    order = torch.arange(n_samples, device=X.device)
    for level in range(levels if in_order else 0, levels + 1):
        n_leaves = 2**level
        edges = torch.arange(n_leaves + 1, device=X.device) * n_samples // n_leaves
        leaf = torch.repeat_interleave(edges.diff(), output_size=n_samples)
        low, high = _corners(coordinates[order], leaf, n_leaves)
        if level < levels:
            along = coordinates[order].gather(1, (high - low).argmax(1)[leaf][:, None])[:, 0]
            inner = along.argsort(stable=True)
            order = order[inner[leaf[inner].argsort(stable=True)]]
    slack = torch.zeros(n_leaves, dtype=X.dtype, device=X.device)
    slack = slack.scatter_reduce(0, leaf, margin[order], "amax")[:, None].double()
    return Leaves(order, edges.tolist(), low.double() - slack, high.double() + slack)


def _corners(coordinates: Tensor, leaf: Tensor, n_leaves: int) -> tuple[Tensor, Tensor]:
    at = leaf[:, None].expand_as(coordinates)
    empty = coordinates.new_empty(n_leaves, coordinates.shape[1])
    low = empty.scatter_reduce(0, at, coordinates, "amin", include_self=False)
    return low, empty.scatter_reduce(0, at, coordinates, "amax", include_self=False)


def squared_gaps(first: Leaves, second: Leaves) -> Tensor:
    """``(n_first, n_second)`` lower bounds, float64, of squared distances between leaves' rows."""
    shape = (len(first.low), len(second.low))
    gaps = torch.zeros(shape, dtype=torch.float64, device=first.low.device)
    for axis in range(first.low.shape[1]):
        above = first.low[:, None, axis] - second.high[None, :, axis]
        below = second.low[None, :, axis] - first.high[:, None, axis]
        gaps += torch.maximum(above, below).clamp_min_(0).square_()
    return gaps * (1 - 1e-6)


def rows_of(leaves: Leaves, chosen: Tensor) -> Tensor | slice:
    """Positions in ``order`` of the rows of the leaves ``chosen``; a slice where they adjoin."""
    picked = chosen.sort().values.tolist()
    if picked[-1] - picked[0] == len(picked) - 1:
        return slice(leaves.starts[picked[0]], leaves.starts[picked[-1] + 1])
    device = leaves.order.device
    return torch.cat(
        [torch.arange(leaves.starts[p], leaves.starts[p + 1], device=device) for p in picked]
    )


def taken(rows: Tensor, at: Tensor | slice) -> Tensor:
    """``rows[at]``, in half the time where ``at`` is a tensor."""
    return rows[at] if isinstance(at, slice) else rows.index_select(0, at)


class Index(NamedTuple):
    """Rows to search, sorted into the ``leaves`` of a ``frame``, with their ``scales`` if any."""

    rows: Tensor
    leaves: Leaves
    frame: Frame
    scales: Tensor | None


class Searched(NamedTuple):
    """Rows ``asking``, sorted into leaves too, and the index ``known`` that they search.

    ``gaps`` (n_asking_leaves, n_leaves) are lower bounds of squared distances, divided by the
    product of the two rows' scales where there are any.
    """

    asking: Tensor
    asking_leaves: Leaves
    asking_scales: Tensor | None
    known: Index
    gaps: Tensor


def build_index(
    X: Tensor,
    scale: Tensor | None = None,
    *,
    rows_per_leaf: int | None = None,
    in_order: bool = False,
) -> Index:
    """Sort rows into leaves, unless they stand ``in_order`` as :func:`leaf_order` puts them."""
    frame = principal_frame(X)
    leaves = partition(X, frame, rows_per_leaf or leaf_rows(X.device), in_order=in_order)
    rows = X if in_order else taken(X, leaves.order)
    return Index(rows, leaves, frame, None if scale is None else scale[leaves.order])


def ask(A: Tensor | None, index: Index, scale: Tensor | None = None) -> Searched:
    """Sort the rows of ``A`` into leaves; for None the rows of the index ask themselves."""
    leaves = index.leaves
    if A is None:
        asked, asking, scales = index.rows, leaves, index.scales
    else:
        asking = partition(A, index.frame, leaf_rows(A.device))
        asked, scales = taken(A, asking.order), None if scale is None else scale[asking.order]
    gaps = squared_gaps(asking, leaves)
    if scales is not None and index.scales is not None:
        gaps /= leaf_maxima(asking, scales)[:, None] * leaf_maxima(leaves, index.scales)
    return Searched(asked, asking, scales, index, gaps)


def leaf_maxima(leaves: Leaves, values: Tensor) -> Tensor:
    """Largest of the ``values`` (n_samples,), in the order of the leaves, of every leaf."""
    lengths = torch.tensor(leaves.starts, device=values.device).diff()
    return torch.segment_reduce(values, "max", lengths=lengths)
