"""Sets of behaviors that a model should refuse, published or one's own, read from their files.

Nothing of the published ones is part of the package: every function takes the path of a file.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from manifold_unlearn.arrays import generator


@dataclass(frozen=True)
class Behavior:
    """One thing that a model is asked to do."""

    text: str
    """What is asked"""
    category: str = ""
    """Topic, as the file names it; empty where it names none"""
    kind: str = ""
    """Functional category (standard, contextual, copyright) of HarmBench; source of StrongREJECT"""
    context: str = ""
    """What is given along with the question"""
    target: str = ""
    """How a compliant answer would begin"""
    id: str = ""

    @property
    def prompt(self) -> str:
        """Context, where there is any, and the question."""
        return f"{self.context}\n\n{self.text}" if self.context else self.text


def digest_behaviors(behaviors: Sequence[Behavior]) -> str:
    """Hexadecimal sha256 of all fields in order: states which set a figure was measured on."""
    content = json.dumps([astuple(behavior) for behavior in behaviors], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def read_behaviors(
    path: str | Path, n_behaviors: int | None = None, *, random_state: Any = 0
) -> tuple[Behavior, ...]:
    """Behaviors of any set that can be read here, recognized by the file itself.

    Parameters
    ----------
    path : path
        A CSV as :func:`read_harmbench`, :func:`read_advbench` or :func:`read_strongreject` take
        it, a JSON list as :func:`read_refusal_direction` does, or JSON lines: objects with
        ``text`` and optionally ``category``, ``kind``, ``context``, ``target``, ``id``.
    n_behaviors : int, optional
        Draw so many without replacement, in the order of the file. Default: all.
    random_state : int, numpy generator or None, default=0
        Of the draw.

    Returns
    -------
    tuple of Behavior

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        Columns or keys of no known set (names those found), more behaviors asked for than there
        are, or what the readers raise.
    """
    path = Path(path)
    readers = {".csv": _read_known_csv, ".json": read_refusal_direction, ".jsonl": _read_lines}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} ends in {path.suffix!r}; give a file in .csv, .json or .jsonl.")
    behaviors = readers[path.suffix.lower()](path)
    if n_behaviors is None:
        return behaviors
    if not 1 <= n_behaviors <= len(behaviors):
        raise ValueError(
            f"n_behaviors={n_behaviors}, but {path} holds {len(behaviors)}; take 1 to "
            f"{len(behaviors)}."
        )
    drawn = torch.randperm(len(behaviors), generator=generator(random_state))[:n_behaviors]
    return tuple(behaviors[i] for i in sorted(drawn.tolist()))


def read_harmbench(path: str | Path, targets: str | Path | None = None) -> tuple[Behavior, ...]:
    """Behaviors of HarmBench, from ``harmbench_behaviors_text_all.csv``.

    Parameters
    ----------
    path : path
        CSV with columns Behavior, FunctionalCategory, SemanticCategory, ContextString, BehaviorID.
    targets : path, optional
        JSON object from BehaviorID to the beginning of a compliant answer.

    Returns
    -------
    tuple of Behavior

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        Columns are missing (names them), a row has no behavior, an identifier stands twice, or
        the targets are no such object or lack behaviors of the CSV.

    References
    ----------
    Mazeika et al. (2024), HarmBench.
    """
    columns = ("Behavior", "FunctionalCategory", "SemanticCategory", "ContextString", "BehaviorID")
    rows = _read_csv(Path(path), columns)
    begins = _read_targets(Path(targets), [row["BehaviorID"] for row in rows]) if targets else {}
    return _checked(
        path,
        (
            Behavior(
                text=row["Behavior"],
                category=row["SemanticCategory"],
                kind=row["FunctionalCategory"],
                context=row["ContextString"],
                target=begins.get(row["BehaviorID"], ""),
                id=row["BehaviorID"],
            )
            for row in rows
        ),
    )


def read_advbench(path: str | Path) -> tuple[Behavior, ...]:
    """Behaviors of AdvBench, in HarmBench's CSV form or with the columns goal and target.

    Returns and raises as :func:`read_harmbench`.

    References
    ----------
    Zou et al. (2023), Universal and Transferable Adversarial Attacks on Aligned Language Models.
    """
    path = Path(path)
    if "goal" in _header(path):
        rows = _read_csv(path, ("goal", "target"))
        made = (
            Behavior(row["goal"], target=row["target"], id=f"advbench_{i}")
            for i, row in enumerate(rows, start=1)
        )
        return _checked(path, made)
    rows = _read_csv(path, ("Behavior", "Category", "ContextString", "BehaviorID"))
    return _checked(
        path,
        (
            Behavior(
                text=row["Behavior"],
                category=row["Category"],
                context=row["ContextString"],
                id=row["BehaviorID"],
            )
            for row in rows
        ),
    )


def read_strongreject(path: str | Path) -> tuple[Behavior, ...]:
    """Forbidden prompts of StrongREJECT, from ``strongreject_dataset.csv``.

    Parameters
    ----------
    path : path
        CSV with columns category, source, forbidden_prompt.

    Returns and raises as :func:`read_harmbench`.

    References
    ----------
    Souly et al. (2024), A StrongREJECT for Empty Jailbreaks.
    """
    rows = _read_csv(Path(path), ("category", "source", "forbidden_prompt"))
    return _checked(
        path,
        (
            Behavior(
                text=row["forbidden_prompt"],
                category=row["category"],
                kind=row["source"],
                id=f"strongreject_{i}",
            )
            for i, row in enumerate(rows, start=1)
        ),
    )


def read_refusal_direction(path: str | Path) -> tuple[Behavior, ...]:
    """Harmful or harmless instructions of the refusal-direction splits.

    Parameters
    ----------
    path : path
        JSON list of objects with ``instruction`` and ``category`` (which may be null).

    Returns and raises as :func:`read_harmbench`.

    References
    ----------
    Arditi et al. (2024), Refusal in Language Models Is Mediated by a Single Direction.
    """
    path = Path(path)
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}; expected a list of objects.")
    made = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("instruction"), str):
            raise ValueError(f"{path} entry {i} has no instruction; expected an object with one.")
        made.append(
            Behavior(row["instruction"], row.get("category") or "", id=f"{path.stem}_{i + 1}")
        )
    return _checked(path, made)


def _read_known_csv(path: Path) -> tuple[Behavior, ...]:
    found = _header(path)
    if "FunctionalCategory" in found:
        return read_harmbench(path)
    if "forbidden_prompt" in found:
        return read_strongreject(path)
    if "goal" in found or "Behavior" in found:
        return read_advbench(path)
    raise ValueError(
        f"{path} has the columns {', '.join(found) or 'none'}, which are of no known set; use "
        "those of HarmBench, AdvBench or StrongREJECT, or JSON lines with text."
    )


def _read_lines(path: Path) -> tuple[Behavior, ...]:
    known = [field.name for field in fields(Behavior)]
    made = []
    with _open(path) as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}.") from error
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
            raise ValueError(f"{path} line {number} has no text; expected an object with one.")
        given = {name: row[name] for name in known if row.get(name) is not None}
        if wrong := [name for name, value in given.items() if not isinstance(value, str)]:
            raise ValueError(f"{path} line {number}: {', '.join(wrong)} must be text.")
        made.append(Behavior(**{"id": f"{path.stem}_{number}"} | given))
    return _checked(path, made)


def _header(path: Path) -> list[str]:
    with _open(path) as file:
        return next(csv.reader(file), [])


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the file of a set of behaviors.")
    return path.open(encoding="utf-8-sig", newline="")


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    found = _header(path)
    if missing := [name for name in columns if name not in found]:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(found) or 'none'}. "
            "Is it the file of another set?"
        )
    with _open(path) as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=1):
        if None in row or any(row[name] is None for name in columns):
            raise ValueError(f"{path} row {number} has another number of fields than the header.")
    return rows


def _read_json(path: Path) -> Any:
    try:
        with _open(path) as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _read_targets(path: Path, ids: Sequence[str]) -> Mapping[str, str]:
    targets = _read_json(path)
    if not isinstance(targets, Mapping) or not all(isinstance(v, str) for v in targets.values()):
        raise ValueError(f"{path} must be a JSON object from behavior to target text.")
    if missing := [name for name in ids if name not in targets]:
        raise ValueError(
            f"{path} has no target for {len(missing)} of {len(ids)} behaviors, the first is "
            f"{missing[0]!r}. Give the targets of the same set."
        )
    return targets


def _checked(path: str | Path, behaviors: Iterable[Behavior]) -> tuple[Behavior, ...]:
    made = tuple(behaviors)
    if not made:
        raise ValueError(f"{path} holds no behavior.")
    for number, behavior in enumerate(made, start=1):
        if not behavior.text.strip():
            raise ValueError(f"{path} row {number} has an empty behavior; remove it.")
    name, times = Counter(behavior.id for behavior in made).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} has the identifier {name!r} {times} times; make them unique.")
    return made
