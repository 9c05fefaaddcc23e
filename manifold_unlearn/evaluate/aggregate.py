"""One figure out of many: the published aggregates, and how near each is to the retrained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np

from manifold_unlearn.evaluate.metrics import harmonic_mean
from manifold_unlearn.evaluate.privacy import membership_similarity

SMOOTHING = 1e-12
"""What the study of 150 checkpoints adds to every part of a harmonic mean but memorization's."""

DESTROYED_BELOW = 0.5
"""Utility, as a share of the retrained model's, under which a model counts as destroyed. Among 150
published checkpoints the best of the most harmful method, RMU, stands at .54."""

LEAST_GAP = 0.02
"""Difference of target and retrained model that a part needs to say something of forgetting."""

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "memorization": (
            "extraction_strength",
            "exact_memorization",
            "paraphrased_answer_probability",
            "truth_probability",
        ),
        "mia": ("auc_loss", "auc_zlib", "auc_min_k", "auc_min_k_plus_plus"),
        "privacy": ("depth",),
        "utility": ("model_utility", "fluency"),
    }
)
"""Parts of each aggregate; privacy also holds mia, overall holds memorization, privacy, utility."""

CONTROLLED: Mapping[str, str] = MappingProxyType({"depth": "controlled_depth"})
"""What :func:`judge` takes for a part, where all three models have it: the same under a control."""

Verdict: TypeAlias = Literal["destroyed", "untouched", "partly forgotten", "forgotten"]


def memorization_aggregate(
    extraction_strength: float,
    exact_memorization: float,
    paraphrased_answer_probability: float,
    truth_probability: float,
) -> float:
    """Harmonic mean of one minus each: high where little is recited.

    It rewards over-forgetting: in the published table the retrained model has .582 and models that
    are worse than it more.

    Parameters
    ----------
    extraction_strength, exact_memorization : float
        Means over the forget set, in the published forms.
    paraphrased_answer_probability : float
        Of the paraphrased answers.
    truth_probability : float
        Truth ratio as ``p_c / (p_c + p_w)``.

    References
    ----------
    Unlearning Depth Score, arXiv 2605.24614, its study of 150 checkpoints; so for all here.
    """
    parts = (
        extraction_strength,
        exact_memorization,
        paraphrased_answer_probability,
        truth_probability,
    )
    return harmonic_mean([1 - part for part in parts])


def mia_aggregate(loss: float, zlib: float, min_k: float, min_k_plus_plus: float) -> float:
    """Smoothed harmonic mean of the four similarities ``s_*`` to the retrained model."""
    return harmonic_mean([loss, zlib, min_k, min_k_plus_plus], smoothing=SMOOTHING)


def privacy_aggregate(mia: float, depth: float) -> float:
    """Smoothed harmonic mean of :func:`mia_aggregate` and the unlearning depth score."""
    return harmonic_mean([mia, depth], smoothing=SMOOTHING)


def utility_aggregate(model_utility: float, fluency: float) -> float:
    """Smoothed harmonic mean of model utility and fluency."""
    return harmonic_mean([model_utility, fluency], smoothing=SMOOTHING)


def relative_utility(utility: float, target_utility: float) -> float:
    """Utility as a share of that of the model before unlearning, at most 1.

    Published: the share of the target that was trained for as many epochs as the method.

    Raises
    ------
    ValueError
        The target has no utility.
    """
    if not target_utility > 0:
        raise ValueError(f"target_utility={target_utility} must be above 0 to be relative to it.")
    return min(utility / target_utility, 1.0)


def overall_aggregate(memorization: float, privacy: float, utility: float) -> float:
    """Smoothed harmonic mean of memorization, privacy and relative utility."""
    return harmonic_mean([memorization, privacy, utility], smoothing=SMOOTHING)


@dataclass(frozen=True)
class Aggregates:
    """Five figures in [0, 1] of one model, high is good; None where nothing was measured."""

    memorization: float | None
    mia: float | None
    privacy: float | None
    utility: float | None
    overall: float | None

    def to_json(self) -> dict[str, float | None]:
        """The five by name."""
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """How near a model is to the retrained one, and whether there is a model left to judge."""

    verdict: Verdict
    """``"destroyed"`` goes before all else"""
    relative_utility: float
    """utility over the retrained model's, at most 1: the gate"""
    aggregates: Aggregates
    """nearness to the retrained model; all 0 for a destroyed model"""
    ungated: Aggregates
    """the same without the gate"""
    nearness: Mapping[str, float] = field(default_factory=dict)
    """of each part: 0 as far as the target or farther, 1 as the retrained model"""
    left_out: tuple[str, ...] = ()
    """parts in which target and retrained model do not differ, or that not all three have"""

    def to_json(self) -> dict[str, Any]:
        """All of it, with plain types."""
        return {
            "verdict": self.verdict,
            "relative_utility": self.relative_utility,
            "aggregates": self.aggregates.to_json(),
            "ungated": self.ungated.to_json(),
            "nearness": dict(self.nearness),
            "left_out": list(self.left_out),
        }


