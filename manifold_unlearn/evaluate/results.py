"""Measured values: one per item, with the mean, its interval, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

N_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric over the items of a set."""

    name: str
    values: np.ndarray
    """(n_items,) float64"""

    @property
    def mean(self) -> float:
        """Mean over the items."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile bootstrap interval of the mean, from a fixed seed."""
        return _percentiles(self.values[_resamples(len(self.values))].mean(axis=1))

    def to_json(self) -> dict[str, Any]:
        """Mean, interval, count and the values themselves."""
        return {
            "mean": self.mean,
            "interval": list(self.interval),
            "n": len(self.values),
            "values": [float(v) for v in self.values],
        }


@dataclass(frozen=True, eq=False)
class Change:
    """A metric before and after an edit, on the same items."""

    before: Metric
    after: Metric

    @property
    def kept(self) -> float:
        """Mean after over mean before; NaN where there was nothing before."""
        return self.after.mean / self.before.mean if self.before.mean else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of :attr:`kept`, items resampled in pairs."""
        index = _resamples(len(self.before.values))
        after = self.after.values[index].mean(axis=1)
        before = self.before.values[index].mean(axis=1)
        if not before.all():
            return float("nan"), float("nan")
        return _percentiles(after / before)

    def to_json(self) -> dict[str, Any]:
        """Both metrics and what was kept; null where that is undefined."""
        defined = bool(np.isfinite([self.kept, *self.interval]).all())
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "kept": self.kept if defined else None,
            "kept_interval": list(self.interval) if defined else None,
        }


def paired_difference(first: Metric, second: Metric) -> tuple[float, tuple[float, float]]:
    """Mean of ``first`` less that of ``second`` on the same items, and its 95 % interval.

    Percentiles of a bootstrap from a fixed seed, items resampled in pairs.

    Raises
    ------
    ValueError
        Other numbers of items.
    """
    if len(first.values) != len(second.values):
        raise ValueError(
            f"{first.name}: {len(first.values)} items against {len(second.values)} of "
            f"{second.name}; measure both on the same items."
        )
    difference = first.values - second.values
    means = difference[_resamples(len(difference))].mean(axis=1)
    return float(difference.mean()), _percentiles(means)


def _resamples(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n, size=(N_RESAMPLES, n))


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
