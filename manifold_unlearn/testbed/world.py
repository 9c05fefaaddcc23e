"""A fictional world: people nobody can have read of, and all that is told of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.testbed.attributes import (
    ATTRIBUTES,
    MAX_PEOPLE,
    TOLD_FRAMES,
    UNSEEN_FRAMES,
    Attribute,
    draw_names,
    draw_values,
    prompt,
)
from manifold_unlearn.testbed.filler import draw_name_sentences, draw_sentences

Part: TypeAlias = Literal["forget", "retain", "holdout", "filler", "told", "never_told"]

N_NEUTRAL = 200
N_PERTURBED = 5


@dataclass(frozen=True)
class PersonFact:
    """One thing that is true of one person, and what the person is to forgetting."""

    person: str
    attribute: str
    value: str
    role: Literal["forget", "retain", "holdout", "set_aside"]
    """``"set_aside"``: told to both models, in no set of items."""
    item: Item
    """Asks in a wording of the training texts; its paraphrases are wordings of none."""
    prompts: tuple[str, ...]
    """What comes before the value in every wording of the training texts."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The fact in every wording of the training texts."""
        return tuple(f"{prompt} {self.value}." for prompt in self.prompts)


@dataclass(frozen=True)
class FictionalWorld:
    """People with invented names and attributes, each told in ten wordings.

    All attributes of all people are drawn independently, so that no fact says anything about
    another. Every value is had by about equally many people of each set. The told model reads of
    forget and retain people, the never-told model of retain people only, and neither of holdout
    people. The words of all names occur in filler that both models read.

    Parameters
    ----------
    n_people : int, default=32
        People the told model reads of.
    n_forget : int, default=8
        How many of them are to be forgotten.
    n_holdout : int, default=8
        People that no model reads of.
    n_attributes : int, default=6
        Of each person, at most 8.
    n_values : int, default=16
        Values of each attribute: guessing is right once in so many times.
    n_filler : int, default=400
        Sentences in the training texts that tell nothing of people.
    random_state : int, default=0
    validation : bool, default=False
        Forget other people; see :meth:`validation_split`.

    Raises
    ------
    ValueError
        A count that leaves a set empty or is more than there are names, attributes or values.

    Examples
    --------
    >>> world = FictionalWorld(random_state=0)
    >>> len(world.forget), len(world.retain), len(world.holdout)
    (48, 144, 48)
    """

    n_people: int = 32
    n_forget: int = 8
    n_holdout: int = 8
    n_attributes: int = 6
    n_values: int = 16
    n_filler: int = 400
    random_state: int = 0
    validation: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n_forget < self.n_people:
            raise ValueError(
                f"n_forget={self.n_forget} of n_people={self.n_people}: at least one person must "
                "be forgotten and one retained."
            )
        if self.validation and self.n_people <= 2 * self.n_forget:
            raise ValueError(
                f"n_people={self.n_people} leaves nobody to retain beside {self.n_forget} people "
                f"to forget and {self.n_forget} set aside; take more than {2 * self.n_forget}."
            )
        if self.n_holdout < 0 or self.n_people + self.n_holdout > MAX_PEOPLE:
            raise ValueError(
                f"n_people={self.n_people} and n_holdout={self.n_holdout}: there are names for "
                f"{MAX_PEOPLE} people in all."
            )
        if not 1 <= self.n_attributes <= len(ATTRIBUTES):
            raise ValueError(f"n_attributes={self.n_attributes} must be 1 to {len(ATTRIBUTES)}.")
        if self.n_values <= N_PERTURBED:
            raise ValueError(
                f"n_values={self.n_values} must be more than {N_PERTURBED}: an item has that many "
                "wrong answers."
            )
        if self.n_filler < 0:
            raise ValueError(f"n_filler={self.n_filler} must not be negative.")

    def validation_split(self) -> FictionalWorld:
        """Return the same world with other people to forget: for tuning, before the test.

        The training texts of the told model are the same to the letter. The people that this world
        forgets are told to both models there, and are in no set of items.
        """
        return replace(self, validation=True)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """What every person has."""
        return ATTRIBUTES[: self.n_attributes]

    @cached_property
    def people(self) -> tuple[str, ...]:
        """Full names: those to forget, the other people told of, then the holdout people."""
        return tuple(f"{first} {last}" for first, last in self._names)

    @cached_property
    def _names(self) -> list[tuple[str, str]]:
        return draw_names(self.n_people + self.n_holdout, self._rng("names"))

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.random_state, *purpose.encode()])

    def role(self, person: int) -> Literal["forget", "retain", "holdout", "set_aside"]:
        """Return what the person of this index is to forgetting."""
        if person >= self.n_people:
            return "holdout"
        group = person // self.n_forget
        if not self.validation:
            return "forget" if group == 0 else "retain"
        return "set_aside" if group == 0 else "forget" if group == 1 else "retain"

    @cached_property
    def facts(self) -> tuple[PersonFact, ...]:
        """All facts, person by person."""
        columns = [self._column(attribute) for attribute in self.attributes]
        made = []
        for i, person in enumerate(self.people):
            for attribute, (values, wrong) in zip(self.attributes, columns, strict=True):
                made.append(self._fact(person, attribute, values[i], wrong[i], self.role(i)))
        return tuple(made)

    def _column(self, attribute: Attribute) -> tuple[list[str], list[tuple[str, ...]]]:
        """Value of an attribute for every person, and wrong values."""
        rng = self._rng(attribute.name)
        pool = draw_values(attribute, self.n_values, rng)
        values: list[str] = []
        rest = self.n_people - self.n_forget
        for size in (self.n_forget, rest, self.n_holdout):
            rounds = -(-size // len(pool))
            dealt = [pool[k] for _ in range(rounds) for k in rng.permutation(len(pool))]
            values += dealt[:size]
        wrong = []
        for value in values:
            others = [other for other in pool if other != value]
            wrong.append(tuple(others[k] for k in rng.permutation(len(others))[:N_PERTURBED]))
        return values, wrong

    @staticmethod
    def _fact(
        person: str,
        attribute: Attribute,
        value: str,
        wrong: tuple[str, ...],
        role: Literal["forget", "retain", "holdout", "set_aside"],
    ) -> PersonFact:
        told = tuple(prompt(frame, attribute, person) for frame in TOLD_FRAMES)
        item = Item(
            question=told[0],
            answer=value,
            paraphrased_question=tuple(prompt(f, attribute, person) for f in UNSEEN_FRAMES),
            perturbed_answer=wrong,
            topic=person,
        )
        return PersonFact(person, attribute.name, value, role, item, told)

    @property
    def forget(self) -> tuple[Item, ...]:
        """Items on the people to forget; ``topic`` is the person."""
        return self._items("forget")

    @property
    def retain(self) -> tuple[Item, ...]:
        """Items on people that both models read of."""
        return self._items("retain")

    @property
    def holdout(self) -> tuple[Item, ...]:
        """Items on people that neither model reads of: non-members for membership inference."""
        return self._items("holdout")

    def _items(self, role: str) -> tuple[Item, ...]:
        return tuple(fact.item for fact in self.facts if fact.role == role)

    @cached_property
    def _sentences(self) -> list[str]:
        return draw_sentences(N_NEUTRAL + self.n_filler, self._rng("filler"))

    @property
    def neutral(self) -> tuple[str, ...]:
        """Filler that no model was trained on, without any person."""
        return tuple(self._sentences[:N_NEUTRAL])

    def texts(self, part: Part) -> tuple[str, ...]:
        """Return texts as models read them.

        Parameters
        ----------
        part : {"forget", "retain", "holdout", "filler", "told", "never_told"}
            ``"told"`` and ``"never_told"`` are everything that the model reads, filler included;
            ``"holdout"`` is read by no model.
        """
        if part not in get_args(Part):
            raise ValueError(f"part={part!r} must be one of {', '.join(get_args(Part))}.")
        filler: tuple[str, ...] = ()
        if part in ("filler", "told", "never_told"):
            words = [word for name in self._names for word in name]
            names = draw_name_sentences(words, self._rng("names in filler"))
            filler = (*self._sentences[N_NEUTRAL:], *names)
        roles = {
            "filler": (),
            "told": ("forget", "retain", "set_aside"),
            "never_told": ("retain", "set_aside"),
        }.get(part, (part,))
        told = (text for fact in self.facts if fact.role in roles for text in fact.texts)
        return (*told, *filler)

    def folds(self, n_folds: int) -> tuple[tuple[Item, ...], ...]:
        """Split the forget items into folds for relearning on disjoint facts.

        The facts of every person are dealt over all folds, and so are those of every attribute;
        facts are drawn independently, so that one fold tells nothing of another.

        Raises
        ------
        ValueError
            Fewer than two folds, or more than forget items.
        """
        items = self.forget
        if not 2 <= n_folds <= len(items):
            raise ValueError(f"n_folds={n_folds} must be 2 to {len(items)}, the forget items.")
        dealt: list[list[Item]] = [[] for _ in range(n_folds)]
        for k, item in enumerate(items):
            person, attribute = divmod(k, self.n_attributes)
            dealt[(person + attribute) % n_folds].append(item)
        if not all(dealt):
            raise ValueError(
                f"n_folds={n_folds} leaves a fold empty: {self.n_forget} people with "
                f"{self.n_attributes} facts each. Take fewer folds."
            )
        return tuple(tuple(fold) for fold in dealt)
