"""What probes are asked: texts, labels, and which texts belong together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from manifold_unlearn.activations.corpus import Item, join_answer
from manifold_unlearn.activations.tokens import Text


@dataclass(frozen=True, eq=False)
class ProbeTask:
    """Texts, what is to be read at the last token of each, and which belong together."""

    texts: tuple[Text, ...]
    labels: np.ndarray
    """(n_texts,) int64"""
    groups: np.ndarray
    """(n_texts,) int64: texts of one group (of one fact, of one person) are never split"""
    asked: np.ndarray
    """(n_texts,) bool: texts on which the probe is judged; the others only ever train it"""

    def __post_init__(self) -> None:
        n = len(self.texts)
        if not len(self.labels) == len(self.groups) == len(self.asked) == n:
            raise ValueError(
                f"{n} texts with {len(self.labels)} labels, {len(self.groups)} groups and "
                f"{len(self.asked)} asked; give one of each for every text."
            )
        if len(np.unique(self.labels[self.asked])) < 2:
            raise ValueError("the texts asked have fewer than two labels: nothing to tell apart.")


def truth_task(
    items: Sequence[Item],
    *,
    groups: Sequence[Hashable] | None = None,
    trained_on: Sequence[Item] = (),
    trained_groups: Sequence[Hashable] | None = None,
) -> ProbeTask:
    """Ask whether an answer is right: each item with its answer (1) and with a wrong one (0).

    The state of the answer's last token is read. Wrong answers should be values that other items
    have as right ones; where they differ in style, the model that was never told shows by how much.

    Parameters
    ----------
    items : sequence of Item
        Asked; each with at least one perturbed answer, of which they take turns in using one.
    groups : sequence of hashable, optional
        What each item is about, such as a person's name. Default: each item is on its own, so the
        split is by fact.
    trained_on : sequence of Item, optional
        More items that only ever train the probe.
    trained_groups : sequence of hashable, optional
        What those are about.

    Returns
    -------
    ProbeTask

    Raises
    ------
    ValueError
        An item without answer or perturbed answer; groups of another number than items.
    """
    texts: list[Text] = []
    labels, about = [], []
    known = _keys(items, groups, "groups") + _keys(trained_on, trained_groups, "trained_groups")
    for i, item in enumerate([*items, *trained_on]):
        if not item.answer or not item.perturbed_answer:
            raise ValueError(
                f"item {i} ({item.question[:40]!r}) lacks an answer or a perturbed_answer; leave "
                "it out."
            )
        wrong = item.perturbed_answer[i % len(item.perturbed_answer)]
        right = item.paraphrased_answer or item.answer
        for label, answer in ((1, right), (0, wrong)):
            texts.append((item.question, join_answer(item.question, answer)))
            labels.append(label)
            about.append(known[i])
    return ProbeTask(
        tuple(texts), np.array(labels), _codes(about), np.arange(len(texts)) < 2 * len(items)
    )


def attribute_task(
    items: Sequence[Item],
    labels: Sequence[Hashable],
    groups: Sequence[Hashable],
    *,
    trained_on: Sequence[Item] = (),
    trained_labels: Sequence[Hashable] = (),
    trained_groups: Sequence[Hashable] = (),
) -> ProbeTask:
    """Ask which value of an attribute an item has, at the last token of its prompt.

    Parameters
    ----------
    items : sequence of Item
        Asked. Their prompts must not name the value.
    labels : sequence of hashable
        Value of each item; several groups should share a value, or it cannot be learned.
    groups : sequence of hashable
        Whom each item is about. The split is between groups, never within one.
    trained_on, trained_labels, trained_groups : sequences, optional
        More items that only ever train the probe.

    Returns
    -------
    ProbeTask

    Raises
    ------
    ValueError
        Lengths that differ, or items asked that share one label.
    """
    everything = [*items, *trained_on]
    return ProbeTask(
        tuple(item.question for item in everything),
        _codes([*labels, *trained_labels]),
        _codes([*groups, *trained_groups]),
        np.arange(len(everything)) < len(items),
    )


def _keys(
    items: Sequence[Item], groups: Sequence[Hashable] | None, name: str
) -> list[tuple[str, Hashable]]:
    """What each item is about: its group, or the item itself."""
    if groups is None:
        return [("own", item.question) for item in items]
    if len(groups) != len(items):
        raise ValueError(f"{len(groups)} {name} for {len(items)} items; give one an item.")
    return [("group", group) for group in groups]


def _codes(values: Sequence[Hashable]) -> np.ndarray:
    """Whole numbers for values, in order of their first appearance."""
    code: dict[Hashable, int] = {}
    return np.array([code.setdefault(value, len(code)) for value in values], dtype=np.int64)
