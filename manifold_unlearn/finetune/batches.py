"""Items as padded batches with labels, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.tokens import Encoding, Text, encode

IGNORED = -100
"""Label of a token that carries no loss."""

Example: TypeAlias = "Item | Text"
"""An item, a plain text, or a prompt with its answer (which brings its own leading space)."""

MarkedTokens: TypeAlias = Literal["predicting", "answer", "all"]
"""Tokens whose next token carries loss (in a pair: the prompt's last, and the answer's but the
last), those that carry loss themselves, or all but the padding."""


@dataclass(frozen=True)
class LabeledBatch:
    """Texts padded on the right to one rectangle, with the tokens that carry loss."""

    index: Tensor
    """int64 (n_texts,): which of the examples"""
    input_ids: Tensor
    """int64 (n_texts, width)"""
    attention_mask: Tensor
    """int64 (n_texts, width)"""
    labels: Tensor
    """int64 (n_texts, width): the token itself, or ``IGNORED``; not shifted"""

    def __len__(self) -> int:
        return self.index.shape[0]

    def marked(self, tokens: MarkedTokens) -> Tensor:
        """Boolean (n_texts, width): which tokens a loss on hidden states counts."""
        if tokens == "all":
            return self.attention_mask.bool()
        loss = self.labels != IGNORED
        if tokens == "answer":
            return loss
        if tokens == "predicting":
            return loss.roll(-1, dims=1)  # the first token never carries loss
        raise ValueError(f"tokens={tokens!r} is not 'predicting', 'answer' or 'all'.")

    def to(self, device: torch.device) -> LabeledBatch:
        """Return the same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        return replace(self, **moved)


def encode_examples(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    name: str = "examples",
    context: int | None = None,
    max_length: int | None = None,
    include_eos: bool = False,
) -> list[Encoding]:
    """Tokens of each example; those of the answer are marked, or all of a text without answer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    examples : sequence of Item, str or (prompt, answer)
    name : str
        What error messages call the set.
    context : int, optional
        Longest sequence that the model takes.
    max_length : int, optional
        Cut longer examples to this many tokens.
    include_eos : bool, default=False
        End every answer with the end-of-sequence token, which then carries loss too.

    Returns
    -------
    list of Encoding
        ``answer`` marks the tokens that carry loss; the first token of a text never does.

    Raises
    ------
    ValueError
        The set is empty, an answer tokenizes to nothing, a text is too short to predict anything,
        or an example is longer than ``context``.
    """
    if isinstance(examples, str):
        raise ValueError(f"the {name} set is one string; give a list of texts or items.")
    if len(examples) == 0:
        raise ValueError(f"the {name} set is empty; give at least one item or text.")
    texts = [example.captured if isinstance(example, Item) else example for example in examples]
    try:
        rows = encode(
            tokenizer, texts, context=context, max_length=max_length, append_eos=include_eos
        )
    except ValueError as error:
        raise ValueError(f"the {name} set: {error}") from error
    marked = []
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        loss = row.answer.clone() if isinstance(text, tuple) else ~row.special
        loss[0] = False
        if not bool(loss.any()):
            raise ValueError(
                f"the {name} set: text {i} ({str(text)[:40]!r}) has no token that another token "
                "precedes, so nothing to learn; remove it or give it a prompt."
            )
        marked.append(Encoding(row.ids, row.special, loss))
    return marked


def collate(rows: Sequence[Encoding], index: Tensor, *, pad_id: int = 0) -> LabeledBatch:
    """Rectangle of the rows named by ``index``."""
    chosen = [rows[i] for i in index.tolist()]
    shape = (len(chosen), max(map(len, chosen)))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for r, row in enumerate(chosen):
        ids[r, : len(row)] = row.ids
        mask[r, : len(row)] = 1
        labels[r, : len(row)] = torch.where(row.answer, row.ids, IGNORED)
    return LabeledBatch(index, ids, mask, labels)


def epochs(n_rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices: every epoch a new order, each row once an epoch.

    Parameters
    ----------
    n_rows : int
    batch_size : int
        The last batch of an epoch holds what is left.
    generator : torch.Generator
        On the CPU.
    """
    while True:
        yield from torch.randperm(n_rows, generator=generator).split(batch_size)


def batches_in_order(
    rows: Sequence[Encoding], batch_size: int, *, pad_id: int = 0
) -> Iterator[LabeledBatch]:
    """Every row once, in the order given."""
    for index in torch.arange(len(rows)).split(batch_size):
        yield collate(rows, index, pad_id=pad_id)
