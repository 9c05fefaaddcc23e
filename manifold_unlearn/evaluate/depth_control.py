"""Unlearning depth under a control: what answers that both models know lose is not knowledge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from manifold_unlearn.evaluate.depth import THRESHOLD, LayerDrop
from manifold_unlearn.evaluate.meta import percentiles
from manifold_unlearn.evaluate.results import N_RESAMPLES


@dataclass(frozen=True, eq=False)
class ControlledDepth:
    """Unlearning depth of a model by what forget answers lose beyond retain answers."""

    score: float
    """0 as the told model, 1 as the retrained"""
    interval: tuple[float, float]
    """95 % percentile bootstrap of the score; forget and control items resampled apart"""
    sites: tuple[str, ...]
    knowledge: np.ndarray
    """(n_sites,) float64, nats a token: the retrained excess where it counts, else 0"""
    erased: np.ndarray
    """(n_sites,) float64: share of that knowledge which is gone; 0 where there is none"""
    excess: np.ndarray
    """(n_sites,) float64, nats a token: of the model, mean fall of the items less the control's"""
    retrained_excess: np.ndarray
    """(n_sites,) float64: the same of the retrained model, whether it counts or not"""
    misaligned: float
    """Share of the retrained model's fall, all sites together, that the control shows too"""

    def to_json(self) -> dict[str, Any]:
        """All of it, with plain types."""
        return {
            "score": self.score,
            "interval": list(self.interval),
            "sites": list(self.sites),
            "knowledge": self.knowledge.tolist(),
            "erased": self.erased.tolist(),
            "excess": self.excess.tolist(),
            "retrained_excess": self.retrained_excess.tolist(),
            "misaligned": self.misaligned,
        }


def controlled_depth(
    drop: LayerDrop,
    retrained_drop: LayerDrop,
    *,
    control: LayerDrop,
    retrained_control: LayerDrop,
    threshold: float = THRESHOLD,
) -> ControlledDepth:
    """Share of the layers' knowledge that is gone, told apart from a change of basis.

    Models that were trained apart hold the same knowledge in different bases: the states of one
    lower every answer of the other, also those that both know. The control is this fall on such
    answers, and the excess ``mean(d) - mean(c)`` of the falls to forget over it is what is missing.
    A site counts where the excess of the retrained model is above ``threshold`` and its 95 %
    bootstrap interval above 0.

    The excess of an item is its fall less the mean control, drawn toward the mean excess by the
    share ``min(1, var(c) / var(d))`` of its spread that the control has too. Items are matched by
    the size of their excess, since it is an accident which answers a model without the knowledge
    comes near to, and the share erased is ``sum_i(clip(x_i, 0, r_i)) / sum_i(r_i)`` with ``x_i``
    the excess of the model judged and ``r_i``, at least 0, that of the retrained one. The score is
    its mean over the sites, weighted by the mean retrained excess. An edit in place has no fall of
    the control; damage lowers both kinds, and does not pass for forgetting.

    There are no values an item: a fall holds the item's own noise, of which only the spread is
    known. A ratio of means has no use for items, but would call a model that lost half of the
    answers altogether as deep as one that lost all, since a fall has no upper end.

    Parameters
    ----------
    drop, retrained_drop : LayerDrop
        As for :func:`~manifold_unlearn.evaluate.depth.unlearning_depth`: from
        :func:`~manifold_unlearn.evaluate.depth.patching_drop` or
        :func:`~manifold_unlearn.evaluate.lens.frozen_head_drop`, of the model judged and of the
        retrained one, on the items to forget.
    control, retrained_control : LayerDrop
        The same of the same models on answers that the told and the retrained model both know,
        alike in form and mixture to those to forget: retain items, drawn at random if they are
        too many (every second one may ask for every second attribute alone). If the retrained
        model does not know them, knowledge passes for misalignment, and sites lose weight.
    threshold : float, default=0.05
        Nats a token.

    Returns
    -------
    ControlledDepth
        1 for the retrained model's own drops, 0 for the told model's.

    Raises
    ------
    ValueError
        Sites or numbers of items that do not fit, fewer than 2 items of a kind, values that are
        not finite, or no site that counts.

    References
    ----------
    The score without a control: unlearning depth score (arXiv 2605.24614).
    """
    _require_alike(drop, retrained_drop, "drop", "retrained_drop")
    _require_alike(control, retrained_control, "control", "retrained_control")
    if drop.sites != control.sites:
        raise ValueError(
            f"control is of the sites {list(control.sites)}, drop of {list(drop.sites)}; measure "
            "both at the same."
        )
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} must be at least 0 nats.")
    draw = np.random.default_rng(0)
    items, controls = (_resamples(draw, len(d.values)) for d in (drop, control))
    mean, known, erased = np.empty((3, len(drop.sites), len(items)))
    for site in range(len(drop.sites)):
        x = _excess(drop, control, items, controls, site)
        r = _excess(retrained_drop, retrained_control, items, controls, site)
        mean[site], known[site], erased[site] = x.mean(axis=1), r.mean(axis=1), _erased(x, r)
    counts = (np.percentile(known[:, 1:], 2.5, axis=1) > 0) & (known[:, 0] > threshold)
    misaligned = _misaligned(retrained_drop, retrained_control)
    if not counts.any():
        best = int(known[:, 0].argmax())
        low, high = percentiles(known[best, 1:])
        raise ValueError(
            "at no site does the retrained model lower the answers to forget further than the "
            f"control by threshold={threshold} nats and beyond noise: the most is "
            f"{known[best, 0]:.3g} ({low:.3g} to {high:.3g}) at {drop.sites[best]!r}, and the "
            f"control shows {misaligned:.0%} of its fall. Give more items, a control of answers "
            "that both models know, or models of one start."
        )
    erased = np.where(counts[:, None], erased, 0.0)
    weight = np.where(counts[:, None], np.maximum(known, 0), 0.0)
    drawn = weight.sum(axis=0) > 0
    scores = (weight * erased).sum(axis=0)[drawn] / weight.sum(axis=0)[drawn]
    return ControlledDepth(
        float(scores[0]),
        percentiles(scores[1:]),
        drop.sites,
        weight[:, 0],
        erased[:, 0],
        mean[:, 0],
        known[:, 0],
        misaligned,
    )


