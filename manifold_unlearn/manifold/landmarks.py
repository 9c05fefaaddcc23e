"""Landmarks: the rows that stand for all the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import generator
from manifold_unlearn.manifold.distances import squared_norms


def choose_landmarks(
    X: Tensor, n_landmarks: int | None, random_state: Any = None, numbers: Tensor | None = None
) -> Tensor:
    """Indices, ascending, of ``n_landmarks`` rows; of all rows for None or as many.

    A random subset when ``random_state`` is given, else :func:`farthest_points`. The random subset
    depends on the seed and the ``numbers`` of the rows only, so that landmarks chosen from a
    stream, batch by batch, are those chosen from all of it.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
    n_landmarks : int or None
    random_state : int, RandomState or None
    numbers : Tensor of shape (n_samples,), optional
        Default: 0, 1, 2 and so on.
    """
    n_samples = len(X)
    if n_landmarks is None or n_landmarks >= n_samples:
        return torch.arange(n_samples, device=X.device)
    if random_state is None:
        return farthest_points(X, n_landmarks)
    numbers = torch.arange(n_samples) if numbers is None else numbers.cpu()
    lots = _lots(generator(random_state).initial_seed(), numbers.numpy())
    return torch.from_numpy(lots.argsort(kind="stable")[:n_landmarks]).sort().values.to(X.device)


class LandmarkStream(NamedTuple):
    """Landmarks of the rows that have passed so far.

    Attributes
    ----------
    n_landmarks : int
    random_state : int, RandomState or None
    rows : Tensor of shape (n_kept, n_features) or None
        At most ``n_landmarks``; None before the first batch.
    numbers : Tensor of shape (n_kept,), int64
        Theirs, in the order seen; ascending.
    n_seen : int
    """

    n_landmarks: int
    random_state: Any
    rows: Any = None
    numbers: Any = None
    n_seen: int = 0

    def add(self, batch: Tensor) -> LandmarkStream:
        """The stream after the rows of ``batch`` (n_samples, n_features) have passed."""
        n_seen = self.n_seen + len(batch)
        rows, numbers = batch, torch.arange(self.n_seen, n_seen, device=batch.device)
        if self.rows is not None:
            rows = torch.cat([self.rows.to(batch.dtype), batch])
            numbers = torch.cat([self.numbers, numbers])
        at = choose_landmarks(rows, self.n_landmarks, self.random_state, numbers)
        return self._replace(rows=rows[at], numbers=numbers[at], n_seen=n_seen)


def _lots(seed: int, numbers: np.ndarray) -> np.ndarray:
    """A lot for each number, the same whichever others are asked for."""
    start = _mixed(np.array([seed % 2**64], dtype=np.uint64))
    return _mixed(_mixed(numbers.astype(np.uint64)) ^ start)


def _mixed(words: np.ndarray) -> np.ndarray:
    """One step of splitmix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


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
