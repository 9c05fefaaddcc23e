"""How deep forgetting goes: what a model still carries, layer by layer, put into the told model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.comparison.similarity import cka
from manifold_unlearn.evaluate.forced import (
    Entities,
    Forced,
    Sites,
    force,
    named_sites,
    predicting_states,
    require_equal_shapes,
    scored_log_probabilities,
)
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject
from manifold_unlearn.evaluate.results import Metric
from manifold_unlearn.intervene.hooks import intervene

THRESHOLD = 0.05
"""Nats by which retrained states must lower the answer for a layer to carry knowledge."""


@dataclass(frozen=True, eq=False)
class LayerDrop:
    """What each item loses when the told model meets another model's states at a site."""

    sites: tuple[str, ...]
    values: np.ndarray
    """(n_items, n_sites) float64, nats a token; 0 where the other model's states say the same"""


@dataclass(frozen=True, eq=False)
class UnlearningDepth:
    """Unlearning depth of a model, with the layers that carry the knowledge."""

    score: Metric
    """Over the items of which a layer carries knowledge: 0 as the told model, 1 as the retrained"""
    scored: np.ndarray
    """(n_items,) bool: which items those are"""
    knowledge: np.ndarray
    """(n_items, n_sites) bool: the sites whose retrained states lower the item's answer"""
    erased: np.ndarray
    """(n_sites,) float64: mean share erased over the items that know there; 0 where none does"""
    drop: LayerDrop
    retrained_drop: LayerDrop

    @property
    def n_excluded(self) -> int:
        """Items that no layer carries: the told model does not know them better."""
        return int((~self.scored).sum())

    def to_json(self) -> dict[str, Any]:
        """Score with its interval, what was left out, and the profile over the sites."""
        return {
            "score": self.score.to_json(),
            "n_excluded": self.n_excluded,
            "sites": list(self.drop.sites),
            "knowing_share": self.knowledge.mean(axis=0).tolist(),
            "erased": self.erased.tolist(),
            "drop": self.drop.values.mean(axis=0).tolist(),
            "retrained_drop": self.retrained_drop.values.mean(axis=0).tolist(),
        }


def patching_drop(
    told: Subject,
    source: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    sites: Sites = "blocks",
    entities: Entities | None = None,
    include_eos: bool = False,
    batch_size: BatchSize = "auto",
) -> LayerDrop:
    """Fall of the answers' log-probability when the source's states replace those of the told.

    Both models read prompt and answer. At one site at a time, and only at the positions whose
    states predict an answer token (from the prompt's last token to the answer's last but one, or
    those before the entity's tokens), the told model goes on with the source's states. The prompt
    and, with an entity, what goes before it stay the told model's own.

    Parameters
    ----------
    told, source : Subject
        ``plain(model)`` or a model under an edit. They may be one model: it is opened for one of
        them at a time. Nothing in either is changed.
    tokenizer : transformers.PreTrainedTokenizerFast
    items : sequence of Item
    sites : {"blocks", "attn", "mlp"} or sequence of str, default="blocks"
        Where to exchange states. ``"blocks"`` is the published form: the residual stream after
        each block. ``"attn"`` and ``"mlp"`` exchange what one part writes and leave the stream.
    entities : sequence of str or (str, str), optional
        Look at the entity in each answer alone, as published. See
        :func:`~manifold_unlearn.evaluate.forced.force`.
    include_eos : bool, default=False
        Count the end-of-sequence token as the answer's last.
    batch_size : int or "auto"

    Returns
    -------
    LayerDrop
        ``mean_t(log p_told(y_t) - log p_patched(y_t))``, nats.

    Raises
    ------
    ValueError
        The models differ in shape; what :func:`~manifold_unlearn.evaluate.forced.force` refuses;
        a log-probability that is not finite (names the site and the item).

    References
    ----------
    Unlearning depth score (arXiv 2605.24614).
    """
    require_equal_shapes({"told": told, "source": source})
    forced = force(
        told,
        tokenizer,
        items,
        entities=entities,
        include_eos=include_eos,
        batch_size=batch_size,
    )
    return forced_drop(told, source, forced, named_sites(told, sites), batch_size)


