"""Whether generated text is language, without a judge: n-gram entropy, repetition, likelihood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from manifold_unlearn.activations.corpus import join_answer
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject, answer_log_probabilities
from manifold_unlearn.evaluate.metrics import answer_probability
from manifold_unlearn.evaluate.results import Metric
from manifold_unlearn.evaluate.rouge import Words, split_words

ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Order of the n-grams to weight, of the generation entropy of the model-editing literature."""


def n_gram_entropy(text: str, *, words: Words = "ascii") -> float:
    """Weighted entropy of the bigrams and trigrams of a text, in bits.

    Mean of ``2/3 H_2`` and ``4/3 H_3``. It is low where a text repeats itself; it grows with the
    text's length and does **not** tell language from random words: compare it at equal length, and
    read it beside :func:`reference_fluency`.

    Parameters
    ----------
    text : str
    words : {"ascii", "unicode"}
        Published figures split with NLTK's Treebank tokenizer, which keeps punctuation; here a word
        is what ROUGE counts.

    Returns
    -------
    float
        0 for a text of fewer than three words.

    References
    ----------
    Zhang et al. (2018), Generating informative and diverse conversational responses; the weights
    are those of Meng et al. (2022), ROME, "generation entropy".
    """
    said = split_words(text, words)
    return float(np.mean([w * _entropy(said, n) for n, w in ENTROPY_WEIGHTS.items()]))


def _entropy(words: Sequence[str], n: int) -> float:
    counts = np.array(list(_n_grams(words, n).values()), dtype=np.float64)
    p = counts / counts.sum() if len(counts) else counts
    return float(-(p * np.log2(p)).sum())


def _n_grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def repetition(text: str, *, n: int = 4, words: Words = "ascii") -> float:
    """Share of a text's n-grams that stood in it before, ``1 - distinct / all``.

    Returns
    -------
    float
        In [0, 1); 0 for a text of fewer than ``n`` words.

    References
    ----------
    Welleck et al. (2020), Neural text generation with unlikelihood training, "seq-rep-n".
    """
    counts = _n_grams(split_words(text, words), n)
    total = sum(counts.values())
    return 1 - len(counts) / total if total else 0.0


def reference_fluency(
    reference: Subject,
    tokenizer: Any,
    prompts: Sequence[str],
    said: Sequence[str],
    reference_said: Sequence[str],
    *,
    words: Words = "ascii",
    batch_size: BatchSize = "auto",
) -> Metric:
    """How well a model that was never told would have said what was said, without repetition.

    For each prompt, the likelihood a token that the reference gives what was said over the one that
    it gives its own answer, at most 1, times ``1 - repetition``. Published fluency is instead the
    verdict of a gibberish classifier, a neural judge; the two are not on one scale.

    Parameters
    ----------
    reference : Subject
        The retrained model, or the model before the edit.
    tokenizer : transformers.PreTrainedTokenizerBase
    prompts : sequence of str
    said, reference_said : sequence of str
        Greedy answers of the model judged and of the reference. An empty answer counts as 0, unless
        the reference too says nothing: then as 1. Of garbage, which has more tokens when it is read
        again, what fits the context is scored.
    words : {"ascii", "unicode"}
    batch_size : int or "auto"

    Returns
    -------
    Metric
        ``fluency``, one value a prompt, in [0, 1]; 1 for the reference itself, but for repetition.

    Raises
    ------
    ValueError
        No prompts, or not one text of each for each prompt.
    """
    if not prompts or not len(prompts) == len(said) == len(reference_said):
        raise ValueError(
            f"{len(prompts)} prompts, {len(said)} and {len(reference_said)} answers: give at least "
            "one prompt and one answer of each model to each."
        )
    both = [text.strip() + other.strip() for text, other in zip(said, reference_said, strict=True)]
    values = np.array([float(not text) for text in both])
    scored = [i for i, text in enumerate(said) if text.strip() and reference_said[i].strip()]
    if scored:
        pairs = [
            (prompts[i], join_answer(prompts[i], texts[i]))
            for texts in (said, reference_said)
            for i in scored
        ]
        log_p = answer_log_probabilities(
            reference, tokenizer, pairs, cut=True, batch_size=batch_size
        )
        p = answer_probability(log_p).reshape(2, -1)
        once = np.array([1 - repetition(said[i], words=words) for i in scored])
        values[scored] = np.minimum(p[0] / np.maximum(p[1], np.finfo(np.float64).tiny), 1) * once
    return Metric("fluency", values)