def _resamples(draw: np.random.Generator, n: int) -> np.ndarray:
    """Items as they are in the first row, drawn anew in the others: ``(1 + N_RESAMPLES, n)``."""
    return np.vstack([np.arange(n), draw.integers(0, n, size=(N_RESAMPLES, n))])


def _excess(
    drop: LayerDrop, control: LayerDrop, items: np.ndarray, controls: np.ndarray, site: int
) -> np.ndarray:
    """Excess of the items of each resample at a site: ``(1 + N_RESAMPLES, n_items)``."""
    d, c = drop.values[items, site], control.values[controls, site]
    mean, spread = d.mean(axis=1, keepdims=True), d.var(axis=1, keepdims=True)
    noise = c.var(axis=1, keepdims=True) / np.where(spread > 0, spread, 1.0)
    return mean - c.mean(axis=1, keepdims=True) + np.clip(1 - noise, 0, 1) * (d - mean)


def _erased(excess: np.ndarray, retrained: np.ndarray) -> np.ndarray:
    """Share of the retrained excess that the model has, items matched by size, row by row."""
    least = np.maximum(np.sort(retrained, axis=1), 0)
    total = least.sum(axis=1)
    reached = np.clip(np.sort(excess, axis=1), 0, least).sum(axis=1)
    return reached / np.where(total > 0, total, 1.0)


def _misaligned(drop: LayerDrop, control: LayerDrop) -> float:
    fall = np.maximum(drop.values.mean(axis=0), 0)
    if not fall.any():
        return 0.0
    return float(np.clip(control.values.mean(axis=0), 0, fall).sum() / fall.sum())


def _require_alike(first: LayerDrop, second: LayerDrop, name: str, other: str) -> None:
    if first.sites != second.sites or first.values.shape != second.values.shape:
        raise ValueError(
            f"{name} is of {first.values.shape} items and sites {list(first.sites)}, {other} of "
            f"{second.values.shape} and {list(second.sites)}; measure both alike."
        )
    if len(first.values) < 2:
        raise ValueError(
            f"{name} is of {len(first.values)} items; noise is not known from fewer than 2."
        )
    for values, which in ((first.values, name), (second.values, other)):
        if not np.isfinite(values).all():
            raise ValueError(f"{which} holds NaN or infinity; measure it again.")
