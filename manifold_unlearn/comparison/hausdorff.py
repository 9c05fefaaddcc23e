"""Hausdorff distance of two clouds, exact and robust."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from manifold_unlearn.arrays import Array, Device
from manifold_unlearn.comparison.mmd import two_clouds
from manifold_unlearn.manifold.neighbors import nearest_neighbors

__all__ = ["Hausdorff", "both_hausdorff", "hausdorff_distance"]


class Hausdorff(NamedTuple):
    """The ``largest`` distance to the other cloud, and its ``robust`` quantile."""

    largest: float
    robust: float


def hausdorff_distance(
    A: Array, B: Array, *, quantile: float = 1.0, directed: bool = False, device: Device = "auto"
) -> float:
    """Hausdorff distance of two clouds, exact, or its robust quantile version.

    The largest distance from a row of either to the nearest row of the other. With ``quantile``
    below 1 so many of the rows count and the farthest do not (the partial Hausdorff distance).
    Memory is ``O(n + block)``.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_A, n_features) and (n_B, n_features)
    quantile : float, default=1.0
        In (0, 1].
    directed : bool, default=False
        Only from the rows of A to B: 0 when B contains A.
    device : str or torch.device, default="auto"

    Returns
    -------
    float
        In units of the data.

    Raises
    ------
    ValueError
        Unequal features, an empty or non-finite side, or ``quantile`` out of range.

    References
    ----------
    Huttenlocher, Klanderman and Rucklidge (1993), Comparing images using the Hausdorff distance,
    IEEE Trans. Pattern Anal. Mach. Intell. 15.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} must lie in (0, 1].")
    X, Y = two_clouds(A, B, device)
    sides = [(X, Y)] if directed else [(X, Y), (Y, X)]
    return max(_quantile(_to_nearest(*side), quantile) for side in sides)


def _to_nearest(X: Tensor, Y: Tensor) -> Tensor:
    found = nearest_neighbors(X, 1, Y, neighbors="exact", device=X.device)
    return found.squared_distances[:, 0].double().sqrt()


def _quantile(values: Tensor, quantile: float) -> float:
    """The least value that at least this part of all values does not exceed."""
    rank = max(1, math.ceil(quantile * len(values) - 1e-9))
    return float(values.kthvalue(rank).values)


def both_hausdorff(X: Tensor, Y: Tensor, quantile: float) -> Hausdorff:
    """Exact and robust distance from one search either way."""
    ways = _to_nearest(X, Y), _to_nearest(Y, X)
    return Hausdorff(
        max(float(way.max()) for way in ways), max(_quantile(way, quantile) for way in ways)
    )
