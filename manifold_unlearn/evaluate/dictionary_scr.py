"""Whether a probe can be freed of a spurious cue by taking out the cue's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from manifold_unlearn.arrays import as_rows
from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.evaluate.dictionary_probing import code_matrix
from manifold_unlearn.evaluate.dictionary_tpp import without_latents


@dataclass(frozen=True, eq=False)
class SpuriousRemoval:
    """A probe trained where target and cue agree, before and after the cue's latents are gone.

    Accuracies are means over the four combinations of target and cue.
    """

    top_n: tuple[int, ...]
    latents: tuple[int, ...]
    """Of the cue, most effect first; at most ``max(top_n)``"""
    unbiased: float
    """Accuracy of a probe of the target that has seen all combinations"""
    biased: float
    """Accuracy of the probe that has seen target and cue agree"""
    freed: tuple[float, ...]
    """Accuracy of that probe without the cue's latents, for each number of them"""
    freed_random: tuple[float, ...]
    """The same, without as many random latents"""

    @property
    def scores(self) -> dict[int, float]:
        """``(freed - biased) / (unbiased - biased)``; NaN where the cue does no harm."""
        return self._scores(self.freed)

    @property
    def random_scores(self) -> dict[int, float]:
        """The same with random latents: what a score must exceed."""
        return self._scores(self.freed_random)

    def _scores(self, freed: Sequence[float]) -> dict[int, float]:
        harm = self.unbiased - self.biased
        found = [(now - self.biased) / harm if harm > 0 else float("nan") for now in freed]
        return dict(zip(self.top_n, found, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Accuracies and scores; null where a score is undefined."""

        def written(scores: dict[int, float]) -> dict[str, float | None]:
            return {str(k): value if np.isfinite(value) else None for k, value in scores.items()}

        return {
            "unbiased": self.unbiased,
            "biased": self.biased,
            "freed": list(self.freed),
            "scores": written(self.scores),
            "random_scores": written(self.random_scores),
            "latents": list(self.latents),
        }


def spurious_removal(
    coder: SparseAutoencoder,
    rows: Tensor,
    target: Sequence[bool] | np.ndarray,
    cue: Sequence[bool] | np.ndarray,
    held_out: Sequence[bool] | np.ndarray,
    *,
    top_n: Sequence[int] = (2, 5, 10, 20),
    random_state: int = 0,
) -> SpuriousRemoval:
    """Train a probe where a cue goes with its target, and take the cue out of the rows it reads.

    A latent's effect is ``abs((mean activation with the cue - without) (W_dec[l] . w))`` with the
    weights ``w`` of a probe of the cue; the latents of most effect are set to 0, and what the
    dictionary does not reconstruct is kept.

    Parameters
    ----------
    coder : SparseAutoencoder
    rows : Tensor of shape (n, d_in)
    target, cue : sequence of bool of shape (n,)
        All four combinations must be among the training and among the held-out rows.
    held_out : sequence of bool of shape (n,)
        Rows to judge; the others train the probes and choose the latents.
    top_n : sequence of int
    random_state : int, default=0
        Of the random latents.

    Returns
    -------
    SpuriousRemoval

    Raises
    ------
    ValueError
        A combination that a part lacks, lengths that differ, a count below 1.

    References
    ----------
    Karvonen et al. (2025), SAEBench, arXiv 2503.09532 (spurious correlation removal; there of two
    directions the one in which the cue does more harm counts: call it with target and cue swapped
    for the other).
    """
    y, z, asked = (np.asarray(given).astype(bool) for given in (target, cue, held_out))
    if not len(rows) == len(y) == len(z) == len(asked) or not top_n or min(top_n) < 1:
        raise ValueError(
            f"{len(rows)} rows with {len(y)} targets, {len(z)} cues and {len(asked)} of held_out, "
            f"top_n={list(top_n)}: give one of each a row, and every count at least 1."
        )
    cell = 2 * y + z
    for name, part in (("held-out", asked), ("training", ~asked)):
        if missing := sorted(set(range(4)) - set(cell[part].tolist())):
            pairs = [(bool(c // 2), bool(c % 2)) for c in missing]
            raise ValueError(f"the {name} rows lack the combinations (target, cue) {pairs}.")
    X = as_rows(rows).double().cpu().numpy()
    train, agree = ~asked, ~asked & (y == z)
    unbiased, of_cue = (_balanced_probe(X[train], given[train], cell[train]) for given in (y, z))
    biased = _balanced_probe(X[agree], y[agree], cell[agree])
    codes = code_matrix(coder, rows[torch.from_numpy(train)])
    one, other = (np.asarray(codes[k].mean(axis=0)).ravel() for k in (z[train], ~z[train]))
    written = coder.W_dec.detach().double().cpu().numpy() @ of_cue.coef_[0]
    effect = np.abs((one - other) * written)
    order = np.argsort(-effect, kind="stable")[: max(top_n)]
    latents = order[effect[order] > 0].tolist()
    alive = np.flatnonzero(codes.getnnz(axis=0))
    random = np.random.default_rng(random_state).permutation(alive)[: len(latents)].tolist()
    test = rows[torch.from_numpy(asked)]

    def accuracy(probe: LogisticRegression, given: np.ndarray) -> float:
        right = probe.predict(given) == y[asked]
        return float(np.mean([right[cell[asked] == c].mean() for c in range(4)]))

    freed, freed_random = (
        tuple(accuracy(biased, without_latents(coder, test, own[:k])) for k in top_n)
        for own in (latents, random)
    )
    return SpuriousRemoval(
        tuple(int(k) for k in top_n),
        tuple(latents),
        accuracy(unbiased, X[asked]),
        accuracy(biased, X[asked]),
        freed,
        freed_random,
    )


def _balanced_probe(X: np.ndarray, y: np.ndarray, cell: np.ndarray) -> LogisticRegression:
    """Logistic regression in which every combination that is there weighs alike."""
    weight = 1 / np.bincount(cell, minlength=4)[cell]
    weight *= len(weight) / weight.sum()
    return LogisticRegression(max_iter=1000).fit(X, y, sample_weight=weight)
