"""Whether latents that tell of one class can be taken out without harm to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from manifold_unlearn.arrays import as_rows, row_blocks
from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.evaluate.dictionary_probing import code_matrix, fitted_probe
from manifold_unlearn.evaluate.meta import percentiles

N_RESAMPLES = 1000
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class TargetedPerturbation:
    """One probe a class, on rows from which the latents of a class were taken out.

    ``right`` holds, for each number of latents, class whose latents are gone, and probe, whether
    the probe is right of each held-out row.
    """

    classes: tuple[Any, ...]
    top_n: tuple[int, ...]
    labels: np.ndarray
    """(n_asked,) int64: class of each held-out row"""
    latents: tuple[tuple[int, ...], ...]
    """For each class the latents found for it, most effect first; at most ``max(top_n)``"""
    right_before: np.ndarray
    """(n_classes, n_asked) bool: on rows as they are"""
    right: np.ndarray
    """(n_top, n_classes, n_classes, n_asked) bool"""
    right_random: np.ndarray
    """The same, with as many random latents taken out"""

    @property
    def accuracy(self) -> np.ndarray:
        """(n_classes,) float64: balanced accuracy of each probe on rows as they are."""
        return self._accuracy(self.right_before, self._once)[..., 0]

    @property
    def drops(self) -> np.ndarray:
        """(n_top, n_classes, n_classes): loss of accuracy by class taken out and probe."""
        return self._drops(self.right, self._once)[..., 0]

    @property
    def scores(self) -> dict[int, float]:
        """For each number of latents: loss of the class's own probe less that of the others."""
        return self._named(self._scores(self.right, self._once)[:, 0])

    @property
    def random_scores(self) -> dict[int, float]:
        """The same with random latents: what a score must exceed."""
        return self._named(self._scores(self.right_random, self._once)[:, 0])

    @property
    def score_intervals(self) -> dict[int, tuple[float, float]]:
        """95 % percentile bootstrap of each score over the held-out rows, from a fixed seed."""
        n = len(self.labels)
        draw = np.random.default_rng(0)
        weights = draw.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)
        drawn = self._scores(self.right, weights)
        return {k: percentiles(row) for k, row in zip(self.top_n, drawn, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Scores, their intervals and controls, and the parts they are made of."""
        own, others = _own_and_others(self.drops)
        return {
            "classes": [str(name) for name in self.classes],
            "n_asked": len(self.labels),
            "accuracy": self.accuracy.tolist(),
            "scores": {
                str(k): {
                    "score": self.scores[k],
                    "interval": list(self.score_intervals[k]),
                    "random": self.random_scores[k],
                    "intended_drop": float(own[i].mean()),
                    "unintended_drop": float(others[i].mean()),
                }
                for i, k in enumerate(self.top_n)
            },
            "latents": [list(found) for found in self.latents],
        }

    @property
    def _once(self) -> np.ndarray:
        return np.ones((1, len(self.labels)))

    def _named(self, values: np.ndarray) -> dict[int, float]:
        return dict(zip(self.top_n, values.tolist(), strict=True))

    def _accuracy(self, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Balanced accuracy of probes (..., n_classes, n_asked), (..., n_classes, n_weights)."""
        own = self.labels == np.arange(len(self.classes))[:, None]
        halves = []
        for kept in (own, ~own):
            total = kept @ weights.T
            halves.append(((right & kept) @ weights.T) / np.where(total > 0, total, 1.0))
        return (halves[0] + halves[1]) / 2

    def _drops(self, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return self._accuracy(self.right_before, weights) - self._accuracy(right, weights)

    def _scores(self, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
        own, others = _own_and_others(self._drops(right, weights))
        return (own - others).mean(axis=1)


def _own_and_others(drops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (n_top, n_classes, n_classes, ...): the diagonal, and the mean of the rest of each row."""
    n = drops.shape[1]
    at = np.arange(n)
    own = drops[:, at, at]
    return own, (drops.sum(axis=2) - own) / (n - 1)


def targeted_perturbation(
    coder: SparseAutoencoder,
    rows: Tensor,
    labels: Sequence[Any] | np.ndarray,
    held_out: Sequence[bool] | np.ndarray,
    *,
    top_n: Sequence[int] = (2, 5, 10, 20),
    random_state: int = 0,
) -> TargetedPerturbation:
    """Take out the latents of each class in turn, and see which probes still read theirs.

    One probe a class, against the rest, on the rows themselves. A latent's effect on a class is
    ``max(mean activation in the class - mean activation outside, 0) * (W_dec[l] . w)`` with the
    probe's weights ``w``; the latents of most effect are set to 0, and what the dictionary does not
    reconstruct is kept.

    Parameters
    ----------
    coder : SparseAutoencoder
    rows : Tensor of shape (n, d_in)
    labels : sequence of shape (n,)
        Class of each row, two or more.
    held_out : sequence of bool of shape (n,)
        Rows to judge; the others train the probes and choose the latents.
    top_n : sequence of int
        How many latents to take out.
    random_state : int, default=0
        Of the random latents.

    Returns
    -------
    TargetedPerturbation

    Raises
    ------
    ValueError
        Fewer than two classes, one that a part lacks, lengths that differ, a count below 1.

    References
    ----------
    Karvonen et al. (2025), SAEBench, arXiv 2503.09532 (targeted probe perturbation; there the
    accuracies are of balanced sets, here they are balanced by weight).
    """
    names, y = np.unique(np.asarray(labels), return_inverse=True)
    asked = np.asarray(held_out).astype(bool)
    if not len(rows) == len(y) == len(asked) or not top_n or min(top_n) < 1:
        raise ValueError(
            f"{len(rows)} rows with {len(y)} labels and {len(asked)} of held_out, top_n="
            f"{list(top_n)}: give one of each a row, and every count at least 1."
        )
    for name, part in (("held-out", asked), ("training", ~asked)):
        if len(names) < 2 or len(np.unique(y[part])) < len(names):
            raise ValueError(
                f"the {name} rows have {len(np.unique(y[part]))} of {len(names)} classes; all "
                "classes, and at least two, are needed in both parts."
            )
    X = as_rows(rows).double().cpu().numpy()
    probes = [fitted_probe(X[~asked], y[~asked] == c) for c in range(len(names))]
    codes = code_matrix(coder, rows[torch.from_numpy(~asked)])
    chosen = [effects(coder, codes, y[~asked] == c, probe) for c, probe in enumerate(probes)]
    found = [np.argsort(-e, kind="stable")[: max(top_n)] for e in chosen]
    latents = [order[e[order] > 0] for order, e in zip(found, chosen, strict=True)]
    draw = np.random.default_rng(random_state)
    alive = np.flatnonzero(codes.getnnz(axis=0))
    random = [draw.permutation(alive)[: len(own)] for own in latents]
    test, wanted = rows[torch.from_numpy(asked)], y[asked]

    def right(given: np.ndarray) -> np.ndarray:
        read = np.stack([probe.predict(given) for probe in probes]).astype(bool)
        own: np.ndarray = wanted == np.arange(len(names))[:, None]
        return read == own

    return TargetedPerturbation(
        tuple(names.tolist()),
        tuple(int(k) for k in top_n),
        wanted,
        tuple(tuple(own.tolist()) for own in latents),
        right(X[asked]),
        _taken_out(coder, test, latents, top_n, right),
        _taken_out(coder, test, random, top_n, right),
    )


def effects(
    coder: SparseAutoencoder, codes: Any, own: np.ndarray, probe: LogisticRegression
) -> np.ndarray:
    """Effect of each latent on a probe of a class, (d_sae,); 0 for those that fire less in it."""
    one, other = (np.asarray(codes[kept].mean(axis=0)).ravel() for kept in (own, ~own))
    written = coder.W_dec.detach().double().cpu().numpy() @ probe.coef_[0]
    return (one - other).clip(min=0) * written


def without_latents(coder: SparseAutoencoder, rows: Tensor, latents: Sequence[int]) -> np.ndarray:
    """Rows (n, d) float64 from which latents are taken out, the error of reconstruction kept."""
    if len(latents) == 0:
        return rows.double().cpu().numpy()
    clamp = FeatureClamp(coder, list(latents), 0.0)
    with torch.no_grad():
        made = [clamp(rows[part].to(coder.dtype)) for part in row_blocks(len(rows), _BLOCK)]
    return torch.cat(made).double().cpu().numpy()


def _taken_out(
    coder: SparseAutoencoder,
    rows: Tensor,
    latents: Sequence[np.ndarray],
    top_n: Sequence[int],
    right: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    return np.stack(
        [
            np.stack([right(without_latents(coder, rows, own[:k].tolist())) for own in latents])
            for k in top_n
        ]
    )
