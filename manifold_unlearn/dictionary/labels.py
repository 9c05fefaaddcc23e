"""Labels of latents without a judge: the rule of tokens and contexts that foretells firing best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from manifold_unlearn.dictionary.code_rows import without_zeros
from manifold_unlearn.dictionary.contexts import Context, FeatureContexts
from manifold_unlearn.dictionary.corpus_codes import CorpusCode
from manifold_unlearn.dictionary.token_traits import NO_TRAIT, Trait, token_traits

NOTHING = "none"
"""Text of the label where no rule is better than chance."""
_MAX_STEPS = 20
_LEAST_SHARE = 0.02  # of a latent's firing: a term of less says nothing of it


@dataclass(frozen=True)
class LatentLabel:
    """The best rule for when a latent fires, and how good it is on texts it was not made from."""

    latent: int
    text: str
    """Such as ``token " sea", " ocean"``, or ``NOTHING``."""
    family: str
    """Family of the rule; empty for none."""
    terms: tuple[str, ...]
    """The one that holds most of the firing first."""
    precision: float
    """Of the tokens that the rule names, the share on which the latent fires."""
    recall: float
    """Of the tokens on which the latent fires, the share that the rule names."""
    f1: float
    control: float
    """Largest F1 of the rules found in the same way for shuffled firing."""
    n_fires: int
    """Tokens of the texts kept apart on which it fires."""

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return vars(self) | {"terms": list(self.terms)}


def label_latents(
    corpus: CorpusCode,
    tokenizer: Any,
    *,
    latents: Sequence[int] | None = None,
    topics: Sequence[str] | None = None,
    traits: Sequence[Trait] | None = None,
    max_terms: int = 8,
    strength: float = 0.0,
    n_shuffles: int = 10,
    min_f1: float = 0.3,
    min_fires: int = 5,
    random_state: int = 0,
) -> list[LatentLabel]:
    """Label of every latent from a corpus, by rules of one family of traits each.

    A rule names up to ``max_terms`` terms, such as tokens, each of which holds at least 2 % of
    where the latent fires; it foretells that the latent fires where a token has one of them. In
    half of the texts each family's terms of largest F1 are found (exactly, by Dinkelbach's
    iteration), in a quarter the family is chosen, in the last quarter the figures are measured. A
    rule is a label if its F1 there is at least ``min_f1`` and above that of every control: the
    same search where firing is moved to tokens drawn at random.

    Parameters
    ----------
    corpus : CorpusCode
        Of :func:`~manifold_unlearn.dictionary.corpus_codes.corpus_codes`. First and special tokens
        do not count, but are seen by their neighbors.
    tokenizer : transformers.PreTrainedTokenizerBase
    latents : sequence of int, optional
        Numbers in the dictionary of the code's latents. Default: 0, 1, ...
    topics : sequence of str, optional
        Of each text.
    traits : sequence of Trait, optional
        Further families, or other ones than those of
        :func:`~manifold_unlearn.dictionary.token_traits.token_traits` if ``tokenizer`` is None.
    max_terms : int, default=8
    strength : float, default=0.0
        Fires where the absolute activation exceeds this share of its maximum.
    n_shuffles : int, default=10
        Controls: a latent that knows nothing is labeled at most once in ``n_shuffles + 1``.
    min_f1 : float, default=0.3
    min_fires : int, default=5
        Latents that fire less often in a part of the texts get no label.
    random_state : int, default=0

    Returns
    -------
    list of LatentLabel
        In the order of the code's latents.

    Raises
    ------
    ValueError
        Fewer than 4 texts, a parameter out of range, latents or traits that do not fit.

    References
    ----------
    Dinkelbach (1967), On nonlinear fractional programming (sets of largest F1).
    """
    code, m = without_zeros(corpus.code), corpus.code.n_latents
    names = np.arange(m) if latents is None else np.asarray(latents, dtype=np.int64).reshape(-1)
    if len(names) != m:
        raise ValueError(f"{len(names)} numbers in latents for the {m} latents of the code.")
    if max_terms < 1 or n_shuffles < 1 or min_fires < 1 or not 0 <= strength < 1:
        raise ValueError(
            f"max_terms={max_terms}, n_shuffles={n_shuffles} and min_fires={min_fires} must be at "
            f"least 1, strength={strength} in [0, 1)."
        )
    families = [] if tokenizer is None else token_traits(corpus.tokens, tokenizer, topics=topics)
    families += list(traits or ())
    if not families or any(len(one.value) != len(corpus.tokens) for one in families):
        raise ValueError(
            f"traits must hold at least one family, each of {len(corpus.tokens)} tokens; got "
            f"{[len(one.value) for one in families]}."
        )
    row, latent = code.row.cpu().numpy(), code.latent.cpu().numpy()
    value = np.abs(code.value.detach().float().cpu().numpy())
    largest = np.zeros(m, dtype=value.dtype)
    np.maximum.at(largest, latent, value)
    strong = value > strength * largest[latent]
    row, latent = row[strong], latent[strong]
    part = _parts(corpus, random_state)
    found = _searched(families, row, latent, part, m, max_terms)
    control = np.zeros(m)
    shuffle = np.random.default_rng([random_state, 1])
    for _ in range(n_shuffles):
        moved = np.arange(len(part))
        for one in range(3):
            mine = np.flatnonzero(part == one)
            moved[mine] = shuffle.permutation(mine)
        control = np.maximum(
            control, _searched(families, moved[row], latent, part, m, max_terms).f1
        )
    fires = np.stack([np.bincount(latent[part[row] == one], minlength=m) for one in range(3)])
    made = []
    for i, name in enumerate(names.tolist()):
        family = families[int(found.family[i])]
        terms = found.terms[i]
        label = LatentLabel(
            latent=name,
            text=family.said(terms),
            family=family.family,
            terms=tuple(family.names[term] for term in terms),
            precision=float(found.precision[i]),
            recall=float(found.recall[i]),
            f1=float(found.f1[i]),
            control=float(control[i]),
            n_fires=int(fires[2, i]),
        )
        holds = label.f1 > label.control and label.f1 >= min_f1
        if not (holds and terms and fires[:, i].min() >= min_fires):
            label = replace(label, text=NOTHING, family="", terms=())
        made.append(label)
    return made


def judged_labels(
    contexts: FeatureContexts,
    judge: Callable[[list[Context]], str],
    *,
    latents: Sequence[int] | None = None,
    n: int = 10,
) -> dict[int, str]:
    """Labels of a judge, such as a language model, that is shown the strongest contexts.

    Parameters
    ----------
    contexts : FeatureContexts
    judge : callable
        From contexts, the strongest first, to a text.
    latents : sequence of int, optional
        Default: all in ``contexts`` that fire.
    n : int, default=10
        Contexts shown.

    Raises
    ------
    ValueError
        A latent that was not looked for or never fires, or an answer that is no text.
    """
    wanted = contexts.latents[contexts.count > 0].tolist() if latents is None else list(latents)
    labels = {}
    for latent in wanted:
        shown = contexts.strongest(latent, n)
        if not shown:
            raise ValueError(f"latent {latent} never fires: there is nothing to show the judge.")
        said = judge(shown)
        if not isinstance(said, str):
            raise ValueError(
                f"the judge answered {type(said).__name__} for latent {latent}; it must be a text."
            )
        labels[int(latent)] = said.strip()
    return labels


class _Found(NamedTuple):
    """Best rule of each latent: index of its family, its terms, and figures on the last part."""

    family: np.ndarray
    terms: list[tuple[int, ...]]
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def _parts(corpus: CorpusCode, random_state: int) -> np.ndarray:
    """Part of each token: 0 to find terms, 1 to choose the family, 2 to measure; -1 not counted."""
    text = corpus.tokens.text_index.cpu().numpy()
    _, back = np.unique(text, return_inverse=True)
    n = int(back.max()) + 1
    if n < 4:
        raise ValueError(
            f"{n} texts cannot be parted to find, choose and measure; give at least 4."
        )
    rank = np.random.default_rng([random_state, 0]).permutation(n)
    of_text = np.where(rank < n // 2, 0, np.where(rank < n // 2 + (n - n // 2) // 2, 1, 2))
    return np.where(corpus.counted.cpu().numpy(), of_text[back.reshape(-1)], -1)


def _searched(
    families: Sequence[Trait],
    row: np.ndarray,
    latent: np.ndarray,
    part: np.ndarray,
    m: int,
    max_terms: int,
) -> _Found:
    fires = np.stack([np.bincount(latent[part[row] == one], minlength=m) for one in range(3)])
    best = np.full(m, -1.0)
    family = np.zeros(m, dtype=np.int64)
    terms: list[tuple[int, ...]] = [()] * m
    figures = np.zeros((3, m))
    for index, trait in enumerate(families):
        size = len(trait.names)
        totals = [_totals(trait.value[part == one], size) for one in range(3)]
        counts = [_pairs(trait.value, row, latent, part, one, size) for one in range(3)]
        pairs, hits = counts[0]
        telling = hits >= np.maximum(2, _LEAST_SHARE * fires[0][pairs // size])
        keys = _best_terms(pairs[telling], hits[telling], totals[0], fires[0], size, max_terms)
        scores = [_scored(keys, *counts[one], totals[one], fires[one], size) for one in (1, 2)]
        better = scores[0][2] > best
        best[better] = scores[0][2][better]
        family[better] = index
        figures[:, better] = scores[1][:, better]
        edges = np.searchsorted(keys, np.arange(m + 1) * size)
        for i in np.flatnonzero(better):
            mine = keys[edges[i] : edges[i + 1]]
            often = np.argsort(-hits[np.searchsorted(pairs, mine)], kind="stable")
            terms[i] = tuple((mine[often] - i * size).tolist())
    return _Found(family, terms, *figures)


def _totals(value: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(value[value != NO_TRAIT], minlength=size)


def _pairs(
    value: np.ndarray, row: np.ndarray, latent: np.ndarray, part: np.ndarray, one: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``latent * size + term`` that occur in a part where the latent fires, and how often."""
    kept = (part[row] == one) & (value[row] != NO_TRAIT)
    keys, count = np.unique(latent[kept] * size + value[row[kept]], return_counts=True)
    return keys, count


