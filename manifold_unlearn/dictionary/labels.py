"""Labels of latents without a judge: the rule of tokens and contexts that foretells firing best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from manifold_unlearn.dictionary.coding import without_zeros
from manifold_unlearn.dictionary.contexts import Context, FeatureContexts
from manifold_unlearn.dictionary.corpus import CorpusCode
from manifold_unlearn.dictionary.token_traits import NO_TRAIT, Trait, token_traits

NOTHING = "none"
"""Text of the label where no rule is better than chance."""
NOT_COUNTED = -1
_MAX_STEPS = 20
_LEAST_SHARE = 0.02  # of a latent's firing: a term of less says nothing of it


@dataclass(frozen=True)
class LatentLabel:
    """The best rule for when a latent fires, and how good such rules are on other texts."""

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
    """Tokens on which it fires."""

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
    n_folds: int = 4,
    random_state: int = 0,
) -> list[LatentLabel]:
    """Label of every latent from a corpus, by rules of one family of traits each.

    A rule names up to ``max_terms`` terms of a family, such as tokens, each of which holds at least
    2 % of where the latent fires; it foretells that the latent fires where a token has one of them.
    The terms of largest F1 are found exactly (Dinkelbach's iteration). Figures are measured by
    cross-validation: a part of the texts at a time, with the terms of the other texts; the family
    is the one that does best so. A rule is a label if its F1 is at least ``min_f1`` and above that
    of every control: the same search, figures and choice of family included, where firing is moved
    to tokens drawn at random. The terms of a label are those of all texts.

    Parameters
    ----------
    corpus : CorpusCode
        Of :func:`~manifold_unlearn.dictionary.corpus.corpus_codes`. First and special tokens
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
        Latents that fire on fewer tokens get no label.
    n_folds : int, default=4
        Parts of the texts.
    random_state : int, default=0

    Returns
    -------
    list of LatentLabel
        In the order of the code's latents.

    Raises
    ------
    ValueError
        Fewer texts than folds, a parameter out of range, latents or traits that do not fit.

    References
    ----------
    Dinkelbach (1967), On nonlinear fractional programming (sets of largest F1).
    """
    code, m = without_zeros(corpus.code), corpus.code.n_latents
    names = np.arange(m) if latents is None else np.asarray(latents, dtype=np.int64).reshape(-1)
    if len(names) != m:
        raise ValueError(f"{len(names)} numbers in latents for the {m} latents of the code.")
    if min(max_terms, n_shuffles, min_fires) < 1 or n_folds < 2 or not 0 <= strength < 1:
        raise ValueError(
            f"max_terms={max_terms}, n_shuffles={n_shuffles} and min_fires={min_fires} must be at "
            f"least 1, n_folds={n_folds} at least 2, strength={strength} in [0, 1)."
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
    fold = _folds(corpus, n_folds, random_state)
    kept = fold[row] != NOT_COUNTED
    row, latent = row[kept], latent[kept]
    found = _searched(families, row, latent, fold, m, max_terms, with_terms=True)
    control = np.zeros(m)
    shuffle = np.random.default_rng([random_state, 1])
    counted = np.flatnonzero(fold != NOT_COUNTED)
    moved = np.arange(len(fold))
    for _ in range(n_shuffles):
        moved[counted] = shuffle.permutation(counted)
        control = np.maximum(
            control, _searched(families, moved[row], latent, fold, m, max_terms).f1
        )
    fires = np.bincount(latent, minlength=m)
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
            n_fires=int(fires[i]),
        )
        holds = label.f1 > label.control and label.f1 >= min_f1
        if not (holds and terms and fires[i] >= min_fires):
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
    """Best rule of each latent: index of its family, its terms, and cross-validated figures."""

    family: np.ndarray
    terms: list[tuple[int, ...]]
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def _folds(corpus: CorpusCode, n_folds: int, random_state: int) -> np.ndarray:
    """Fold of each token, whole texts together; ``NOT_COUNTED`` for those that do not count."""
    _, back = np.unique(corpus.tokens.text_index.cpu().numpy(), return_inverse=True)
    n = int(back.max()) + 1
    if n < n_folds:
        raise ValueError(f"{n} texts make no {n_folds} folds; give more, or lower n_folds.")
    fold = np.random.default_rng([random_state, 0]).permutation(n) % n_folds
    return np.where(corpus.counted.cpu().numpy(), fold[back.reshape(-1)], NOT_COUNTED)


def _searched(
    families: Sequence[Trait],
    row: np.ndarray,
    latent: np.ndarray,
    fold: np.ndarray,
    m: int,
    max_terms: int,
    *,
    with_terms: bool = False,
) -> _Found:
    n_folds = int(fold.max()) + 1
    fires = _counts(latent, fold[row], m, n_folds)
    best, family = np.full(m, -1.0), np.zeros(m, dtype=np.int64)
    terms: list[tuple[int, ...]] = [()] * m
    figures = np.zeros((3, m))
    for index, trait in enumerate(families):
        size = len(trait.names)
        has = (trait.value != NO_TRAIT) & (fold != NOT_COUNTED)
        totals = _counts(trait.value[has], fold[has], size, n_folds)
        keys, hits = _pairs(trait.value, row, latent, fold, size, n_folds)
        right, named = np.zeros(m), np.zeros(m)
        for one in range(n_folds):
            others = np.arange(n_folds) != one
            rule = _best_terms(
                keys,
                hits[:, others].sum(1),
                totals[:, others].sum(1),
                fires[:, others].sum(1),
                max_terms,
            )
            owner = keys[rule] // size
            right += np.bincount(owner, hits[rule, one], m)
            named += np.bincount(owner, totals[keys[rule] % size, one], m)
        whole = fires.sum(1)
        f1 = 2 * right / np.maximum(named + whole, 1)
        better = f1 > best
        best[better], family[better] = f1[better], index
        found = np.stack([right / np.maximum(named, 1), right / np.maximum(whole, 1), f1])
        figures[:, better] = found[:, better]
        if with_terms:
            rule = _best_terms(keys, hits.sum(1), totals.sum(1), whole, max_terms)
            rule = rule[np.lexsort((-hits[rule].sum(1), keys[rule] // size))]
            edges = np.searchsorted(keys[rule] // size, np.arange(m + 1))
            for i in np.flatnonzero(better):
                terms[i] = tuple((keys[rule[edges[i] : edges[i + 1]]] % size).tolist())
    return _Found(family, terms, *figures)


def _counts(value: np.ndarray, fold: np.ndarray, size: int, n_folds: int) -> np.ndarray:
    """How often each value occurs in each fold, (size, n_folds)."""
    return np.bincount(value * n_folds + fold, minlength=size * n_folds).reshape(size, n_folds)


def _pairs(
    value: np.ndarray,
    row: np.ndarray,
    latent: np.ndarray,
    fold: np.ndarray,
    size: int,
    n_folds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``latent * size + term`` that occur where the latent fires, and how often by fold."""
    has = value[row] != NO_TRAIT
    keys, back = np.unique(latent[has] * size + value[row[has]], return_inverse=True)
    return keys, _counts(back.reshape(-1), fold[row[has]], len(keys), n_folds)


def _best_terms(
    keys: np.ndarray, hits: np.ndarray, totals: np.ndarray, fires: np.ndarray, max_terms: int
) -> np.ndarray:
    """Places in ``keys`` of each latent's terms of largest ``F1 = 2 hits / (fires + named)``.

    For a ratio ``r`` the best set takes the terms of largest ``2 hits - r named``, if positive;
    its F1 is the next ``r``, until that stands still. Terms of too little say are left out.
    """
    owner, term = keys // len(totals), keys % len(totals)
    telling = np.flatnonzero(hits >= np.maximum(2, _LEAST_SHARE * fires[owner]))
    owner, named, right = owner[telling], totals[term[telling]], hits[telling]
    ratio = np.zeros(len(fires))
    chosen = np.zeros(len(telling), dtype=bool)
    for _ in range(_MAX_STEPS):
        gain = 2 * right - ratio[owner] * named
        order = np.lexsort((-gain, owner))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - np.searchsorted(owner[order], owner[order])
        chosen = (gain > 0) & (rank < max_terms)
        top = np.bincount(owner[chosen], 2.0 * right[chosen], len(fires))
        below = fires + np.bincount(owner[chosen], named[chosen], len(fires))
        following = top / np.maximum(below, 1)
        if np.allclose(following, ratio, atol=1e-12):
            break
        ratio = np.maximum(following, ratio)
    return telling[chosen]
