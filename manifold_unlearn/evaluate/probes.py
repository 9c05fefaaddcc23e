"""What can still be read from activations: probes at every site, with their controls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.evaluate.forced import Sites, named_sites
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject
from manifold_unlearn.evaluate.meta import concordance, percentiles
from manifold_unlearn.evaluate.probe_tasks import ProbeTask

N_RESAMPLES = 1000
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse strengths of the squared penalty among which a linear probe chooses."""

Kind: TypeAlias = "Literal['linear', 'mlp']"


class Difference(NamedTuple):
    """A difference of two measures on the same rows."""

    value: float
    interval: tuple[float, float]
    """95 %, bootstrap over the groups, in pairs"""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a probe reads at each site, and what it reads of shuffled labels."""

    kind: str
    measure: str
    """``"auc"`` of two labels, ``"balanced_accuracy"`` of more"""
    sites: tuple[str, ...]
    labels: np.ndarray
    """(n_asked,) int64"""
    groups: np.ndarray
    """(n_asked,) int64"""
    fold: np.ndarray
    """(n_asked,) int64: which probe judged the row; only rows of one probe are ranked"""
    readings: np.ndarray
    """(n_sites, n_asked) float64: score of label 1, or the label told"""
    shuffled_labels: np.ndarray
    """(n_shuffles, n_asked) int64"""
    shuffled_readings: np.ndarray
    """(n_shuffles, n_sites, n_asked) float64"""

    @property
    def values(self) -> np.ndarray:
        """(n_sites,) float64: the measure at each site."""
        return self._measured(np.ones((1, len(self.labels))))[:, 0]

    @property
    def shuffled(self) -> np.ndarray:
        """(n_sites,) float64: the same for shuffled labels, mean over the shuffles."""
        return self._measured_shuffled(np.ones((1, len(self.labels))))[:, 0]

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """95 % of each value, bootstrap over the groups."""
        return [percentiles(row) for row in self._measured(self._weights())]

    def above_shuffled(self) -> list[Difference]:
        """At each site, the value less that of shuffled labels."""
        weights = self._weights()
        drawn = self._measured(weights) - self._measured_shuffled(weights)
        return _differences(self.values - self.shuffled, drawn)

    def above(self, reference: ProbeResult) -> list[Difference]:
        """At each site, the value less that of the same probe on another model.

        Raises
        ------
        ValueError
            The other probe was asked something else.
        """
        alike = self.sites == reference.sites and np.array_equal(self.groups, reference.groups)
        if not alike or not np.array_equal(self.labels, reference.labels):
            raise ValueError(
                "the two probes differ in sites, groups or labels; run one task on both models."
            )
        weights = self._weights()
        drawn = self._measured(weights) - reference._measured(weights)
        return _differences(self.values - reference.values, drawn)

    def to_json(self) -> dict[str, Any]:
        """Values with intervals by site, and the shuffled control."""
        return {
            "kind": self.kind,
            "measure": self.measure,
            "n": len(self.labels),
            "n_groups": len(np.unique(self.groups)),
            "sites": list(self.sites),
            "values": self.values.tolist(),
            "intervals": [list(interval) for interval in self.intervals],
            "shuffled": self.shuffled.tolist(),
        }

    def _weights(self) -> np.ndarray:
        """How often each row is in each resample of the groups: ``(N_RESAMPLES, n_asked)``."""
        _, group = np.unique(self.groups, return_inverse=True)
        n = int(group.max()) + 1
        drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
        return drawn[:, group].astype(np.float64)

    def _measured(self, weights: np.ndarray) -> np.ndarray:
        return np.array(
            [_measure(self.measure, row, self.labels, self.fold, weights) for row in self.readings]
        )

    def _measured_shuffled(self, weights: np.ndarray) -> np.ndarray:
        found = [
            [_measure(self.measure, row, labels, self.fold, weights) for row in readings]
            for labels, readings in zip(self.shuffled_labels, self.shuffled_readings, strict=True)
        ]
        return np.array(found).mean(axis=0)


def probe(
    subject: Subject,
    tokenizer: Any,
    task: ProbeTask,
    *,
    sites: Sites = "blocks",
    kind: Kind = "linear",
    n_splits: int = 5,
    n_shuffles: int = 2,
    batch_size: BatchSize = "auto",
    random_state: int = 0,
) -> ProbeResult:
    """Read a task's labels from the states of each text's last token, site by site.

    All sites are captured in one run. Run the same task on the model that was never told: only
    what is above it is knowledge.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerFast
    task : ProbeTask
    sites : {"blocks", "attn", "mlp"} or sequence of str, default="blocks"
    kind, n_splits, n_shuffles, random_state
        As for :func:`probe_rows`.
    batch_size : int or "auto"

    Returns
    -------
    ProbeResult
    """
    names = named_sites(subject, sites)
    with subject() as model:
        acts = capture(
            model,
            tokenizer,
            task.texts,
            list(names),
            tokens="last",
            batch_size=batch_size,
        )
    return probe_rows(
        acts,
        task.labels,
        task.groups,
        task.asked,
        kind=kind,
        n_splits=n_splits,
        n_shuffles=n_shuffles,
        random_state=random_state,
    )


def probe_rows(
    X: Mapping[str, Tensor],
    labels: np.ndarray,
    groups: np.ndarray,
    asked: np.ndarray | None = None,
    *,
    kind: Kind = "linear",
    n_splits: int = 5,
    n_shuffles: int = 2,
    random_state: int = 0,
) -> ProbeResult:
    """Cross-validated probes of rows at several sites.

    Parameters
    ----------
    X : mapping of str to Tensor of shape (n_rows, n_features)
        Rows by site; all finite.
    labels, groups : int array of shape (n_rows,)
    asked : bool array of shape (n_rows,), optional
        Rows that are judged; all by default. The others train every probe.
    kind : {"linear", "mlp"}, default="linear"
        Logistic regression whose penalty is chosen on training groups held out, or a network of
        one hidden layer of 64; both on standardized features.
    n_splits : int, default=5
        Parts of the groups asked; each is judged by a probe of all other rows. 1: one probe,
        trained on rows that are not asked alone.
    n_shuffles : int, default=2
        Runs with shuffled labels: whole groups exchange labels where all rows of a group share
        one, else the rows within each group do, so that no part has more of one label than another.
    random_state : int, default=0
        Of parts, shuffles and networks.

    Returns
    -------
    ProbeResult

    Raises
    ------
    ValueError
        Fewer groups than parts, a part whose probe would see a single label, rows that are not
        finite, an unknown kind.
    """
    if kind not in ("linear", "mlp"):
        raise ValueError(f"kind={kind!r} is not 'linear' or 'mlp'.")
    if n_shuffles < 1:
        raise ValueError(f"n_shuffles={n_shuffles}; at least one shuffled control is needed.")
    asked = np.ones(len(labels), dtype=bool) if asked is None else np.asarray(asked, dtype=bool)
    draw = np.random.default_rng(random_state)
    fold = _folds(groups, asked, n_splits, draw)
    tried = np.stack([labels, *(_shuffled(labels, groups, draw) for _ in range(n_shuffles))])
    binary = len(np.unique(labels)) == 2
    rows = {site: values.double().cpu().numpy() for site, values in X.items()}
    for site, values in rows.items():
        if not np.isfinite(values).all():
            raise ValueError(f"rows of {site!r} hold NaN or infinity; repair the model.")
    readings = np.array(
        [
            [
                _readings(values, y, groups, fold, kind, binary, random_state)
                for values in rows.values()
            ]
            for y in tried
        ]
    )[:, :, asked]
    return ProbeResult(
        kind,
        "auc" if binary else "balanced_accuracy",
        tuple(rows),
        labels[asked],
        groups[asked],
        fold[asked],
        readings[0],
        tried[1:, asked],
        readings[1:],
    )


def _folds(
    groups: np.ndarray, asked: np.ndarray, n_splits: int, draw: np.random.Generator
) -> np.ndarray:
    """Part of each row asked, -1 for rows of no group asked: ``(n_rows,)``."""
    found = np.unique(groups[asked])
    if n_splits < 1 or n_splits > len(found):
        raise ValueError(
            f"n_splits={n_splits} with {len(found)} groups asked; choose between 1 and that."
        )
    if n_splits == 1 and asked.all():
        raise ValueError("n_splits=1 trains on rows that are not asked; there are none.")
    part = {g: i % n_splits for i, g in enumerate(draw.permutation(found).tolist())}
    return np.array([part.get(g, -1) for g in groups.tolist()])


def _shuffled(labels: np.ndarray, groups: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    if np.array_equal(labels[first][group], labels):
        return draw.permutation(labels[first])[group]
    shuffled = draw.permutation(len(labels))
    source = shuffled[np.argsort(group[shuffled], kind="stable")]
    found = np.empty_like(labels)
    found[np.argsort(group, kind="stable")] = labels[source]
    return found


def _readings(
    X: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    fold: np.ndarray,
    kind: Kind,
    binary: bool,
    random_state: int,
) -> np.ndarray:
    """What the probe that has not seen a row's part makes of it; NaN where no probe judges it."""
    found = np.full(len(X), np.nan)
    for part in range(int(fold.max()) + 1):
        test, train = fold == part, fold != part
        if len(np.unique(y[train])) < 2:
            raise ValueError("a probe would be trained on a single label; give more groups.")
        mean, scale = X[train].mean(axis=0), X[train].std(axis=0)
        Z = (X - mean) / np.where(scale > 0, scale, 1.0)
        if kind == "mlp":
            fitted: Any = _network(Z[train], y[train], random_state)
        else:
            Z = _row_space(Z, train)
            fitted = _logistic(Z[train], y[train], groups[train])
        found[test] = fitted.predict_proba(Z[test])[:, 1] if binary else fitted.predict(Z[test])
    return found


