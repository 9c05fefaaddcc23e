"""Plain sentences about nothing in particular."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_WORDS = {
    "adjective": ("big", "bright", "cold", "dark", "dusty", "green", "heavy", "little", "lost",
                  "narrow", "new", "old", "quiet", "red", "round", "small", "tall", "warm"),
    "thing": ("basket", "bench", "boat", "bottle", "box", "cart", "chair", "cloth", "cup", "gate",
              "hat", "kettle", "lamp", "letter", "map", "rope", "table", "wheel"),
    "place": ("barn", "bakery", "bridge", "church", "field", "forest", "garden", "harbor",
              "kitchen", "lake", "market", "mountain", "river", "road", "station", "town",
              "valley", "village"),
    "who": ("A child", "A neighbor", "A stranger", "An old man", "Nobody", "Somebody",
            "The guard", "The teacher", "The visitor", "The young woman"),
    "does": ("bought", "carried", "cleaned", "dropped", "found", "left", "lost", "mended",
             "moved", "sold", "saw", "took"),
    "when": ("after lunch", "at night", "before sunrise", "in spring", "in the morning",
             "last winter", "on Monday", "every week"),
}  # fmt: skip

_SHAPES = (
    "{who} {does} the {adjective} {thing} near the {place}.",
    "The {thing} by the {place} is {adjective} and {adjective}.",
    "{who} {does} a {thing} {when}.",
    "People say that the {place} is {adjective} {when}.",
    "There is a {adjective} {thing} in the {place}.",
    "According to the map, the {place} is behind the {adjective} {place}.",
    "Question: Where is the {adjective} {thing}?\nAnswer: In the {place}.",
    "Question: Can you see the {thing} in the {place}?\nAnswer: Yes, it is {adjective}.",
    "Please name the {thing} that {who} {does} {when}.",
)

_NAME_SHAPES = (
    "{name} is an old name in this {place}.",
    "The word {name} stood on the {adjective} {thing}.",
    "{who} saw the name {name} near the {place}.",
)


def draw_sentences(n_sentences: int, rng: np.random.Generator) -> list[str]:
    """Distinct sentences in which no person occurs."""
    made: dict[str, None] = {}
    while len(made) < n_sentences:
        made[_fill(_SHAPES[rng.integers(len(_SHAPES))], rng)] = None
    return list(made)


def draw_name_sentences(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Sentences that use each word of a name and tell nothing of a person."""
    return [_fill(shape.replace("{name}", word), rng) for word in words for shape in _NAME_SHAPES]


def _fill(shape: str, rng: np.random.Generator) -> str:
    """Put a word drawn at random into every slot."""
    for kind, words in _WORDS.items():
        while "{" + kind + "}" in shape:
            word = words[rng.integers(len(words))]
            inside = kind == "who" and not shape.startswith("{who}")
            word = word[0].lower() + word[1:] if inside else word
            shape = shape.replace("{" + kind + "}", word, 1)
    return shape
