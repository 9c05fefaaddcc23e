"""Thresholds that a further value exceeds with a promised chance."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class ConformalQuantile(NamedTuple):
    """A value, and what it promises.

    Attributes
    ----------
    value : float
    promised_rate : float
        Chance, at most, that a further exchangeable value is greater.
    n_needed : int
        Values that the rate asked for would need.
    """

    value: float
    promised_rate: float
    n_needed: int


def conformal_quantile(values: Tensor, rate: float) -> ConformalQuantile:
    """Least of the values that a further one exceeds with at most the chance asked for.

    It is the ``ceil((n + 1) * (1 - rate))``-th smallest: of ``n + 1`` exchangeable values the last
    is above it with at most that chance. With fewer values than the rate needs, the largest takes
    its place and promises ``1 / (n + 1)``.

    Parameters
    ----------
    values : Tensor of shape (n,)
    rate : float
        In (0, 1).

    References
    ----------
    Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world.
    """
    n = len(values)
    rank = min(math.ceil((n + 1) * (1 - rate) - 1e-9), n)
    value = float(values.double().sort().values[rank - 1])
    return ConformalQuantile(value, 1 - rank / (n + 1), math.ceil(1 / rate - 1e-9) - 1)
