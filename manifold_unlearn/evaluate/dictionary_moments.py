"""Means and variances of each dimension of rows, merged exactly over blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spread:
    """Count, mean and scatter of each dimension over the rows seen so far; float64.

    References
    ----------
    Chan, Golub and LeVeque (1983), The American Statistician 37.
    """

    count: int
    mean: Tensor
    """(..., d)"""
    scatter: Tensor
    """(..., d): sum over the rows of the squared distance from the mean"""

    @classmethod
    def of(cls, rows: Tensor) -> Spread:
        """Of rows (n, ..., d)."""
        wide = rows.to(torch.float64)
        mean = wide.mean(0)
        return cls(len(rows), mean, (wide - mean).square().sum(0))

    def merge(self, other: Spread) -> Spread:
        """Of both sets of rows together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        weight = self.count * other.count / count
        return Spread(
            count,
            self.mean + apart * (other.count / count),
            self.scatter + other.scatter + apart.square() * weight,
        )

    def stream(self, i: int) -> Spread:
        """Of one of the streams of rows (n, streams, d), on the CPU."""
        return Spread(self.count, self.mean[i].cpu(), self.scatter[i].cpu())

    @property
    def second_moments(self) -> Tensor:
        """(..., d): sum over the rows of the square."""
        return self.scatter + self.count * self.mean.square()
