"""Judging the judges: whether a metric sees knowledge, and stays where none comes or goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from manifold_unlearn.evaluate.metrics import harmonic_mean

N_RESAMPLES = 2000

Form: TypeAlias = "Literal['symmetric', 'one_directional']"
"""Of a robustness: both directions count, or only the return of knowledge."""


@dataclass(frozen=True)
class Faithfulness:
    """How well a metric tells models with the knowledge from models without it."""

    auc: float
    """In [0, 1]; .5 is chance"""
    interval: tuple[float, float]
    """95 %, percentile bootstrap over the models of either kind"""
    mean_with: float
    mean_without: float

    def to_json(self) -> dict[str, Any]:
        """All four figures."""
        return {
            "auc": self.auc,
            "interval": list(self.interval),
            "mean_with": self.mean_with,
            "mean_without": self.mean_without,
        }


@dataclass(frozen=True, eq=False)
class Robustness:
    """How steady a metric is under relearning and under quantization."""

    relearning: float
    quantization: float
    score: float
    """Harmonic mean of the two"""
    interval: tuple[float, float]
    """95 % of the score, percentile bootstrap over the models"""

    def to_json(self) -> dict[str, Any]:
        """All four figures."""
        return {
            "relearning": self.relearning,
            "quantization": self.quantization,
            "score": self.score,
            "interval": list(self.interval),
        }


def concordance(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Of all pairs, 1 where the first is greater, 1/2 where they tie: ``(n_above, n_below)``."""
    difference = np.subtract.outer(np.asarray(above, float), np.asarray(below, float))
    return (np.sign(difference) + 1) / 2


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """Area under the ROC curve; a tie counts one half (Mann-Whitney)."""
    return float(concordance(above, below).mean())


def faithfulness(
    with_knowledge: Sequence[float] | np.ndarray,
    without_knowledge: Sequence[float] | np.ndarray,
    *,
    knowledge_is: Literal["high", "low"] = "high",
    random_state: int = 0,
) -> Faithfulness:
    """Area under the ROC curve of a metric over models with and without the knowledge.

    Parameters
    ----------
    with_knowledge, without_knowledge : array of shape (n_models,)
        The metric's value of each model.
    knowledge_is : {"high", "low"}, default="high"
        Whether knowledge makes the metric high (a probability) or low (a forgetting score, such
        as the unlearning depth).
    random_state : int, default=0
        Of the bootstrap.

    Returns
    -------
    Faithfulness

    Raises
    ------
    ValueError
        A side is empty or holds a value that is not finite.

    References
    ----------
    Dorna et al. (2025), OpenUnlearning, arXiv 2506.12618 (meta-evaluation of metrics).
    """
    if knowledge_is not in ("high", "low"):
        raise ValueError(f"knowledge_is={knowledge_is!r} is not 'high' or 'low'.")
    told = _models(with_knowledge, "with_knowledge")
    never = _models(without_knowledge, "without_knowledge")
    pairs = concordance(told, never) if knowledge_is == "high" else concordance(-told, -never)
    draw = np.random.default_rng(random_state)
    some = _counts(draw, len(told)) / len(told)
    others = _counts(draw, len(never)) / len(never)
    resampled = np.einsum("ri,ij,rj->r", some, pairs, others, optimize=True)
    return Faithfulness(
        float(pairs.mean()),
        percentiles(np.clip(resampled, 0, 1)),
        float(told.mean()),
        float(never.mean()),
    )


def relearning_robustness(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    retrained_before: float,
    retrained_after: float,
    *,
    form: Form = "symmetric",
) -> np.ndarray:
    """How far relearning moves the metric of each model as it moves that of the retrained one.

    With ``d`` the change (after less before) of a model and ``r`` that of the retrained:
    ``symmetric`` is ``1 - |d - r| / (|d| + |r|)``; ``one_directional`` is ``min(r / d, 1)`` and
    penalizes only what comes back faster than it is learned anew. The published OpenUnlearning
    figures use the one-directional form, those of the unlearning depth score the symmetric one.
    Where nothing changes on either side, both are 1; a model that gains nothing while it relearns
    has 1 in the one-directional form; none is below 0.

    Parameters
    ----------
    before, after : array of shape (n_models,)
        Metric of unlearned models, before and after relearning; high for knowledge (of a
        forgetting score give one less the score).
    retrained_before, retrained_after : float
        The same of the retrained model, relearned at equal budget.
    form : {"symmetric", "one_directional"}, default="symmetric"

    Returns
    -------
    ndarray of shape (n_models,), float64
        In [0, 1]; 1 is robust.

    Raises
    ------
    ValueError
        Lengths that differ, no models, a value that is not finite, an unknown form.

    References
    ----------
    Dorna et al. (2025), OpenUnlearning, arXiv 2506.12618; unlearning depth score, arXiv 2605.24614.
    """
    first, then = _paired(before, after)
    d = then - first
    r = float(_models([retrained_after], "retrained_after")[0]) - float(
        _models([retrained_before], "retrained_before")[0]
    )
    if form == "symmetric":
        return _alike(d, np.full_like(d, r))
    _require_one_directional(form)
    return np.where(d > 0, np.clip(r / np.where(d > 0, d, 1.0), 0, 1), 1.0)


