"""The form most objectives share: ``gamma * forget term + alpha * retain term``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import Tensor

from manifold_unlearn.finetune.batches import LabeledBatch, MarkedTokens
from manifold_unlearn.finetune.losses import hidden_mse, kl_to_reference, negative_log_likelihood
from manifold_unlearn.finetune.reference import frozen_copy, hidden_states, reference_logits
from manifold_unlearn.finetune.rules import Descent, Run, Terms, logits_of

Term: TypeAlias = "Callable[[LabeledBatch], Tensor]"

RetainTerm: TypeAlias = Literal["nll", "kl", "kl_all", "hidden"]
"""NLL of the retain answers; KL to the untouched model where answers are predicted, or at all
positions as published; or distance of hidden states to those of the untouched model."""


def weighted(
    run: Run, forget: Term, *, gamma: float, alpha: float, retain: Term | None = None
) -> Descent:
    """Rule that descends ``gamma * forget + alpha * retain``; ``alpha=0`` leaves retain out."""

    def terms(batch: LabeledBatch, beside: LabeledBatch | None) -> Terms:
        found = {"forget": gamma * forget(batch)}
        if alpha and retain is not None:
            assert beside is not None
            found["retain"] = alpha * retain(beside)
        return found

    return Descent(run, terms)


def retain_term(run: Run, kind: RetainTerm, *, site: str = "layers.0") -> Term:
    """Return what keeps the retain set; a frozen copy of the model is made where one is needed.

    Raises
    ------
    ValueError
        ``kind`` is not one of :data:`RetainTerm`.
    """
    if kind == "nll":
        return lambda batch: negative_log_likelihood(logits_of(run.model, batch), batch.labels)
    if kind in ("kl", "kl_all"):
        reference = frozen_copy(run.model)

        def divergence(batch: LabeledBatch) -> Tensor:
            mask = batch.marked("predicting") if kind == "kl" else None
            before, now = reference_logits(reference, batch), logits_of(run.model, batch)
            return kl_to_reference(now, before, mask)

        return divergence
    if kind == "hidden":
        return hidden_term(run, site)
    raise ValueError(f"retain={kind!r} is not 'nll', 'kl', 'kl_all' or 'hidden'.")


def hidden_term(
    run: Run,
    site: str,
    *,
    tokens: MarkedTokens = "predicting",
    reduction: Literal["token", "text", "published"] = "token",
) -> Term:
    """Mean squared distance of hidden states at a site to those of the untouched model."""
    reference = frozen_copy(run.model)

    def distance(batch: LabeledBatch) -> Tensor:
        (now,) = hidden_states(run.model, [site], batch)
        (before,) = hidden_states(reference, [site], batch)
        return hidden_mse(now, before, batch.marked(tokens), reduction=reduction)

    return distance
