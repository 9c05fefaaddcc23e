"""SFR-on: forget steps where forgetting matters more than remaining, each followed by repair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from manifold_unlearn.activations.tokens import Encoding
from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import LabeledBatch, batches_in_order
from manifold_unlearn.finetune.rules import Rule, Run, Terms, logits_of, require_finite_terms


@dataclass(frozen=True)
class SFRon:
    """Saliency-masked fast forget steps between slow retain steps of the same optimizer.

    The retain steps pull the model back to where the retain loss is low, so that the net movement
    is the forget direction in the metric of the retain loss, whose inverse is never formed. Both
    kinds count as updates: one forget step, then ``frequency`` retain steps, and so on.

    Attributes
    ----------
    alpha : float
        Weight of the forget loss at the start; it falls as ``(1 + cos(pi t / T)) / 2``.
    frequency : int
        Retain steps after each forget step.
    power : float
        Of the loss in the weight that pushes the best known hardest.
    threshold : float, optional
        A weight takes part in forget steps where its Fisher information on forget, over that on
        retain, is at least this. None: all do.
    clip : float
        Largest norm of a forget gradient.
    average : float
        After each retain step the weights become ``average * new + (1 - average) * before``, with
        those after the retain step before it. The released value 1 does nothing.
    unit : {"text", "token"}
        What has a loss of its own: an answer (its mean NLL) or a token.

    Notes
    -----
    Released for image classifiers with ``TrainConfig(optimizer="sgd", lr=0.01, momentum=0.9,
    weight_decay=5e-4, schedule="cosine", clip=None)`` and 1500 retain steps; ``alpha=25``,
    ``frequency=5`` on CIFAR-10, 500 and 1 (AdamW) on TinyImageNet. The Fisher information is the
    mean over batches of the squared gradient of a batch, as released. There the learning rate moves
    once per retain step, here once per update.

    References
    ----------
    Huang et al. (2024), arXiv 2409.19732; released code, ``Classification/unlearn/sfron.py``.
    """

    alpha: float = 25.0
    frequency: int = 5
    power: float = 0.5
    threshold: float | None = 1.0
    clip: float = 7.0
    average: float = 1.0
    unit: Literal["text", "token"] = "text"
    name: ClassVar[str] = "sfr-on"
    needs_retain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.frequency < 1:
            raise ValueError(f"frequency={self.frequency} must be at least 1 retain step.")
        if not 0 < self.average <= 1:
            raise ValueError(f"average={self.average} must lie in (0, 1].")

    def bind(self, run: Run) -> Rule:
        """Measure which weights matter more to forget; return the rule of one run."""
        mask = None if self.threshold is None else saliency_mask(run, self.threshold)
        return _FastSlow(run, self, mask)


def saliency_mask(run: Run, threshold: float) -> dict[str, Tensor]:
    """Where Fisher information on forget is at least ``threshold`` times that on retain.

    Returns
    -------
    dict of str to Tensor, bool
        By parameter name, in its shape.
    """
    forget, retain = _fisher(run, run.forget), _fisher(run, run.retain)
    return {n: (forget[n] + 1e-15) / (retain[n] + 1e-15) >= threshold for n in run.parameters}


def _fisher(run: Run, rows: Sequence[Encoding]) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of the batch's NLL."""
    n_batches = math.ceil(len(rows) / run.batch_size)
    found = {name: torch.zeros_like(value) for name, value in run.parameters.items()}
    for batch in batches_in_order(rows, run.batch_size, pad_id=run.pad_id):
        batch = batch.to(run.device)
        loss = losses.negative_log_likelihood(logits_of(run.model, batch), batch.labels)
        gradients = torch.autograd.grad(loss, list(run.parameters.values()), allow_unused=True)
        for name, gradient in zip(run.parameters, gradients, strict=True):
            if gradient is not None:
                found[name] += gradient.square() / n_batches
    return found


@dataclass
class _FastSlow:
    run: Run
    objective: SFRon
    mask: Mapping[str, Tensor] | None
    before: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keep()

    def gradients(self, step: int, forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
        assert retain is not None
        block, place = divmod(step, self.objective.frequency + 1)
        if place:
            terms = {"retain": self._nll(retain)}
            require_finite_terms(terms, step)
            terms["retain"].backward()
            return terms
        n_blocks = math.ceil(self.run.steps / (self.objective.frequency + 1))
        n_slow = max(1, self.run.steps - n_blocks)
        done = min(1.0, block * self.objective.frequency / n_slow)
        weight = self.objective.alpha * (1 + math.cos(math.pi * done)) / 2
        terms = {"forget": weight * self._ascent(forget)}
        require_finite_terms(terms, step)
        terms["forget"].backward()
        for name, parameter in self.run.parameters.items():
            if self.mask is not None and parameter.grad is not None:
                parameter.grad *= self.mask[name]
        torch.nn.utils.clip_grad_norm_(self.run.parameters.values(), self.objective.clip)
        return terms

    def settle(self, step: int) -> None:
        share = self.objective.average
        if share == 1 or step % (self.objective.frequency + 1) == 0:
            return
        with torch.no_grad():
            for name, parameter in self.run.parameters.items():
                parameter.lerp_(self.before[name], 1 - share)
        self._keep()

    def _keep(self) -> None:
        if self.objective.average < 1:
            values = self.run.parameters.items()
            self.before = {name: value.detach().clone() for name, value in values}

    def _nll(self, batch: LabeledBatch) -> Tensor:
        return losses.negative_log_likelihood(logits_of(self.run.model, batch), batch.labels)

    def _ascent(self, batch: LabeledBatch) -> Tensor:
        tokens, mask = losses.token_log_probabilities(
            logits_of(self.run.model, batch), batch.labels
        )
        each = -tokens[mask] if self.objective.unit == "token" else -tokens.sum(1) / mask.sum(1)
        return losses.adaptive_ascent(each, power=self.objective.power)
