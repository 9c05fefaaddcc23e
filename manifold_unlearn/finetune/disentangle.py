"""Forget gradients without their part along gradients of the retain set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from manifold_unlearn.arrays import generator
from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import LabeledBatch, epochs
from manifold_unlearn.finetune.rules import (
    Descent,
    Objective,
    Rule,
    Run,
    Terms,
    logits_of,
    require_finite_terms,
)


@dataclass(frozen=True)
class Disentangled:
    """Any objective with its forget part projected off the span of retain gradients.

    To first order in the step no loss of a spanned retain batch then changes: what is left of the
    change is of second order, and what retain texts outside the span lose.

    Attributes
    ----------
    objective : Objective
        One that descends a sum of terms; what it calls ``forget`` is projected.
    rank : int
        Retain gradients in the span.
    per : {"batch", "text"}
        Whether each is the gradient of a batch's NLL or of one text's.
    refresh : int
        Updates after which the span is computed anew, where the model then is.
    of : {"gradient", "update"}
        What is projected. ``"gradient"`` leaves retain invariant under plain SGD only: adaptive
        optimizers scale coordinates, momentum remembers older spans. ``"update"`` projects the
        movement itself, whatever the optimizer; terms of the objective other than ``forget`` are
        then projected with it, so give one without them (``GradientAscent``, or ``alpha=0``).

    Notes
    -----
    Costs ``rank`` gradients each ``refresh`` updates, and their memory.

    References
    ----------
    The projection of Geometric-disentanglement unlearning, arXiv 2511.17100.
    """

    objective: Objective
    rank: int = 8
    per: Literal["batch", "text"] = "batch"
    refresh: int = 1
    of: Literal["gradient", "update"] = "gradient"

    def __post_init__(self) -> None:
        for name in ("rank", "refresh"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.of not in ("gradient", "update"):
            raise ValueError(f"of={self.of!r} is not 'gradient' or 'update'.")

    @property
    def name(self) -> str:
        """Name of the objective with a suffix."""
        return f"{self.objective.name}, disentangled"

    @property
    def needs_retain(self) -> bool:
        """Always: the span comes from it."""
        return True

    def bind(self, run: Run) -> Rule:
        """Bind the objective; return the rule that projects."""
        rule = self.objective.bind(run)
        if not isinstance(rule, Descent):
            raise ValueError(
                f"{self.objective.name} makes its gradients itself, so none can be projected; "
                "choose an objective that descends a sum of terms."
            )
        size = 1 if self.per == "text" else run.batch_size
        return _Projected(
            run, self, rule, epochs(len(run.retain), size, generator(run.random_state + 2))
        )


@dataclass
class _Projected:
    run: Run
    settings: Disentangled
    rule: Descent
    order: Iterator[Tensor]
    span: Tensor | None = None
    before: Tensor | None = None

    def gradients(self, step: int, forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
        if self.span is None or step % self.settings.refresh == 0:
            self.span = self._span()
        terms = self.rule.terms(forget, retain)
        require_finite_terms(terms, step)
        if self.settings.of == "update":
            self._set(self._gradient(sum_of(terms)))
            self.before = self._weights()
            return terms
        gradient = without(self._gradient(terms["forget"]), self.span)
        if others := {name: term for name, term in terms.items() if name != "forget"}:
            gradient = gradient + self._gradient(sum_of(others))
        self._set(gradient)
        return terms

    def settle(self, step: int) -> None:
        del step
        if self.before is None:
            return
        assert self.span is not None
        kept = self.before + without(self._weights() - self.before, self.span)
        with torch.no_grad():
            for parameter, part in self._split(kept):
                parameter.copy_(part)

    def _span(self) -> Tensor:
        """Orthonormal columns ``(n_weights, at most rank)`` that span retain gradients."""
        columns = []
        for _ in range(self.settings.rank):
            batch = self.run.batch(self.run.retain, next(self.order))
            logits = logits_of(self.run.model, batch)
            loss = losses.negative_log_likelihood(logits, batch.labels)
            columns.append(self._gradient(loss))
        return orthonormal(torch.stack(columns, dim=1))

    def _gradient(self, loss: Tensor) -> Tensor:
        values = list(self.run.parameters.values())
        parts = torch.autograd.grad(loss, values, allow_unused=True)
        found = [
            torch.zeros_like(v) if g is None else g for v, g in zip(values, parts, strict=True)
        ]
        return torch.cat([part.flatten() for part in found])

    def _weights(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self.run.parameters.values()])

    def _set(self, gradient: Tensor) -> None:
        for parameter, part in self._split(gradient):
            parameter.grad = part.clone()

    def _split(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        values = list(self.run.parameters.values())
        for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
            yield value, part.view_as(value)


def orthonormal(columns: Tensor, *, tol: float = 1e-6) -> Tensor:
    """Orthonormal basis of the columns of ``(n, m)``; dependent and vanishing ones drop out.

    By the Gram matrix, so that ``n`` may be millions.
    """
    wide = columns.to(torch.promote_types(columns.dtype, torch.float32))
    norms = wide.norm(dim=0)
    kept = norms > tol * norms.max()
    unit = wide[:, kept] / norms[kept]
    if not bool(kept.any()):
        return unit
    values, vectors = torch.linalg.eigh((unit.T @ unit).double())
    strong = values > tol * values.max()
    basis = unit @ (vectors[:, strong] / values[strong].sqrt()).to(unit.dtype)
    return torch.linalg.qr(basis)[0]


def without(vector: Tensor, span: Tensor) -> Tensor:
    """``vector`` less its projection on orthonormal columns; twice, against rounding."""
    for _ in range(2):
        vector = vector - span @ (span.T @ vector)
    return vector


def sum_of(terms: Terms) -> Tensor:
    """Sum of weighted terms."""
    values = list(terms.values())
    return sum(values[1:], start=values[0])
