"""How much of what a hooked edit does a baked model still does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.activations.tokens import Batch, Encoding, batches, encode
from manifold_unlearn.evaluate.likelihood import Subject, answer_encodings

TOKEN_BUDGET = 1024
"""Tokens a forward pass: the logits of three models are held at once."""


@dataclass(frozen=True)
class KeptBehavior:
    """A baked model between the original (0) and the hooked one (1)."""

    divergence: float
    """``1 - KL(hooked | baked) / KL(hooked | original)``, summed over the tokens"""
    log_probability: float
    """``1 - sum |log p_hooked - log p_baked| / sum |log p_hooked - log p_original|`` of the tokens
    that the items have; below 0 where the baked model is farther off than the original"""
    hooked_divergence: float
    """Mean ``KL(hooked | original)`` a token, nats: what there was to keep"""
    n_tokens: int


def kept_behavior(
    hooked: Subject,
    baked: Subject,
    original: Subject,
    tokenizer: Any,
    items: Sequence[Item],
) -> KeptBehavior:
    """Share of a hooked edit's effect on next-token distributions that a baked model reproduces.

    Parameters
    ----------
    hooked, baked, original : Subject
        ``lambda: intervene(model, maps)``, ``plain(baked)`` and ``plain(model)``.
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
        Scored at the tokens of the answers; in items without answer at all tokens but the first.

    Returns
    -------
    KeptBehavior

    Raises
    ------
    ValueError
        No items, the hooks change nothing on them, or a log-probability is not a number.
    """
    if not items:
        raise ValueError("items is empty; give at least one.")
    with original() as model, torch.no_grad(), evaluating(model):
        rows = _encodings(model, tokenizer, items)
    made = batches(rows, token_budget=TOKEN_BUDGET)
    left = torch.zeros(2, dtype=torch.float64)
    whole = torch.zeros(2, dtype=torch.float64)
    n_tokens = 0
    for batch in made:
        answer = _answer(batch, rows)
        teacher, student, start = (
            _log_probabilities(subject, batch, answer) for subject in (hooked, baked, original)
        )
        said = batch.input_ids[answer][:, None]
        left += _distance(teacher, student, said)
        whole += _distance(teacher, start, said)
        n_tokens += len(said)
    if not bool(torch.isfinite(left + whole).all()):
        raise ValueError(
            "a model's log-probabilities are not numbers: its weights, or what edits them, hold "
            "NaN. Check them, or load the model in float32 or bfloat16."
        )
    if not bool((whole > 0).all()):
        raise ValueError(
            f"the hooks change nothing at the {n_tokens} tokens of the items; give items on which "
            "they act."
        )
    share = 1 - left / whole
    return KeptBehavior(float(share[0]), float(share[1]), float(whole[0]) / n_tokens, n_tokens)


def _encodings(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[Encoding]:
    pairs = [item.pair for item in items if item.answer]
    asked = iter(answer_encodings(model, tokenizer, pairs) if pairs else [])
    return [next(asked) if item.answer else _plain(tokenizer, item) for item in items]


def _plain(tokenizer: Any, item: Item) -> Encoding:
    row = encode(tokenizer, [item.question])[0]
    return Encoding(row.ids, row.special, torch.arange(len(row)) > 0)


def _answer(batch: Batch, rows: Sequence[Encoding]) -> Tensor:
    masks = [rows[i].answer for i in batch.index.tolist()]
    return torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)


def _log_probabilities(subject: Subject, batch: Batch, answer: Tensor) -> Tensor:
    """(n, vocabulary) float32 on the CPU, for the tokens of the answers."""
    with subject() as model, torch.no_grad(), evaluating(model):
        device = next(model.parameters()).device
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
        ).logits
        predicting = answer.roll(-1, dims=1).to(device)  # the first token never counts
        return logits[predicting].float().log_softmax(-1).cpu()


def _distance(teacher: Tensor, student: Tensor, said: Tensor) -> Tensor:
    """Summed KL divergence, and summed difference of the log-probabilities of what is said."""
    divergence = (teacher.exp() * (teacher - student)).sum(dtype=torch.float64)
    apart = (teacher.gather(1, said) - student.gather(1, said)).abs().sum(dtype=torch.float64)
    return torch.stack([divergence, apart])
