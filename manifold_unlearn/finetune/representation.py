"""Unlearners that steer hidden states of the forget set elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from manifold_unlearn.arrays import generator
from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import LabeledBatch, MarkedTokens
from manifold_unlearn.finetune.reference import frozen_copy, hidden_states, layer_at
from manifold_unlearn.finetune.rules import Rule, Run, Terms, require_finite_terms
from manifold_unlearn.finetune.weighted import RetainTerm, hidden_term, retain_term, weighted

Reduction = Literal["token", "text", "published"]


@dataclass(frozen=True)
class RMU:
    r"""Push hidden states of forget answers to one random direction, keep those of retain.

    Attributes
    ----------
    site : str, optional
        Where hidden states are read. None: the residual stream at 0.44 of the depth (layer 7 of
        16 in the published TOFU runs).
    scale : float
        ``c``, the norm of the target: 2 in OpenUnlearning's TOFU runs, 20 in WMDP's default. The
        norms of a model's hidden states decide what is large; see :class:`AdaptiveRMU`.
    gamma, alpha : float
        ``alpha`` is 1 on TOFU, 100 to 1200 on WMDP.
    retain : str
        ``"hidden"`` as in the paper, or any other retain term.
    reduction : {"token", "text", "published"}
        See :func:`manifold_unlearn.finetune.losses.hidden_mse`. OpenUnlearning's tables are
        ``"published"``, WMDP's ``"token"``.
    tokens : {"predicting", "answer", "all"}
        Which hidden states. OpenUnlearning's tables are ``"answer"``, which does not reach the
        state that predicts the answer's first token; WMDP's are ``"all"``.

    Notes
    -----
    OpenUnlearning trains all weights on TOFU; WMDP only ``mlp.down_proj`` of three layers up to
    the site: ``TrainConfig(trainable=r"layers\.(5|6|7)\.mlp\.down_proj")``.

    References
    ----------
    Li et al. (2024), WMDP, arXiv 2403.03218.
    """

    site: str | None = None
    scale: float = 2.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "hidden"
    reduction: Reduction = "token"
    tokens: MarkedTokens = "predicting"
    name: ClassVar[str] = "rmu"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Draw the control vector and freeze a copy; return the rule of one run."""

        def scale(batch: LabeledBatch) -> float:
            del batch
            return self.scale

        return _steering(run, self, scale)


@dataclass(frozen=True)
class AdaptiveRMU:
    """RMU whose target has ``scale`` times the norm of the untouched hidden states.

    So one scale serves any layer and model. The other attributes are those of :class:`RMU`.

    Attributes
    ----------
    scale : float
        The paper's ``beta``.
    per : {"text", "token"}
        Whose norm: the mean over a text's answer tokens, or each token's own.

    References
    ----------
    Dang et al. (2024), arXiv 2408.06223.
    """

    site: str | None = None
    scale: float = 5.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "hidden"
    reduction: Reduction = "token"
    tokens: MarkedTokens = "predicting"
    per: Literal["text", "token"] = "text"
    name: ClassVar[str] = "adaptive-rmu"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Draw the control vector and freeze a copy; return the rule of one run."""
        reference = frozen_copy(run.model)

        def scale(batch: LabeledBatch) -> Tensor:
            (before,) = hidden_states(reference, [_site(run, self)], batch)
            mask = batch.marked(self.tokens)
            return self.scale * losses.adaptive_scale(before, mask, per=self.per)

        return _steering(run, self, scale)


def _site(run: Run, objective: RMU | AdaptiveRMU) -> str:
    return objective.site or layer_at(run.model, 7 / 16)


def _steering(
    run: Run,
    objective: RMU | AdaptiveRMU,
    scale: Callable[[LabeledBatch], Tensor | float],
) -> Rule:
    site = _site(run, objective)
    if objective.retain == "hidden":
        keep = hidden_term(run, site, tokens=objective.tokens, reduction=objective.reduction)
    else:
        keep = retain_term(run, objective.retain)
    directions: dict[int, Tensor] = {}

    def forget(batch: LabeledBatch) -> Tensor:
        (now,) = hidden_states(run.model, [site], batch)
        width = now.shape[-1]
        if width not in directions:
            draw = generator(run.random_state)
            directions[width] = losses.control_vector(width, draw).to(now.device)
        mask = batch.marked(objective.tokens)
        target = scale(batch) * directions[width].expand(1, 1, -1)
        return losses.hidden_mse(now, target, mask, reduction=objective.reduction)

    return weighted(run, forget, gamma=objective.gamma, alpha=objective.alpha, retain=keep)


@dataclass(frozen=True)
class CircuitBreaker:
    """Turn hidden states of forget answers orthogonal to what they were; keep those of retain.

    The weight of the forget term falls linearly from ``alpha`` and that of the retain term rises
    from 0, each halfway at the last update.

    Attributes
    ----------
    sites : tuple of str
        Empty: the residual stream at 1/3 and 2/3 of the depth (layers 10 and 20 of 32 published).
    alpha : float
    tokens : {"predicting", "answer", "all"}
        Which hidden states count; all of a text in the published code.

    Notes
    -----
    Published with LoRA: ``TrainConfig(trainable=LoRA(rank=16))``. The retain term covers the same
    sites; the published code takes every layer.

    References
    ----------
    Zou et al. (2024), arXiv 2406.04313, with the schedule of the released code.
    """

    sites: tuple[str, ...] = ()
    alpha: float = 10.0
    tokens: MarkedTokens = "predicting"
    name: ClassVar[str] = "circuit-breaker"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Freeze a copy; return the rule of one run."""
        sites = self.sites or tuple(layer_at(run.model, share) for share in (1 / 3, 2 / 3))
        return _Rerouting(run, self, frozen_copy(run.model), sites)


@dataclass
class _Rerouting:
    run: Run
    objective: CircuitBreaker
    reference: Any
    sites: tuple[str, ...]

    def gradients(self, step: int, forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
        assert retain is not None
        progress = step / (2 * self.run.steps)
        terms = {
            "forget": self._mean(losses.rerouting, forget) * self.objective.alpha * (1 - progress)
        }
        if step:
            keep = self._mean(losses.hidden_distance, retain)
            terms["retain"] = keep * self.objective.alpha * progress
        require_finite_terms(terms, step)
        sum(terms.values(), start=terms["forget"].new_zeros(())).backward()
        return terms

    def settle(self, step: int) -> None:
        """Nothing is left to do."""

    def _mean(
        self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], batch: LabeledBatch
    ) -> Tensor:
        mask = batch.marked(self.objective.tokens)
        now = hidden_states(self.run.model, self.sites, batch)
        before = hidden_states(self.reference, self.sites, batch)
        parts = [loss(a, b, mask) for a, b in zip(now, before, strict=True)]
        total = sum(parts[1:], start=parts[0])
        return total / len(parts)
