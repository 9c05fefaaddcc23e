"""Answers an attacker wants, as token blocks with room for what he inserts before them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import context_length
from manifold_unlearn.activations.tokens import Encoding, encode

Place: TypeAlias = "Literal['suffix', 'prefix']"

N_SEAMS = 16
"""Pairs on which the two ways to tokenize a prompt and its answer are compared."""

Control: TypeAlias = "Literal['random', 'others', 'perturbed']"
"""Answers that nobody was told: tokens drawn from the vocabulary without the special ones; the
answer tokens of all items, shuffled among the places; each item's first perturbed answer."""


@dataclass(frozen=True)
class Targets:
    """Prompts cut in two, each with its answer: ``head | what is inserted | tail``.

    Heads are padded on the left and tails on the right, so that what is inserted stands in the
    same columns of every row.
    """

    head_ids: Tensor
    """int64 (n_items, head width)"""
    head_mask: Tensor
    """int64 (n_items, head width): 0 in the padding"""
    tail_ids: Tensor
    """int64 (n_items, tail width): the rest of the prompt, then the answer"""
    tail_mask: Tensor
    """int64 (n_items, tail width)"""
    answer: Tensor
    """bool (n_items, tail width): belongs to the answer"""
    special: Tensor
    """bool (n_items, head width): padding, or put there by the tokenizer"""

    def __len__(self) -> int:
        return self.head_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Targets:
        """Return some of the items, padded as they were."""
        return Targets(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def encode_targets(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    place: Place = "suffix",
    ending: str = "",
    room: int = 0,
) -> Targets:
    r"""Tokenize items for an attack that inserts tokens or perturbs prompts.

    Where tokenizing prompt and answer together gives other tokens than one after the other, the
    way that is likelier under the model on the first items is used, as in scoring.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    place : {"suffix", "prefix"}, default="suffix"
        Insert behind the prompt, or before it (behind the tokenizer's opening token).
    ending : str, default=""
        What ends every prompt and stays behind a suffix: ``"\nAnswer:"``.
    room : int, default=0
        Tokens that will be inserted; they count against the model's context.

    Raises
    ------
    ValueError
        No items, an item without an answer, an answer without tokens, a prompt that does not end
        on ``ending``, an unknown place, or a sequence that does not fit the context.
    """
    if place not in ("suffix", "prefix"):
        raise ValueError(f"place={place!r} is not 'suffix' or 'prefix'.")
    for i, item in enumerate(items):
        if not item.answer:
            raise ValueError(f"item {i} has no answer to aim at; give (question, answer) items.")
        if not item.question.endswith(ending):
            raise ValueError(
                f"item {i}: the prompt does not end on ending={ending!r}; give what the template "
                "puts behind the question."
            )
    context = context_length(model)
    limit = None if context is None else context - room
    rows = _likelier(model, tokenizer, [item.pair for item in items], limit)
    heads = [
        _head_length(tokenizer, item, row, place, ending)
        for item, row in zip(items, rows, strict=True)
    ]
    return _blocks(rows, heads)


def control_targets(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    control: Control,
    *,
    generator: torch.Generator,
    place: Place = "suffix",
    ending: str = "",
    room: int = 0,
) -> Targets:
    """Encode the same prompts with answers that nobody was told.

    Parameters
    ----------
    model, tokenizer, items, place, ending, room
        As in :func:`encode_targets`.
    control : {"random", "others", "perturbed"}
        See :data:`Control`. Random answers are what published controls use; perturbed ones are of
        the right kind, so that what the attack gains over them is knowledge of the item alone.
    generator : torch.Generator

    Raises
    ------
    ValueError
        An unknown control, or ``"perturbed"`` with an item that has no perturbed answer.
    """
    if control not in ("random", "others", "perturbed"):
        raise ValueError(f"control={control!r} is not 'random', 'others' or 'perturbed'.")
    if control == "perturbed":
        if without := [i for i, item in enumerate(items) if not item.perturbed_answer]:
            raise ValueError(
                f"item {without[0]} has no perturbed_answer; use control='random' or 'others'."
            )
        items = [replace(item, answer=item.perturbed_answer[0]) for item in items]
    targets = encode_targets(model, tokenizer, items, place=place, ending=ending, room=room)
    if control == "perturbed":
        return targets
    n = int(targets.answer.sum())
    if control == "random":
        special = set(tokenizer.all_special_ids)
        pool = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        drawn = pool[torch.randint(len(pool), (n,), generator=generator)]
    else:
        drawn = targets.tail_ids[targets.answer][torch.randperm(n, generator=generator)]
    ids = targets.tail_ids.clone()
    ids[targets.answer] = drawn
    return replace(targets, tail_ids=ids)


def _likelier(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], limit: int | None
) -> list[Encoding]:
    apart = encode(tokenizer, pairs, context=limit)
    together = encode(tokenizer, pairs, context=limit, joint=True)
    seams = [
        i
        for i, (a, b) in enumerate(zip(apart, together, strict=True))
        if bool(b.answer.any()) and not bool(b.answer[0]) and not torch.equal(a.ids, b.ids)
    ]
    sample = seams[:N_SEAMS]
    if not sample:
        return apart
    with torch.no_grad():
        scores = [
            float(mean_log_likelihood(model, _blocks([rows[i] for i in sample])).mean())
            for rows in (apart, together)
        ]
    if scores[1] <= scores[0]:
        return apart
    return [together[i] if i in set(seams) else row for i, row in enumerate(apart)]


