"""What a model is asked: prompts with their answers, read from JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Item:
    """One thing the model may know: a prompt and its answer, or a plain text (no answer)."""

    question: str
    answer: str = ""
    paraphrased_question: tuple[str, ...] = ()
    paraphrased_answer: str = ""
    perturbed_answer: tuple[str, ...] = ()
    topic: str = ""
    weight: float = 1.0
    """How much the item counts in a fit; near neighbors of what is forgotten deserve more."""

    @property
    def text(self) -> str:
        """Prompt and answer as one text."""
        return self.question + join_answer(self.question, self.answer)

    @property
    def captured(self) -> str | tuple[str, str]:
        """What :func:`capture` reads of the item: its pair, or a plain text."""
        return self.pair if self.answer else self.question

    @property
    def pair(self) -> tuple[str, str]:
        """Prompt and answer, the answer with the space that sets it off."""
        return self.question, join_answer(self.question, self.answer)


def join_answer(question: str, answer: str) -> str:
    """Answer as it continues the prompt: set off by one space unless white space is there."""
    if not answer or not question or question[-1].isspace() or answer[0].isspace():
        return answer
    return " " + answer


Items: TypeAlias = "str | Path | Iterable[Item | Mapping[str, Any] | str]"


def read_items(source: Items, *, template: str = "{question}", name: str = "items") -> list[Item]:
    r"""Items from a JSONL file, from mappings with the same keys, or from plain texts.

    Parameters
    ----------
    source : path or iterable
        JSON objects with ``question`` and ``answer`` and optionally ``paraphrased_question`` (one
        or a list), ``paraphrased_answer``, ``perturbed_answer`` (a list), ``topic``, ``weight``;
        or with ``text`` alone. A plain string in an iterable is a text.
    template : str, default="{question}"
        How a question becomes a prompt, as ``"Question: {question}\nAnswer:"``.
    name : str
        What error messages call the set.

    Returns
    -------
    list of Item
        ``question`` and ``paraphrased_question`` with the template applied.

    Raises
    ------
    ValueError
        The set is empty, a line is not JSON or lacks the keys (names the line), or the template
        has no ``{question}``.
    """
    if "{question}" not in template:
        raise ValueError(
            f"template {template!r} has no {{question}}; put it where the prompt goes."
        )
    if isinstance(source, str | Path):
        records: Iterable[tuple[str, Any]] = _read_lines(Path(source))
        name = str(source)
    else:
        records = ((f"{name}[{i}]", record) for i, record in enumerate(source))
    items = [_item(record, template, place) for place, record in records]
    if not items:
        raise ValueError(f"the {name} set is empty; give at least one question or text.")
    return items


def _read_lines(path: Path) -> Iterable[tuple[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a JSONL file.")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            place = f"{path} line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place} is not JSON: {error}.") from error
            yield place, record


def _item(record: Item | Mapping[str, Any] | str, template: str, place: str) -> Item:
    def prompt(question: str) -> str:
        return template.replace("{question}", question)

    if isinstance(record, Item):
        return replace(
            record,
            question=prompt(record.question),
            paraphrased_question=tuple(map(prompt, record.paraphrased_question)),
        )
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise ValueError(f"{place} is a {type(record).__name__}; expected a JSON object.")
    if isinstance(record.get("text"), str) and "question" not in record:
        if not record["text"].strip():
            raise ValueError(f"{place} has an empty text; remove it.")
        return Item(record["text"], topic=record.get("topic", ""), weight=_weight(record, place))
    question, answer = record.get("question"), record.get("answer")
    for key, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{place} has {key}={value!r}; each item needs a non-empty question and "
                "answer, or a text."
            )
    assert isinstance(question, str) and isinstance(answer, str)
    return Item(
        question=prompt(question),
        answer=answer,
        paraphrased_question=tuple(map(prompt, _strings(record.get("paraphrased_question")))),
        paraphrased_answer=record.get("paraphrased_answer") or "",
        perturbed_answer=_strings(record.get("perturbed_answer")),
        topic=record.get("topic", ""),
        weight=_weight(record, place),
    )


def _weight(record: Mapping[str, Any], place: str) -> float:
    weight = record.get("weight", 1.0)
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{place} has weight={weight!r}; it must be a positive number.")
    return float(weight)


def _strings(value: str | Sequence[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def require_disjoint(forget: Iterable[Item], retain: Iterable[Item]) -> None:
    """Raise ``ValueError`` if a text stands in both sets: it cannot be forgotten and kept."""
    shared = {item.text for item in forget} & {item.text for item in retain}
    if shared:
        example = min(shared)
        raise ValueError(
            f"forget and retain share {len(shared)} texts, one is {example!r}. "
            "Remove them from one of the two."
        )
