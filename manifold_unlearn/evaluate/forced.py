"""Prompts with their answers given: which states predict which tokens, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn.activations.capture import recording
from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.activations.tokens import Batch, Encoding, batches
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject, answer_encodings

Entities: TypeAlias = "Sequence[str | tuple[str, str]]"
"""One an item: the entity as it stands in the answer, or what goes before it and the entity."""

Sites: TypeAlias = "Literal['blocks', 'attn', 'mlp'] | Sequence[str]"
"""Outputs of all blocks, of their attention or MLP, or sites by name."""

TOKEN_BUDGET = 1024


@dataclass(frozen=True)
class Forced:
    """Items as token rows, each with the tokens whose prediction is looked at."""

    rows: tuple[Encoding, ...]
    scored: tuple[Tensor, ...]
    """One bool ``(n_tokens,)`` a row: the answer's tokens, or those of its entity."""

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, batch_size: BatchSize = "auto") -> list[ForcedBatch]:
        """Return the rows in left-padded rectangles, longest first."""
        made = batches(
            self.rows, batch_size=batch_size, padding_side="left", token_budget=TOKEN_BUDGET
        )
        return [self._batch(batch) for batch in made]

    def _batch(self, batch: Batch) -> ForcedBatch:
        scored = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for r, i in enumerate(batch.index.tolist()):
            scored[r, -len(self.rows[i]) :] = self.scored[i]
        reads = torch.zeros_like(scored)
        reads[:, :-1] = scored[:, 1:]
        item = batch.index[:, None].expand_as(scored)
        return ForcedBatch(batch, reads, item[scored], batch.input_ids[scored])

    def per_item(self, values: Tensor, item: Tensor) -> np.ndarray:
        """Mean over each item's tokens of ``values (..., n_tokens)``: ``(..., n_items)``."""
        rows = values.double()
        total = rows.new_zeros(*rows.shape[:-1], len(self)).index_add_(-1, item, rows)
        return (total / torch.bincount(item, minlength=len(self))).numpy()


@dataclass(frozen=True)
class ForcedBatch:
    """One rectangle of items; tokens are counted row by row."""

    batch: Batch
    reads: Tensor
    """bool (n_rows, width): positions whose state predicts a scored token"""
    item: Tensor
    """int64 (n_scored,): the item of each scored token"""
    token: Tensor
    """int64 (n_scored,): the token predicted there"""


def force(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    entities: Entities | None = None,
    include_eos: bool = False,
    batch_size: BatchSize = "auto",
) -> Forced:
    """Tokenize items with their answers, one way for every model that is compared.

    Where tokenizing prompt and answer together gives other tokens than one after the other, the
    way that the subject finds likelier is taken, as
    :func:`~manifold_unlearn.evaluate.likelihood.answer_log_probabilities` does.

    Parameters
    ----------
    subject : Subject
        Usually the told model: it was trained on one of the two ways.
    tokenizer : transformers.PreTrainedTokenizerFast
    items : sequence of Item
    entities : sequence of str or (str, str), optional
        Look at the tokens that overlap the entity, instead of at the whole answer. A pair is what
        goes before the entity, and the entity; it tells two mentions apart.
    include_eos : bool, default=False
        Count the end-of-sequence token as the answer's last; not with ``entities``.
    batch_size : int or "auto"

    Returns
    -------
    Forced

    Raises
    ------
    ValueError
        No items, an item without an answer or a prompt, an answer without tokens, more or fewer
        entities than items, an entity that is not in its answer, a text longer than the context.
    """
    if len(items) == 0:
        raise ValueError("items is empty; give at least one.")
    for i, item in enumerate(items):
        if not item.answer:
            raise ValueError(f"item {i} ({item.question[:40]!r}) has no answer; leave it out.")
    pairs = [item.pair for item in items]
    spans = _spans(pairs, entities)
    with subject() as model, torch.no_grad(), evaluating(model):
        rows = answer_encodings(model, tokenizer, pairs, include_eos, batch_size)
    scored = [
        row.answer if span is None else _overlap(tokenizer, pair, row, span)
        for pair, row, span in zip(pairs, rows, spans, strict=True)
    ]
    for i, mask in enumerate(scored):
        if not bool(mask.any()) or bool(mask[0]):
            raise ValueError(f"item {i} has no prompt tokens before its answer; give a prompt.")
    return Forced(tuple(rows), tuple(scored))


def _spans(
    pairs: Sequence[tuple[str, str]], entities: Entities | None
) -> list[tuple[int, int] | None]:
    """Where each entity stands in its answer, in characters."""
    if entities is None:
        return [None] * len(pairs)
    if len(entities) != len(pairs):
        raise ValueError(f"{len(entities)} entities for {len(pairs)} items; give one an item.")
    spans: list[tuple[int, int] | None] = []
    for i, ((_, answer), entity) in enumerate(zip(pairs, entities, strict=True)):
        before, name = entity if isinstance(entity, tuple) else ("", entity)
        place = answer.find(before)
        start = answer.find(name, place + len(before)) if name and place >= 0 else -1
        if start < 0:
            raise ValueError(
                f"entity {entity!r} is not in the answer of item {i}, {answer!r}. Spell it as the "
                "answer does, or leave the item out."
            )
        spans.append((start, start + len(name)))
    return spans


