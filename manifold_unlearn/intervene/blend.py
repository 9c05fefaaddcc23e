"""Several texts entered as one: their embeddings averaged, and the model led on from there.

An average of names is a name without an identity. What the model makes of it lies where its states
lie, unlike an average of states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.activations.models import context_length, evaluating
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.activations.tokens import Encoding, Text, encode
from manifold_unlearn.intervene.block_stream import BlockStream, advance, entered
from manifold_unlearn.intervene.targets import (
    StateTargets,
    TokenRows,
    aligned,
    chosen_layers,
    mask_of,
    padded,
    without_idle,
)


def blended_targets(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    counterfactuals: Sequence[Sequence[Text]],
    *,
    layers: Sequence[int] | None = None,
) -> StateTargets:
    """States of the model on several counterfactuals of each text, blended into one.

    As :func:`~manifold_unlearn.intervene.targets.counterfactual_targets`, but what enters block 0
    is the mean over the counterfactuals.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
        What the states shall stand at.
    counterfactuals : sequence of sequences of str or (prompt, answer)
        Each holds one counterfactual of every text. Of those of one text only the ones with as many
        tokens as most of them are blended, each as often as it takes to have one a sequence.
    layers : sequence of int, optional
        Blocks behind which to read. Default: all.

    Raises
    ------
    ValueError
        No counterfactuals, another number of them than of texts, none that differs from its text, a
        text without tokens or longer than the context, a block that does not exist.

    Warns
    -----
    UserWarning
        Texts that do not differ from their counterfactuals are left out: names the count.
    """
    chosen = chosen_layers(model, layers)
    context = context_length(model)
    encodings = encode(tokenizer, list(texts), context=context)
    slots = _alike(tokenizer, counterfactuals, encodings, context)
    pairs = [
        max((aligned(own.ids, slot[i].ids) for slot in slots), key=lambda pair: len(pair[0]))
        for i, own in enumerate(encodings)
    ]
    masks = [mask_of(len(own), pair[0]) for own, pair in zip(encodings, pairs, strict=True)]
    kept = without_idle(masks, "the counterfactual is the text itself")
    sources = [mask_of(len(slots[0][i]), pairs[i][1]) for i in kept]
    blend = _Blend(model, [padded([slot[i] for i in kept], sources) for slot in slots])
    rows = padded([encodings[i] for i in kept], [masks[i] for i in kept])
    return StateTargets(rows.input_ids, rows.attention_mask, rows.where, blend.states(chosen))


def blended_log_probabilities(
    model: Any, tokenizer: Any, texts: Sequence[Sequence[Text]]
) -> Tensor:
    """Mean log-probability of the answer, when several prompts are entered as one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of sequences of str or (prompt, answer)
        Each holds one wording of every text, as ``counterfactuals`` of :func:`blended_targets`; of
        a text without an answer all tokens but the first are scored.

    Returns
    -------
    Tensor of shape (n_texts,), float64
        Tokens of the first sequence are scored, natural logarithm.

    Raises
    ------
    ValueError
        As :func:`blended_targets`; a text of one token.
    """
    context = context_length(model)
    slots = _alike(tokenizer, texts, None, context)
    masks = [
        row.answer if bool(row.answer.any()) else torch.ones(len(row), dtype=torch.bool)
        for row in slots[0]
    ]
    masks = [mask & (torch.arange(len(mask)) > 0) for mask in masks]
    if short := [i for i, mask in enumerate(masks) if not bool(mask.any())]:
        raise ValueError(f"text {short[0]} has one token: nothing of it can be predicted.")
    return _Blend(model, [padded(slot, masks) for slot in slots]).log_probabilities()


@dataclass(frozen=True, eq=False)
class _Blend:
    """Texts with one rectangle of tokens a wording; all rectangles have the same shape."""

    model: Any
    rows: Sequence[TokenRows]

    def stream(self) -> BlockStream:
        """The mean of all wordings, before block 0."""
        first, *others = self.rows
        blended = BlockStream(self.model, first)
        for rows in others:
            for part, other in zip(blended, BlockStream(self.model, rows), strict=True):
                part.hidden = part.hidden + other.hidden
        for part in blended:
            part.hidden = part.hidden / len(self.rows)
        return blended

    def states(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Behind each block the states at the tokens that count, in their order."""
        rank, n_rows = self.rows[0].rank, int(self.rows[0].where.sum())
        found: dict[int, Tensor] = {}
        with torch.no_grad(), evaluating(self.model):
            stream = self.stream()
            for layer, block in enumerate(find_decoder(self.model).blocks[: max(layers) + 1]):
                advance(stream, block, layer)
                if layer not in layers:
                    continue
                for part in stream:
                    read = part.hidden[part.where].cpu()
                    rows = found.setdefault(layer, read.new_empty(n_rows, read.shape[1]))
                    mask = part.where.cpu()
                    rows[rank[part.index, : mask.shape[1]][mask]] = read
        return found

    def log_probabilities(self) -> Tensor:
        first = self.rows[0]
        found = torch.zeros(len(first), dtype=torch.float64)
        with torch.no_grad(), evaluating(self.model):
            for part in self.stream():
                ids = first.input_ids[part.index, : part.present.shape[1]].to(part.hidden.device)
                with entered(self.model, part.hidden):
                    logits = self.model(
                        input_ids=ids, attention_mask=part.present.long(), use_cache=False
                    ).logits
                scores = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
                counted = part.where[:, 1:]
                total = (scores * counted).sum(1).double() / counted.sum(1)
                found[part.index] = total.cpu()
        return found


def _alike(
    tokenizer: Any,
    wordings: Sequence[Sequence[Text]],
    own: Sequence[Encoding] | None,
    context: int | None,
) -> list[list[Encoding]]:
    """For each wording one encoding of every text, all of a text with the same number of tokens."""
    if not wordings:
        raise ValueError("no wordings to blend; give at least one of every text.")
    n_texts = len(wordings[0] if own is None else own)
    if uneven := [len(wording) for wording in wordings if len(wording) != n_texts]:
        raise ValueError(f"{uneven[0]} counterfactuals for {n_texts} texts; give one a text.")
    encoded = [encode(tokenizer, list(wording), context=context) for wording in wordings]
    slots: list[list[Encoding]] = [[] for _ in encoded]
    for i in range(n_texts):
        lengths = Counter(len(wording[i]) for wording in encoded)
        wanted = None if own is None else len(own[i])
        length = max(lengths, key=lambda n: (lengths[n], n == wanted))
        fitting = [wording[i] for wording in encoded if len(wording[i]) == length]
        for k, slot in enumerate(slots):
            slot.append(fitting[k % len(fitting)])
    return slots