def forced_drop(
    told: Subject,
    source: Subject,
    forced: Forced,
    names: Sequence[str],
    batch_size: BatchSize = "auto",
) -> LayerDrop:
    """:func:`patching_drop` of items that are tokens already, for many sources of one told model.

    ``forced`` is from :func:`~manifold_unlearn.evaluate.forced.force` with the told model, and
    ``names`` are sites.
    """
    require_equal_shapes({"told": told, "source": source})
    parts, item = [], []
    for made, states in predicting_states(source, forced, names, batch_size, desc="patch"):
        with told() as model, torch.no_grad(), evaluating(model):
            plain = scored_log_probabilities(model, made)
            drops = []
            for name in names:
                with intervene(model, {name: _placing(states[name], made.reads)}):
                    drops.append(plain - scored_log_probabilities(model, made))
        parts.append(torch.stack(drops))
        item.append(made.item)
    values = forced.per_item(torch.cat(parts, dim=1), torch.cat(item)).T
    _require_finite(values, names)
    return LayerDrop(tuple(names), values)


def _placing(states: Tensor, reads: Tensor) -> Callable[[Tensor], Tensor]:
    def place(hidden: Tensor) -> Tensor:
        placed = hidden.clone()
        placed[reads.to(hidden.device)] = states.to(hidden)
        return placed

    return place


def _require_finite(values: np.ndarray, names: Sequence[str]) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        item, site = bad[0]
        raise ValueError(
            f"the log-probability of item {item} patched at {names[site]!r} is not finite; one of "
            "the models has weights or states that are not. Repair it, or use float32."
        )


def unlearning_depth(
    drop: LayerDrop, retrained_drop: LayerDrop, *, threshold: float = THRESHOLD
) -> UnlearningDepth:
    """Share of the layers' knowledge that is gone, each layer weighted by what it carries.

    A site carries an item's knowledge where the retrained states lower the answer by more than
    ``threshold``. Over these, ``sum(d1 * clip(d2 / d1, 0, 1)) / sum(d1)`` with ``d1`` the fall for
    the retrained model's states and ``d2`` that for the states of the model judged. Items without
    such a site are left out and counted.

    Parameters
    ----------
    drop, retrained_drop : LayerDrop
        From :func:`patching_drop` (unlearning depth) or
        :func:`~manifold_unlearn.evaluate.lens.frozen_head_drop` (its logit-lens form), both of the
        same items, told model and sites.
    threshold : float, default=0.05
        Nats a token.

    Returns
    -------
    UnlearningDepth
        1 for the retrained model's own drop, 0 for the told model's.

    Raises
    ------
    ValueError
        The two belong to other sites or items, or no item has a site that carries it.

    References
    ----------
    Unlearning depth score (arXiv 2605.24614).
    """
    if drop.sites != retrained_drop.sites or drop.values.shape != retrained_drop.values.shape:
        raise ValueError(
            f"drop is of {drop.values.shape} items and sites {list(drop.sites)}, retrained_drop of "
            f"{retrained_drop.values.shape} and {list(retrained_drop.sites)}; measure both alike."
        )
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} must be at least 0 nats.")
    d1, d2 = retrained_drop.values, drop.values
    knowledge = d1 > threshold
    scored = np.asarray(knowledge.any(axis=1))
    if not scored.any():
        raise ValueError(
            f"no item falls by more than threshold={threshold} nats at any site (the largest fall "
            f"is {d1.max():.3g}): the told model knows nothing that the retrained one does not. "
            "Check which model is which."
        )
    share = np.clip(d2 / np.where(knowledge, d1, 1.0), 0, 1)
    weight = np.where(knowledge, d1, 0.0)
    values = (weight * share).sum(axis=1)[scored] / weight.sum(axis=1)[scored]
    count = knowledge.sum(axis=0)
    erased = (share * knowledge).sum(axis=0) / np.maximum(count, 1)
    return UnlearningDepth(
        Metric("unlearning_depth", values), scored, knowledge, erased, drop, retrained_drop
    )


