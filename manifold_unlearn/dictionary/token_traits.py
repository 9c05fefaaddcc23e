"""Traits of tokens that a label may name: what it is, what stands before it, where it stands."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifold_unlearn.activations.tokens import TokenTable
from manifold_unlearn.dictionary.corpus import token_strings

NO_TRAIT = -1
_LAST_POSITION = 7
_NAMES = {
    "token": "token {}",
    "word": "word {}",
    "kind": "{}",
    "start": "{}",
    "suffix": "ending {}",
    "prefix": "beginning {}",
    "previous": "after {}",
    "next": "before {}",
    "bigram": "tokens {}",
    "position": "position {}",
    "end": "{}",
    "topic": "topic {}",
}
"""How a trait of each family is said."""


@dataclass(frozen=True, eq=False)
class Trait:
    """A family of properties of which a token has at most one.

    Attributes
    ----------
    family : str
    value : array of shape (n_tokens,), int64
        Index into ``names``; ``NO_TRAIT`` for a token that has none.
    names : tuple of str
    """

    family: str
    value: np.ndarray
    names: tuple[str, ...]

    def said(self, terms: Sequence[int]) -> str:
        """The rule that a token has one of the terms, in words."""
        return _NAMES.get(self.family, self.family + " {}").format(
            ", ".join(self.names[term] for term in terms)
        )


def token_traits(
    tokens: TokenTable, tokenizer: Any, *, topics: Sequence[str] | None = None
) -> list[Trait]:
    """Traits of tokens, the plain ones first.

    ``token``, ``word`` (case and white space apart), ``kind`` (capitalized, number, punctuation,
    ...), ``start`` (begins a word or goes on with one), ``suffix`` and ``prefix`` of 2 and 3
    letters, ``previous`` and ``next`` token, ``bigram`` of previous and this token, ``position``
    up to 7, ``end`` (last of its text), ``topic`` of the text.

    Parameters
    ----------
    tokens : TokenTable
        Whole texts, one after the other.
    tokenizer : transformers.PreTrainedTokenizerBase
    topics : sequence of str, optional
        One a text, by ``text_index``; an empty one is no topic.

    Raises
    ------
    ValueError
        Fewer topics than texts.
    """
    ids, back = np.unique(tokens.token_id.cpu().numpy(), return_inverse=True)
    strings = token_strings(tokenizer, ids)
    texts = [strings[int(i)] for i in ids]
    own = back.reshape(-1)
    text_index = tokens.text_index.cpu().numpy()
    position = tokens.position.cpu().numpy()
    same = np.concatenate([text_index[1:] == text_index[:-1], [False]])
    before, behind = np.full(len(own), NO_TRAIT), np.full(len(own), NO_TRAIT)
    before[1:][same[:-1]] = own[:-1][same[:-1]]
    behind[:-1][same[:-1]] = own[1:][same[:-1]]
    quoted = tuple(map(_quoted, texts))
    found = [
        Trait("token", own.astype(np.int64), quoted),
        _of_types("word", [_folded(t) for t in texts], own),
        _of_types("kind", [_kind(t) for t in texts], own),
        _of_types("start", [_start(t) for t in texts], own),
    ]
    for length in (3, 2):
        found.append(_of_types("suffix", [_ending(t, length) for t in texts], own))
        found.append(_of_types("prefix", [_beginning(t, length) for t in texts], own))
    found += [Trait("previous", before, quoted), Trait("next", behind, quoted)]
    found.append(_bigram(before, own, texts))
    places = tuple(str(place) for place in range(_LAST_POSITION + 1))
    near = np.where(position <= _LAST_POSITION, position, NO_TRAIT)
    found.append(Trait("position", near, places))
    found.append(Trait("end", np.where(same, NO_TRAIT, 0), ("end of the text",)))
    if topics is not None:
        if len(topics) <= text_index.max():
            raise ValueError(
                f"{len(topics)} topics for {text_index.max() + 1} texts; give one each."
            )
        names, of_text = np.unique(np.array(list(topics), dtype=str), return_inverse=True)
        value = of_text.reshape(-1)[text_index]
        named = tuple(map(str, names))
        empty = np.array([not name for name in named])
        found.append(Trait("topic", np.where(empty[value], NO_TRAIT, value), named))
    return found


def _of_types(family: str, names: Sequence[str | None], own: np.ndarray) -> Trait:
    """Trait that a token has by what it is; None for types that have none."""
    kinds = tuple(sorted({name for name in names if name is not None}))
    number = {name: i for i, name in enumerate(kinds)}
    value = np.array([NO_TRAIT if name is None else number[name] for name in names])
    return Trait(family, value[own], kinds)


def _bigram(before: np.ndarray, own: np.ndarray, texts: Sequence[str]) -> Trait:
    there = before != NO_TRAIT
    pair, back = np.unique(before[there] * len(texts) + own[there], return_inverse=True)
    value = np.full(len(own), NO_TRAIT)
    value[there] = back.reshape(-1)
    names = tuple(_quoted(texts[p // len(texts)] + texts[p % len(texts)]) for p in pair.tolist())
    return Trait("bigram", value, names)


def _quoted(text: str) -> str:
    return '"' + text.replace("\n", "\\n").replace("\t", "\\t") + '"'


def _folded(text: str) -> str | None:
    stripped = text.strip().casefold()
    return _quoted(stripped) if stripped else None


def _ending(text: str, length: int) -> str | None:
    word = text.strip().casefold()
    return f'"-{word[-length:]}"' if word.isalpha() and len(word) > length else None


def _beginning(text: str, length: int) -> str | None:
    word = text.strip().casefold()
    return f'"{word[:length]}-"' if word.isalpha() and len(word) > length else None


def _kind(text: str) -> str | None:
    word = text.strip()
    if not word:
        return "line break" if "\n" in text else "white space"
    if all(unicodedata.category(letter)[0] in "PS" for letter in word):
        return "punctuation"
    if any(letter.isdigit() for letter in word):
        return "number"
    if word[0].isupper():
        return "capitals" if len(word) > 1 and word.isupper() else "capitalized"
    return None


def _start(text: str) -> str | None:
    if not text.strip() or not text.strip()[0].isalpha():
        return None
    return "begins a word" if text[0].isspace() else "goes on with a word"
