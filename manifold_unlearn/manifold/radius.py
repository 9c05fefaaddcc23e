"""All pairs of rows within a radius, by blocks of matrix products over leaves of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.distances import (
    exact_squared_distances,
    rounding_error,
    squared_norms,
)
from manifold_unlearn.manifold.partition import Index, Searched, ask, leaf_maxima, rows_of, taken

_REFINE = 1e-4  # part of the squared radius up to which rounding is left standing
_FLAT = 0.5  # part of the leaves within reach above which all rows are looked at in order
_FLAT_ROWS = 1024
_NEAR_ROWS = 100  # leaves are looked at together up to about so many rows
_BLOCK_COLUMNS = 4096


class Pairs(NamedTuple):
    """Pairs of rows within a radius: ``rows``, ``columns`` int64 and ``squared_distances``."""

    rows: Tensor
    columns: Tensor
    squared_distances: Tensor


class Block(NamedTuple):
    """Squared distances of rows that ask, ``rows``, and of rows of an index, ``columns``.

    Both number the rows themselves; ``squared_distances`` (len(rows), len(columns)) is infinite
    where neither reaches the other.
    """

    rows: Tensor
    columns: Tensor
    squared_distances: Tensor


def radius_neighbors(index: Index, squared_radius: float) -> Pairs:
    """All pairs of rows within a radius, each once with ``rows < columns``.

    Parameters
    ----------
    index : Index
        Of the rows (:func:`~manifold_unlearn.manifold.partition.build_index`). With scales, squared
        distances are divided by the product of the two rows' scales.
    squared_radius : float
        Squared units of the data, or of the scaled distances.

    Returns
    -------
    Pairs
        ``squared_distances`` are off by at most 1e-4 of the squared radius, through rounding. The
        columns of each row ascend where the index was built ``in_order``.
    """
    rows, order = index.rows, index.leaves.order
    reach = torch.full((len(rows),), squared_radius, dtype=rows.dtype, device=rows.device)
    sides = _Sides(ask(None, index), reach, None, once=True)
    found = sides.all_pairs()
    first, second = order[found.rows], order[found.columns]
    return Pairs(torch.minimum(first, second), torch.maximum(first, second), found[2])


def pairs_within(
    Q: Tensor, index: Index, reach_Q: Tensor, reach_X: Tensor, *, scale_Q: Tensor | None = None
) -> Pairs:
    """Pairs of a row of ``Q`` and one of the index of which either reaches the other.

    Parameters
    ----------
    Q : Tensor of shape (n_Q, n_features)
    index : Index
    reach_Q, reach_X : Tensor of shape (n_Q,) and (n_X,)
        Squared radius of every row: a pair is kept up to the larger of the two.
    scale_Q : Tensor, optional
        Squared distances are divided by it and by the scale of the other row, in the index.

    Returns
    -------
    Pairs
        ``rows`` into ``Q``, ``columns`` into the rows that the index was built of.
    """
    sides = _sides(Q, index, reach_Q, reach_X, scale_Q)
    found = sides.all_pairs()
    order = sides.searched.asking_leaves.order
    return Pairs(order[found.rows], index.leaves.order[found.columns], found.squared_distances)


def blocks_within(
    Q: Tensor, index: Index, reach_Q: Tensor, reach_X: Tensor, *, scale_Q: Tensor | None = None
) -> Iterator[Block]:
    """The pairs of :func:`pairs_within` as dense blocks, made one after the other.

    For sums over pairs: nothing is listed, and a block stays in the cache.
    """
    sides = _sides(Q, index, reach_Q, reach_X, scale_Q)
    order = sides.searched.asking_leaves.order
    for part, columns in sides.places():
        yield Block(order[part], index.leaves.order[columns], sides.block(part, columns))


def _sides(
    Q: Tensor, index: Index, reach_Q: Tensor, reach_X: Tensor, scale_Q: Tensor | None
) -> _Sides:
    searched = ask(Q, index, scale_Q)
    asking, order = searched.asking_leaves.order, index.leaves.order
    return _Sides(searched, reach_Q[asking], reach_X[order], once=False)


class _Sides:
    """Rows that ask and rows that are searched, ready for blocks of distances."""

    def __init__(
        self, searched: Searched, reach: Tensor, other_reach: Tensor | None, once: bool
    ) -> None:
        self.searched, self.reach, self.other_reach, self.once = searched, reach, other_reach, once
        self.scales = (searched.asking_scales, searched.known.scales)
        center = searched.known.frame.center
        self.rows = searched.known.rows - center
        self.squared_rows = squared_norms(self.rows)
        same = searched.asking is searched.known.rows
        self.asking = self.rows if same else searched.asking - center
        self.squared = self.squared_rows if same else squared_norms(self.asking)
        least = float(reach.min())
        for scale in self.scales:
            least *= 1.0 if scale is None else float(scale.min())
        largest = float(
            rounding_error(self.squared).max() + rounding_error(self.squared_rows).max()
        )
        self.fine = largest <= _REFINE * least  # one center will do for all blocks

    def places(self) -> Iterator[tuple[slice, slice | Tensor]]:
        """Rows that ask with columns, ascending, that hold all they reach or are reached by."""
        asking, leaves = self.searched.asking_leaves, self.searched.known.leaves
        limits = leaf_maxima(asking, self.reach)[:, None]
        if self.other_reach is not None:
            limits = torch.maximum(limits, leaf_maxima(leaves, self.other_reach))
        near = self.searched.gaps <= limits
        if self.once:
            near = near.triu()
        if float(near.double().mean()) > _FLAT / (1 + self.once):
            for part in row_blocks(len(self.asking), _FLAT_ROWS):
                start = part.start if self.once else 0
                for piece in row_blocks(len(self.rows) - start, _BLOCK_COLUMNS):
                    yield part, slice(start + piece.start, start + piece.stop)
            return
        together = max(1, _NEAR_ROWS // (asking.starts[1] + 1))
        wide = max(1, _BLOCK_COLUMNS // (leaves.starts[1] + 1))
        for group in row_blocks(len(near), together):
            part = slice(asking.starts[group.start], asking.starts[group.stop])
            chosen = near[group].any(0).nonzero()[:, 0]
            for piece in row_blocks(len(chosen), wide):
                yield part, rows_of(leaves, chosen[piece])

    def all_pairs(self) -> Pairs:
        """The pairs of all places, numbered in the order of the leaves."""
        empty = torch.empty(0, dtype=torch.int64, device=self.reach.device)
        found = [Pairs(empty, empty, self.reach[:0])]
        found += [self.pairs(*place) for place in self.places()]
        return Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def pairs(self, part: slice, columns: slice | Tensor) -> Pairs:
        """Pairs of the rows ``part`` that ask and the rows ``columns``."""
        squared, add, inside, product = self._compare(part, columns)
        device = squared.device
        if isinstance(columns, slice):
            columns = torch.arange(columns.start, columns.stop, device=device)
        if self.once and int(columns[0]) < part.stop:
            inside &= torch.arange(part.start, part.stop, device=device)[:, None] < columns
        rows, at = inside.nonzero(as_tuple=True)
        values = (squared[rows, at] + add[rows]).clamp_min_(0)
        if product is not None:
            values = values / product[rows, at]
        return Pairs(rows + part.start, columns[at], values)

    def block(self, part: slice, columns: slice | Tensor) -> Tensor:
        """Squared distances of the rows ``part`` and ``columns``, infinite beyond their reach."""
        squared, add, inside, product = self._compare(part, columns)
        squared += add[:, None]
        if product is not None:
            squared /= product
        return squared.masked_fill_(~inside, float("inf"))

    def _compare(
        self, part: slice, columns: slice | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Unscaled squared distances less a column to add, pairs within reach, scales' product."""
        A, B = self.asking[part], taken(self.rows, columns)
        squared_A, squared_B = self.squared[part], self.squared_rows[columns]
        if not self.fine:
            middle = A.mean(0, keepdim=True)
            A, B = A - middle, B - middle
            squared_A, squared_B = squared_norms(A), squared_norms(B)
        squared = torch.addmm(squared_B[None, :], A, B.T, alpha=-2)
        limit, product = self._limits(part, columns)
        error_A, error_B = rounding_error(squared_A), rounding_error(squared_B)
        if self.fine or float(error_A.max() + error_B.max()) <= _REFINE * float(limit.min()):
            return squared, squared_A, squared <= limit - squared_A[:, None], product
        # where rounding is coarse, what may be inside is looked at again
        squared += squared_A[:, None]
        error = error_A[:, None] + error_B
        inside = squared - error <= limit
        rows, at = (inside & (error > _REFINE * limit)).nonzero(as_tuple=True)
        exact = self.searched.asking[part], self.searched.known.rows[columns]
        squared[rows, at] = exact_squared_distances(*exact, rows, at)
        inside &= squared <= limit
        return squared, torch.zeros_like(squared_A), inside, product

    def _limits(self, part: slice, columns: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Largest squared distances of pairs, unscaled, and the product of their scales."""
        limit = self.reach[part, None]
        if self.other_reach is not None:
            others = self.other_reach[columns]
            if float(others.max()) > float(limit.min()):
                limit = torch.maximum(limit, others)
        first, second = self.scales
        if first is None or second is None:
            return limit, None
        product = first[part, None] * second[columns]
        return limit * product, product
