"""Multiple choice, scored by letters or by answers, whatever the order of the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from manifold_unlearn.activations.corpus import Item, join_answer
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject, answer_log_probabilities
from manifold_unlearn.evaluate.results import Metric

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Orders: TypeAlias = Literal["given", "balanced", "cyclic", "all"]
"""Orders in which options are shown. ``"given"``: one, as they stand. ``"balanced"``: one, turned
so that over the questions the right option stands in each position equally often. ``"cyclic"``:
every rotation: each option stands once in each position. ``"all"``: every permutation."""

Scoring: TypeAlias = Literal["letter", "option", "answer"]
"""``"letter"``: options are listed, the letter is scored (WMDP and MMLU). ``"option"``: options are
listed, the text of the option is scored. ``"answer"``: nothing is listed, the text is scored after
the bare question; the order then plays no part."""


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its options."""

    question: str
    options: tuple[str, ...]
    correct: int
    """index of the right option"""

    def __post_init__(self) -> None:
        if not 0 <= self.correct < len(self.options) or len(self.options) < 2:
            raise ValueError(
                f"question {self.question[:40]!r}: correct={self.correct} with "
                f"{len(self.options)} options. Give two or more, and the index of the right one."
            )
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"question {self.question[:40]!r} has an option twice; remove one.")


def choice_questions(items: Sequence[Item], *, n_options: int = 4) -> list[ChoiceQuestion]:
    """Items as questions, the perturbed answers as wrong options; the right one stands first.

    Distinct perturbed answers are taken in their order.

    Raises
    ------
    ValueError
        No items, or one with too few perturbed answers (names it).
    """
    if not items:
        raise ValueError("items is empty; give at least one.")
    made = []
    for i, item in enumerate(items):
        wrong = [w for w in dict.fromkeys(item.perturbed_answer) if w != item.answer]
        if len(wrong) < n_options - 1:
            raise ValueError(
                f"item {i} has {len(wrong)} perturbed answers; {n_options} options need "
                f"{n_options - 1}. Give more, or lower n_options."
            )
        options = (item.answer, *wrong[: n_options - 1])
        made.append(ChoiceQuestion(item.question, options, 0))
    return made


def option_orders(questions: Sequence[ChoiceQuestion], orders: Orders) -> np.ndarray:
    """Which option stands in which position, ``(n_questions, n_orders, n_options)`` int64.

    Raises
    ------
    ValueError
        No questions, not equally many options to each, an unknown name, or ``"all"`` for more than
        six options.
    """
    if not questions or len({len(q.options) for q in questions}) > 1:
        raise ValueError(
            f"{len(questions)} questions with {sorted({len(q.options) for q in questions})} "
            "options; give at least one question, and equally many options to all."
        )
    n = len(questions[0].options)
    rotations = (np.arange(n)[:, None] + np.arange(n)) % n
    if orders == "balanced":
        turned = [(q.correct - i) % n for i, q in enumerate(questions)]
        return rotations[turned][:, None, :]
    if orders == "all" and n > 6:
        raise ValueError(f"orders='all' of {n} options are too many; use orders='cyclic'.")
    shown = {
        "given": lambda: rotations[:1],
        "cyclic": lambda: rotations,
        "all": lambda: np.array(list(permutations(range(n)))),
    }
    if orders not in shown:
        raise ValueError(f"orders={orders!r} is not 'given', 'balanced', 'cyclic' or 'all'.")
    return np.repeat(shown[orders]()[None], len(questions), axis=0)


