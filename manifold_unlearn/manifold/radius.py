"""All pairs of rows within a radius, by blocks of matrix products over leaves of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.distances import (
    exact_squared_distances,
    rounding_error,
    squared_distance_block,
    squared_norms,
)
from manifold_unlearn.manifold.partition import Searched, leaf_maxima, prepare, rows_of

_REFINE = 1e-4  # part of the squared radius up to which rounding is left standing
_FLAT = 0.5  # part of the leaves within reach above which all rows are looked at in order
_FLAT_ROWS = 1024
_BLOCK_COLUMNS = 4096


class Pairs(NamedTuple):
    """Pairs of rows within a radius: ``rows``, ``columns`` int64 and ``squared_distances``."""

    rows: Tensor
    columns: Tensor
    squared_distances: Tensor


def radius_neighbors(
    X: Tensor,
    squared_radius: float,
    *,
    scale: Tensor | None = None,
    rows_per_leaf: int | None = None,
    in_order: bool = False,
) -> Pairs:
    """All pairs of rows within a radius, each once with ``rows < columns``.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features), float32 or float64
    squared_radius : float
        Squared units of the data, or of the scaled distances.
    scale : Tensor of shape (n_samples,), optional
        Squared distances are divided by the product of the two rows' scales.
    rows_per_leaf : int, optional
        Rows handled together. The answer does not depend on it.
    in_order : bool
        Whether the rows stand as :func:`~manifold_unlearn.manifold.partition.leaf_order` puts
        them. Then the columns of each row's pairs ascend.

    Returns
    -------
    Pairs
        ``squared_distances`` are scaled when ``scale`` is given; off by at most 1e-4 of the
        squared radius, through rounding.
    """
    searched = prepare(X, None, scale, None, rows_per_leaf, in_order)
    reach = torch.full((len(X),), squared_radius, dtype=X.dtype, device=X.device)
    found = _within(searched, reach, None, once=True)
    if in_order:
        return found
    order = searched.leaves.order
    first, second = order[found.rows], order[found.columns]
    return Pairs(torch.minimum(first, second), torch.maximum(first, second), found[2])


def pairs_within(
    Q: Tensor,
    X: Tensor,
    reach_Q: Tensor,
    reach_X: Tensor,
    *,
    scale_Q: Tensor | None = None,
    scale_X: Tensor | None = None,
    in_order: bool = False,
) -> Pairs:
    """Pairs of a row of ``Q`` and one of ``X`` of which either reaches the other.

    Parameters
    ----------
    Q, X : Tensor of shape (n_Q, n_features) and (n_X, n_features)
    reach_Q, reach_X : Tensor of shape (n_Q,) and (n_X,)
        Squared radius of every row: a pair is kept up to the larger of the two.
    scale_Q, scale_X : Tensor, optional
        As in :func:`radius_neighbors`.
    in_order : bool
        Whether the rows of ``X`` stand as ``leaf_order`` puts them.

    Returns
    -------
    Pairs
        ``rows`` into ``Q``, ``columns`` into ``X``.
    """
    searched = prepare(Q, X, scale_Q, scale_X, in_order=in_order)
    asking, order = searched.asking_leaves.order, searched.leaves.order
    found = _within(searched, reach_Q[asking], reach_X[order], once=False)
    return Pairs(asking[found.rows], order[found.columns], found.squared_distances)


def _within(
    searched: Searched, reach: Tensor, other_reach: Tensor | None, *, once: bool
) -> Pairs:
    """Pairs in the order of the leaves; ``once``: of a set with itself, rows < columns."""
    asking, leaves = searched.asking_leaves, searched.leaves
    limits = leaf_maxima(asking, reach)[:, None]
    if other_reach is not None:
        limits = torch.maximum(limits, leaf_maxima(leaves, other_reach))
    near = searched.gaps <= limits
    if once:
        near = near.triu()
    flat = float(near.double().mean()) > _FLAT / (1 + once)
    found = []
    if flat:
        for part in row_blocks(len(searched.asking), _FLAT_ROWS):
            start = part.start if once else 0
            for piece in row_blocks(len(searched.rows) - start, _BLOCK_COLUMNS):
                columns = slice(piece.start + start, piece.stop + start)
                found.append(_block_pairs(searched, part, columns, reach, other_reach, once))
    else:
        for leaf, part in enumerate(map(slice, asking.starts[:-1], asking.starts[1:])):
            chosen = near[leaf].nonzero()[:, 0]
            for piece in row_blocks(len(chosen), max(1, _BLOCK_COLUMNS // (leaves.starts[1] + 1))):
                columns = rows_of(leaves, chosen[piece])
                found.append(
                    _block_pairs(searched, part, columns, reach, other_reach, once, local=True)
                )
    if not found:
        empty = torch.empty(0, dtype=torch.int64, device=reach.device)
        return Pairs(empty, empty, empty.to(reach.dtype))
    return Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _block_pairs(
    searched: Searched,
    part: slice,
    columns: slice | Tensor,
    reach: Tensor,
    other_reach: Tensor | None,
    once: bool,
    local: bool = False,
) -> Pairs:
    A, B = searched.asking[part], searched.rows[columns]
    middle = A.mean(0, keepdim=True) if local else searched.center
    A, B = A - middle, B - middle
    squared_A, squared_B = squared_norms(A), squared_norms(B)
    block = squared_distance_block(A, B, squared_A, squared_B)
    limit = reach[part, None]
    if other_reach is not None:
        limit = torch.maximum(limit, other_reach[columns])
    product = None
    if searched.asking_scales is not None and searched.scales is not None:
        product = searched.asking_scales[part, None] * searched.scales[columns]
        limit = limit * product
    error_A, error_B = rounding_error(squared_A), rounding_error(squared_B)
    coarse = float(error_A.max() + error_B.max()) > _REFINE * float(limit.min())
    if coarse:  # keep what may be inside, and look again below
        inside = block - error_A[:, None] - error_B <= limit
    else:
        inside = block <= limit
    if isinstance(columns, slice):
        first, numbers = columns.start, None
    else:
        first, numbers = 0, columns
    if once and first < part.stop:
        at = torch.arange(first, first + len(B), device=A.device) if numbers is None else numbers
        inside &= torch.arange(part.start, part.stop, device=A.device)[:, None] < at
    rows, at = inside.nonzero(as_tuple=True)
    values = block[rows, at].clamp_min_(0)
    limits = limit.expand_as(block)[rows, at] if coarse else None
    if limits is not None:
        again = (error_A[rows] + error_B[at] > _REFINE * limits).nonzero()[:, 0]
        first_rows, second_rows = searched.asking[part], searched.rows[columns]
        values[again] = exact_squared_distances(first_rows, second_rows, rows[again], at[again])
        keep = values <= limits
        rows, at, values = rows[keep], at[keep], values[keep]
    if product is not None:
        values = values / product[rows, at]
    return Pairs(rows + part.start, at + first if numbers is None else numbers[at], values)
