"""One model beside the one it was made from and the one that was never told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.aggregate import CONTROLLED, GROUPS, Judgement, judge
from manifold_unlearn.evaluate.depth import LayerDrop, forced_drop, unlearning_depth
from manifold_unlearn.evaluate.depth_control import controlled_depth
from manifold_unlearn.evaluate.fluency import reference_fluency
from manifold_unlearn.evaluate.forced import Forced, force, named_sites
from manifold_unlearn.evaluate.likelihood import Subject
from manifold_unlearn.evaluate.metrics import truth_ratio_probability, truth_ratio_symmetric
from manifold_unlearn.evaluate.privacy import privacy_leakage
from manifold_unlearn.evaluate.profiles import EvaluationSets, Profile, profile
from manifold_unlearn.evaluate.results import Metric, paired_difference
from manifold_unlearn.evaluate.suites import model_report

CONTROL_ITEMS = 48
"""Retain items, at most, on which the depth has its control."""

LEAST_CONTROL_ITEMS = 16
"""Fewer retain items that both models know are no control."""


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
    not_controlled : str
        Why the depth has no control and the published form is judged by; empty where it has one,
        or no depth was measured.
    """

    profiles: dict[str, Profile]
    standings: list[Standing] = field(default_factory=list)
    judgement: Judgement | None = None
    not_judged: str = ""
    not_controlled: str = ""

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
        return {
            "standings": standings,
            "judgement": judged,
            "not_judged": self.not_judged,
            "not_controlled": self.not_controlled,
        }


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The never-told and the told model, measured once, for any number of models between them.

    Made by :func:`yardstick`; a model is measured against it by :meth:`report`.

    Attributes
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    sets : EvaluationSets
    reference, target : Subject or None
    profiles : dict of str to Profile
        Of those of ``"reference"`` and ``"target"`` that there are, with fluency and depth: as
        published, and with a control on retain items that both models know
        (``controlled_depth``), where it could be measured. ``misaligned`` is the share of the
        reference's fall that the control shows too.
    how : dict of str to object
        Keywords of :func:`profile`, the same for every model.
    """

    tokenizer: Any
    sets: EvaluationSets
    reference: Subject | None
    target: Subject | None
    profiles: dict[str, Profile]
    how: dict[str, Any]
    _depths: _Depths | None = field(repr=False)

    def report(self, model: Subject) -> ForgettingReport:
        """Measure a model, and judge it.

        Raises
        ------
        ValueError
            With ``depth``, a model of another shape than the target.
        """
        tokenizer, sets, reference = self.tokenizer, self.sets, self.reference
        found = profile(model, tokenizer, sets, reference=reference, **self.how)
        if reference is not None:
            never_told = self.profiles["reference"]
            _add_fluency(found, never_told, reference, tokenizer, sets, self.how)
        if self._depths is not None:
            found.figures["depth"] = self._depths.figures(model)
        return self._beside(found)

    def controls(self) -> dict[str, ForgettingReport]:
        """Reports of the target and the reference themselves; nothing is measured again.

        A target is ``"untouched"`` and a reference ``"forgotten"``, or the sets tell them apart too
        little to judge others.
        """
        return {name: self._beside(one) for name, one in self.profiles.items()}

    def _beside(self, model: Profile) -> ForgettingReport:
        profiles = {"model": model, **self.profiles}
        if self.reference is None:
            return ForgettingReport(profiles)
        standings = compare_profiles(model, profiles["reference"], profiles.get("target"))
        judged, not_judged = None, ""
        if self.target is not None:
            parts = {name: judged_parts(one) for name, one in profiles.items()}
            try:
                judged = judge(parts["model"], target=parts["target"], retrained=parts["reference"])
            except ValueError as error:
                not_judged = str(error)
        reason = "" if self._depths is None else self._depths.not_controlled
        return ForgettingReport(profiles, standings, judged, not_judged, reason)


@dataclass(frozen=True, eq=False)
class _Depths:
    """Patching of the target, prepared for any source of states."""

    target: Subject
    forced: Forced
    reference: LayerDrop
    control: tuple[Forced, LayerDrop] | None
    """Retain items, and what they lose to the reference's states"""
    not_controlled: str

    def figures(self, source: Subject) -> dict[str, float]:
        sites = self.reference.sites
        drop = forced_drop(self.target, source, self.forced, sites)
        if self.control is None:
            return self.of(drop)
        return self.of(drop, forced_drop(self.target, source, self.control[0], sites))

    def of(self, drop: LayerDrop, control: LayerDrop | None = None) -> dict[str, float]:
        found = {"depth": unlearning_depth(drop, self.reference).score.mean}
        if self.control is not None and control is not None:
            found["controlled_depth"] = controlled_depth(
                drop, self.reference, control=control, retrained_control=self.control[1]
            ).score
        return found

    def of_pair(self) -> dict[str, dict[str, float]]:
        """Figures of target and reference: the target's own states lower nothing."""
        drop = self.reference
        if self.control is None:
            return {"target": self.of(_nothing(drop)), "reference": self.of(drop)}
        control = self.control[1]
        own = controlled_depth(drop, drop, control=control, retrained_control=control)
        return {
            "target": self.of(_nothing(drop), _nothing(control)),
            "reference": self.of(drop, control) | {"misaligned": own.misaligned},
        }


