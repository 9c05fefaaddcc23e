"""Exact search for the k nearest rows, by blocks of matrix products over leaves of rows.

Leaves (:mod:`~manifold_unlearn.manifold.partition`) too far from a row's candidates are left out:
most of them on data of low dimension. Where few can be, the search goes through all rows in order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.distances import (
    rounding_error,
    squared_distance_block,
    squared_norms,
)
from manifold_unlearn.manifold.partition import (
    Frame,
    Index,
    Searched,
    ask,
    build_index,
    rows_of,
    taken,
)

_SPARE = 8  # candidates kept beyond k, so that rounding in the matrix product reorders none away
_PROBED = 4  # leaves from which the part of the leaves that a search visits is guessed
_FLAT = 0.4  # above, the search goes through all rows in order
_FLAT_ROWS = 1024
_PRECISE = 1e-5  # part of a row's least squared distance up to which rounding is left standing
_GROUP = 8  # columns of which the smallest stands for all, before the k smallest are sought


def exact_neighbors(
    A: Tensor,
    B: Tensor | Index | None,
    k: int,
    *,
    scale_A: Tensor | None = None,
    first_pass: torch.dtype | None = None,
    block_columns: int = 16384,
    rows_per_leaf: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared distances and indices ``(len(A), k)`` of the nearest rows, nearest first.

    Parameters
    ----------
    A : Tensor of shape (n_samples, n_features), float32 or float64
    B : Tensor of shape (n_searched, n_features), Index or None
        None: ``A`` itself, each row's own entry left out.
    k : int
    scale_A : Tensor of shape (n_samples,), optional
        Squared distances are divided by the product of the two rows' scales; those of ``B`` are
        in its index.
    first_pass : torch.dtype, optional
        Dtype of the matrix products, half precision; twice as many candidates are kept, and
        ranked by their distances in the dtype of ``A``, but none is certain.
    block_columns : int
        Columns of one block of distances.
    rows_per_leaf : int, optional
    """
    if isinstance(B, Index):
        index = B
    else:
        index = build_index(A if B is None else B, rows_per_leaf=rows_per_leaf)
    searched = ask(None if B is None else A, index, scale_A)
    order, starts = searched.asking_leaves.order, searched.asking_leaves.starts
    distances = torch.empty(len(A), k, dtype=A.dtype, device=A.device)
    indices = torch.empty(len(A), k, dtype=torch.int64, device=A.device)
    certain = torch.empty(len(A), dtype=torch.bool, device=A.device)
    flat = first_pass is not None or _visited(searched, k) > _FLAT
    parts = row_blocks(len(A), _FLAT_ROWS) if flat else map(slice, starts[:-1], starts[1:])
    others = None
    if flat:
        centered = index.rows - index.frame.center
        block = centered.new_empty(min(len(A), _FLAT_ROWS) * min(len(centered), block_columns))
        others = _Rows(centered, squared_norms(centered), block)
    for leaf, part in enumerate(parts):
        search = _LeafSearch(searched, part, k, B is None, others, first_pass)
        if flat:
            for columns in row_blocks(len(index.rows), block_columns):
                search.look_at(columns)
        else:
            search.look_near(searched.gaps[leaf], block_columns)
        at = order[part]
        distances[at], indices[at], certain[at] = search.result()
    if A.dtype == torch.float32 and first_pass is None and not bool(certain.all()):
        doubtful = (~certain).nonzero()[:, 0]
        scale = None if scale_A is None else scale_A[doubtful].double()
        frame = Frame(*(part.double() for part in index.frame))
        wider = index._replace(rows=index.rows.double(), frame=frame)
        wide, at = exact_neighbors(A[doubtful].double(), wider, k + (B is None), scale_A=scale)
        if B is None:
            keep = without_own(at, doubtful)
            wide, at = wide[keep].reshape(-1, k), at[keep].reshape(-1, k)
        distances[doubtful], indices[doubtful] = wide.float(), at
    return distances, indices


