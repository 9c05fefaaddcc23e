"""What an attack brings back, by the compute spent on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from manifold_unlearn.evaluate.likelihood import Subject
from manifold_unlearn.evaluate.results import Metric

Knowledge: TypeAlias = Callable[[Subject, Any], np.ndarray]
"""What a subject with its tokenizer knows of each item, ``(n_items,)`` in [0, 1]."""


@dataclass(frozen=True, eq=False)
class AttackCurve:
    """What a model shows of each item as an attack goes on.

    Attributes
    ----------
    attack : str
        Name of the attack, with what sets it apart: ``"relearn, disjoint facts"``.
    metric : str
        What the values measure: ``"probability"``, ``"accuracy"``.
    unit : str
        Of the compute: ``"gradient steps"``, ``"forward passes"``, ``"samples"``, ``"tokens"``.
    spent : ndarray of shape (n_points,), float64
        Compute up to each point, ascending; 0 is before the attack.
    values : ndarray of shape (n_points, n_items), float64
        In [0, 1].
    details : mapping
        Settings and by-products, as JSON holds them.
    """

    attack: str
    metric: str
    unit: str
    spent: np.ndarray
    values: np.ndarray
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) != len(self.spent) or not self.values.size:
            raise ValueError(
                f"{self.attack}: values of shape {self.values.shape} for {len(self.spent)} points. "
                "Give one row of at least one item for each point."
            )
        if not np.isfinite(self.values).all() or np.any(np.diff(self.spent) < 0):
            raise ValueError(f"{self.attack}: values must be finite and spent must ascend.")

    @property
    def before(self) -> Metric:
        """Before the attack."""
        return Metric(self.metric, self.values[0])

    @property
    def best(self) -> Metric:
        """At the point where the attacker sees most on average."""
        return Metric(self.metric, self.values[int(self.values.mean(axis=1).argmax())])

    def to_json(self) -> dict[str, Any]:
        """Curve of the means, the first and the best point with their intervals, and details."""
        return {
            "attack": self.attack,
            "metric": self.metric,
            "unit": self.unit,
            "spent": self.spent.tolist(),
            "means": self.values.mean(axis=1).tolist(),
            "before": self.before.to_json(),
            "best": self.best.to_json(),
            "details": dict(self.details),
        }
