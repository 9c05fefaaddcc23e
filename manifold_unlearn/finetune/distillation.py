"""Unlearners that learn from an edited distribution of the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import LabeledBatch
from manifold_unlearn.finetune.reference import frozen_copy, reference_logits
from manifold_unlearn.finetune.rules import Rule, Run, logits_of
from manifold_unlearn.finetune.weighted import RetainTerm, retain_term, weighted


@dataclass(frozen=True)
class UNDIAL:
    """Self-distillation from the untouched model with the true token's logit lowered.

    ``alpha=0`` as published: the distribution beside the true token is what keeps the model.

    References
    ----------
    Dong et al. (2024), arXiv 2402.10052; defaults as in OpenUnlearning (there lr 1e-4).
    """

    beta: float = 10.0
    gamma: float = 1.0
    alpha: float = 0.0
    retain: RetainTerm = "nll"
    positions: Literal["answer", "published"] = "answer"
    name: ClassVar[str] = "undial"

    @property
    def needs_retain(self) -> bool:
        """Only with a retain term."""
        return self.alpha > 0

    def bind(self, run: Run) -> Rule:
        """Keep a frozen copy; return the rule of one run."""
        reference = frozen_copy(run.model)

        def forget(batch: LabeledBatch) -> Tensor:
            return losses.undial(
                logits_of(run.model, batch),
                reference_logits(reference, batch),
                batch.labels,
                beta=self.beta,
                positions=self.positions,
            )

        keep = retain_term(run, self.retain) if self.alpha else None
        return weighted(run, forget, gamma=self.gamma, alpha=self.alpha, retain=keep)


@dataclass(frozen=True)
class CEU:
    """Cross entropy to the model's own distribution without the true token, as it now is."""

    ignore_first: int = 1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"
    name: ClassVar[str] = "ceu"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Return the rule of one run."""

        def forget(batch: LabeledBatch) -> Tensor:
            logits = logits_of(run.model, batch)
            return losses.ceu(logits, batch.labels, ignore_first=self.ignore_first)

        keep = retain_term(run, self.retain)
        return weighted(run, forget, gamma=self.gamma, alpha=self.alpha, retain=keep)
