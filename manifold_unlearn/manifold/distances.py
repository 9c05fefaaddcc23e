"""Squared distances by matrix products, what rounding does to them, and the mend."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks

_ROUNDING = 8.0  # multiple of the machine epsilon that bounds the error of |x|^2 + |y|^2 - 2 x.y
_CHUNK = 2**18  # elements of one gathered difference: it stays in the cache


def center_of(X: Tensor) -> Tensor:
    """Robust center ``(1, n_features)``: the median of at most 1,000 rows, in X's dtype.

    Distances do not depend on it; their rounding does, and a mean would follow one far outlier.
    """
    return X[:: -(-X.shape[0] // 1000)].median(dim=0, keepdim=True).values


def squared_norms(X: Tensor) -> Tensor:
    """``(n_samples,)`` squared lengths of the rows."""
    return torch.linalg.vector_norm(X, dim=-1).square_()


def rounding_error(squared_norms: Tensor) -> Tensor:
    """Bound on a row's share of the rounding error of its squared distances."""
    return _ROUNDING * torch.finfo(squared_norms.dtype).eps * squared_norms


def squared_distance_block(X: Tensor, Y: Tensor, squared_X: Tensor, squared_Y: Tensor) -> Tensor:
    """``(len(X), len(Y))`` squared distances by one matrix product; rounding may leave < 0."""
    return torch.addmm(squared_Y[None, :], X, Y.T, alpha=-2).add_(squared_X[:, None])


def exact_squared_distances(X: Tensor, Y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of the pairs ``X[rows], Y[columns]`` from their differences."""
    result = torch.empty(len(rows), dtype=X.dtype, device=X.device)
    chunk = _CHUNK if X.device.type == "cpu" else 64 * _CHUNK
    for part in row_blocks(len(rows), max(1, chunk // X.shape[1])):
        difference = X[rows[part]].sub_(Y[columns[part]])
        result[part] = squared_norms(difference)
    return result
