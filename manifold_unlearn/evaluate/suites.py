"""Metrics of a model on sets of items: what is run, for which formula."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manifold_unlearn.activations.corpus import Item, join_answer
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.evaluate.likelihood import (
    BatchSize,
    Subject,
    TokenScores,
    answer_encodings,
    greedy_answers,
    score_log_probabilities,
    score_tokens,
    text_divergence,
    text_log_probabilities,
)
from manifold_unlearn.evaluate.memorization import memorization_of
from manifold_unlearn.evaluate.metrics import (
    answer_probability,
    answer_rank,
    forget_quality,
    harmonic_mean,
    perplexity,
    truth_ratio,
    truth_ratio_preference,
    truth_ratio_symmetric,
)
from manifold_unlearn.evaluate.privacy import membership_of
from manifold_unlearn.evaluate.results import Metric
from manifold_unlearn.evaluate.rouge import rouge_l


def assess(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    include_eos: bool = False,
    generate: bool = True,
    max_new_tokens: int | None = None,
    said: Sequence[str] | None = None,
    batch_size: BatchSize = "auto",
) -> dict[str, Metric]:
    """What a model knows of a set of items.

    Parameters
    ----------
    subject : Subject
        ``plain(model)``, or any function that opens to a model.
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    include_eos : bool, default=False
        Count the end-of-sequence token as a part of every answer, as TOFU does.
    generate : bool, default=True
        Also generate greedy answers, for ROUGE-L recall.
    max_new_tokens : int, optional
        Of the greedy answers. Default: :func:`answer_room`.
    said : sequence of str, optional
        The greedy answers, where they were generated before.
    batch_size : int or "auto"

    Returns
    -------
    dict of str to Metric
        ``probability`` of the answers; where the items have what it takes also
        ``paraphrase_probability`` (prompts reworded, mean over an item's paraphrases), ``rank``
        among the perturbed answers, ``truth_ratio`` (raw, per item), ``rouge_l_recall``,
        ``paraphrased_answer_probability``. Plain texts have ``probability`` alone.

    Warns
    -----
    UserWarning
        Answers without words, which ROUGE-L leaves out; says how many.

    Raises
    ------
    ValueError
        No items, or plain texts and questions mixed.
    """
    if not items:
        raise ValueError("items is empty; give at least one.")
    if not any(item.answer for item in items):
        log_p, _ = text_log_probabilities(subject, tokenizer, [item.question for item in items])
        return {"probability": Metric("probability", answer_probability(log_p))}
    metrics = dict(
        score_answers(
            subject, tokenizer, items, include_eos=include_eos, batch_size=batch_size
        ).knowledge
    )
    if said is None and generate:
        said = greedy_answers(
            subject,
            tokenizer,
            [item.question for item in items],
            max_new_tokens=max_new_tokens
            or answer_room(tokenizer, [item.pair[1] for item in items]),
            batch_size=batch_size,
        )
    if said is not None:
        metrics["rouge_l_recall"] = recall_of(said, items)
    return metrics


def recall_of(said: Sequence[str], items: Sequence[Item]) -> Metric:
    """ROUGE-L recall of the items' answers in what was said; warns as :func:`assess` does."""
    recall = rouge_l(said, [item.answer for item in items], form="recall")
    if recall.n_excluded:
        warnings.warn(
            f"{recall.n_excluded} of {len(items)} answers have no words in ASCII letters or "
            "digits and are left out of ROUGE-L; use evaluate.rouge_l(words='unicode').",
            UserWarning,
            stacklevel=3,
        )
    return Metric("rouge_l_recall", recall.values)


def answer_room(tokenizer: Any, answers: Sequence[str]) -> int:
    """Tokens to generate for answers: those of the longest plus a quarter, rounded up.

    Answers bring their leading space, as in ``item.pair``.
    """
    longest = max(map(len, tokenizer(list(answers), add_special_tokens=False)["input_ids"]))
    return longest + (longest + 3) // 4


@dataclass(frozen=True, eq=False)
class ScoredAnswers:
    """One teacher-forced pass over a set of questions, from which several metrics follow.

    Attributes
    ----------
    items : tuple of Item
    answers : list of TokenScores
        Of each item's own answer, with its end-of-sequence token where it was asked for.
    ended : list of bool
        Whether the last of an answer's tokens is an end-of-sequence token put behind it.
    knowledge : dict of str to Metric
        What :func:`assess` gives of the same items without generation.
    """

    items: tuple[Item, ...]
    answers: list[TokenScores]
    ended: list[bool]
    knowledge: dict[str, Metric]

    def memorization(self) -> dict[str, Metric]:
        """``exact_memorization`` and ``extraction_strength``; the end of an answer is no part."""
        pairs = zip(self.answers, self.ended, strict=True)
        return memorization_of([row.up_to(len(row.correct) - ended) for row, ended in pairs])

    def membership(self) -> dict[str, np.ndarray]:
        """What :func:`membership_scores` gives of the same pairs."""
        return membership_of(self.answers, [item.pair[1] for item in self.items])


def score_answers(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    include_eos: bool = False,
    batch_size: BatchSize = "auto",
) -> ScoredAnswers:
    """Score every answer that a set of items asks for, once.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    include_eos : bool, default=False
        Score the end-of-sequence token as a part of every answer.
    batch_size : int or "auto"

    Returns
    -------
    ScoredAnswers

    Raises
    ------
    ValueError
        No items, or one without an answer; what scoring pairs raises.
    """
    if not items:
        raise ValueError("items is empty; give at least one.")
    _require_questions(items)
    asked, n = _Asked(items), len(items)
    with subject() as model, torch.no_grad(), evaluating(model):
        rows = answer_encodings(model, tokenizer, asked.pairs, include_eos, batch_size)
        answers = score_tokens(model, rows[:n], batch_size)
        others = score_log_probabilities(model, rows[n:], batch_size) if rows[n:] else []
    p = answer_probability([row.log_probabilities for row in answers] + others)
    ended = [include_eos and bool(row.special[-1]) for row in rows[:n]]
    return ScoredAnswers(tuple(items), answers, ended, asked.metrics(p))


def _require_questions(items: Sequence[Item]) -> None:
    if not all(item.answer for item in items):
        raise ValueError("plain texts and questions are mixed in one set; assess them apart.")


class _Asked:
    """The pairs that a set of items asks for in one scoring run, and the metrics they give."""

    def __init__(self, items: Sequence[Item]):
        self.pairs = [item.pair for item in items]
        self.paraphrased = [self._add_all(item, item.paraphrased_question) for item in items]
        self.perturbed = [self._add_wrong(item) for item in items]
        self.right = [
            self._add(item.question, item.paraphrased_answer) if item.paraphrased_answer else i
            for i, item in enumerate(items)
        ]

    def _add(self, question: str, answer: str) -> int:
        self.pairs.append((question, join_answer(question, answer)))
        return len(self.pairs) - 1

    def _add_all(self, item: Item, questions: Sequence[str]) -> list[int]:
        return [self._add(question, item.answer) for question in questions]

    def _add_wrong(self, item: Item) -> list[int]:
        return [self._add(item.question, answer) for answer in item.perturbed_answer]

    def metrics(self, p: np.ndarray) -> dict[str, Metric]:
        n = len(self.right)
        found = {"probability": p[:n]}
        if all(self.paraphrased):
            found["paraphrase_probability"] = np.array([p[i].mean() for i in self.paraphrased])
        if all(right >= n for right in self.right):
            found["paraphrased_answer_probability"] = p[self.right]
        if all(self.perturbed):
            ranks = [answer_rank(p[i], p[wrong].tolist()) for i, wrong in enumerate(self.perturbed)]
            found["rank"] = np.array(ranks, dtype=np.float64)
            ratios = zip(self.right, self.perturbed, strict=True)
            found["truth_ratio"] = np.array(
                [truth_ratio(p[right], p[wrong].tolist()) for right, wrong in ratios]
            )
        return {name: Metric(name, values) for name, values in found.items()}


def assess_text(
    subject: Subject, tokenizer: Any, texts: Sequence[str], *, reference: Subject | None = None
) -> dict[str, float]:
    """Perplexity on neutral text, and the mean divergence from a reference model.

    Returns
    -------
    dict
        ``perplexity``, and with a reference ``kl``: mean over tokens of
        ``KL(reference || subject)`` in nats.
    """
    if reference is None:
        log_p, _ = text_log_probabilities(subject, tokenizer, texts)
        return {"perplexity": perplexity(log_p)}
    found = compare_text(subject, reference, tokenizer, texts)
    return {"perplexity": found["perplexity"], "kl": found["kl"]}


def compare_text(
    subject: Subject, reference: Subject, tokenizer: Any, texts: Sequence[str]
) -> dict[str, float]:
    """:func:`assess_text` of both models from one run of each.

    Returns
    -------
    dict
        ``perplexity`` and ``kl`` as there, and ``reference_perplexity``.
    """
    found = text_divergence(subject, reference, tokenizer, texts)
    divergences = np.concatenate([row.double().numpy() for row in found.divergences])
    return {
        "perplexity": perplexity(found.log_probabilities),
        "reference_perplexity": perplexity(found.reference_log_probabilities),
        "kl": float(divergences.mean()),
    }


def summarize(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Means of the metrics; truth ratios in their two published forms."""
    means = {name: metric.mean for name, metric in metrics.items() if name != "truth_ratio"}
    if "truth_ratio" in metrics:
        ratios = metrics["truth_ratio"].values
        means["truth_ratio"] = float(truth_ratio_symmetric(ratios).mean())
        means["truth_ratio_preference"] = float(truth_ratio_preference(ratios).mean())
    return means


def model_report(
    forget: Mapping[str, Metric],
    retain: Mapping[str, Metric],
    reference_forget: Mapping[str, Metric] | None,
) -> dict[str, Any]:
    """One model's entry in ``metrics.json``.

    Parameters
    ----------
    forget, retain : mapping of str to Metric
        From :func:`assess`.
    reference_forget : mapping of str to Metric, optional
        The same of the model that was never told, for ``forget_quality``.

    Returns
    -------
    dict
        ``forget`` and ``retain`` (means), ``forget_quality`` (null without a reference or
        perturbed answers), ``model_utility``: harmonic mean of the retain set's probability,
        ROUGE-L recall and truth-ratio preference, those of them that were measured.
    """
    quality = None
    if reference_forget and "truth_ratio" in forget and "truth_ratio" in reference_forget:
        quality = forget_quality(
            forget["truth_ratio"].values, reference_forget["truth_ratio"].values
        )
    kept = summarize(retain)
    useful = ("probability", "rouge_l_recall", "truth_ratio_preference")
    return {
        "forget": summarize(forget),
        "retain": kept,
        "forget_quality": quality,
        "model_utility": harmonic_mean([kept[name] for name in useful if name in kept]),
    }
