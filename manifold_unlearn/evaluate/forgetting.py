"""One model beside the one it was made from and the one that was never told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.aggregate import GROUPS, Judgement, judge
from manifold_unlearn.evaluate.depth import patching_drop, unlearning_depth
from manifold_unlearn.evaluate.fluency import reference_fluency
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject, greedy_answers
from manifold_unlearn.evaluate.memorization import token_memorization
from manifold_unlearn.evaluate.metrics import truth_ratio_probability, truth_ratio_symmetric
from manifold_unlearn.evaluate.multiple_choice import choice_questions, score_choices
from manifold_unlearn.evaluate.privacy import (
    membership_inference,
    membership_scores,
    privacy_leakage,
)
from manifold_unlearn.evaluate.results import Metric, paired_difference
from manifold_unlearn.evaluate.sampling import leak_at_k, sampled_leakage
from manifold_unlearn.evaluate.suites import answer_room, assess, assess_text, model_report

N_OPTIONS = 4


@dataclass(frozen=True)
class EvaluationSets:
    """What models are asked.

    Attributes
    ----------
    forget, retain : sequence of Item
        Questions with answers.
    holdout : sequence of Item
        Questions with answers that no model was told; for membership inference.
    neutral : sequence of str
        Texts on other matters; for perplexity and divergence.
    """

    forget: Sequence[Item]
    retain: Sequence[Item]
    holdout: Sequence[Item] = ()
    neutral: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("forget", "retain"):
            if not getattr(self, name):
                raise ValueError(f"the {name} set is empty; give at least one question.")


@dataclass(frozen=True, eq=False)
class Profile:
    """All that is measured of one model.

    Attributes
    ----------
    metrics : dict of str to dict of str to Metric
        By set (``"forget"``, ``"retain"``) and name, one value an item.
    figures : dict of str to dict of str to float
        ``"neutral"``: perplexity, and ``kl`` to the reference; ``"membership"``: areas under the
        curve by score, near 1 where forget items are known to have been seen.
    said : dict of str to list of str
        Greedy answers by set; empty where none were generated.
    """

    metrics: dict[str, dict[str, Metric]]
    figures: dict[str, dict[str, float]]
    said: dict[str, list[str]]


def profile(
    subject: Subject,
    tokenizer: Any,
    sets: EvaluationSets,
    *,
    reference: Subject | None = None,
    include_eos: bool = False,
    generate: bool = True,
    max_new_tokens: int | None = None,
    n_samples: int = 0,
    choices: bool = False,
    batch_size: BatchSize = "auto",
) -> Profile:
    """Measure one model on all sets.

    Parameters
    ----------
    subject : Subject
        ``plain(model)``, or any function that opens to a model.
    tokenizer : transformers.PreTrainedTokenizerBase
    sets : EvaluationSets
    reference : Subject, optional
        A model of the same vocabulary: with neutral texts, the divergence from it is measured too.
    include_eos : bool, default=False
        Count the end-of-sequence token as a part of every answer, as TOFU does.
    generate : bool, default=True
        Also generate greedy answers, for ROUGE-L recall and fluency.
    max_new_tokens : int, optional
        Of the greedy answers. Default: the longest answer's tokens plus a quarter.
    n_samples : int, default=0
        Sampled answers to each forget question, for ``leak_at_<n_samples>``.
    choices : bool, default=False
        Also ask the items as multiple-choice questions, for models that can answer such.
    batch_size : int or "auto"

    Returns
    -------
    Profile
        Of both sets what :func:`assess` gives, ``exact_memorization`` and
        ``extraction_strength``; with perturbed answers ``accuracy`` (the answer ranks first among
        them), and with three ``choice_accuracy``, among four lettered options in all rotations.
    """
    metrics: dict[str, dict[str, Metric]] = {}
    said: dict[str, list[str]] = {}
    for name, items in (("forget", sets.forget), ("retain", sets.retain)):
        said[name] = []
        if generate and items[0].answer:
            room = max_new_tokens or answer_room(tokenizer, items)
            questions = [item.question for item in items]
            said[name] = greedy_answers(
                subject, tokenizer, questions, max_new_tokens=room, batch_size=batch_size
            )
        found = assess(
            subject,
            tokenizer,
            items,
            include_eos=include_eos,
            generate=False,
            said=said[name] or None,
            batch_size=batch_size,
        )
        if items[0].answer:
            found |= token_memorization(subject, tokenizer, items, batch_size=batch_size)
        if "rank" in found:
            found["accuracy"] = Metric("accuracy", (found["rank"].values == 1).astype(np.float64))
        if choices and all(len(set(item.perturbed_answer)) >= N_OPTIONS - 1 for item in items):
            asked = choice_questions(items, n_options=N_OPTIONS)
            scored = score_choices(subject, tokenizer, asked, batch_size=batch_size)
            found["choice_accuracy"] = Metric("choice_accuracy", scored.accuracy.values)
        metrics[name] = found
    if n_samples:
        scores = sampled_leakage(subject, tokenizer, sets.forget, n_samples, batch_size=batch_size)
        name = f"leak_at_{n_samples}"
        metrics["forget"][name] = Metric(name, leak_at_k(scores, n_samples))
    figures: dict[str, dict[str, float]] = {}
    if sets.neutral:
        figures["neutral"] = assess_text(subject, tokenizer, sets.neutral, reference=reference)
    if sets.holdout:
        figures["membership"] = _membership(subject, tokenizer, sets, include_eos, batch_size)
    return Profile(metrics, figures, said)


def _membership(
    subject: Subject, tokenizer: Any, sets: EvaluationSets, include_eos: bool, size: BatchSize
) -> dict[str, float]:
    forget, holdout = (
        membership_scores(
            subject,
            tokenizer,
            [item.pair for item in items],
            include_eos=include_eos,
            batch_size=size,
        )
        for items in (sets.forget, sets.holdout)
    )
    return {
        f"auc_{name}": membership_inference(scores, holdout[name]).auc
        for name, scores in forget.items()
    }


@dataclass(frozen=True, eq=False)
class Standing:
    """One metric of the model judged, between its target and the one never told.

    Attributes
    ----------
    part, metric : str
        Set and name.
    model, reference, target : float
        Means; ``target`` None where there is none.
    distance : float
        ``model - reference``: 0 is the goal on every set.
    interval : tuple of two floats or None
        95 % bootstrap interval of ``distance``, items resampled in pairs; None for a single figure.
    left : float or None
        ``distance / (target - reference)``: 1 as before, 0 as never told, below 0 overdone. None
        of what both models know alike (retain, neutral), without a target, or where target and
        reference differ by less than .02.
    """

    part: str
    metric: str
    model: float
    reference: float
    target: float | None
    distance: float
    interval: tuple[float, float] | None
    left: float | None


@dataclass(frozen=True, eq=False)
class ForgettingReport:
    """Profiles of the models, every metric's standing, and the verdict.

    Attributes
    ----------
    profiles : dict of str to Profile
        ``"model"``, and where given ``"reference"`` and ``"target"``.
    standings : list of Standing
        Empty without a reference.
    judgement : Judgement or None
        None without both reference and target, and where ``not_judged`` says why.
    not_judged : str
        What keeps three models from being judged; empty where nothing does.
    """

    profiles: dict[str, Profile]
    standings: list[Standing] = field(default_factory=list)
    judgement: Judgement | None = None
    not_judged: str = ""

    def models(self) -> dict[str, dict[str, Any]]:
        """One entry a model: means by set, forget quality, utility, figures; as JSON holds them."""
        reference = self.profiles.get("reference")
        never_told = None if reference is None else reference.metrics["forget"]
        found: dict[str, Any] = {}
        for name, one in self.profiles.items():
            found[name] = model_report(one.metrics["forget"], one.metrics["retain"], never_told)
            found[name] |= one.figures
        return found

    def comparison(self) -> dict[str, Any]:
        """The standings and the judgement, as JSON holds them."""
        judged = None if self.judgement is None else self.judgement.to_json()
        standings = [vars(standing) for standing in self.standings]
        return {"standings": standings, "judgement": judged, "not_judged": self.not_judged}


def evaluate_forgetting(
    model: Subject,
    tokenizer: Any,
    sets: EvaluationSets,
    *,
    reference: Subject | None = None,
    target: Subject | None = None,
    depth: bool = True,
    **how: Any,
) -> ForgettingReport:
    """Measure a model beside the one never told, and the one it was made from.

    Parameters
    ----------
    model : Subject
        The model judged.
    tokenizer : transformers.PreTrainedTokenizerBase
        Shared by all; see :func:`require_same_tokenizer`.
    sets : EvaluationSets
    reference : Subject, optional
        The model that was never told the forget set: the goal.
    target : Subject, optional
        The model that was told.
    depth : bool, default=True
        With both, also measure the unlearning depth score by activation patching.
    **how
        As in :func:`profile`.

    Returns
    -------
    ForgettingReport
        Target against itself is ``"untouched"``, the reference ``"forgotten"``, a model with
        shuffled weights ``"destroyed"``, whatever its forget set says.
    """
    subjects = {"model": model, "reference": reference, "target": target}
    profiles = {
        name: profile(subject, tokenizer, sets, reference=reference, **how)
        for name, subject in subjects.items()
        if subject is not None
    }
    if reference is None:
        return ForgettingReport(profiles)
    figures: dict[str, dict[str, float]] = {name: {} for name in profiles}
    _add_fluency(profiles, reference, tokenizer, sets, how.get("batch_size", "auto"))
    if target is not None and depth and sets.forget[0].answer:
        items = sets.forget
        drops = {
            name: patching_drop(target, subject, tokenizer, items)
            for name, subject in subjects.items()
            if subject is not None
        }
        for name, drop in drops.items():
            figures[name]["depth"] = unlearning_depth(drop, drops["reference"]).score.mean
    for name, found in figures.items():
        if found:
            profiles[name].figures["depth"] = found
    standings = compare_profiles(profiles["model"], profiles["reference"], profiles.get("target"))
    judged, not_judged = None, ""
    if target is not None:
        parts = {name: judged_parts(one) for name, one in profiles.items()}
        try:
            judged = judge(parts["model"], target=parts["target"], retrained=parts["reference"])
        except ValueError as error:
            not_judged = str(error)
    return ForgettingReport(profiles, standings, judged, not_judged)


def _add_fluency(
    profiles: Mapping[str, Profile],
    reference: Subject,
    tokenizer: Any,
    sets: EvaluationSets,
    batch_size: BatchSize,
) -> None:
    questions = [item.question for item in sets.retain]
    expected = profiles["reference"].said["retain"]
    if not expected:
        return
    for one in profiles.values():
        one.metrics["retain"]["fluency"] = reference_fluency(
            reference, tokenizer, questions, one.said["retain"], expected, batch_size=batch_size
        )


def judged_parts(one: Profile) -> dict[str, float]:
    """Those of the parts that :data:`GROUPS` names which a profile holds."""
    forget, retain = one.metrics["forget"], one.metrics["retain"]
    found = {name: metric.mean for name, metric in forget.items()}
    if "truth_ratio" in forget:
        ratios = forget["truth_ratio"].values
        found["truth_probability"] = float(truth_ratio_probability(ratios).mean())
    found |= one.figures.get("membership", {}) | one.figures.get("depth", {})
    found["model_utility"] = model_report(forget, retain, None)["model_utility"]
    if "fluency" in retain:
        found["fluency"] = retain["fluency"].mean
    wanted = {name for names in GROUPS.values() for name in names}
    return {name: value for name, value in found.items() if name in wanted}


def compare_profiles(
    model: Profile, reference: Profile, target: Profile | None = None
) -> list[Standing]:
    """Every metric that both models have, set by set."""
    found = []
    for part, metrics in model.metrics.items():
        for name, metric in metrics.items():
            other = reference.metrics[part].get(name)
            if other is None:
                continue
            first = None if target is None else target.metrics[part].get(name)
            metric, other = _published(metric), _published(other)
            told = None if first is None else _published(first).mean
            gap, interval = paired_difference(metric, other)
            left = _left(part, metric.mean, other.mean, told)
            found.append(Standing(part, name, metric.mean, other.mean, told, gap, interval, left))
    for part, figures in model.figures.items():
        for name, value in figures.items():
            if (never := reference.figures.get(part, {}).get(name)) is None:
                continue
            told = None if target is None else target.figures.get(part, {}).get(name)
            left = _left(part, value, never, told)
            found.append(Standing(part, name, value, never, told, value - never, None, left))
            if name.startswith("auc_"):
                name, leak = name.replace("auc", "privleak"), privacy_leakage(value, never)
                found.append(Standing(part, name, leak, 0.0, None, leak, None, None))
    return found


def _published(metric: Metric) -> Metric:
    """Truth ratios in their symmetric form: a mean of raw ratios is that of a few large ones."""
    if metric.name != "truth_ratio":
        return metric
    return Metric(metric.name, truth_ratio_symmetric(metric.values))


def _left(part: str, model: float, reference: float, target: float | None) -> float | None:
    if part in ("retain", "neutral") or target is None or abs(target - reference) < 0.02:
        return None
    return (model - reference) / (target - reference)


def require_same_tokenizer(tokenizer: Any, other: Any, name: str) -> None:
    """Raise ``ValueError`` unless both give every text the same tokens.

    Figures of models whose tokens differ are averages over other things.
    """
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"the {name} model has another vocabulary ({len(other)} tokens against "
            f"{len(tokenizer)}): their figures cannot be compared. Give a model of the same "
            "tokenizer."
        )
    probe = "The quick brown fox, born 1984 in Zürich, didn't jump.\n"
    if tokenizer(probe)["input_ids"] != other(probe)["input_ids"]:
        raise ValueError(
            f"the {name} model's tokenizer has the same vocabulary but splits text in another way; "
            "give a model of the same tokenizer."
        )
