"""What a model recites: token by token, verbatim, and in answer to questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.likelihood import (
    BatchSize,
    Subject,
    TokenScores,
    answer_scores,
    greedy_answers,
)
from manifold_unlearn.evaluate.results import Metric
from manifold_unlearn.evaluate.rouge import Stem, Words, rouge_l

KNOWLEDGE_STOPS = ("\n\n", "\nQuestion", "Question:")
"""Where a few-shot answer ends, as MUSE cuts it."""


def exact_memorization(correct: Tensor) -> float:
    """Share of the answer's tokens that are the argmax under teacher forcing.

    Parameters
    ----------
    correct : bool Tensor of shape (n_answer_tokens,)
        As :func:`~manifold_unlearn.evaluate.likelihood.answer_scores` gives it.

    Raises
    ------
    ValueError
        There are no tokens.
    """
    _require_tokens(correct)
    return float(correct.double().mean())


def exact_memorization_published(correct: Tensor) -> float | None:
    """:func:`exact_memorization` without the last label, as open-unlearning has it.

    ``correct`` should hold the end-of-sequence token: it is the label dropped. None where nothing
    is left, as published.
    """
    kept = correct[:-1]
    return float(kept.double().mean()) if len(kept) else None


def extraction_strength(correct: Tensor) -> float:
    """Longest suffix of the answer that argmax decoding gives, as a share of the answer.

    ``1 - k / L`` with ``k`` the shortest prefix of true tokens after which all others are the
    argmax; 1 where no prefix is needed, 0 where the last token is wrong whatever is given.

    Parameters
    ----------
    correct : bool Tensor of shape (n_answer_tokens,)

    Raises
    ------
    ValueError
        There are no tokens.

    References
    ----------
    Carlini et al. (2021), Extracting training data from large language models; the form of Wang et
    al. (2024), as open-unlearning has it but for :func:`extraction_strength_published`'s quirks.
    """
    _require_tokens(correct)
    return _suffix(correct) / len(correct)


def extraction_strength_published(correct: Tensor) -> float:
    """:func:`extraction_strength` with open-unlearning's quirks.

    The last label (the end-of-sequence token) is dropped; where nothing matches the value is
    ``1 / L`` and not 0; where nothing is left it is 0. The 150-checkpoint study uses this form.
    """
    kept = correct[:-1]
    return max(_suffix(kept), 1) / len(kept) if len(kept) else 0.0


def _suffix(correct: Tensor) -> int:
    return int(correct.flip(0).int().cumprod(0).sum())


def _require_tokens(correct: Tensor) -> None:
    if len(correct) == 0:
        raise ValueError("the answer has no tokens; remove it.")


def token_memorization(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    published: bool = False,
    batch_size: BatchSize = "auto",
) -> dict[str, Metric]:
    """Exact memorization and extraction strength of a set of items, from one run.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    published : bool, default=False
        The open-unlearning forms instead of the corrected ones.
    batch_size : int or "auto"

    Returns
    -------
    dict of str to Metric
        ``exact_memorization`` and ``extraction_strength``, or their ``_published`` forms.

    Raises
    ------
    ValueError
        No items, or one without an answer.
    """
    _require_answers(items)
    pairs = [item.pair for item in items]
    scores = answer_scores(subject, tokenizer, pairs, include_eos=published, batch_size=batch_size)
    return memorization_of(scores, published=published)


def memorization_of(scores: Sequence[TokenScores], *, published: bool = False) -> dict[str, Metric]:
    """:func:`token_memorization` of answers scored before, one :class:`TokenScores` an item.

    With ``published`` the scores should hold the end-of-sequence token, else not.
    """
    ending = "_published" if published else ""
    exact = exact_memorization_published if published else exact_memorization
    strength = extraction_strength_published if published else extraction_strength
    found = {
        f"exact_memorization{ending}": [exact(row.correct) for row in scores],
        f"extraction_strength{ending}": [strength(row.correct) for row in scores],
    }
    return {name: Metric(name, np.array(v, dtype=np.float64)) for name, v in found.items()}


@dataclass(frozen=True, eq=False)
class Recitation:
    """What a model said where its prompts lead, and how near it comes to what was true."""

    metric: Metric
    """ROUGE-L of the items that could be scored"""
    index: np.ndarray
    """(n_scored,) int64: which items they are"""
    said: tuple[str, ...]
    """one continuation an item, scored or not"""
    n_excluded: int
    """items whose reference has no words"""

    def to_json(self) -> dict[str, Any]:
        """The metric, and how many items could not be scored."""
        return self.metric.to_json() | {"n_excluded": self.n_excluded}


def verbatim_memorization(
    subject: Subject,
    tokenizer: Any,
    passages: Sequence[tuple[str, str]],
    *,
    max_new_tokens: int = 128,
    stem: Stem | None = None,
    words: Words = "ascii",
    batch_size: BatchSize = "auto",
) -> Recitation:
    """ROUGE-L F1 between a passage's true continuation and the model's greedy one.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    passages : sequence of (prompt, continuation)
        The pairs of items will do.
    max_new_tokens : int, default=128
    stem, words
        As for :func:`~manifold_unlearn.evaluate.rouge.rouge_l_recall`; published figures use a
        Porter stemmer.
    batch_size : int or "auto"

    Raises
    ------
    ValueError
        No passages, or no continuation has words.

    References
    ----------
    Shi et al. (2024), MUSE, "VerbMem".
    """
    if not passages:
        raise ValueError("passages is empty; give at least one.")
    said = greedy_answers(
        subject,
        tokenizer,
        [prompt for prompt, _ in passages],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    truths = [truth for _, truth in passages]
    return _recitation("verbatim_memorization", said, truths, stem, words)


def knowledge_memorization(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    shots: Sequence[Item] = (),
    max_new_tokens: int = 32,
    stops: Sequence[str] = KNOWLEDGE_STOPS,
    stem: Stem | None = None,
    words: Words = "ascii",
    batch_size: BatchSize = "auto",
) -> Recitation:
    """ROUGE-L F1 between true answers and the model's, after examples of question and answer.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    shots : sequence of Item
        Examples that go before every question, a blank line after each. Take them from neither the
        forget set nor the items.
    max_new_tokens : int, default=32
    stops : sequence of str
        An answer ends before the first of them.
    stem, words
        As for :func:`verbatim_memorization`.
    batch_size : int or "auto"

    Raises
    ------
    ValueError
        No items, one without an answer, no answer with words, or an item among the shots.

    References
    ----------
    Shi et al. (2024), MUSE, "KnowMem".
    """
    _require_answers(items)
    if shots:
        _require_answers(shots)
    if shared := {item.text for item in items} & {shot.text for shot in shots}:
        raise ValueError(
            f"{len(shared)} items stand among the shots, one is {min(shared)!r}: the prompt would "
            "tell the answer. Take other shots."
        )
    before = few_shot_prefix(shots)
    said = greedy_answers(
        subject,
        tokenizer,
        [before + item.question for item in items],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    said = [cut(text, stops) for text in said]
    truths = [item.answer for item in items]
    return _recitation("knowledge_memorization", said, truths, stem, words)


def few_shot_prefix(shots: Sequence[Item]) -> str:
    """Questions with their answers, each followed by a blank line."""
    return "".join(shot.text + "\n\n" for shot in shots)


def cut(text: str, stops: Sequence[str]) -> str:
    """Text up to the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _recitation(
    name: str, said: Sequence[str], truths: Sequence[str], stem: Stem | None, words: Words
) -> Recitation:
    scored = rouge_l(said, truths, form="f1", stem=stem, words=words)
    return Recitation(Metric(name, scored.values), scored.index, tuple(said), scored.n_excluded)


def _require_answers(items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("items is empty; give at least one.")
    if without := [i for i, item in enumerate(items) if not item.answer]:
        raise ValueError(f"item {without[0]} has no answer; memorization needs one for each.")
