"""Plain facts that small language models know, each in four wordings, and neutral prose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from manifold_unlearn.activations.corpus import Item

FIT_WORDINGS = (0, 1)
VALIDATION_WORDING = 2
TEST_WORDING = 3


@dataclass(frozen=True)
class Fact:
    """A fact of a topic; topics of one family are near neighbors of each other."""

    family: str
    topic: str
    subject: str
    item: Item
    """Canonical prompt, answer, three paraphrases of the prompt, four wrong answers."""

    def worded(self, wording: int) -> Item:
        """Return the item asked one way: 0 is canonical, 1 to 3 are the paraphrases."""
        prompts = (self.item.question, *self.item.paraphrased_question)
        return replace(self.item, question=prompts[wording], paraphrased_question=())


@cache
def load_facts() -> tuple[Fact, ...]:
    """Return the bundled facts: 24 topics of 24 facts in 8 families.

    Topics and wordings were chosen for what SmolLM2-135M-Instruct knows, so its scores on them
    say nothing of what it knows in general.
    """
    lines = _bundled("facts.jsonl").splitlines()
    return tuple(_fact(json.loads(line)) for line in lines if line)


@cache
def neutral_texts() -> tuple[str, ...]:
    """Return 60 paragraphs of plain prose on everyday matters, none about a topic of the facts."""
    return tuple(part.strip() for part in _bundled("neutral.txt").split("\n\n") if part.strip())


def topics() -> list[str]:
    """Names of the topics, in file order."""
    return list(dict.fromkeys(fact.topic for fact in load_facts()))


@dataclass(frozen=True)
class Split:
    """Facts by their part in forgetting one topic."""

    forget: tuple[Fact, ...]
    """The topic itself, all of it."""
    near: tuple[Fact, ...]
    """The other topics of its family."""
    retain: tuple[Fact, ...]
    """All other families."""


def split_by_topic(topic: str, facts: Sequence[Fact] | None = None) -> Split:
    """Sort facts into what is forgotten, its near neighbors, and the rest.

    Raises
    ------
    ValueError
        No such topic among the facts (lists theirs).
    """
    facts = load_facts() if facts is None else facts
    families = {fact.family for fact in facts if fact.topic == topic}
    if not families:
        there = dict.fromkeys(fact.topic for fact in facts)
        raise ValueError(f"no topic {topic!r}; there are {', '.join(there)}.")
    return Split(
        forget=tuple(f for f in facts if f.topic == topic),
        near=tuple(f for f in facts if f.topic != topic and f.family in families),
        retain=tuple(f for f in facts if f.family not in families),
    )


def halves(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """Every other fact of each topic: those a fit may see, and those kept for the test."""
    seen: dict[str, int] = {}
    parts: tuple[list[Fact], list[Fact]] = ([], [])
    for fact in facts:
        parts[seen.get(fact.topic, 0) % 2].append(fact)
        seen[fact.topic] = seen.get(fact.topic, 0) + 1
    return parts


def _bundled(name: str) -> str:
    return resources.files("manifold_unlearn.testbed").joinpath(name).read_text(encoding="utf-8")


def _fact(record: dict) -> Fact:
    item = Item(
        question=record["question"],
        answer=record["answer"],
        paraphrased_question=tuple(record["paraphrased_question"]),
        perturbed_answer=tuple(record["perturbed_answer"]),
        topic=record["topic"],
    )
    return Fact(record["family"], record["topic"], record["subject"], item)