def unlearning_depth_score(
    told: Subject,
    subject: Subject,
    retrained: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    threshold: float = THRESHOLD,
    **options: Any,
) -> UnlearningDepth:
    """Unlearning depth of a subject in one call: :func:`patching_drop` twice, and the share.

    To judge many models, measure the retrained drop once and use :func:`unlearning_depth`.

    Parameters
    ----------
    told, subject, retrained : Subject
        That knew, that is judged, that was never told.
    tokenizer : transformers.PreTrainedTokenizerFast
    items : sequence of Item
    threshold : float, default=0.05
    **options
        As for :func:`patching_drop`.

    Returns
    -------
    UnlearningDepth
    """
    reference = patching_drop(told, retrained, tokenizer, items, **options)
    found = patching_drop(told, subject, tokenizer, items, **options)
    return unlearning_depth(found, reference, threshold=threshold)


@dataclass(frozen=True, eq=False)
class CkaErasure:
    """How far a model's representations have moved from the told toward the retrained model's."""

    sites: tuple[str, ...]
    erased: np.ndarray
    """(n_sites,) float64 in [0, 1]"""
    weight: np.ndarray
    """(n_sites,) float64: ``1 - CKA(told, retrained)``"""

    @property
    def score(self) -> float:
        """Mean of the shares erased, weighted."""
        return float((self.weight * self.erased).sum() / self.weight.sum())


def cka_erasure(
    told: Subject,
    subject: Subject,
    retrained: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    sites: Sites = "blocks",
    entities: Entities | None = None,
    batch_size: BatchSize = "auto",
) -> CkaErasure:
    """Geometric counterpart of the unlearning depth; for comparison, not for judgment.

    At each site ``clip((c(subject) - c(told)) / (1 - c(told)), 0, 1)`` with ``c`` the linear CKA
    (biased estimator, as published) to the retrained model over the states that predict answer
    tokens, all items together. Published faithfulness .648 against .971 of the unlearning depth,
    robustness .026 against .933: it says whether representations are alike, not what they carry.

    Parameters
    ----------
    told, subject, retrained : Subject
    tokenizer : transformers.PreTrainedTokenizerFast
    items : sequence of Item
    sites : {"blocks", "attn", "mlp"} or sequence of str, default="blocks"
    entities : sequence of str or (str, str), optional
    batch_size : int or "auto"

    Returns
    -------
    CkaErasure

    Raises
    ------
    ValueError
        The models differ in shape, the items have fewer than 4 answer tokens, the states at a site
        are constant, or told and retrained have the same states everywhere.

    References
    ----------
    Unlearning depth score (arXiv 2605.24614), its CKA baseline.
    """
    require_equal_shapes({"told": told, "subject": subject, "retrained": retrained})
    names = named_sites(told, sites)
    forced = force(told, tokenizer, items, entities=entities, batch_size=batch_size)
    reference = _stacked(retrained, forced, names, batch_size)

    def to_reference(other: Subject) -> np.ndarray:
        states = _stacked(other, forced, names, batch_size)
        return np.array([cka(states[n], reference[n], estimator="biased").value for n in names])

    before, now = to_reference(told), to_reference(subject)
    weight = np.maximum(1 - before, 0.0)
    weight[weight < 1e-9] = 0.0  # rounding of equal states
    if not weight.any():
        raise ValueError(
            "told and retrained have the same states at every site: nothing can be erased. "
            "Check which model is which."
        )
    share = np.clip((now - before) / np.where(weight > 0, weight, 1.0), 0, 1)
    return CkaErasure(tuple(names), np.where(weight > 0, share, 0.0), weight)


def _stacked(
    subject: Subject, forced: Forced, names: Sequence[str], batch_size: BatchSize
) -> dict[str, Tensor]:
    parts = [states for _, states in predicting_states(subject, forced, names, batch_size)]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in names}
