"""Gaussian kernel on the graph of nearest neighbors that an approximate search finds."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from manifold_unlearn.manifold.bandwidth import FAR_CUTOFF, Bandwidth, PairHistogram
from manifold_unlearn.manifold.kernels import KernelGraph, support_radius, symmetric_kernel
from manifold_unlearn.manifold.neighbors import NeighborMethod, approximate_neighbors

_MOST = 4  # times n_neighbors: the longest lists of neighbors searched
_COVERED = 0.99  # part of the rows whose list must reach as far as the kernel


class ApproximateGraph(NamedTuple):
    """A graph, the bandwidth with the support it has, and the search's estimated recall."""

    graph: KernelGraph
    tuned: Bandwidth
    recall: float


def approximate_graph(
    X: Tensor,
    histogram: PairHistogram,
    tuned: Bandwidth,
    *,
    n_neighbors: int,
    neighbors: NeighborMethod,
    random_state: Any = None,
) -> ApproximateGraph:
    """As :func:`~manifold_unlearn.manifold.kernels.kernel_graph`, of lists of near neighbors.

    The lists are as long as 99 % of the rows need to reach as far as the kernel, at most
    ``4 * n_neighbors``; where that is too short the kernel is cut where they end.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
    histogram : PairHistogram
        Of the same rows.
    tuned : Bandwidth
    n_neighbors : int
    neighbors : str
        Search, see :func:`~manifold_unlearn.manifold.neighbors.nearest_neighbors`.
    random_state : int, RandomState or None

    Warns
    -----
    UserWarning
        The lists truncate the kernel; names the ``n_neighbors`` that would do.
    """
    n_samples, width = len(X), 4 * tuned.bandwidth
    reached = np.quantile(np.cumsum(histogram.counts, axis=1), _COVERED, axis=0)
    needed = float(np.interp(width * tuned.cutoff, histogram.values, reached))
    most = min(_MOST * n_neighbors, n_samples - 1)
    if needed > most:
        allowed = float(np.interp(most, reached, histogram.values))
        warnings.warn(
            f"lists of {most} neighbors truncate the kernel: bandwidth={tuned.bandwidth:.4g} "
            f"reaches {needed:.0f}. n_neighbors={int(np.ceil(needed / _MOST))} would do, or "
            "neighbors='exact', or a smaller bandwidth.",
            UserWarning,
            stacklevel=4,
        )
        tuned = tuned._replace(cutoff=allowed / width)
    k = int(np.clip(needed + 1, n_neighbors, most))
    found, _, recall = approximate_neighbors(
        X, k, neighbors=neighbors, device=X.device, random_state=random_state
    )
    base, far = width * tuned.cutoff, tuned.offset + width * FAR_CUTOFF
    near = found.squared_distances
    support = support_radius(near[:, : max(1, n_neighbors - 1)], base, far)
    rows, at = (near <= support[:, None]).nonzero(as_tuple=True)
    pairs = (rows, found.indices[rows, at], near[rows, at])
    return ApproximateGraph(
        KernelGraph(symmetric_kernel(*pairs, tuned, n_samples), support), tuned, recall
    )
