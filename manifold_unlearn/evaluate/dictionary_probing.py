"""What a few latents of a dictionary tell of a label, against a few coordinates and all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from manifold_unlearn.arrays import as_rows
from manifold_unlearn.dictionary import SparseCoder
from manifold_unlearn.dictionary.coding import code_rows
from manifold_unlearn.evaluate.results import Metric

READERS = ("latents", "random_latents", "coordinates")
"""Which few numbers of a row are read."""


@dataclass(frozen=True, eq=False)
class SparseProbing:
    """How often a probe of few numbers is right of a row it has not seen; 1 or 0 a row.

    Labels are weighed alike in training, and in each row's weight in :attr:`balanced`.
    """

    ks: tuple[int, ...]
    labels: np.ndarray
    """(n,) bool"""
    few: Mapping[str, tuple[Metric, ...]]
    """For ``"latents"``, ``"random_latents"`` and ``"coordinates"`` a metric of each k"""
    all_coordinates: Metric
    """The probe of the whole row"""
    chosen: tuple[tuple[int, ...], ...]
    """For each k the latents chosen on all rows, best first"""

    def balanced(self, reader: str = "latents") -> dict[int, float]:
        """Mean of the two labels' shares of rows read right, for each k."""
        if reader not in self.few:
            raise ValueError(f"reader={reader!r} is not one of {', '.join(self.few)}.")
        return {
            k: _balanced(metric.values, self.labels)
            for k, metric in zip(self.ks, self.few[reader], strict=True)
        }

    @property
    def balanced_whole(self) -> float:
        """As :meth:`balanced`, of the probe of the whole row."""
        return _balanced(self.all_coordinates.values, self.labels)

    def to_json(self) -> dict[str, Any]:
        """Accuracies with their intervals, and the latents chosen."""
        return {
            "n": len(self.labels),
            "ks": list(self.ks),
            "chosen": [list(latents) for latents in self.chosen],
            "all_coordinates": _figures(self.all_coordinates, self.balanced_whole),
            **{
                name: [
                    _figures(metric, balanced)
                    for metric, balanced in zip(metrics, self.balanced(name).values(), strict=True)
                ]
                for name, metrics in self.few.items()
            },
        }


def _figures(metric: Metric, balanced: float) -> dict[str, Any]:
    return {
        "accuracy": metric.mean,
        "interval": list(metric.interval),
        "balanced_accuracy": balanced,
    }


def _balanced(right: np.ndarray, labels: np.ndarray) -> float:
    return float((right[labels].mean() + right[~labels].mean()) / 2)