def _best_terms(
    keys: np.ndarray,
    hits: np.ndarray,
    totals: np.ndarray,
    fires: np.ndarray,
    size: int,
    max_terms: int,
) -> np.ndarray:
    """Keys of each latent's terms of largest ``F1 = 2 hits / (fires + named)``, ascending.

    For a ratio ``r`` the best set takes the terms of largest ``2 hits - r named``, if positive;
    its F1 is the next ``r``, until that stands still.
    """
    owner, named = keys // size, totals[keys % size]
    ratio = np.zeros(len(fires))
    chosen = np.zeros(len(keys), dtype=bool)
    for _ in range(_MAX_STEPS):
        gain = 2 * hits - ratio[owner] * named
        order = np.lexsort((-gain, owner))
        rank = np.empty(len(keys), dtype=np.int64)
        rank[order] = np.arange(len(keys)) - np.searchsorted(owner[order], owner[order])
        chosen = (gain > 0) & (rank < max_terms)
        top = np.bincount(owner[chosen], 2.0 * hits[chosen], len(fires))
        below = fires + np.bincount(owner[chosen], named[chosen], len(fires))
        following = top / np.maximum(below, 1)
        if np.allclose(following, ratio, atol=1e-12):
            break
        ratio = np.maximum(following, ratio)
    return keys[chosen]


def _scored(
    rule: np.ndarray,
    keys: np.ndarray,
    hits: np.ndarray,
    totals: np.ndarray,
    fires: np.ndarray,
    size: int,
) -> np.ndarray:
    """Precision, recall and F1 of each latent's rule, (3, m); 0 where they are undefined."""
    place = np.searchsorted(keys, rule)
    inside = place < len(keys)
    hit = np.zeros(len(rule))
    hit[inside] = np.where(keys[place[inside]] == rule[inside], hits[place[inside]], 0)
    owner = rule // size
    right = np.bincount(owner, hit, len(fires))
    named = np.bincount(owner, totals[rule % size], len(fires))
    precision = right / np.maximum(named, 1)
    recall = right / np.maximum(fires, 1)
    return np.stack([precision, recall, 2 * right / np.maximum(named + fires, 1)])