def published_aggregates(
    model: Mapping[str, float], *, retrained: Mapping[str, float], target_utility: float
) -> Aggregates:
    """The five aggregates of the published table from a model's parts.

    Parameters
    ----------
    model, retrained : mapping of str to float
        The parts that :data:`GROUPS` names; of the retrained model its areas alone are used.
    target_utility : float
        :func:`utility_aggregate` of the model before unlearning.

    Raises
    ------
    ValueError
        A part is missing (names it).
    """
    _require([name for names in GROUPS.values() for name in names], model, "model")
    _require(GROUPS["mia"], retrained, "retrained")
    memorization = memorization_aggregate(*(model[name] for name in GROUPS["memorization"]))
    mia = mia_aggregate(*(membership_similarity(model[n], retrained[n]) for n in GROUPS["mia"]))
    privacy = privacy_aggregate(mia, model["depth"])
    utility = relative_utility(
        utility_aggregate(model["model_utility"], model["fluency"]), target_utility
    )
    return Aggregates(
        memorization, mia, privacy, utility, overall_aggregate(memorization, privacy, utility)
    )


def judge(
    model: Mapping[str, float],
    *,
    target: Mapping[str, float],
    retrained: Mapping[str, float],
    destroyed_below: float = DESTROYED_BELOW,
    least_gap: float = LEAST_GAP,
) -> Judgement:
    """Judge a model by its distance to the retrained one, unless it is destroyed.

    Of each part of memorization, mia and privacy the nearness is
    ``1 - min(|x - x_retrained| / |x_target - x_retrained|, 1)``: the target has 0, the retrained
    model 1, and who goes past the retrained model falls again. Utility is its share of the
    retrained model's, at most 1. Aggregates are harmonic means of the same groups as the published.

    Parameters
    ----------
    model, target, retrained : mapping of str to float
        Parts by the names of :data:`GROUPS`, all in their plain sense (``extraction_strength`` is
        high where much is recited). One of utility's is needed; of the others what there is. With
        ``controlled_depth`` (see :data:`CONTROLLED`) of all three, that one in place of ``depth``.
    destroyed_below : float, default=0.5
        Relative utility under which all aggregates are 0 and the verdict is ``"destroyed"``.
    least_gap : float, default=0.02
        Parts in which target and retrained model differ by less are left out, and named.

    Returns
    -------
    Judgement
        ``"forgotten"`` from .9 for the harmonic mean of memorization and privacy, ``"untouched"``
        where no part is nearer than .1. Which depth was used stands in ``nearness``.

    Raises
    ------
    ValueError
        No part of utility is there, the retrained model has none, no other part can be judged, or a
        value is not finite.
    """
    for name, parts in (("model", model), ("target", target), ("retrained", retrained)):
        if bad := [part for part, value in parts.items() if not np.isfinite(value)]:
            raise ValueError(f"{name}: {', '.join(bad)} is not finite; measure it again.")
    useful = [n for n in GROUPS["utility"] if n in model and n in retrained]
    if not useful:
        raise ValueError(
            f"no part of utility ({', '.join(GROUPS['utility'])}) of both model and retrained: "
            "without it a broken model cannot be told from a forgetful one."
        )
    utility = relative_utility(
        harmonic_mean([model[n] for n in useful]), harmonic_mean([retrained[n] for n in useful])
    )
    nearness, left_out = {}, []
    three = (model, target, retrained)
    for part in (*GROUPS["memorization"], *GROUPS["mia"], *GROUPS["privacy"]):
        better = CONTROLLED.get(part, part)
        name = better if all(better in parts for parts in three) else part
        measured = all(name in parts for parts in three)
        gap = abs(target[name] - retrained[name]) if measured else 0.0
        if gap > 0 and gap >= least_gap:
            nearness[name] = 1 - min(abs(model[name] - retrained[name]) / gap, 1.0)
        else:
            left_out.append(name)
    if not nearness:
        raise ValueError(
            "target and retrained model differ in no part: there is nothing to forget, or nothing "
            "was measured. Measure more parts, or lower least_gap."
        )
    ungated = _combine(nearness, utility)
    return Judgement(
        verdict="destroyed" if utility < destroyed_below else _verdict(ungated, nearness),
        relative_utility=utility,
        aggregates=gate(ungated, utility, destroyed_below=destroyed_below),
        ungated=ungated,
        nearness=nearness,
        left_out=tuple(left_out),
    )


def gate(
    found: Aggregates, utility: float, *, destroyed_below: float = DESTROYED_BELOW
) -> Aggregates:
    """Aggregates as they are, or all 0 where utility relative to the retrained model is too low.

    A model with shuffled weights recites nothing and gives no membership away: ungated, the
    published memorization and privacy aggregates praise it.
    """
    if utility >= destroyed_below:
        return found
    return Aggregates(*(None if v is None else 0.0 for v in asdict(found).values()))


def _combine(nearness: Mapping[str, float], utility: float) -> Aggregates:
    def mean(values: list[float]) -> float | None:
        return harmonic_mean(values) if values else None

    def of(group: str) -> list[float]:
        names = {name for part in GROUPS[group] for name in (part, CONTROLLED.get(part))}
        return [value for name, value in nearness.items() if name in names]

    memorization, mia = mean(of("memorization")), mean(of("mia"))
    privacy = mean([*([] if mia is None else [mia]), *of("privacy")])
    measured = [value for value in (memorization, privacy) if value is not None]
    return Aggregates(memorization, mia, privacy, utility, mean([*measured, utility]))


def _verdict(found: Aggregates, nearness: Mapping[str, float]) -> Verdict:
    measured = [value for value in (found.memorization, found.privacy) if value is not None]
    if harmonic_mean(measured) >= 0.9:
        return "forgotten"
    return "untouched" if max(nearness.values()) <= 0.1 else "partly forgotten"


def _require(names: Any, parts: Mapping[str, float], what: str) -> None:
    if missing := [name for name in names if name not in parts]:
        raise ValueError(f"{what} lacks {', '.join(missing)}; measure them, or use judge.")
