"""What an objective is given, and what it gives the loop: a rule that makes gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.tokens import Encoding
from manifold_unlearn.finetune.batches import Example, LabeledBatch, collate

Terms: TypeAlias = "Mapping[str, Tensor]"
"""Weighted parts of a loss by name; their sum is descended."""


@dataclass(frozen=True)
class Run:
    """What one run trains on; made by the loop, read by objectives."""

    model: Any
    """The model being trained, in evaluation mode (no dropout)."""
    tokenizer: Any
    forget: Sequence[Encoding]
    retain: Sequence[Encoding]
    """Empty where the objective needs none."""
    forget_examples: Sequence[Example]
    parameters: Mapping[str, nn.Parameter]
    """Those that may change."""
    steps: int
    batch_size: int
    random_state: int
    include_eos: bool = False
    max_length: int | None = None

    @property
    def pad_id(self) -> int:
        """Token that stands in the padding."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(iter(self.parameters.values())).device

    def batch(self, rows: Sequence[Encoding], index: Tensor) -> LabeledBatch:
        """Rows named by ``index``, padded, on the device of the model."""
        return collate(rows, index, pad_id=self.pad_id).to(self.device)


class Rule(Protocol):
    """How the updates of one run come about."""

    def gradients(self, step: int, forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
        """Leave gradients in the parameters for update ``step`` (from 0); return what to log."""

    def settle(self, step: int) -> None:
        """Do what is to be done after the update."""


class Objective(Protocol):
    """What is descended; hyper-parameters only, so that one object serves many runs."""

    @property
    def name(self) -> str:
        """Short name, as tables print it."""

    @property
    def needs_retain(self) -> bool:
        """Whether a retain set has to be given."""

    def bind(self, run: Run) -> Rule:
        """Compute once what is needed of the untouched model, before the first update."""


@dataclass
class Descent:
    """The rule of most objectives: gradients of a sum of terms."""

    run: Run
    terms: Callable[[LabeledBatch, LabeledBatch | None], Terms]

    def gradients(self, step: int, forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
        """Gradients of the sum of the terms."""
        terms = self.terms(forget, retain)
        require_finite_terms(terms, step)
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        return terms

    def settle(self, step: int) -> None:
        """Nothing is left to do."""


def require_finite_terms(terms: Terms, step: int) -> None:
    """Raise ``FloatingPointError`` naming the first term that is NaN or infinite."""
    for name, term in terms.items():
        if not bool(torch.isfinite(term.detach())):
            raise FloatingPointError(
                f"step {step + 1}: the {name} loss is {float(term.detach())}. Lower lr, clip "
                "gradients, or give the objective a retain term; the caller's model is unchanged."
            )


def logits_of(model: Any, batch: LabeledBatch, **options: Any) -> Tensor:
    """Logits ``(n_texts, width, n_vocabulary)`` of a batch."""
    out = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **options
    )
    return out.logits
