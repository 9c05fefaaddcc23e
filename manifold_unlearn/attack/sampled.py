"""Ask many times: what at least one of k sampled answers gives away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.evaluate.likelihood import Subject, greedy_answers
from manifold_unlearn.evaluate.rouge import rouge_l_recall
from manifold_unlearn.evaluate.sampling import leak_at_k, sample_answers

AnswerScore = Callable[[str, str], float]
"""How much of the right answer (second) an answer (first) gives away, in [0, 1]."""


def sampling_attack(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    k: Sequence[int] = (1, 2, 4, 8, 16),
    n_samples: int | None = None,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
    score: AnswerScore = rouge_l_recall,
    random_state: int = 0,
) -> AttackCurve:
    """Expected best of k sampled answers to each question, beside the greedy one.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    k : sequence of int, default=(1, 2, 4, 8, 16)
        Ascending from 1 or more.
    n_samples : int, optional
        Answers drawn for each item, at least the largest k. Default: the largest k. More make the
        estimate at each k steadier; it is unbiased for any number.
    max_new_tokens : int, default=32
    temperature, top_p : float, default=1.0
    score : callable, default=rouge_l_recall
        ``(answer, right answer) -> [0, 1]``.
    random_state : int, default=0

    Returns
    -------
    AttackCurve
        ``unit`` "samples"; 0 is the greedy answer, which one sample need not match.
        ``details["n_empty"]`` counts sampled answers that hold nothing.

    Raises
    ------
    ValueError
        No items or one without an answer, ``k`` that does not ascend from 1, fewer samples than
        the largest k, or a score outside [0, 1].

    References
    ----------
    arXiv 2511.04934, leak@k.
    """
    if not items or not all(item.answer.strip() for item in items):
        raise ValueError("items is empty or holds a plain text; give questions with answers.")
    if not len(k) or k[0] < 1 or any(np.diff(k) <= 0):
        raise ValueError(f"k={tuple(k)} must ascend from 1 or more.")
    n_samples = k[-1] if n_samples is None else n_samples
    if n_samples < k[-1]:
        raise ValueError(f"n_samples={n_samples} is fewer than k={k[-1]}; draw more.")
    prompts = [item.question for item in items]
    sampled = sample_answers(
        subject,
        tokenizer,
        prompts,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        random_state=random_state,
    )
    greedy = greedy_answers(subject, tokenizer, prompts, max_new_tokens=max_new_tokens)
    first = np.array([_scored(score, said, item) for said, item in zip(greedy, items, strict=True)])
    scores = np.array(
        [
            [_scored(score, said, item) for said in answers]
            for answers, item in zip(sampled, items, strict=True)
        ]
    )
    rows = [first, *(leak_at_k(scores, n) for n in k)]
    details = {
        "n_samples": n_samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "random_state": random_state,
        "n_empty": sum(not said.strip() for answers in sampled for said in answers),
    }
    metric = getattr(score, "__name__", "score")
    spent = np.array([0, *k], dtype=np.float64)
    return AttackCurve("sampling", metric, "samples", spent, np.stack(rows), details)


def _scored(score: AnswerScore, said: str, item: Item) -> float:
    found = float(score(said, item.answer))
    if not 0 <= found <= 1:
        raise ValueError(f"score answered {found} to {said[:40]!r}; it must lie in [0, 1].")
    return found
