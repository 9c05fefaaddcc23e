"""Unlearners that climb the loss of what is to be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import LabeledBatch
from manifold_unlearn.finetune.rules import Rule, Run, logits_of
from manifold_unlearn.finetune.weighted import RetainTerm, Term, retain_term, weighted


@dataclass(frozen=True)
class GradientAscent:
    """Descend ``-NLL`` of the forget set, with nothing beside it.

    References
    ----------
    Jang et al. (2022), arXiv 2210.01504.
    """

    name: ClassVar[str] = "ga"
    needs_retain: ClassVar[bool] = False

    def bind(self, run: Run) -> Rule:
        """Return the rule of one run."""

        def forget(batch: LabeledBatch) -> Tensor:
            return losses.gradient_ascent(logits_of(run.model, batch), batch.labels)

        return weighted(run, forget, gamma=1.0, alpha=0.0)


@dataclass(frozen=True)
class GradDiff:
    """Gradient ascent on forget, descent on retain.

    References
    ----------
    Liu, Liu and Stone (2022), arXiv 2203.12817; weights as in OpenUnlearning.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"
    name: ClassVar[str] = "graddiff"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Return the rule of one run."""

        def forget(batch: LabeledBatch) -> Tensor:
            return losses.gradient_ascent(logits_of(run.model, batch), batch.labels)

        return _with_retain(run, self, forget)


@dataclass(frozen=True)
class WGA:
    """Ascent weighted by ``p**beta``, so that what is forgotten is left alone."""

    beta: float = 1.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"
    name: ClassVar[str] = "wga"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Return the rule of one run."""

        def forget(batch: LabeledBatch) -> Tensor:
            return losses.wga(logits_of(run.model, batch), batch.labels, beta=self.beta)

        return _with_retain(run, self, forget)


@dataclass(frozen=True)
class SatImp:
    """Ascent weighted by ``p**beta1 * (1 - p)**beta2``."""

    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 1.0
    alpha: float = 0.1
    retain: RetainTerm = "nll"
    name: ClassVar[str] = "satimp"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Return the rule of one run."""

        def forget(batch: LabeledBatch) -> Tensor:
            logits = logits_of(run.model, batch)
            return losses.satimp(logits, batch.labels, beta1=self.beta1, beta2=self.beta2)

        return _with_retain(run, self, forget)


def _with_retain(run: Run, objective: GradDiff | WGA | SatImp, forget: Term) -> Rule:
    keep = retain_term(run, objective.retain)
    return weighted(run, forget, gamma=objective.gamma, alpha=objective.alpha, retain=keep)
