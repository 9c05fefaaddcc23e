"""What is measured of a model while it is attacked: one value in [0, 1] an item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.results import Knowledge
from manifold_unlearn.evaluate.likelihood import (
    BatchSize,
    Subject,
    answer_log_probabilities,
    text_log_probabilities,
)
from manifold_unlearn.evaluate.metrics import answer_probability
from manifold_unlearn.evaluate.suites import assess


@dataclass(frozen=True)
class KnowledgeOf:
    """A measure bound to its items: ``(subject, tokenizer) -> (n_items,)`` in [0, 1]."""

    name: Literal["probability", "accuracy", "rouge_l_recall"]
    items: tuple[Item, ...]
    include_eos: bool = False
    max_new_tokens: int | None = None
    batch_size: BatchSize = "auto"

    def __call__(self, subject: Subject, tokenizer: Any) -> np.ndarray:
        """Measure what the subject knows of each item, ``(n_items,)`` float64."""
        if self.name == "probability":
            return self._probabilities(subject, tokenizer)
        found = assess(
            subject,
            tokenizer,
            self.items,
            include_eos=self.include_eos,
            generate=self.name == "rouge_l_recall",
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        if self.name == "accuracy":
            return (found["rank"].values == 1).astype(np.float64)
        return found[self.name].values

    def _probabilities(self, subject: Subject, tokenizer: Any) -> np.ndarray:
        if not self.items[0].answer:
            texts = [item.question for item in self.items]
            scored, _ = text_log_probabilities(
                subject, tokenizer, texts, batch_size=self.batch_size
            )
        else:
            scored = answer_log_probabilities(
                subject,
                tokenizer,
                [item.pair for item in self.items],
                include_eos=self.include_eos,
                batch_size=self.batch_size,
            )
        return answer_probability(scored)


def probability_of(
    items: Sequence[Item], *, include_eos: bool = False, batch_size: BatchSize = "auto"
) -> KnowledgeOf:
    """Length-normalized probability of each answer, or of each plain text.

    Parameters
    ----------
    items : sequence of Item
        All with an answer, or all plain texts.
    include_eos : bool, default=False
        Count the end-of-sequence token as the answer's last, as TOFU does.
    batch_size : int or "auto"

    Raises
    ------
    ValueError
        No items, or plain texts and questions mixed.
    """
    _check(items)
    return KnowledgeOf("probability", tuple(items), include_eos, batch_size=batch_size)


def accuracy_of(items: Sequence[Item], *, batch_size: BatchSize = "auto") -> KnowledgeOf:
    """1 where the answer is more probable than each of its item's perturbed answers, else 0.

    Probabilities are length-normalized. A model that never knew is right once in
    ``1 + n_perturbed`` on average.

    Raises
    ------
    ValueError
        No items, or an item without perturbed answers (names the first).
    """
    _check(items)
    if without := [i for i, item in enumerate(items) if not item.perturbed_answer]:
        raise ValueError(
            f"item {without[0]} has no perturbed_answer to rank its answer among "
            f"({len(without)} of {len(items)}); give some, or measure probability_of."
        )
    return KnowledgeOf("accuracy", tuple(items), batch_size=batch_size)


def recall_of(
    items: Sequence[Item], *, max_new_tokens: int | None = None, batch_size: BatchSize = "auto"
) -> KnowledgeOf:
    """ROUGE-L recall of each answer by the greedy answer.

    Raises
    ------
    ValueError
        No items, or an item without an answer.
    """
    _check(items)
    if not items[0].answer:
        raise ValueError("recall_of needs answers; measure probability_of on plain texts.")
    return KnowledgeOf(
        "rouge_l_recall", tuple(items), max_new_tokens=max_new_tokens, batch_size=batch_size
    )


def measured(knowledge: Knowledge, subject: Subject, tokenizer: Any) -> np.ndarray:
    """Call a measure and check that it gave one finite value in [0, 1] an item.

    Raises
    ------
    ValueError
        The measure gave something else; the model may have weights that are not finite.
    """
    values = np.asarray(knowledge(subject, tokenizer), dtype=np.float64)
    inside = np.isfinite(values) & (values >= 0) & (values <= 1)
    if values.ndim != 1 or not values.size or not inside.all():
        raise ValueError(
            f"{measure_name(knowledge)} gave {int((~inside).sum())} of {values.size} values "
            f"(shape {values.shape}) outside [0, 1]; check the model for weights that are not "
            "finite, and that the measure gives one value an item."
        )
    return values


def measure_name(knowledge: Knowledge) -> str:
    """Return what a measure calls itself, for the curve that holds its values."""
    return str(getattr(knowledge, "name", getattr(knowledge, "__name__", "knowledge")))


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("items is empty; give at least one to measure.")
    answered = [bool(item.answer) for item in items]
    if any(answered) != all(answered):
        raise ValueError("plain texts and questions are mixed in one set; measure them apart.")