def sparse_probing(
    coder: SparseCoder,
    rows: Tensor,
    labels: Sequence[bool] | np.ndarray,
    *,
    groups: Sequence[int] | np.ndarray | None = None,
    ks: Sequence[int] = (1, 2, 5, 10, 20),
    n_splits: int = 5,
    random_state: int = 0,
) -> SparseProbing:
    """Cross-validated probes of the k latents that tell most of a label.

    Latents are ranked by the difference of their mean activations under the two labels, and a
    logistic regression reads the first k; both on training rows alone. For comparison the same of
    the row's own coordinates, of k latents drawn at random among those that fire, and of the whole
    row.

    Parameters
    ----------
    coder : SparseCoder
    rows : Tensor of shape (n, d_in)
        For a crosscoder (n, n_streams, d_stream); its coordinates are those of all streams.
    labels : sequence of bool of shape (n,)
        One class against the rest.
    groups : sequence of int of shape (n,), optional
        Rows of one group (of one text, of one person) are never split. Default: each is its own.
    ks : sequence of int
        Those above the number of latents or coordinates read all of them.
    n_splits : int, default=5
    random_state : int, default=0
        Of the parts and of the random latents.

    Returns
    -------
    SparseProbing

    Raises
    ------
    ValueError
        A single label, fewer groups of a label than parts, lengths that differ, a k below 1, rows
        that are not finite.

    References
    ----------
    Gurnee et al. (2023), Finding neurons in a haystack: case studies with sparse probing.
    Karvonen et al. (2025), SAEBench, arXiv 2503.09532 (sparse probing).
    """
    wanted = np.asarray(labels).astype(bool)
    groups = np.arange(len(wanted)) if groups is None else np.asarray(groups)
    if not len(rows) == len(wanted) == len(groups) or not ks or min(ks) < 1:
        raise ValueError(
            f"{len(rows)} rows with {len(wanted)} labels and {len(groups)} groups, ks={list(ks)}: "
            "give one of each a row, and every k at least 1."
        )
    parts = _parts(wanted, groups, n_splits, random_state)
    codes = code_matrix(coder, rows)
    X = as_rows(rows.flatten(1)).double().cpu().numpy()
    draw = np.random.default_rng(random_state)
    alive = draw.permutation(np.flatnonzero(codes.getnnz(axis=0)))
    right = {name: np.zeros((len(ks), len(X))) for name in READERS}
    whole = np.zeros(len(X))
    for train, test in parts:
        y = wanted[train]
        ranked = {
            "latents": rank_by_difference(codes[train], y),
            "random_latents": alive,
            "coordinates": rank_by_difference(X[train], y),
        }
        for name, order in ranked.items():
            source = X if name == "coordinates" else codes
            for i, k in enumerate(ks):
                Z = columns(source, order[:k])
                right[name][i, test] = _read(Z[train], y, Z[test]) == wanted[test]
        whole[test] = _read(X[train], y, X[test]) == wanted[test]
    order = rank_by_difference(codes, wanted)
    return SparseProbing(
        tuple(int(k) for k in ks),
        wanted,
        {
            name: tuple(Metric(f"{name}_{k}", row) for k, row in zip(ks, found, strict=True))
            for name, found in right.items()
        },
        Metric("all_coordinates", whole),
        tuple(tuple(order[:k].tolist()) for k in ks),
    )


def code_matrix(coder: SparseCoder, rows: Tensor) -> csr_matrix:
    """Codes of rows, (n, d_sae) float64, with nothing stored where no latent fires."""
    code = code_rows(coder, rows)
    entries = (code.row.cpu().numpy(), code.latent.cpu().numpy())
    value = code.value.to("cpu", torch.float64).numpy()
    return csr_matrix((value, entries), shape=(code.n_rows, code.n_latents))


def rank_by_difference(X: Any, labels: np.ndarray, *, for_label: bool = False) -> np.ndarray:
    """Columns by the size of the difference of their means under two labels, largest first.

    Parameters
    ----------
    X : array or sparse matrix of shape (n, n_columns)
    labels : bool array of shape (n,)
    for_label : bool, default=False
        By the difference itself: columns that speak against the label come last.
    """
    one, other = (np.asarray(X[kept].mean(axis=0)).ravel() for kept in (labels, ~labels))
    difference = one - other
    return np.argsort(-(difference if for_label else np.abs(difference)), kind="stable")


def columns(X: Any, chosen: np.ndarray) -> np.ndarray:
    """Chosen columns as a dense array (n, k)."""
    found = X[:, chosen]
    return found.toarray() if isinstance(found, csr_matrix) else np.asarray(found)


def fitted_probe(Z: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """Logistic regression with both labels weighed alike."""
    return LogisticRegression(max_iter=1000, class_weight="balanced").fit(Z, y)


def _read(Z: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    mean, scale = Z.mean(axis=0), Z.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    read: np.ndarray = fitted_probe((Z - mean) / scale, y).predict((asked - mean) / scale)
    return read


def _parts(
    labels: np.ndarray, groups: np.ndarray, n_splits: int, random_state: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to train on and rows to judge, part by part; both labels in each."""
    least = min(len(np.unique(groups[labels])), len(np.unique(groups[~labels])))
    if n_splits < 2 or least < n_splits:
        raise ValueError(
            f"n_splits={n_splits} with {least} groups of the rarer label; give from 2 to that."
        )
    made = StratifiedGroupKFold(n_splits, shuffle=True, random_state=random_state)
    parts = list(made.split(np.zeros(len(labels)), labels, groups))
    if any(len(np.unique(labels[train])) < 2 for train, _ in parts):
        raise ValueError("a probe would be trained on a single label; give more groups.")
    return parts
