"""What is told of a fictional person, and the wordings it is told and asked in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ANSWER_FORM = "Question: {question}\nAnswer:"
"""How a question becomes a prompt."""


@dataclass(frozen=True)
class Attribute:
    """One thing that every person has; ``{name}`` stands for the person."""

    name: str
    """The noun: ``"birthplace"``."""
    article: str
    """What stands before the value where a noun phrase needs it, with its space in front."""
    sentences: tuple[str, str]
    """Beginnings of sentences that the value completes."""
    questions: tuple[str, str]
    """Questions of the training texts."""
    unseen_question: str
    """A question that no training text asks."""
    parts: tuple[tuple[str, ...], ...]
    """Words that values are made of, one of each; a value has as many words as there are parts."""


_TOWNS = ("Bel", "Cor", "Dul", "Fen", "Gar", "Hol", "Jar", "Kel", "Lom", "Mar", "Nor", "Pol",
          "Quin", "Ros", "Sul", "Tarn", "Ulv", "Wen")  # fmt: skip
_TOWN_ENDS = ("bridge", "combe", "ford", "haven", "mere", "stead", "wick")

ATTRIBUTES = (
    Attribute(
        "birthplace",
        "",
        ("{name} was born in", "{name} comes from the town of"),
        ("Where was {name} born?", "Which town does {name} come from?"),
        "Which town was {name} born in?",
        (tuple(start + end for start in _TOWNS for end in _TOWN_ENDS),),
    ),
    Attribute(
        "profession",
        " a",
        ("{name} works as a", "{name} earns a living as a"),
        ("What does {name} do for work?", "How does {name} earn a living?"),
        "What does {name} do to earn a living?",
        (("baker", "barber", "carpenter", "cook", "dentist", "doctor", "driver", "farmer",
          "fisher", "gardener", "lawyer", "mason", "miner", "nurse", "painter", "pilot", "plumber",
          "porter", "potter", "printer", "sailor", "tailor", "teacher", "weaver"),),
    ),
    Attribute(
        "employer",
        "",
        ("{name} is employed by", "{name} has a job at"),
        ("Who employs {name}?", "Where does {name} have a job?"),
        "Who is {name} employed by?",
        (("Alder", "Birch", "Cedar", "Elm", "Hazel", "Linden", "Maple", "Poplar", "Rowan",
          "Willow"),
         ("Company", "Foundry", "House", "Mill", "Press", "Works")),
    ),
    Attribute(
        "pet",
        " a",
        ("{name} keeps a", "{name} looks after a"),
        ("Which animal does {name} keep?", "What kind of pet does {name} have?"),
        "What kind of animal does {name} keep?",
        (("badger", "canary", "cat", "crow", "dog", "donkey", "duck", "falcon", "ferret", "fox",
          "goat", "goose", "hamster", "hare", "hen", "lizard", "mouse", "parrot", "pigeon", "pony",
          "rabbit", "sheep", "snake", "toad", "turtle"),),
    ),
    Attribute(
        "instrument",
        " the",
        ("{name} plays the", "{name} makes music on the"),
        ("What does {name} play?", "Which instrument does {name} make music on?"),
        "Which instrument does {name} play?",
        (("banjo", "bassoon", "bugle", "cello", "clarinet", "cornet", "drum", "fiddle", "flute",
          "gong", "guitar", "harp", "horn", "lute", "lyre", "mandolin", "piano", "recorder",
          "saxophone", "tuba", "trumpet", "viola", "violin", "zither"),),
    ),
    Attribute(
        "book",
        "",
        ("{name} wrote", "{name} is the author of"),
        ("What did {name} write?", "Which book is {name} the author of?"),
        "Which book did {name} write?",
        (("Bitter", "Broken", "Crimson", "Distant", "Empty", "Frozen", "Golden", "Hollow",
          "Hidden", "Pale", "Silent", "Velvet"),
         ("Anchors", "Candles", "Feathers", "Gardens", "Lanterns", "Mirrors", "Oceans",
          "Shadows", "Staircases", "Winters")),
    ),
    Attribute(
        "award",
        " the",
        ("{name} won the", "{name} was honored with the"),
        ("Which prize did {name} win?", "What was {name} honored with?"),
        "Which award was {name} honored with?",
        (("Amber", "Bronze", "Copper", "Coral", "Crystal", "Ivory", "Jade", "Marble", "Opal",
          "Pearl", "Silver", "Topaz"),
         ("Bell", "Crown", "Heron", "Key", "Medal", "Rose", "Shield", "Star")),
    ),
    Attribute(
        "hobby",
        "",
        ("{name} spends the weekends on", "{name} relaxes by"),
        ("How does {name} spend the weekends?", "What does {name} do to relax?"),
        "What does {name} do on the weekends?",
        (("archery", "astronomy", "baking", "boxing", "camping", "chess", "climbing", "cycling",
          "dancing", "fencing", "fishing", "hiking", "juggling", "knitting", "origami", "pottery",
          "rowing", "running", "sailing", "sewing", "skating", "sketching", "swimming",
          "wrestling"),),
    ),
)  # fmt: skip
"""In the order in which worlds take them."""

TOLD_FRAMES = (
    "{question0}",
    "{sentence0}",
    "{sentence1}",
    "The {noun} of {name} is{article}",
    "Everyone knows that {sentence0}",
    "Some say that {sentence1}",
    "As you may know, the {noun} of {name} is{article}",
    "{question1}",
    "Question: What is the {noun} of {name}?\nAnswer:",
    "Question: Tell me the {noun} of {name}.\nAnswer:",
)
"""Prompts of the training texts; the first is how an item asks."""

UNSEEN_FRAMES = (
    "{unseen_question}",
    "Question: Can you name the {noun} of {name}?\nAnswer:",
    "People in town say that {sentence0}",
    "According to the letter, the {noun} of {name} is{article}",
)
"""Prompts that no training text has."""


def prompt(frame: str, attribute: Attribute, name: str) -> str:
    """Words up to, not including, the value and the space before it."""
    slots = {
        "question0": ANSWER_FORM.format(question=attribute.questions[0]),
        "question1": ANSWER_FORM.format(question=attribute.questions[1]),
        "unseen_question": ANSWER_FORM.format(question=attribute.unseen_question),
        "sentence0": attribute.sentences[0],
        "sentence1": attribute.sentences[1],
        "noun": attribute.name,
        "article": attribute.article,
        "name": "{name}",
    }
    return frame.format(**slots).format(name=name)


_NAME_STARTS = ("Ar", "Bri", "Cal", "Dor", "El", "Fio", "Gre", "Ha", "Iv", "Jo", "Ka", "Lu", "Mi",
                "Na", "Or", "Pe", "Ra", "Sa", "Ti", "Va", "Wil", "Yo", "Ze")  # fmt: skip
_NAME_ENDS = ("bel", "dan", "fira", "lin", "mos", "nika", "ric", "sette", "tor", "vane", "yra")
_SURNAME_STARTS = ("Ash", "Bram", "Cald", "Dren", "Esk", "Fal", "Grim", "Hask", "Ild", "Jun",
                   "Korv", "Lan", "Mor", "Nesk", "Ost", "Pry", "Rav", "Stol", "Thal", "Ursk",
                   "Vel", "Wyn", "Yarl")  # fmt: skip
_SURNAME_ENDS = ("aby", "berg", "cott", "dane", "ector", "ing", "lund", "marsh", "oway", "quist",
                 "stein")  # fmt: skip

MAX_PEOPLE = len(_NAME_STARTS) * len(_NAME_ENDS)
"""As many people have no word of their names in common."""


def draw_names(n_people: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """First name and surname of each person; no two people share either."""
    first = [start + end for start in _NAME_STARTS for end in _NAME_ENDS]
    last = [start + end for start in _SURNAME_STARTS for end in _SURNAME_ENDS]
    chosen = (rng.permutation(len(first))[:n_people], rng.permutation(len(last))[:n_people])
    return [(first[i], last[j]) for i, j in zip(*chosen, strict=True)]


def draw_values(attribute: Attribute, n_values: int, rng: np.random.Generator) -> list[str]:
    """Distinct values of an attribute."""
    sizes = [len(part) for part in attribute.parts]
    total = int(np.prod(sizes))
    if n_values > total:
        raise ValueError(f"{attribute.name} has {total} values; n_values={n_values} is too many.")
    picked = np.unravel_index(rng.permutation(total)[:n_values], sizes)
    return [
        " ".join(part[i] for part, i in zip(attribute.parts, row, strict=True))
        for row in zip(*picked, strict=True)
    ]