def _overlap(tokenizer: Any, pair: tuple[str, str], row: Encoding, span: tuple[int, int]) -> Tensor:
    """Which tokens of a row overlap a span of the answer's characters."""
    prompt, answer = pair
    start, tail = int(row.answer.int().argmax()), int(row.answer.sum())
    made = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    shift = 0
    if made["input_ids"] != row.ids[start : start + len(made["input_ids"])].tolist():
        made = tokenizer(prompt + answer, return_offsets_mapping=True)  # tokenized jointly
        start, tail, shift = 0, len(row), len(prompt)
    low, high = span[0] + shift, span[1] + shift
    hit = [a < high and b > low and b > a for a, b in made["offset_mapping"]][:tail]
    mask = torch.zeros(len(row), dtype=torch.bool)
    mask[start : start + len(hit)] = torch.tensor(hit)
    return mask & row.answer


def inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """Keywords of a forward pass over a rectangle."""
    return {
        "input_ids": batch.input_ids.to(model.device),
        "attention_mask": batch.attention_mask.to(model.device),
        "position_ids": batch.position_ids.to(model.device),
        "use_cache": False,
    }


def scored_log_probabilities(model: Any, made: ForcedBatch) -> Tensor:
    """Log-probability of each scored token of a rectangle: ``(n_scored,)`` float32, on the CPU."""
    width = made.reads.shape[1] - int(made.reads.any(0).int().argmax())
    logits = model(**inputs(model, made.batch), logits_to_keep=width).logits
    chosen = logits[made.reads[:, -width:].to(logits.device)].float().log_softmax(-1).cpu()
    return chosen.gather(1, made.token[:, None])[:, 0]


def forced_log_probabilities(
    subject: Subject, forced: Forced, batch_size: BatchSize = "auto"
) -> np.ndarray:
    """Mean log-probability of each item's scored tokens: ``(n_items,)`` float64, nats."""
    parts, item = [], []
    with subject() as model, torch.no_grad(), evaluating(model):
        for made in forced.batches(batch_size):
            parts.append(scored_log_probabilities(model, made))
            item.append(made.item)
    return forced.per_item(torch.cat(parts), torch.cat(item))


def predicting_states(
    subject: Subject,
    forced: Forced,
    sites: Sequence[str],
    batch_size: BatchSize = "auto",
    *,
    desc: str = "read states",
) -> Iterator[tuple[ForcedBatch, dict[str, Tensor]]]:
    """Each rectangle with the states that predict its scored tokens.

    Yields
    ------
    made : ForcedBatch
    states : dict of str to Tensor
        For each site ``(n_scored, d_site)``, in the model's dtype and on its device.
    """
    made = forced.batches(batch_size)
    for batch in tqdm(made, desc=desc, unit="batch", disable=None, leave=False):
        with subject() as model, torch.no_grad(), evaluating(model):
            body: Any = getattr(model, "base_model", model)
            with recording(model, sites) as seen:
                body(**inputs(model, batch.batch))
            states = {
                name: hidden[-1][batch.reads.to(hidden[-1].device)] for name, hidden in seen.items()
            }
        yield batch, states


def named_sites(subject: Subject, sites: Sites) -> tuple[str, ...]:
    """Names of the sites meant.

    Raises
    ------
    ValueError
        None are named, or a single string is not one of the three.
    """
    if not isinstance(sites, str):
        if len(sites) == 0:
            raise ValueError("sites is empty; name at least one, such as 'layers.0'.")
        return tuple(sites)
    parts = {"blocks": "", "attn": ".attn", "mlp": ".mlp"}
    if sites not in parts:
        raise ValueError(f"sites={sites!r} is not 'blocks', 'attn', 'mlp' or a list of names.")
    with subject() as model:
        n = len(find_decoder(model).blocks)
    return tuple(f"layers.{i}{parts[sites]}" for i in range(n))


def require_equal_shapes(subjects: dict[str, Subject]) -> None:
    """Raise ``ValueError`` unless all models have as many blocks, one width and one vocabulary."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, subject in subjects.items():
        with subject() as model:
            words, width = model.get_input_embeddings().weight.shape
            found[name] = (len(find_decoder(model).blocks), width, words)
    if len(set(found.values())) > 1:
        described = "; ".join(
            f"{name}: {blocks} blocks, width {width}, {words} tokens"
            for name, (blocks, width, words) in found.items()
        )
        raise ValueError(
            f"the models differ in shape ({described}). States can be exchanged only between "
            "models of one shape and one tokenizer; compare checkpoints of one architecture."
        )