def _head_length(tokenizer: Any, item: Item, row: Encoding, place: str, ending: str) -> int:
    start = int(row.answer.int().argmax())
    if place == "prefix":
        return int(row.special[:start].int().cumprod(0).sum())
    if not ending:
        return start
    keep = len(item.question) - len(ending)
    offsets = tokenizer(item.question, return_offsets_mapping=True)["offset_mapping"]
    return min(start, sum(end <= keep for _, end in offsets))


def _blocks(rows: Sequence[Encoding], heads: Sequence[int] | None = None) -> Targets:
    if heads is None:
        heads = [int(row.answer.int().argmax()) for row in rows]
    n, left = len(rows), max(max(heads), 1)
    right = max(len(row) - head for row, head in zip(rows, heads, strict=True))
    head_ids, head_mask = (torch.zeros(n, left, dtype=torch.int64) for _ in "im")
    tail_ids, tail_mask = (torch.zeros(n, right, dtype=torch.int64) for _ in "im")
    answer = torch.zeros(n, right, dtype=torch.bool)
    special = torch.ones(n, left, dtype=torch.bool)
    for r, (row, head) in enumerate(zip(rows, heads, strict=True)):
        n_tail = len(row) - head
        head_ids[r, left - head :], head_mask[r, left - head :] = row.ids[:head], 1
        special[r, left - head :] = row.special[:head]
        tail_ids[r, :n_tail], tail_mask[r, :n_tail] = row.ids[head:], 1
        answer[r, :n_tail] = row.answer[head:]
    return Targets(head_ids, head_mask, tail_ids, tail_mask, answer, special)


def token_log_likelihoods(model: Any, targets: Targets, inserted: Tensor | None = None) -> Tensor:
    """Log-probability of each answer token, with gradients to what is inserted.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    targets : Targets
    inserted : Tensor of shape (n_items or 1, n_tokens, d_model), optional
        Rows of the embedding space that stand between head and tail.

    Returns
    -------
    Tensor of shape (n_items, tail width), float32
        0 where no answer token stands.
    """
    log_p = _tail_log_softmax(model, targets, inserted)
    found = log_p.gather(2, targets.tail_ids.to(log_p.device)[..., None])[..., 0]
    return torch.where(targets.answer.to(log_p.device), found, 0.0)


def answer_scores(
    model: Any, targets: Targets, inserted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each answer, and whether each of its tokens is the likeliest.

    Returns
    -------
    log_p : Tensor of shape (n_items,), float32
    greedy : Tensor of shape (n_items,), bool
        Greedy decoding says the answer.
    """
    log_p = _tail_log_softmax(model, targets, inserted)
    ids, answer = targets.tail_ids.to(log_p.device), targets.answer.to(log_p.device)
    found = log_p.gather(2, ids[..., None])[..., 0]
    mean = torch.where(answer, found, 0.0).sum(1) / answer.sum(1)
    return mean, ((log_p.argmax(-1) == ids) | ~answer).all(1)


def _tail_log_softmax(model: Any, targets: Targets, inserted: Tensor | None) -> Tensor:
    """Log-probabilities ``(n_items, tail width, vocabulary)`` of what stands in the tail."""
    device = model.device
    embed = model.get_input_embeddings()
    n = len(targets)
    parts = [embed(targets.head_ids.to(device)), embed(targets.tail_ids.to(device))]
    masks = [targets.head_mask, targets.tail_mask]
    if inserted is not None:
        parts.insert(1, inserted.to(parts[0].dtype).expand(n, -1, -1))
        masks.insert(1, torch.ones(n, inserted.shape[1], dtype=torch.int64))
    mask = torch.cat(masks, dim=1).to(device)
    width = targets.tail_ids.shape[1]
    logits = model(
        inputs_embeds=torch.cat(parts, dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, -width - 1 : -1]
    return logits.float().log_softmax(-1)


def mean_log_likelihood(model: Any, targets: Targets, inserted: Tensor | None = None) -> Tensor:
    """Mean log-probability of the answer tokens of each item, ``(n_items,)`` float32."""
    found = token_log_likelihoods(model, targets, inserted)
    return found.sum(1) / targets.answer.sum(1).to(found.device)


def frozen(model: Any) -> AbstractContextManager[None]:
    """Keep weights out of the gradient for a while; every flag returns to what it was."""
    return _Frozen(model)


class _Frozen(AbstractContextManager[None]):
    def __init__(self, model: Any):
        self.trainable = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.trainable:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.trainable:
            parameter.requires_grad_(True)
