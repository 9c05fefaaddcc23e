"""Choose sites, method and rank on a validation split of the bundled facts.

Fits see two wordings of every fact to forget and of half of the others. Trials are scored on a
third wording, of the facts to forget and of the unseen half; the fourth is for the test alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.models import load_model
from manifold_unlearn.demo import PERPLEXITY_TARGET, TARGETS, demo_sets, known_facts
from manifold_unlearn.evaluate.likelihood import Subject, answer_log_probabilities, plain
from manifold_unlearn.evaluate.metrics import answer_probability
from manifold_unlearn.evaluate.suites import assess_text
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.recipe.subspace import SubspaceRecipe, fit_maps
from manifold_unlearn.testbed.facts import (
    VALIDATION_WORDING,
    Fact,
    halves,
    split_by_topic,
)

CANDIDATES = tuple(
    SubspaceRecipe(parts=parts, first=first / 30, last=last / 30, method=method, rank=rank)
    for parts, (first, last), (method, rank) in product(
        (("attn",), ("attn", "mlp")),
        ((8, 28), (12, 24), (16, 24)),
        (("contrastive", 1), ("contrastive", 2), ("contrastive", 3), ("leace", 1)),
    )
)
"""Recipes that the sweep tries; depths are given for 30 blocks."""

N_VALIDATION_TEXTS = 8


@dataclass(frozen=True)
class Trial:
    """What one recipe did on the validation split."""

    recipe: SubspaceRecipe
    forget: float
    """Share of the answer probability kept; likewise ``near`` and ``retain``."""
    near: float
    retain: float
    perplexity: float
    """After over before."""

    @property
    def slack(self) -> float:
        """Smallest distance to a target, as a share of the way to the ideal; negative if missed.

        The ideal keeps nothing of forget and everything else: 1 there, 0 on a target.
        """
        kept = {name: getattr(self, name) for name in TARGETS}
        shares = [
            (target - kept[name]) / target
            if name == "forget"
            else (kept[name] - target) / (1 - target)
            for name, target in TARGETS.items()
        ]
        return min(*shares, (PERPLEXITY_TARGET - self.perplexity) / (PERPLEXITY_TARGET - 1))

    def to_json(self) -> dict[str, Any]:
        """JSON values of recipe and figures."""
        return {**asdict(self), "slack": self.slack}


class TopicTrials:
    """Trials on one topic: activations captured once, every recipe fitted from them.

    Parameters
    ----------
    model, tokenizer
    topic : str
    known : sequence of Fact
        Facts that the model knows; see :func:`manifold_unlearn.demo.known_facts`.
    recipes : iterable of SubspaceRecipe
        Whose sites are captured.
    wording : int
        Wording that the forget facts, and the half of the others that no fit sees, are asked in.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        topic: str,
        known: Sequence[Fact],
        recipes: Iterable[SubspaceRecipe],
        *,
        wording: int = VALIDATION_WORDING,
    ):
        self.model, self.tokenizer = model, tokenizer
        split = split_by_topic(topic)
        sets = demo_sets(split, known)
        self.n_forget = len(sets.fit_forget)
        # the validation must not read the neutral texts of the test: hold out some of the fit's
        texts = [item.question for item in sets.fit_retain if not item.answer]
        self.held_out = texts[-N_VALIDATION_TEXTS:]
        fitted = [item for item in sets.fit_retain if item.question not in set(self.held_out)]
        self.items = [*sets.fit_forget, *fitted]
        sites = list(dict.fromkeys(site for r in recipes for site in r.sites(model)))
        self.acts = capture(model, tokenizer, [item.captured for item in self.items], sites)
        known_set = set(known)
        parts = {
            name: [fact for fact in facts if fact in known_set]
            for name, facts in (("near", split.near), ("retain", split.retain))
        }
        asked = {"forget": [fact for fact in split.forget if fact in known_set]}
        asked |= {name: halves(facts)[1] for name, facts in parts.items()}
        self.asked = {n: [fact.worded(wording) for fact in facts] for n, facts in asked.items()}
        self.before = self._probabilities(plain(model))
        self.perplexity = assess_text(plain(model), tokenizer, self.held_out)["perplexity"]

    def _probabilities(self, subject: Subject) -> dict[str, float]:
        pairs = [item.pair for items in self.asked.values() for item in items]
        p = answer_probability(answer_log_probabilities(subject, self.tokenizer, pairs))
        ends = np.cumsum([len(items) for items in self.asked.values()])
        parts = np.split(p, ends[:-1])
        return {name: float(v.mean()) for name, v in zip(self.asked, parts, strict=True)}

    def run(self, recipe: SubspaceRecipe) -> Trial:
        """Fit a recipe, hook it in, and measure it."""
        sites = recipe.sites(self.model)
        edit = fit_maps(self.acts, self.items, self.n_forget, recipe, sites)

        def edited() -> Any:
            return intervene(self.model, edit)

        after = self._probabilities(edited)
        perplexity = assess_text(edited, self.tokenizer, self.held_out)["perplexity"]
        kept = {name: after[name] / self.before[name] for name in after}
        return Trial(recipe, **kept, perplexity=perplexity / self.perplexity)


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial whose tightest target is met by most, or missed by least."""
    return max(trials, key=lambda trial: trial.slack)


def choose_recipe(
    model_name: str,
    topic: str,
    *,
    say: Callable[[str], None],
    candidates: Sequence[SubspaceRecipe] = CANDIDATES,
) -> SubspaceRecipe:
    """Recipe for a topic, by trial on the validation split."""
    model, tokenizer = load_model(model_name, prefer_wheel=True)
    trials = TopicTrials(model, tokenizer, topic, known_facts(plain(model), tokenizer), candidates)
    found = []
    for recipe in candidates:
        found.append(trials.run(recipe))
        say(describe(found[-1]))
    chosen = best(found)
    say(f"chosen: {describe(chosen)}")
    return chosen.recipe


def describe(trial: Trial) -> str:
    """One line on a trial."""
    r = trial.recipe
    return (
        f"{'+'.join(r.parts)} {r.first:.2f}-{r.last:.2f} {r.method} rank {r.rank}: kept forget "
        f"{trial.forget:.3f}, near {trial.near:.3f}, retain {trial.retain:.3f}; perplexity x "
        f"{trial.perplexity:.3f}"
    )
