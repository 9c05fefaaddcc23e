"""Formulas of the metrics, on log-probabilities and strings; no model is run here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from torch import Tensor


def answer_probability(log_probabilities: Sequence[Tensor]) -> np.ndarray:
    """Length-normalized probability of each answer, ``exp(mean log p)``.

    Parameters
    ----------
    log_probabilities : sequence of Tensor
        One ``(n_answer_tokens,)`` an answer.

    Returns
    -------
    ndarray of shape (n_answers,), float64

    References
    ----------
    Maini et al. (2024), TOFU, section 2.2.2.
    """
    return np.array([float(row.double().mean().exp()) for row in log_probabilities])


def answer_rank(correct: float, alternatives: Sequence[float]) -> int:
    """Rank of the answer among wrong alternatives: 1 where none is as probable."""
    return 1 + sum(wrong >= correct for wrong in alternatives)


def truth_ratio(correct: float, wrong: Sequence[float]) -> float:
    """Geometric mean probability of wrong answers over that of the right one.

    All are length-normalized probabilities. Below 1 the model prefers the truth; a model that
    never knew is near 1.

    Raises
    ------
    ValueError
        There is no wrong answer.

    References
    ----------
    Maini et al. (2024), TOFU, section 2.2.2.
    """
    if len(wrong) == 0:
        raise ValueError("truth_ratio needs at least one perturbed_answer; got none.")
    tiny = float(np.finfo(np.float64).tiny)
    logs = np.log(np.maximum(wrong, tiny))
    return float(np.exp(np.clip(logs.mean() - np.log(max(correct, tiny)), -700, 700)))


def truth_ratio_symmetric(ratios: np.ndarray) -> np.ndarray:
    """``min(r, 1/r)``: 1 where right and wrong are alike, whichever side is preferred."""
    return np.minimum(ratios, 1 / ratios)


def truth_ratio_preference(ratios: np.ndarray) -> np.ndarray:
    """``max(0, 1 - r)``: how clearly the truth is preferred; the form model utility uses."""
    return np.maximum(0.0, 1 - ratios)


def rouge_l_recall(
    answer: str, reference: str, *, stem: Callable[[str], str] | None = None
) -> float:
    """Share of the reference's words found in the answer in order (longest common subsequence).

    Parameters
    ----------
    answer, reference : str
        Words are runs of ASCII letters and digits after lower-casing, as in the ROUGE package.
    stem : callable, optional
        Applied to words longer than three letters. Published TOFU figures use a Porter stemmer.

    Raises
    ------
    ValueError
        The reference has no words.

    References
    ----------
    Lin (2004), ROUGE, section 3.1.
    """
    said, wanted = _words(answer, stem), _words(reference, stem)
    if not wanted:
        raise ValueError(f"the reference answer {reference!r} has no words to recall.")
    best = [0] * (len(wanted) + 1)
    for word in said:
        diagonal = 0
        for j, other in enumerate(wanted, start=1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1] / len(wanted)


def _words(text: str, stem: Callable[[str], str] | None) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [stem(word) if stem and len(word) > 3 else word for word in words]


def perplexity(log_probabilities: Sequence[Tensor]) -> float:
    """``exp`` of the mean negative log-probability over all tokens of all texts."""
    total = sum(float(row.double().sum()) for row in log_probabilities)
    return float(np.exp(-total / sum(len(row) for row in log_probabilities)))


def forget_quality(ratios: np.ndarray, reference_ratios: np.ndarray) -> dict[str, float]:
    """How unlike the truth ratios of two models are.

    Parameters
    ----------
    ratios, reference_ratios : ndarray of shape (n_items,)
        Truth ratios of the model judged and of the model that was never told.

    Returns
    -------
    dict
        ``ks_statistic`` and ``p_value`` of the two-sample Kolmogorov-Smirnov test (TOFU's forget
        quality is the p-value), and ``wasserstein``, the first Wasserstein distance of
        ``1 / (1 + ratio)``, which lies in [0, 1].

    References
    ----------
    Maini et al. (2024), TOFU, section 2.2.3.
    """
    test = stats.ks_2samp(ratios, reference_ratios)
    distance = stats.wasserstein_distance(1 / (1 + ratios), 1 / (1 + reference_ratios))
    return {
        "ks_statistic": float(test.statistic),
        "p_value": float(test.pvalue),
        "wasserstein": float(distance),
    }


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of non-negative values; 0 where one of them is 0."""
    if min(values) <= 0:
        return 0.0
    return float(stats.hmean(values))
