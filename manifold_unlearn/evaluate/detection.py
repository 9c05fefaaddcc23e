"""How well a direction or a gate finds the texts of a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.arrays import as_rows, forget_mask, require_finite

Pool = Literal["max", "mean", "last"]

SCORERS = ("decision_function", "scores", "log_ratio")
DIRECTIONS = ("vector_", "direction_", "directions_")
"""What is looked for in a detector, in this order, before it is called."""


@dataclass(frozen=True, eq=False)
class Detection:
    """Scores of texts, and how well they tell the concept from the rest."""

    auroc: float
    """Share of pairs of a text of the concept and another in which the first scores higher, ties
    counting half: 0.5 is chance"""
    interval: tuple[float, float]
    """95 % percentile bootstrap, both sides resampled on their own, from a fixed seed"""
    scores: np.ndarray
    """(n_texts,) float64"""
    is_concept: np.ndarray
    """(n_texts,) bool"""
    n_rows_left_out: int = 0
    """attention sinks, which count in no text that has other rows"""

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "auroc": self.auroc,
            "interval": list(self.interval),
            "scores": self.scores.tolist(),
            "is_concept": self.is_concept.tolist(),
            "n_rows_left_out": self.n_rows_left_out,
        }


def detection_auroc(
    detector: Any,
    X: Any,
    y: Any,
    *,
    text_index: Any = None,
    pool: Pool = "max",
    n_resamples: int = 2000,
) -> Detection:
    """Area under the ROC curve of a detector on labeled rows, or on texts of several rows.

    Parameters
    ----------
    detector : array, estimator or callable
        A direction ``(n_features,)``, whose inner product with a row is its score; an estimator
        with ``decision_function``, ``scores``, ``log_ratio`` (gates), or else with a single
        direction as ``vector_``, ``direction_`` or ``directions_``; or a callable from rows to
        ``(n_rows,)`` scores.
    X : array or Tensor of shape (n_rows, n_features)
    y : array or Tensor of shape (n_texts,)
        1 marks the concept.
    text_index : int array of shape (n_rows,), optional
        Text of each row, in 0 .. n_texts - 1. Default: each row is a text.
    pool : {"max", "mean", "last"}, default="max"
        A text's score from those of its rows.
    n_resamples : int, default=2000

    Returns
    -------
    Detection

    Raises
    ------
    ValueError
        Data or scores that are not finite, a side without texts, a text without rows, a detector of
        another width or one that gives no score a row.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool={pool!r} is not one of {', '.join(get_args(Pool))}.")
    rows = as_rows(X, device="cpu")
    found = _scores(detector, rows)
    index = np.arange(len(rows)) if text_index is None else np.asarray(text_index)
    n_texts = len(y) if y is not None else len(rows)
    scores = _pooled(found, index, n_texts, pool)
    concept = forget_mask(y, n_texts).numpy()
    above = scores[concept][:, None] - scores[~concept][None]
    wins = (above > 0) + 0.5 * (above == 0)
    draw = np.random.default_rng(0)
    drawn = []
    for n in wins.shape:
        drawn.append(draw.multinomial(n, np.full(n, 1 / n), n_resamples) / n)
    areas = np.einsum("rp,pn,rn->r", drawn[0], wins, drawn[1], optimize=True)
    low, high = np.percentile(areas, [2.5, 97.5])
    return Detection(float(wins.mean()), (float(low), float(high)), scores, concept)


def detect_texts(
    detector: Any,
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Any],
    y: Any,
    site: str,
    *,
    pool: Pool = "max",
    batch_size: int | Literal["auto"] = "auto",
) -> Detection:
    """:func:`detection_auroc` of a detector on the activations of texts at a site.

    Parameters
    ----------
    detector, y, pool
        As for :func:`detection_auroc`.
    model, tokenizer, texts, site, batch_size
        As for :func:`capture`.

    Returns
    -------
    Detection
        Attention sinks, and the first tokens, are left out of texts that have other rows, and
        counted.
    """
    acts = capture(model, tokenizer, texts, site, batch_size=batch_size)
    idle = acts.sink | (acts.position == 0)
    others = torch.zeros(len(texts), dtype=torch.bool)
    others[acts.text_index[~idle]] = True
    keep = ~idle | ~others[acts.text_index]
    made = detection_auroc(
        detector, acts[site][keep], y, text_index=acts.text_index[keep].numpy(), pool=pool
    )
    left_out = int((~keep).sum())
    return Detection(made.auroc, made.interval, made.scores, made.is_concept, left_out)


def _scores(detector: Any, rows: Tensor) -> np.ndarray:
    name = next((name for name in (*SCORERS, *DIRECTIONS) if hasattr(detector, name)), None)
    if name in DIRECTIONS:
        found: Any = _along(getattr(detector, name), rows)
    elif name is None and not callable(detector):
        found = _along(detector, rows)
    else:
        found = (detector if name is None else getattr(detector, name))(rows)
    scores = torch.as_tensor(found).detach().cpu().double()
    if scores.shape != (len(rows),):
        raise ValueError(
            f"the detector {type(detector).__name__} gives scores of shape {tuple(scores.shape)} "
            f"for {len(rows)} rows; one each is needed."
        )
    require_finite(scores[:, None], "the detector's scores")
    return scores.numpy()


def _along(direction: Any, rows: Tensor) -> Tensor:
    vector = torch.atleast_1d(torch.as_tensor(direction).detach().cpu().double().squeeze())
    if vector.shape != rows.shape[1:]:
        raise ValueError(
            f"the direction has shape {tuple(vector.shape)}; the rows have {rows.shape[1]} "
            "features. Give one vector, of the same site."
        )
    return rows.double() @ vector


def _pooled(scores: np.ndarray, index: np.ndarray, n_texts: int, pool: Pool) -> np.ndarray:
    whole = index.dtype.kind in "iu"
    if not whole or index.shape != scores.shape or index.min() < 0 or index.max() >= n_texts:
        raise ValueError(
            f"text_index has shape {index.shape}, dtype {index.dtype} and values {index.min()} .. "
            f"{index.max()}; expected integers of shape {scores.shape}, 0 .. {n_texts - 1}."
        )
    counts = np.bincount(index, minlength=n_texts)
    if not counts.all():
        raise ValueError(f"text {int(counts.argmin())} has no rows; leave it out.")
    if pool == "mean":
        return np.bincount(index, scores, n_texts) / counts
    found = np.full(n_texts, -np.inf)
    if pool == "max":
        np.maximum.at(found, index, scores)
    else:
        found[index] = scores
    return found
