"""The same prompt about nobody: how a model speaks of what it never heard of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from manifold_unlearn.activations.corpus import Item

N_DRAWS = 200


def invent_subjects(
    subjects: Iterable[str],
    known: Iterable[str],
    *,
    tokenizer: Any | None = None,
    random_state: Any = None,
) -> dict[str, str]:
    """Names of nobody, one for each subject, put together from parts of names the model knows.

    The parts are familiar and their combination is not: what a model says of such a name is what
    it says when it does not know, in its own words. Of the model never told of a subject the same
    is true of the subject's own name.

    Parameters
    ----------
    subjects : iterable of str
        Names of one or more words.
    known : iterable of str
        Names to take words from, and not to hit upon. A word keeps its place: first names come from
        first names. It comes from names of as many words as the subject has; from other subjects
        only where too few known names have.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Prefer names of as many tokens as the subject's, behind a space.
    random_state : int, RandomState or None

    Returns
    -------
    dict of str to str
        Each invented name shares no word with its subject, is no known name, and is given once.

    Raises
    ------
    ValueError
        A subject is blank, or there are too few known names of as many words to recombine.
    """
    subjects = list(dict.fromkeys(subjects))
    known = list(dict.fromkeys(known))
    names = list(dict.fromkeys([*known, *subjects]))
    if blank := [name for name in names if not name.strip()]:
        raise ValueError(f"{blank[0]!r} is no name; leave blank subjects out.")
    draw = check_random_state(random_state)
    taken = {tuple(name.split()) for name in names}
    invented: dict[str, str] = {}
    for subject in subjects:
        words = tuple(subject.split())
        others = [name for name in known if name not in subjects]
        parts = _parts(words, others)
        if min(map(len, parts)) < 2:
            parts = _parts(words, names)
        if min(map(len, parts)) < 2:
            raise ValueError(
                f"{subject!r} has {len(words)} words, and too few known names have as many to put "
                "a new one together; give more names of that form as known."
            )
        made = _drawn(words, parts, taken, tokenizer, draw)
        taken.add(tuple(made.split()))
        invented[subject] = made
    return invented


def _parts(words: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """For every place, the words that stand there in names as long, but for the subject's own."""
    alike = [name.split() for name in names if len(name.split()) == len(words)]
    return [sorted({other[i] for other in alike} - set(words)) for i in range(len(words))]


def _drawn(
    words: Sequence[str],
    parts: Sequence[Sequence[str]],
    taken: set[tuple[str, ...]],
    tokenizer: Any,
    draw: np.random.RandomState,
) -> str:
    """An untaken combination, of as many tokens as the subject if one is drawn."""

    def length(name: Sequence[str]) -> int:
        joined = " " + " ".join(name)
        return len(tokenizer(joined, add_special_tokens=False).input_ids) if tokenizer else 0

    wanted, spare = length(words), None
    for _ in range(N_DRAWS):
        name = tuple(part[draw.randint(len(part))] for part in parts)
        if name in taken:
            continue
        if length(name) == wanted:
            return " ".join(name)
        spare = spare or name
    if spare is None:
        raise ValueError(
            f"no new name for {' '.join(words)!r} in {N_DRAWS} draws: all combinations of the "
            "known words are names already; give more known names."
        )
    return " ".join(spare)


def rename(text: str, subject: str, invented: str) -> str:
    """Text with the subject's name, and every capitalized word of it alone, replaced.

    Parameters
    ----------
    text : str
    subject, invented : str
        Names of equally many words.

    Raises
    ------
    ValueError
        The names differ in words, or the text has no word of the subject's.
    """
    old, new = subject.split(), invented.split()
    if len(old) != len(new):
        raise ValueError(f"{subject!r} and {invented!r} differ in their number of words.")
    words = {a: b for a, b in zip(old, new, strict=True) if a[:1].isupper()} or {old[0]: new[0]}
    pattern = r"\b(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + r")\b"
    renamed, n = re.subn(pattern, lambda found: words[found.group()], text)
    if not n:
        raise ValueError(
            f"{text!r} does not name {subject!r}; set the item's topic to its subject."
        )
    return renamed


def counterfactual_items(items: Sequence[Item], invented: Mapping[str, str]) -> list[Item]:
    """Items about the invented subjects in the place of their ``topic``; answers stay as they are.

    Parameters
    ----------
    items : sequence of Item
        ``topic`` is the subject's name, and stands in the question or the text.
    invented : mapping of str to str
        From :func:`invent_subjects`.

    Raises
    ------
    ValueError
        An item without a topic that has an invented name, or whose question does not name it.
    """
    made = []
    for i, item in enumerate(items):
        if item.topic not in invented:
            raise ValueError(
                f"item {i} has topic {item.topic!r}, which has no invented name; set topic to the "
                "subject's name."
            )
        name = invented[item.topic]
        made.append(
            replace(
                item,
                question=rename(item.question, item.topic, name),
                paraphrased_question=tuple(
                    rename(q, item.topic, name) for q in item.paraphrased_question
                ),
                topic=name,
            )
        )
    return made
