"""How much a dictionary's latents let a model forget without harm: the SAEBench score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.tokens import Text
from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.evaluate.dictionary_probing import code_matrix
from manifold_unlearn.evaluate.dictionary_splice import edited_but
from manifold_unlearn.evaluate.likelihood import BatchSize, plain
from manifold_unlearn.evaluate.multiple_choice import (
    ChoiceQuestion,
    Orders,
    Scoring,
    score_choices,
)
from manifold_unlearn.evaluate.results import Metric

THRESHOLDS = (0.001, 0.01)
COUNTS = (10, 20)
MULTIPLIERS = (25.0, 50.0, 100.0, 200.0)
KEPT = 0.99
"""Share of the retain questions that must stay right for a setting to count."""


@dataclass(frozen=True, eq=False)
class UnlearningSetting:
    """One way to clamp, and what the model still answers."""

    retain_threshold: float
    """Latents that fire on this share of the retain tokens or more are not clamped."""
    multiplier: float
    latents: tuple[int, ...]
    """Clamped to ``-multiplier`` where they fire"""
    forget: Metric
    """1 where a forget question is answered right; of those right before"""
    retain: Metric

    @property
    def keeps(self) -> bool:
        """Whether 99 % of the retain questions stay right."""
        return self.retain.mean >= KEPT


@dataclass(frozen=True, eq=False)
class DictionaryUnlearning:
    """What was tried, on questions that the model first answered right."""

    settings: tuple[UnlearningSetting, ...]
    forget_frequency: np.ndarray
    """(d_sae,) float64: share of forget tokens on which each latent fires"""
    retain_frequency: np.ndarray
    n_forget: int
    """Forget questions given, right before or not"""
    n_retain: int

    @property
    def best(self) -> UnlearningSetting | None:
        """The setting that forgets most among those that keep; None where none keeps."""
        keeping = [setting for setting in self.settings if setting.keeps]
        return min(keeping, key=lambda setting: setting.forget.mean, default=None)

    @property
    def score(self) -> float:
        """Share of forget questions that the best setting gets wrong; 0 where none keeps."""
        return 0.0 if self.best is None else 1 - self.best.forget.mean

    def to_json(self) -> dict[str, Any]:
        """The score, every setting and how many questions were asked."""
        return {
            "score": self.score,
            "n_forget": self.n_forget,
            "n_retain": self.n_retain,
            "settings": [
                {
                    "retain_threshold": setting.retain_threshold,
                    "multiplier": setting.multiplier,
                    "latents": list(setting.latents),
                    "forget": setting.forget.to_json(),
                    "retain": setting.retain.to_json(),
                    "keeps": setting.keeps,
                }
                for setting in self.settings
            ],
        }


def forget_latents(
    forget_frequency: np.ndarray, retain_frequency: np.ndarray, *, retain_threshold: float
) -> np.ndarray:
    """Latents that fire on forget tokens and hardly on retain tokens, most frequent first.

    Parameters
    ----------
    forget_frequency, retain_frequency : array of shape (d_sae,)
        Share of the tokens on which each latent fires.
    retain_threshold : float
        Those that reach it on retain tokens are left out.

    Returns
    -------
    array of int64
        Without latents that never fire on forget tokens.
    """
    score = np.where(retain_frequency < retain_threshold, forget_frequency, 0.0)
    order = np.argsort(-score, kind="stable")
    return order[score[order] > 0]


def dictionary_unlearning(
    model: Any,
    tokenizer: Any,
    coder: SparseAutoencoder,
    site: str,
    *,
    forget_texts: Sequence[Text],
    retain_texts: Sequence[Text],
    forget_questions: Sequence[ChoiceQuestion],
    retain_questions: Sequence[ChoiceQuestion],
    retain_thresholds: Sequence[float] = THRESHOLDS,
    counts: Sequence[int] = COUNTS,
    multipliers: Sequence[float] = MULTIPLIERS,
    scoring: Scoring = "letter",
    orders: Orders = "cyclic",
    batch_size: BatchSize = "auto",
) -> DictionaryUnlearning:
    """Clamp latents of the forget texts in every setting, and ask what the model still knows.

    Latents are chosen by :func:`forget_latents`, and set to ``-multiplier`` where they fire, on all
    tokens but the first and special ones; the error of reconstruction is kept. Only questions that
    the model answers right in every order asked count.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    coder : SparseAutoencoder
    site : str
    forget_texts, retain_texts : sequence of str or (prompt, answer)
        To choose latents by; special tokens are left out.
    forget_questions, retain_questions : sequence of ChoiceQuestion
    retain_thresholds, counts, multipliers : sequence of float, int, float
        Every combination is tried. The multipliers are in units of activations: the defaults fit
        dictionaries of a 2B model, whose rows are long.
    scoring, orders
        As :func:`~manifold_unlearn.evaluate.multiple_choice.score_choices`. A model that was never
        taught letters is asked with ``scoring="answer"``.
    batch_size : int or "auto"

    Returns
    -------
    DictionaryUnlearning

    Raises
    ------
    ValueError
        No question that the model answers right, no setting, a count below 1, a multiplier that is
        not positive.

    References
    ----------
    Farrell, Lau and Conmy (2024), Applying sparse autoencoders to unlearn knowledge in language
    models, arXiv 2410.19278.
    Karvonen et al. (2025), SAEBench, arXiv 2503.09532 (unlearning).
    """
    grid = [(t, n, m) for t in retain_thresholds for n in counts for m in multipliers]
    if not grid or min(counts) < 1 or min(multipliers) <= 0:
        raise ValueError(
            f"counts={list(counts)}, multipliers={list(multipliers)}, retain_thresholds="
            f"{list(retain_thresholds)}: give at least one of each, all positive."
        )
    ask = partial(
        score_choices, tokenizer=tokenizer, scoring=scoring, orders=orders, batch_size=batch_size
    )
    known = []
    for name, questions in (("forget", forget_questions), ("retain", retain_questions)):
        right = ask(plain(model), questions=questions).always_right.values
        known.append([q for q, kept in zip(questions, right, strict=True) if kept])
        if not known[-1]:
            raise ValueError(
                f"the model answers none of the {len(questions)} {name} questions right: nothing "
                "can be measured. Ask it what it knows, or with another scoring."
            )
    in_forget, in_retain = (
        _frequencies(model, tokenizer, coder, site, texts, batch_size)
        for texts in (forget_texts, retain_texts)
    )
    settings: dict[tuple[tuple[int, ...], float], tuple[Metric, Metric]] = {}
    tried = []
    for threshold, count, multiplier in tqdm(grid, desc="clamp", disable=None, leave=False):
        latents = forget_latents(in_forget, in_retain, retain_threshold=threshold)[:count]
        key = (tuple(latents.tolist()), float(multiplier))
        if key not in settings:
            subject = plain(model)
            if len(latents):
                clamp = FeatureClamp(coder, latents.tolist(), -float(multiplier))
                subject = partial(
                    edited_but, model, {site: clamp},
                    leave_tokens=tokenizer.all_special_ids, leave_first=True,
                )  # fmt: skip
            forget, retain = (
                Metric(name, ask(subject, questions=asked).credit.mean(axis=1))
                for name, asked in zip(("forget", "retain"), known, strict=True)
            )
            settings[key] = (forget, retain)
        tried.append(UnlearningSetting(float(threshold), key[1], key[0], *settings[key]))
    return DictionaryUnlearning(
        tuple(tried), in_forget, in_retain, len(forget_questions), len(retain_questions)
    )


def _frequencies(
    model: Any,
    tokenizer: Any,
    coder: SparseAutoencoder,
    site: str,
    texts: Sequence[Text],
    batch_size: BatchSize,
) -> np.ndarray:
    """Share of the tokens on which each latent fires, special ones left out."""
    acts = capture(model, tokenizer, texts, [site], batch_size=batch_size)
    codes = code_matrix(coder, acts[site][~acts.special])
    return codes.getnnz(axis=0) / codes.shape[0]