def _row_space(Z: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Coordinates in the span of the training rows, where a penalized solution lies."""
    if Z.shape[1] <= train.sum():
        return Z
    _, s, directions = np.linalg.svd(Z[train], full_matrices=False)
    return Z @ directions[s > 1e-10 * s[0]].T


def _logistic(Z: np.ndarray, y: np.ndarray, groups: np.ndarray) -> LogisticRegression:
    """Logistic regression with the penalty that is best on a third of the groups."""
    held = np.unique(groups, return_inverse=True)[1] % 3 == 0
    penalty = PENALTIES[len(PENALTIES) // 2]
    if not held.all() and np.array_equal(np.unique(y[~held]), np.unique(y)) and held.any():
        tried = [_fitted(Z[~held], y[~held], c).predict_proba(Z[held]) for c in PENALTIES]
        losses = [log_loss(y[held], p, labels=np.unique(y)) for p in tried]
        penalty = PENALTIES[int(np.argmin(losses))]
    return _fitted(Z, y, penalty)


def _network(Z: np.ndarray, y: np.ndarray, random_state: int) -> MLPClassifier:
    """Network of one hidden layer, stopped after 100 steps whether it has converged or not."""
    made = MLPClassifier((64,), alpha=1.0, solver="lbfgs", max_iter=100, random_state=random_state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return made.fit(Z, y)


def _fitted(Z: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=300, class_weight="balanced").fit(Z, y)


def _measure(
    measure: str, row: np.ndarray, labels: np.ndarray, fold: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Value of a measure under weights of the rows: ``(n_resamples,)``."""
    if measure == "auc":
        ahead, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for part in np.unique(fold):
            one = np.flatnonzero((fold == part) & (labels == 1))
            other = np.flatnonzero((fold == part) & (labels == 0))
            w, v = weights[:, one], weights[:, other]
            ahead += ((w @ concordance(row[one], row[other])) * v).sum(axis=1)
            pairs += w.sum(axis=1) * v.sum(axis=1)
        return ahead / np.where(pairs > 0, pairs, 1.0)
    recalls, there = np.zeros(len(weights)), np.zeros(len(weights))
    for label in np.unique(labels):
        w = weights[:, labels == label]
        total = w.sum(axis=1)
        recalls += (w @ (row[labels == label] == label)) / np.where(total > 0, total, 1.0)
        there += total > 0
    return recalls / np.maximum(there, 1)


def _differences(values: np.ndarray, drawn: np.ndarray) -> list[Difference]:
    return [Difference(float(v), percentiles(d)) for v, d in zip(values, drawn, strict=True)]