def quantization_robustness(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    *,
    form: Form = "symmetric",
) -> np.ndarray:
    """How little quantization moves the metric of each model.

    ``symmetric`` is ``1 - |after - before| / (|after| + |before|)``; ``one_directional`` is
    ``min(before / after, 1)`` and penalizes only a metric that rises. The published OpenUnlearning
    figures use the latter, those of the unlearning depth score the former. Two zeros give 1.

    Parameters
    ----------
    before, after : array of shape (n_models,)
        Metric of each model at full precision and quantized; at least 0, high for knowledge.
    form : {"symmetric", "one_directional"}, default="symmetric"

    Returns
    -------
    ndarray of shape (n_models,), float64
        In [0, 1]; 1 is robust.

    Raises
    ------
    ValueError
        Lengths that differ, no models, a value that is not finite, an unknown form.

    References
    ----------
    Dorna et al. (2025), OpenUnlearning, arXiv 2506.12618; unlearning depth score, arXiv 2605.24614.
    """
    first, then = _paired(before, after)
    if form == "symmetric":
        return _alike(first, then)
    _require_one_directional(form)
    return np.where(then > 0, np.clip(first / np.where(then > 0, then, 1.0), 0, 1), 1.0)


def robustness(
    relearning: np.ndarray, quantization: np.ndarray, *, random_state: int = 0
) -> Robustness:
    """Harmonic mean of the mean relearning and the mean quantization robustness.

    Parameters
    ----------
    relearning, quantization : array of shape (n_models,)
        From :func:`relearning_robustness` and :func:`quantization_robustness`; the two may be of
        different numbers of models.
    random_state : int, default=0
        Of the bootstrap.

    Returns
    -------
    Robustness

    Raises
    ------
    ValueError
        No models, or a value that is not finite.
    """
    R, Q = _models(relearning, "relearning"), _models(quantization, "quantization")
    draw = np.random.default_rng(random_state)
    if len(R) == len(Q):  # the same models: drawn together
        weights = _counts(draw, len(R)) / len(R)
        r, q = weights @ R, weights @ Q
    else:
        r, q = _counts(draw, len(R)) @ R / len(R), _counts(draw, len(Q)) @ Q / len(Q)
    total = r + q
    resampled = np.where(total > 0, 2 * r * q / np.where(total > 0, total, 1.0), 0.0)
    means = float(R.mean()), float(Q.mean())
    return Robustness(*means, harmonic_mean(means), percentiles(resampled))


def meta_score(faithful: float, robust: float) -> float:
    """Harmonic mean of faithfulness and robustness: the figure metrics are ranked by."""
    return harmonic_mean([faithful, robust])


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 % of resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = np.abs(a) + np.abs(b)
    return 1 - np.abs(a - b) / np.where(total > 0, total, 1.0)


def _counts(draw: np.random.Generator, n: int) -> np.ndarray:
    """How often each of ``n`` is in each resample: ``(N_RESAMPLES, n)``."""
    return draw.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)


def _models(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) == 0:
        raise ValueError(f"{name} has shape {found.shape}; give one value for at least one model.")
    if not np.isfinite(found).all():
        first = int((~np.isfinite(found)).argmax())
        raise ValueError(
            f"{name} holds NaN or infinity, the first for model {first}. "
            "Leave that model out of both sides, and say so."
        )
    return found


def _paired(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    first, then = _models(before, "before"), _models(after, "after")
    if len(first) != len(then):
        raise ValueError(f"before is of {len(first)} models, after of {len(then)}; give the same.")
    return first, then


def _require_one_directional(form: str) -> None:
    if form != "one_directional":
        raise ValueError(f"form={form!r} is not 'symmetric' or 'one_directional'.")
