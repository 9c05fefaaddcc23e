"""Unlearners that make the true answer the rejected one of a preference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from manifold_unlearn.activations.corpus import Item, join_answer
from manifold_unlearn.activations.tokens import Encoding
from manifold_unlearn.arrays import generator
from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import Example, LabeledBatch, encode_examples
from manifold_unlearn.finetune.reference import reference_answers
from manifold_unlearn.finetune.refusals import REFUSALS
from manifold_unlearn.finetune.rules import Rule, Run, logits_of
from manifold_unlearn.finetune.weighted import RetainTerm, retain_term, weighted


@dataclass(frozen=True)
class NPO:
    """Negative preference optimization: ascent that fades once an answer is unlikelier than before.

    References
    ----------
    Zhang et al. (2024), arXiv 2404.05868.
    """

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"
    name: ClassVar[str] = "npo"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Score the forget answers once; return the rule of one run."""
        before = reference_answers(run, run.forget)

        def forget(batch: LabeledBatch) -> Tensor:
            now, _ = losses.answer_log_probabilities(logits_of(run.model, batch), batch.labels)
            return losses.npo(now, before[batch.index], beta=self.beta)

        keep = retain_term(run, self.retain)
        return weighted(run, forget, gamma=self.gamma, alpha=self.alpha, retain=keep)


@dataclass(frozen=True)
class SimNPO:
    """NPO on the mean over tokens, without a reference model.

    References
    ----------
    Fan et al. (2024), arXiv 2410.07163; default weights as in OpenUnlearning.
    """

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125
    alpha: float = 1.0
    retain: RetainTerm = "nll"
    name: ClassVar[str] = "simnpo"
    needs_retain: ClassVar[bool] = True

    def bind(self, run: Run) -> Rule:
        """Return the rule of one run."""

        def forget(batch: LabeledBatch) -> Tensor:
            now, n_tokens = losses.answer_log_probabilities(
                logits_of(run.model, batch), batch.labels
            )
            return losses.simnpo(now, n_tokens, beta=self.beta, delta=self.delta)

        keep = retain_term(run, self.retain)
        return weighted(run, forget, gamma=self.gamma, alpha=self.alpha, retain=keep)


@dataclass(frozen=True)
class DPO:
    """Prefer another answer to the true one: a refusal (IdkDPO), or a wrong answer (AltPO).

    Each item has one preferred answer for the whole run, drawn from the seed; the published code
    draws a refusal anew each time.

    Attributes
    ----------
    beta, gamma, alpha, retain
        As in :class:`NPO`.
    preferred : {"refusal", "perturbed"}
        ``"perturbed"`` draws from the item's ``perturbed_answer``.
    refusals : tuple of str

    References
    ----------
    Maini et al. (2024), TOFU (IdkDPO); Mekala et al. (2024), arXiv 2409.13474 (AltPO).
    """

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"
    preferred: Literal["refusal", "perturbed"] = "refusal"
    refusals: tuple[str, ...] = REFUSALS
    needs_retain: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """IdkDPO or AltPO."""
        return "idkdpo" if self.preferred == "refusal" else "altpo"

    def bind(self, run: Run) -> Rule:
        """Draw what is preferred, score both answers once; return the rule of one run."""
        wins = self._preferred_rows(run)
        before_win = reference_answers(run, wins)
        before = reference_answers(run, run.forget)

        def forget(batch: LabeledBatch) -> Tensor:
            other = run.batch(wins, batch.index.cpu())
            now, _ = losses.answer_log_probabilities(logits_of(run.model, batch), batch.labels)
            win, _ = losses.answer_log_probabilities(logits_of(run.model, other), other.labels)
            index = batch.index
            return losses.dpo(win, before_win[index], now, before[index], beta=self.beta)

        keep = retain_term(run, self.retain)
        return weighted(run, forget, gamma=self.gamma, alpha=self.alpha, retain=keep)

    def _preferred_rows(self, run: Run) -> list[Encoding]:
        draw = generator(run.random_state)
        pairs = []
        for i, example in enumerate(run.forget_examples):
            question, choices = _choices(i, example, self)
            drawn = int(torch.randint(len(choices), (), generator=draw))
            pairs.append((question, join_answer(question, choices[drawn])))
        return encode_examples(
            run.tokenizer,
            pairs,
            name="preferred answers",
            max_length=run.max_length,
            include_eos=run.include_eos,
        )


def _choices(i: int, example: Example, objective: DPO) -> tuple[str, Sequence[str]]:
    """Question of an example and the answers that may be preferred to its own."""
    if isinstance(example, str) or (isinstance(example, Item) and not example.answer):
        raise ValueError(
            f"forget[{i}] is a plain text; {objective.name} needs items with question and answer."
        )
    question = example.question if isinstance(example, Item) else example[0]
    if objective.preferred == "refusal":
        return question, objective.refusals
    if not isinstance(example, Item) or not example.perturbed_answer:
        raise ValueError(
            f"forget[{i}] has no perturbed_answer to prefer; give items that have some, or use "
            "preferred='refusal'."
        )
    return question, example.perturbed_answer
