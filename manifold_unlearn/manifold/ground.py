"""Metrics of the data space: maps of rows after which Euclidean distances are those wanted."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from sklearn.covariance import oas
from torch import Tensor

from manifold_unlearn.arrays import as_rows

Metric: TypeAlias = Literal["euclidean", "cosine", "rms", "mahalanobis"]


class GroundMetric(NamedTuple):
    """A metric of rows, fitted.

    Attributes
    ----------
    name : str
    whitening : Tensor of shape (n_features, n_features) or None
        Symmetric; whitened rows have covariance 1. Only of ``"mahalanobis"``.
    """

    name: str
    whitening: Tensor | None = None

    def apply(self, X: Tensor) -> Tensor:
        """Rows whose Euclidean distances are the metric's.

        Raises
        ------
        ValueError
            A row of length 0, which has no direction, with ``"cosine"`` or ``"rms"``.
        """
        if self.whitening is not None:
            return X @ self.whitening.to(X.dtype)
        if self.name == "euclidean":
            return X
        lengths = torch.linalg.vector_norm(X, dim=1, keepdim=True)
        if bool((lengths == 0).any()):
            row = int((lengths[:, 0] == 0).nonzero()[0, 0])
            raise ValueError(
                f"metric={self.name!r} needs rows of positive length: row {row} is 0. "
                "Leave such rows out or use metric='euclidean'."
            )
        return X / lengths * (X.shape[1] ** 0.5 if self.name == "rms" else 1.0)


def check_metric(metric: str) -> None:
    """Raise ``ValueError`` unless ``metric`` is known."""
    known = get_args(Metric)
    if metric not in known:
        raise ValueError(
            f"metric={metric!r} is not known. Use one of {', '.join(map(repr, known))}."
        )


def fit_metric(metric: Metric, X: Tensor, reference: Any = None) -> GroundMetric:
    """The metric of the name, whitening fitted on the rows of ``reference``, by default ``X``.

    ``"cosine"``: ``2 - 2 cos`` is the squared distance; ``"rms"``: rows over their root mean
    square, as a normalized residual stream is read, ``n_features`` times that; ``"mahalanobis"``:
    by the covariance of ``reference``, shrunk to a multiple of 1 (OAS: Chen, Wiesel, Eldar and
    Hero 2010), so that it is defined for fewer rows than features.

    Raises
    ------
    ValueError
        The metric is not known, ``reference`` has no variance, other features than ``X``, or no
        part in the metric.
    """
    check_metric(metric)
    if metric != "mahalanobis":
        if reference is not None:
            raise ValueError(
                f"reference has no part in metric={metric!r}. Use metric='mahalanobis'."
            )
        return GroundMetric(metric)
    if reference is not None:
        others = as_rows(reference, device=X.device, name="reference", min_samples=2)
        if others.shape[1] != X.shape[1]:
            raise ValueError(
                f"reference has {others.shape[1]} features, X has {X.shape[1]}. "
                "Give both the same columns."
            )
        X = others
    rows = X.double().cpu().numpy()
    covariance, _ = oas(rows)
    if not covariance.any():
        raise ValueError(
            f"metric='mahalanobis' needs rows that differ: all {len(rows)} are equal. "
            "Give other reference rows."
        )
    variances, axes = torch.linalg.eigh(torch.from_numpy(covariance))
    floor = 1e-12 * variances[-1]  # one feature alone is not shrunk
    whitening = (axes / variances.clamp_min(floor).sqrt()) @ axes.T
    return GroundMetric(metric, whitening.to(X.device))