def choice_prompt(question: ChoiceQuestion, order: Sequence[int], *, header: str = "") -> str:
    r"""Question with lettered options, as lm-evaluation-harness asks WMDP and MMLU.

    ``"{header}{question}\nA. {option}\n...\nAnswer:"``; published runs put a header like ``"The
    following are multiple choice questions (with answers) about biology.\n\n"`` first.
    """
    listed = [f"{LETTERS[k]}. {question.options[o].strip()}" for k, o in enumerate(order)]
    return header + "\n".join([question.question.strip(), *listed, "Answer:"])


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """Score of each option of each question in each order."""

    scores: np.ndarray
    """(n_questions, n_orders, n_options) float64, the options in their own order"""
    orders: np.ndarray
    """(n_questions, n_orders, n_options) int64: the option in each position"""
    correct: np.ndarray
    """(n_questions,) int64"""

    def __post_init__(self) -> None:
        if not np.isfinite(self.scores).all():
            raise ValueError("scores of options must be finite; the model gives NaN or infinity.")

    @property
    def credit(self) -> np.ndarray:
        """(n_questions, n_orders): 1 where the right option has the best score, shared in a tie."""
        best = self._best
        right = np.take_along_axis(best, self.correct[:, None, None], axis=2)[..., 0]
        return right / best.sum(axis=2)

    @property
    def accuracy(self) -> Metric:
        """Share of orders in which the question is answered right."""
        return Metric("accuracy", self.credit.mean(axis=1))

    @property
    def always_right(self) -> Metric:
        """1 where the right option alone is best in every order."""
        return Metric("always_right", (self.credit == 1).all(axis=1).astype(np.float64))

    @property
    def probability(self) -> Metric:
        """Softmax of the scores over the options at the right one, mean over orders."""
        shifted = np.exp(self.scores - self.scores.max(axis=2, keepdims=True))
        p = shifted / shifted.sum(axis=2, keepdims=True)
        right = np.take_along_axis(p, self.correct[:, None, None], axis=2)[..., 0]
        return Metric("choice_probability", right.mean(axis=1))

    @property
    def n_ties(self) -> int:
        """Askings in which several options share the best score."""
        return int((self._best.sum(axis=2) > 1).sum())

    @property
    def position_shares(self) -> np.ndarray:
        """(n_options,): how often the choice falls on each position; uneven is a bias."""
        chosen = np.take_along_axis(self._best / self._best.sum(2, keepdims=True), self.orders, 2)
        return chosen.mean(axis=(0, 1))

    @property
    def _best(self) -> np.ndarray:
        return self.scores == self.scores.max(axis=2, keepdims=True)

    def to_json(self) -> dict[str, Any]:
        """The metrics with their intervals, ties, and the share of each position."""
        return {
            "accuracy": self.accuracy.to_json(),
            "always_right": self.always_right.to_json(),
            "choice_probability": self.probability.to_json(),
            "n_ties": self.n_ties,
            "position_shares": self.position_shares.tolist(),
        }


def score_choices(
    subject: Subject,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    *,
    scoring: Scoring = "letter",
    orders: Orders = "cyclic",
    header: str = "",
    normalize: bool = True,
    batch_size: BatchSize = "auto",
) -> ChoiceScores:
    """Log-probability of each option, by its letter or by its text.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    questions : sequence of ChoiceQuestion
    scoring : {"letter", "option", "answer"}
    orders : {"given", "balanced", "cyclic", "all"}
        Published WMDP and MMLU figures use ``"given"``; SAE unlearning studies take only questions
        that the model first answers right in all 24 orders, :attr:`ChoiceScores.always_right`.
        With ``scoring="answer"`` one order is enough, and ``"given"`` is taken.
    header : str
        Goes before every prompt.
    normalize : bool, default=True
        Mean log-probability a token instead of their sum, where texts are scored.
    batch_size : int or "auto"

    Returns
    -------
    ChoiceScores

    Raises
    ------
    ValueError
        As :func:`option_orders`, an unknown scoring, or an option without tokens.
    """
    if scoring not in ("letter", "option", "answer"):
        raise ValueError(f"scoring={scoring!r} is not 'letter', 'option' or 'answer'.")
    shown = option_orders(questions, "given" if scoring == "answer" else orders)
    pairs = []
    for question, turned in zip(questions, shown, strict=True):
        for order in turned:
            if scoring == "answer":
                prompt = header + question.question
            else:
                prompt = choice_prompt(question, order.tolist(), header=header)
            for position, option in enumerate(order):
                text = LETTERS[position] if scoring == "letter" else question.options[option]
                pairs.append((prompt, join_answer(prompt, text)))
    log_p = answer_log_probabilities(subject, tokenizer, pairs, batch_size=batch_size)
    mean = normalize and scoring != "letter"
    by_position = np.array([_total(row, mean) for row in log_p]).reshape(shown.shape)
    scores = np.empty(shown.shape)
    np.put_along_axis(scores, shown, by_position, axis=2)
    return ChoiceScores(scores, shown, np.array([q.correct for q in questions]))


def _total(row: Tensor, mean: bool) -> float:
    return float(row.double().mean() if mean else row.double().sum())
