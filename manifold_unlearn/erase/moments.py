"""First and second moments of rows, accumulated exactly over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of rows seen so far; float64.

    Merging is exact, so any split of the rows into batches gives the same moments.

    References
    ----------
    Chan, Golub and LeVeque (1983), The American Statistician 37.
    """

    count: float
    """number of rows, or the sum of their weights"""
    mean: Tensor
    """(d,)"""
    scatter: Tensor
    """(d, d): sum of ``(x - mean)(x - mean)'``"""

    @classmethod
    def of(cls, X: Tensor, weight: Tensor | None = None) -> Moments:
        """Moments of the rows of ``X`` (n_samples, d), weighted by ``weight`` (n_samples,)."""
        rows = X.to(torch.float64)
        w = rows.new_ones(len(rows)) if weight is None else weight.to(rows)
        mean = (w @ rows) / w.sum()
        centered = rows - mean
        return cls(float(w.sum()), mean, (centered * w[:, None]).T @ centered)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        weight = self.count * other.count / count
        return Moments(
            count,
            self.mean + shift * (other.count / count),
            self.scatter + other.scatter + weight * torch.outer(shift, shift),
        )

    @property
    def covariance(self) -> Tensor:
        """(d, d), normalized by the count."""
        return self.scatter / self.count

    def about(self, center: Tensor) -> Tensor:
        """Second moment ``(d, d)`` about ``center``: ``mean of (x - center)(x - center)'``."""
        shift = self.mean - center
        return self.covariance + torch.outer(shift, shift)


def oas_shrinkage(covariance: Tensor, count: float) -> float:
    """Weight of the identity in the oracle-approximating shrinkage of a covariance.

    Parameters
    ----------
    covariance : Tensor of shape (d, d)
    count : float
        Rows it was estimated from.

    Returns
    -------
    float
        In [0, 1]: 1 where the rows say nothing beyond the trace.

    References
    ----------
    Chen, Wiesel, Eldar and Hero (2010), IEEE Trans. Signal Process. 58.
    """
    d = covariance.shape[0]
    trace_of_square = float((covariance**2).sum())
    square_of_trace = float(covariance.trace()) ** 2
    numerator = (1 - 2 / d) * trace_of_square + square_of_trace
    denominator = (count + 1 - 2 / d) * (trace_of_square - square_of_trace / d)
    if denominator <= 0:
        return 1.0
    return min(1.0, numerator / denominator)


def shrink(covariance: Tensor, weight: float) -> Tensor:
    """``(1 - weight) * covariance + weight * mean variance * I``, never singular.

    A covariance of zero (all rows equal) becomes the identity.
    """
    d = covariance.shape[0]
    scale = covariance.trace() / d
    identity = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    if scale <= 0:
        return identity
    weight = max(weight, 1e-10)
    return (1 - weight) * covariance + weight * scale * identity