def _nothing(drop: LayerDrop) -> LayerDrop:
    return LayerDrop(drop.sites, np.zeros_like(drop.values))


def _known_to_all(items: Sequence[Item], profiles: Iterable[Profile]) -> list[Item]:
    """Items of whose answers all models recite at least half of the tokens, drawn at random."""
    if not items[0].answer:
        return []
    recited = [one.metrics["retain"]["exact_memorization"].values for one in profiles]
    known = np.flatnonzero(np.min(recited, axis=0) >= 0.5)
    drawn = np.random.default_rng(0).permutation(known)[:CONTROL_ITEMS]
    return [items[i] for i in np.sort(drawn)]


def _depths(
    target: Subject,
    reference: Subject,
    tokenizer: Any,
    sets: EvaluationSets,
    profiles: Mapping[str, Profile],
) -> _Depths:
    sites = named_sites(target, "blocks")
    forced = force(target, tokenizer, sets.forget)
    drop = forced_drop(target, reference, forced, sites)
    known = _known_to_all(sets.retain, profiles.values())
    if len(known) < LEAST_CONTROL_ITEMS:
        reason = (
            f"{len(known)} retain items have answers of which both models recite half; a control "
            f"needs {LEAST_CONTROL_ITEMS}. Give more items that both know."
        )
        return _Depths(target, forced, drop, None, reason)
    forced_known = force(target, tokenizer, known)
    control = forced_drop(target, reference, forced_known, sites)
    try:
        controlled_depth(drop, drop, control=control, retrained_control=control)
    except ValueError as error:
        return _Depths(target, forced, drop, None, str(error))
    return _Depths(target, forced, drop, (forced_known, control), "")


def yardstick(
    tokenizer: Any,
    sets: EvaluationSets,
    *,
    reference: Subject | None = None,
    target: Subject | None = None,
    depth: bool = True,
    **how: Any,
) -> Yardstick:
    """Measure the models that others are judged by, once.

    Parameters
    ----------
    tokenizer, sets, reference, target, depth, **how
        As in :func:`evaluate_forgetting`.

    Returns
    -------
    Yardstick
        ``yardstick(...).report(model)`` is ``evaluate_forgetting(model, ...)``.
    """
    given = {"reference": reference, "target": target}
    subjects = {name: subject for name, subject in given.items() if subject is not None}
    profiles = {
        name: profile(subject, tokenizer, sets, reference=reference, **how)
        for name, subject in subjects.items()
    }
    depths = None
    if reference is not None:
        for one in profiles.values():
            _add_fluency(one, profiles["reference"], reference, tokenizer, sets, how)
        if target is not None and depth and sets.forget[0].answer:
            depths = _depths(target, reference, tokenizer, sets, profiles)
            for name, figures in depths.of_pair().items():
                profiles[name].figures["depth"] = figures
    return Yardstick(tokenizer, sets, reference, target, profiles, how, depths)


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

    To judge several models by the same pair, make a :func:`yardstick` of it.

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
        With both, also measure the unlearning depth score by activation patching, as published
        and with a control on at most :data:`CONTROL_ITEMS` retain items.
    **how
        As in :func:`profile`.

    Returns
    -------
    ForgettingReport
        Target against itself is ``"untouched"``, the reference ``"forgotten"``, a model with
        shuffled weights ``"destroyed"``, whatever its forget set says.
    """
    pair = yardstick(tokenizer, sets, reference=reference, target=target, depth=depth, **how)
    return pair.report(model)


def _add_fluency(
    one: Profile,
    never_told: Profile,
    reference: Subject,
    tokenizer: Any,
    sets: EvaluationSets,
    how: Mapping[str, Any],
) -> None:
    if never_told.said["retain"]:
        one.metrics["retain"]["fluency"] = reference_fluency(
            reference,
            tokenizer,
            [item.question for item in sets.retain],
            one.said["retain"],
            never_told.said["retain"],
            batch_size=how.get("batch_size", "auto"),
        )


def judged_parts(one: Profile) -> dict[str, float]:
    """Those of the parts that :data:`GROUPS` and :data:`CONTROLLED` name which a profile holds."""
    forget, retain = one.metrics["forget"], one.metrics["retain"]
    found = {name: metric.mean for name, metric in forget.items()}
    if "truth_ratio" in forget:
        ratios = forget["truth_ratio"].values
        found["truth_probability"] = float(truth_ratio_probability(ratios).mean())
    found |= one.figures.get("membership", {}) | one.figures.get("depth", {})
    found["model_utility"] = model_report(forget, retain, None)["model_utility"]
    if "fluency" in retain:
        found["fluency"] = retain["fluency"].mean
    wanted = {name for names in (*GROUPS.values(), CONTROLLED.values()) for name in names}
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
