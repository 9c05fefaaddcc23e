"""Formulas of the metrics, on log-probabilities and strings; no model is run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from scipy import stats
from torch import Tensor

PUBLISHED_SMOOTHING = 1e-10
"""What open-unlearning adds to the denominators of its ratios."""

UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_METRICS = ("probability", "rouge", "truth_ratio")


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


def answer_probability_published(
    log_probabilities: Sequence[Tensor], *, labels_first_token: bool
) -> np.ndarray:
    """Probability of each sequence as open-unlearning computes it.

    The sum of log-probabilities is divided by the number of labels *before* they are shifted. Where
    the sequence's first token is a label too (plain texts), that is one more than are predicted,
    and the figure is too high; after a prompt it is :func:`answer_probability`.

    Parameters
    ----------
    log_probabilities : sequence of Tensor
        One ``(n_predicted_tokens,)`` a sequence, the end-of-sequence token included.
    labels_first_token : bool
        Whether the first token of the sequence, which nothing predicts, counts as a label.

    Returns
    -------
    ndarray of shape (n_sequences,), float64
    """
    sums = np.array([float(row.double().sum()) for row in log_probabilities])
    counts = np.array([len(row) for row in log_probabilities]) + int(labels_first_token)
    return np.exp(sums / counts)


def option_probability(correct: float, wrong: Sequence[float], *, smoothing: float = 0.0) -> float:
    """Probability of the right answer among the options, ``p_c / (p_c + sum p_w + smoothing)``.

    All are length-normalized probabilities. TOFU reports it for real authors and world facts, with
    ``smoothing=PUBLISHED_SMOOTHING``.

    Raises
    ------
    ValueError
        There is no wrong answer, or all probabilities are zero and there is no smoothing.

    References
    ----------
    Maini et al. (2024), TOFU, section 2.2.2.
    """
    if len(wrong) == 0:
        raise ValueError("option_probability needs at least one wrong answer; got none.")
    total = correct + float(np.sum(wrong)) + smoothing
    if total <= 0:
        raise ValueError("all options have probability 0; give smoothing=PUBLISHED_SMOOTHING.")
    return correct / total


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


def truth_ratio_published(correct: float, wrong: Sequence[float]) -> float:
    """:func:`truth_ratio` as open-unlearning computes it, ``p_w / (p_c + 1e-10)``.

    It differs where the right answer has a probability near 1e-10: the ratio then stays small.
    """
    return geometric_mean(wrong) / (correct + PUBLISHED_SMOOTHING)


def geometric_mean(probabilities: Sequence[float]) -> float:
    """Geometric mean of wrong answers' probabilities, the ``p_wrong`` of the truth ratio."""
    if len(probabilities) == 0:
        raise ValueError("truth_ratio needs at least one perturbed_answer; got none.")
    tiny = float(np.finfo(np.float64).tiny)
    return float(np.exp(np.log(np.maximum(probabilities, tiny)).mean()))


def truth_ratio_symmetric(ratios: np.ndarray) -> np.ndarray:
    """``min(r, 1/r)``: 1 where right and wrong are alike, whichever side is preferred."""
    return np.minimum(ratios, 1 / ratios)


def truth_ratio_symmetric_published(ratios: np.ndarray) -> np.ndarray:
    """``min(r, 1 / (r + 1e-10))``: what open-unlearning averages on the forget set."""
    return np.minimum(ratios, 1 / (ratios + PUBLISHED_SMOOTHING))


def truth_ratio_preference(ratios: np.ndarray) -> np.ndarray:
    """``max(0, 1 - r)``: how clearly the truth is preferred; the form model utility uses."""
    return np.maximum(0.0, 1 - ratios)


def truth_ratio_probability(ratios: np.ndarray) -> np.ndarray:
    """``p_c / (p_c + p_w) = 1 / (1 + r)``: 1/2 where right and wrong are alike.

    The form of the meta-evaluation, and of the memorization aggregate over 150 checkpoints.
    """
    return 1 / (1 + ratios)


