"""Landmarks: the rows that stand for all the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.arrays import generator
from manifold_unlearn.manifold.distances import squared_norms


def choose_landmarks(X: Tensor, n_landmarks: int | None, random_state: Any = None) -> Tensor:
    """Indices, ascending, of ``n_landmarks`` rows; of all rows for None or as many.

    A random subset when ``random_state`` is given, else :func:`farthest_points`.
    """
    n_samples = len(X)
    if n_landmarks is None or n_landmarks >= n_samples:
        return torch.arange(n_samples, device=X.device)
    if random_state is not None:
        order = torch.randperm(n_samples, generator=generator(random_state))
        return order[:n_landmarks].sort().values.to(X.device)
    return farthest_points(X, n_landmarks)


def farthest_points(X: Tensor, n_points: int) -> Tensor:
    """Indices, ascending, of rows each farthest from those before; the first is the most central.

    Deterministic; ``O(n_samples * n_features)`` a point.
    """
    X = X - X.mean(0)
    squared = squared_norms(X)
    chosen = torch.empty(n_points, dtype=torch.int64, device=X.device)
    reach = torch.full((len(X),), float("inf"), dtype=X.dtype, device=X.device)
    at = squared.argmin()
    for position in range(n_points):
        chosen[position] = at
        reach = torch.minimum(reach, squared - 2 * (X @ X[at]) + squared[at])
        reach[at] = -1.0
        at = reach.argmax()
    return chosen.sort().values
