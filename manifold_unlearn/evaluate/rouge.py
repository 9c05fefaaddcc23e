"""ROUGE-L: how much of a reference text is said, in its order."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Words: TypeAlias = Literal["ascii", "unicode"]
"""``"ascii"``: runs of ASCII letters and digits after lower-casing, as in every published figure.
``"unicode"``: runs of letters, marks and digits of any script, CJK characters one by one."""

Stem: TypeAlias = Callable[[str], str]


@dataclass(frozen=True, eq=False)
class RougeScores:
    """ROUGE-L of many answers; references without words are left out and counted."""

    values: np.ndarray
    """(n_scored,) float64"""
    index: np.ndarray
    """(n_scored,) int64: which answers were scored"""
    n_excluded: int
    """references in which no words were found"""


def rouge_l_recall(
    answer: str, reference: str, *, stem: Stem | None = None, words: Words = "ascii"
) -> float:
    """Share of the reference's words found in the answer in order (longest common subsequence).

    Parameters
    ----------
    answer, reference : str
    stem : callable, optional
        Applied to words longer than three letters. Published TOFU and MUSE figures use a Porter
        stemmer.
    words : {"ascii", "unicode"}
        What a word is.

    Raises
    ------
    ValueError
        The reference has no words.

    References
    ----------
    Lin (2004), ROUGE, section 3.1.
    """
    said, wanted = split_words(answer, words, stem), split_words(reference, words, stem)
    if not wanted:
        raise ValueError(
            f"the reference answer {reference!r} has no words to recall in {words} counting. "
            "Remove it, or count words='unicode'; rouge_l leaves such references out and counts "
            "them."
        )
    return longest_common_subsequence(said, wanted) / len(wanted)


def rouge_l_f1(
    answer: str, reference: str, *, stem: Stem | None = None, words: Words = "ascii"
) -> float:
    """Harmonic mean of ROUGE-L recall and precision; the form MUSE reports.

    It is ``2 LCS / (n_said + n_wanted)``. Parameters and errors are those of
    :func:`rouge_l_recall`.

    References
    ----------
    Lin (2004), ROUGE, section 3.1, with beta = 1.
    """
    recall = rouge_l_recall(answer, reference, stem=stem, words=words)
    said, wanted = split_words(answer, words, stem), split_words(reference, words, stem)
    return 2 * recall * len(wanted) / (len(said) + len(wanted))


def rouge_l(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    form: Literal["recall", "f1"] = "recall",
    stem: Stem | None = None,
    words: Words = "ascii",
) -> RougeScores:
    """ROUGE-L of each answer whose reference has words.

    Parameters
    ----------
    answers, references : sequence of str
    form : {"recall", "f1"}
        TOFU reports recall, MUSE F1.
    stem, words
        As for :func:`rouge_l_recall`.

    Raises
    ------
    ValueError
        No reference has words, or there are not as many answers as references.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references; give pairs.")
    index = [i for i, text in enumerate(references) if split_words(text, words, None)]
    if not index:
        raise ValueError(
            f"none of {len(references)} references has words in {words} counting. "
            "Give references with words, or count words='unicode'."
        )
    score = rouge_l_recall if form == "recall" else rouge_l_f1
    values = [score(answers[i], references[i], stem=stem, words=words) for i in index]
    return RougeScores(np.array(values), np.array(index), len(references) - len(index))


def split_words(text: str, words: Words = "ascii", stem: Stem | None = None) -> list[str]:
    """Words of a text in lower case, stemmed where longer than three letters."""
    if words == "ascii":
        found = re.findall(r"[a-z0-9]+", text.lower())
    elif words == "unicode":
        normal = unicodedata.normalize("NFC", text.lower())
        found = "".join(map(_set_off, normal)).split()
    else:
        raise ValueError(f"words={words!r} is not 'ascii' or 'unicode'.")
    return [stem(word) if stem and len(word) > 3 else word for word in found]


def _set_off(character: str) -> str:
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    return f" {character} " if "\u3040" <= character <= "\u9fff" else character


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence of words that stands in both, in order.

    The rows of the dynamic program are the bits of one integer (Hyyrö 2004), so that its length is
    limited by nothing and long texts are fast.
    """
    where: dict[str, int] = {}
    for j, word in enumerate(b):
        where[word] = where.get(word, 0) | 1 << j
    full = (1 << len(b)) - 1
    row = full
    for word in a:
        hit = row & where.get(word, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(b) - row.bit_count()