def truth_ratio_probability_published(correct: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """``p_c / (p_c + p_w + 1e-10)``, with ``wrong`` the geometric mean over wrong answers."""
    return correct / (correct + wrong + PUBLISHED_SMOOTHING)


def _exact(correct: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    tiny = float(np.finfo(np.float64).tiny)
    logs = np.log(np.maximum(wrong, tiny)) - np.log(np.maximum(correct, tiny))
    return np.exp(np.clip(logs, -700, 700))


TRUTH_RATIO_FORMS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "ratio": _exact,
        "ratio_published": lambda c, w: w / (c + PUBLISHED_SMOOTHING),
        "symmetric": lambda c, w: truth_ratio_symmetric(_exact(c, w)),
        "symmetric_published": lambda c, w: truth_ratio_symmetric_published(
            w / (c + PUBLISHED_SMOOTHING)
        ),
        "preference": lambda c, w: truth_ratio_preference(_exact(c, w)),
        "preference_published": lambda c, w: truth_ratio_preference(w / (c + PUBLISHED_SMOOTHING)),
        "probability": lambda c, w: truth_ratio_probability(_exact(c, w)),
        "probability_published": truth_ratio_probability_published,
    }
)
"""Truth ratio per item in every published form, from ``p_correct`` and ``p_wrong``, the geometric
mean over perturbed answers, both ``(n_items,)``. ``symmetric_published`` is what open-unlearning
reports on the forget set, ``preference_published`` on retain, real authors and world facts,
``probability`` that of the 150-checkpoint study; only names with ``published`` have ``1e-10``."""


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

    Raises
    ------
    ValueError
        A sample is empty or not finite.

    References
    ----------
    Maini et al. (2024), TOFU, section 2.2.3.
    """
    for name, sample in (("ratios", ratios), ("reference_ratios", reference_ratios)):
        if not len(sample) or not np.isfinite(sample).all():
            raise ValueError(f"{name} must be finite and at least one; got {len(sample)} values.")
    test = stats.ks_2samp(ratios, reference_ratios)
    distance = stats.wasserstein_distance(1 / (1 + ratios), 1 / (1 + reference_ratios))
    return {
        "ks_statistic": float(test.statistic),
        "p_value": float(test.pvalue),
        "wasserstein": float(distance),
    }


def harmonic_mean(values: Sequence[float], *, smoothing: float = 0.0) -> float:
    """Harmonic mean of non-negative values; 0 where one of them is 0 and there is no smoothing.

    Parameters
    ----------
    values : sequence of float
    smoothing : float, default=0.0
        Added to each value, so that a zero gives something near it instead.

    Raises
    ------
    ValueError
        There are no values, or one is not finite.
    """
    shifted = np.asarray(values, dtype=np.float64) + smoothing
    if not len(shifted) or not np.isfinite(shifted).all():
        raise ValueError(f"the harmonic mean of {list(values)} is not defined; give finite values.")
    return float(stats.hmean(shifted)) if shifted.min() > 0 else 0.0


def model_utility(parts: Mapping[str, float], *, smoothing: float = 0.0) -> float:
    """Harmonic mean of probability, ROUGE and truth ratio on retain, real authors, world facts.

    Parameters
    ----------
    parts : mapping of str to float
        The nine ``"{set}_{metric}"`` of :data:`UTILITY_SETS` and :data:`UTILITY_METRICS`. As
        published: probability, normalized among the options on the last two sets; ROUGE-L recall;
        truth ratio as ``max(0, 1 - r)``.
    smoothing : float, default=0.0
        Added to each part; published aggregates use 1e-12.

    Raises
    ------
    ValueError
        A part is missing (names it).

    References
    ----------
    Maini et al. (2024), TOFU, section 2.2.2.
    """
    names = [f"{part}_{metric}" for part in UTILITY_SETS for metric in UTILITY_METRICS]
    if missing := [name for name in names if name not in parts]:
        raise ValueError(
            f"model_utility lacks {', '.join(missing)}. Measure them, or take the harmonic_mean of "
            "what you have under another name."
        )
    return harmonic_mean([parts[name] for name in names], smoothing=smoothing)