def without_own(indices: Tensor, own: Tensor) -> Tensor:
    """Mask of the entries but each row's ``own``, or but the last where that is not there."""
    keep = indices != own[:, None]
    keep[keep.all(1), -1] = False
    return keep


def _visited(searched: Searched, k: int) -> float:
    """Part of the leaves that a search will visit, guessed from a few leaves."""
    starts, n_leaves, index = searched.asking_leaves.starts, len(searched.gaps), searched.known
    share = 0.0
    probes = range(0, n_leaves, -(-n_leaves // _PROBED))
    for leaf in probes:
        gaps = searched.gaps[leaf]
        near = index.rows[rows_of(index.leaves, gaps.argsort()[:4])] - index.frame.center
        queries = searched.asking[starts[leaf] : starts[leaf + 1]] - index.frame.center
        block = squared_distance_block(queries, near, squared_norms(queries), squared_norms(near))
        reach = block.topk(min(k, len(near)), dim=1, largest=False).values[:, -1].max()
        share += float((gaps <= reach).double().mean())
    return share / len(probes)


class _Rows(NamedTuple):
    """Centered rows, their squared norms, and memory for one block of distances."""

    rows: Tensor
    squared: Tensor
    block: Tensor


class _LeafSearch:
    """The best candidates so far for the rows ``part`` that ask."""

    def __init__(
        self,
        searched: Searched,
        part: slice,
        k: int,
        own: bool,
        others: _Rows | None,
        first_pass: torch.dtype | None,
    ) -> None:
        self.known, self.k, self.first_pass, self.others = searched.known, k, first_pass, others
        self.queries = searched.asking[part]
        self.own = torch.arange(part.start, part.stop, device=self.queries.device) if own else None
        center = searched.known.frame.center
        self.center = self.queries.mean(0, keepdim=True) if others is None else center
        self.centered = self.queries - self.center
        self.squared = squared_norms(self.centered)
        self.scales = None
        if searched.asking_scales is not None and searched.known.scales is not None:
            self.scales = searched.asking_scales[part][:, None], searched.known.scales
        self.available = len(self.known.rows) - own
        self.kept = min(k + _SPARE if first_pass is None else 2 * k + _SPARE, self.available)
        self.best = self.centered.new_empty(len(self.queries), 0)
        self.at = torch.empty((len(self.queries), 0), dtype=torch.int64, device=self.best.device)

    def look_near(self, gaps: Tensor, block_columns: int) -> None:
        """Look at leaves by their gaps, until no other can hold a better candidate."""
        leaves = self.known.leaves
        gaps, visit = gaps.sort(stable=True)
        n_leaves, size = len(gaps), leaves.starts[1] + 1
        done, wanted = 0, max(4 * self.kept, 4 * size)
        while done < n_leaves:
            stop = min(done + max(1, wanted // size), n_leaves)
            if self.best.shape[1] == self.kept:
                worst = (self.best.amax(1) + self._slack()).max()
                stop = min(stop, int((gaps <= worst).sum()))
            if stop <= done:
                return
            self.look_at(rows_of(leaves, visit[done:stop]))
            done, wanted = stop, block_columns

    def _slack(self) -> Tensor:
        """Rounding error of the squared distances up to the farthest candidate, for each row."""
        # that of a far row grows with its norm, but so does its distance: |y| <= |x| + |x - y|
        farthest = self.best.amax(1).clamp_min(0)
        if self.scales is None:
            return 3 * rounding_error(self.squared) + 2 * rounding_error(farthest)
        own, other = self.scales[0][:, 0], self.scales[1]
        farthest = farthest * own * other.max()
        return (3 * rounding_error(self.squared) + 2 * rounding_error(farthest)) / (
            own * other.min()
        )

    def look_at(self, columns: Tensor | slice) -> None:
        """Keep the best of the candidates kept and the rows at ``columns``, ascending."""
        block = self._distances(columns)
        if isinstance(columns, slice):
            columns = torch.arange(columns.start, columns.stop, device=block.device)
        if self.own is not None:
            place = torch.searchsorted(columns, self.own).clamp_max_(len(columns) - 1)
            rows = (columns[place] == self.own).nonzero()[:, 0]
            block[rows, place[rows]] = float("inf")
        values, at = _smallest(block, self.kept)
        if self.scales is None:
            values += self.squared[:, None]
        best, at = torch.cat([self.best, values], 1), torch.cat([self.at, columns[at]], 1)
        if best.shape[1] > self.kept:
            best, order = best.topk(self.kept, dim=1, largest=False, sorted=False)
            at = at.gather(1, order)
        self.best, self.at = best, at

    def _distances(self, columns: Tensor | slice) -> Tensor:
        """Squared distances; without scales less the squared norm of the row that asks."""
        space = None
        if self.others is None:
            other = taken(self.known.rows, columns) - self.center
            squared = squared_norms(other)
        else:
            other, squared = self.others.rows[columns], self.others.squared[columns]
            shape = (len(self.queries), len(other))
            space = self.others.block[: math.prod(shape)].view(shape)
        if self.first_pass is None:
            block = torch.addmm(squared[None, :], self.centered, other.T, alpha=-2, out=space)
        else:
            half = self.centered.to(self.first_pass) @ other.to(self.first_pass).T
            block = squared - 2 * half.to(other.dtype)
        if self.scales is not None:
            block += self.squared[:, None]
            block /= self.scales[0] * self.scales[1][columns]
        return block

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distances, indices and certainty: that no row left out is nearer than the k-th kept.

        Where rounding may have put candidates in another order, or is large beside the least
        distance, they are ranked by their differences.
        """
        values, order = self.best.sort(dim=1)
        at, slack = self.at.gather(1, order), self._slack()
        clear = (values.diff(dim=1)[:, : self.k] > 2 * slack[:, None]).all(1)
        clear &= slack <= _PRECISE * values[:, 0]
        if self.first_pass is not None:
            clear[:] = False
        numbers, certain = self.known.leaves.order[at], clear | (self.kept == self.available)
        blurred = (~clear).nonzero()[:, 0]
        exact, ranked = self._ranked(blurred, at[blurred])
        certain[blurred] |= exact[:, self.k - 1] + slack[blurred] <= values[blurred, -1]
        values[blurred], numbers[blurred] = exact, ranked
        return values[:, : self.k], numbers[:, : self.k], certain

    def _ranked(self, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Squared lengths of the differences of ``rows`` and their candidates, ascending; those."""
        numbers, order = self.known.leaves.order[at].sort(dim=1)
        at, exact = at.gather(1, order), self.best.new_empty(at.shape)
        chunk = 2**18 // (self.queries.shape[1] * self.kept) if at.is_cpu else 1024
        for part in row_blocks(len(at), max(1, chunk)):
            difference = self.known.rows[at[part]].sub_(self.queries[rows[part], None])
            exact[part] = squared_norms(difference)
        if self.scales is not None:
            exact /= self.scales[0][rows] * self.scales[1][at]
        exact, order = exact.sort(dim=1, stable=True)
        return exact, numbers.gather(1, order)


def _smallest(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest of each row and their columns, in no order.

    Wide rows are folded first: the k smallest lie in the k groups of smallest minima.
    """
    n_rows, width = block.shape
    k = min(k, width)
    folds = width // _GROUP
    if folds < 2 * k:
        return block.topk(k, dim=1, largest=False, sorted=False)
    folded = block[:, : folds * _GROUP].reshape(n_rows, _GROUP, folds)
    group = folded.amin(1).topk(k, dim=1, largest=False, sorted=False).indices
    steps = torch.arange(_GROUP, device=block.device) * folds
    at = (group[:, :, None] + steps).reshape(n_rows, -1)
    rest = torch.arange(folds * _GROUP, width, device=block.device).expand(n_rows, -1)
    at = torch.cat([at, rest], dim=1)
    values, order = block.gather(1, at).topk(k, dim=1, largest=False, sorted=False)
    return values, at.gather(1, order)
