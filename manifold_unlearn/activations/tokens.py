"""Texts as token rows: the key that every captured array carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Text: TypeAlias = "str | tuple[str, str]"
"""A text, or a prompt with its answer (the answer brings its own leading space)."""

TokenSelection: TypeAlias = "Literal['all', 'last', 'answer'] | Sequence[Any] | Tensor"
"""Which tokens: by name, or one boolean mask a text (a padded 2-d array will do)."""


@dataclass(frozen=True)
class Encoding:
    """One text as tokens; no padding."""

    ids: Tensor
    """int64 (n_tokens,)"""
    special: Tensor
    """bool (n_tokens,): put there by the tokenizer, not by the text"""
    answer: Tensor
    """bool (n_tokens,): belongs to the answer of a pair"""

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class TokenTable:
    """Which token each row of an array is; all fields have shape ``(n_tokens,)``."""

    text_index: Tensor
    """int64: index of the text among those given"""
    position: Tensor
    """int64: 0 is the text's first token, whatever the padding"""
    token_id: Tensor
    """int64"""
    special: Tensor
    """bool: put there by the tokenizer"""
    answer: Tensor
    """bool: belongs to the answer of a pair"""
    sink: Tensor
    """bool: attention sink, a token whose norm swamps every statistic"""

    def __len__(self) -> int:
        return self.text_index.shape[0]


def encode(
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    max_length: int | None = None,
    context: int | None = None,
    append_eos: bool = False,
    joint: bool = False,
) -> list[Encoding]:
    """Tokenize texts and mark the special and the answer tokens.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
        The tokens of a pair are those of the prompt, then those of the answer, as in generation.
    max_length : int, optional
        Cut longer texts to this many tokens.
    context : int, optional
        Longest sequence that the model takes; a longer text is an error.
    append_eos : bool, default=False
        End every pair with the end-of-sequence token, as a part of the answer.
    joint : bool, default=False
        Tokenize a pair as one text instead; a token is the answer's if it ends behind the prompt.
        SentencePiece tokenizers of the Llama 2 kind then give other tokens at the seam.

    Returns
    -------
    list of Encoding

    Raises
    ------
    ValueError
        No texts, a text without tokens, an answer without tokens, or a text longer than
        ``context`` (names the text).
    """
    if len(texts) == 0:
        raise ValueError("texts is empty; give at least one text.")
    pairs = [text if isinstance(text, tuple) else (text, "") for text in texts]
    if joint:
        encoded = _tokenize(tokenizer, [prompt + answer for prompt, answer in pairs])
        tails = None
    else:
        encoded = _tokenize(tokenizer, [prompt for prompt, _ in pairs])
        tails = _tokenize(tokenizer, [answer for _, answer in pairs], special=False)
    rows = []
    for i, (prompt, answer) in enumerate(pairs):
        ids, special, ends = (list(encoded[key][i]) for key in ("ids", "special", "ends"))
        if tails is None:
            inside = [end > len(prompt) and not marked for end, marked in zip(ends, special)]  # noqa: B905
        else:
            while answer and special and special[-1] and len(special) > 1:  # a closing token
                ids, special = ids[:-1], special[:-1]
            tail = tails["ids"][i]
            inside = [False] * len(ids) + [True] * len(tail)
            ids, special = ids + tail, special + [0] * len(tail)
        if append_eos and answer and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids, special, inside = [*ids, tokenizer.eos_token_id], [*special, 1], [*inside, True]
        ids, special, inside = ids[:max_length], special[:max_length], inside[:max_length]
        _check_row(i, prompt, answer, ids, inside, context)
        rows.append(
            Encoding(
                torch.tensor(ids, dtype=torch.int64),
                torch.tensor(special, dtype=torch.bool),
                torch.tensor(inside, dtype=torch.bool),
            )
        )
    return rows


def _tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool = True) -> dict[str, Any]:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    return {
        "ids": encoded["input_ids"],
        "special": encoded["special_tokens_mask"],
        "ends": [[end for _, end in row] for row in encoded["offset_mapping"]],
    }


def _check_row(
    i: int,
    prompt: str,
    answer: str,
    ids: list[int],
    in_answer: list[bool],
    context: int | None,
) -> None:
    start = repr(prompt[:40])
    if not ids:
        raise ValueError(f"text {i} ({start}) has no tokens; remove it.")
    if answer and not any(in_answer):
        raise ValueError(f"text {i} ({start}): the answer {answer!r} has no tokens; remove it.")
    if context is not None and len(ids) > context:
        raise ValueError(
            f"text {i} ({start}…) has {len(ids)} tokens; the model takes {context}. "
            "Split it, or cut it with max_length."
        )


def select(encodings: Sequence[Encoding], tokens: TokenSelection) -> list[Tensor]:
    """One boolean mask ``(n_tokens,)`` a text for a token selection.

    Raises
    ------
    ValueError
        An unknown name, ``"answer"`` without prompt/answer pairs, or masks that do not fit.
    """
    if isinstance(tokens, str):
        if tokens == "all":
            return [torch.ones(len(row), dtype=torch.bool) for row in encodings]
        if tokens == "last":
            return [torch.arange(len(row)) == len(row) - 1 for row in encodings]
        if tokens == "answer":
            if without := [i for i, row in enumerate(encodings) if not row.answer.any()]:
                raise ValueError(
                    f"tokens='answer' needs (prompt, answer) pairs; text {without[0]} has no "
                    "answer. Pass texts as tuples."
                )
            return [row.answer for row in encodings]
        raise ValueError(f"tokens={tokens!r} is not 'all', 'last', 'answer' or a mask a text.")
    if len(tokens) != len(encodings):
        raise ValueError(f"{len(tokens)} token masks for {len(encodings)} texts; give one a text.")
    masks = []
    for i, (mask, row) in enumerate(zip(tokens, encodings, strict=True)):
        mask = torch.as_tensor(np.asarray(mask)).to(torch.bool)
        if mask.ndim != 1 or mask.shape[0] < len(row) or mask[len(row) :].any():
            raise ValueError(
                f"the token mask of text {i} has shape {tuple(mask.shape)}; the text has "
                f"{len(row)} tokens."
            )
        masks.append(mask[: len(row)])
    return masks


@dataclass(frozen=True)
class Batch:
    """Texts of similar length, padded to one rectangle."""

    index: Tensor
    """int64 (n_texts,): which of the encodings"""
    input_ids: Tensor
    """int64 (n_texts, width)"""
    attention_mask: Tensor
    """int64 (n_texts, width)"""
    position_ids: Tensor
    """int64 (n_texts, width): counts from each text's first token"""


def batches(
    encodings: Sequence[Encoding],
    *,
    batch_size: int | Literal["auto"] = "auto",
    pad_id: int = 0,
    padding_side: Literal["left", "right"] = "right",
    token_budget: int = 2048,
) -> list[Batch]:
    """Rectangles of texts, longest first, so that little is padded and memory fails early.

    Parameters
    ----------
    encodings : sequence of Encoding
    batch_size : int or "auto", default="auto"
        Texts a batch; ``"auto"`` fills ``token_budget`` tokens, padding included.
    pad_id : int
        Stands in the padding; it is masked.
    padding_side : {"right", "left"}
    token_budget : int
    """
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1, or 'auto'.")
    order = sorted(range(len(encodings)), key=lambda i: (-len(encodings[i]), i))
    made = []
    while order:
        width = len(encodings[order[0]])
        size = max(1, token_budget // width) if batch_size == "auto" else batch_size
        rows, order = order[:size], order[size:]
        ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for r, i in enumerate(rows):
            n = len(encodings[i])
            span = slice(0, n) if padding_side == "right" else slice(width - n, width)
            ids[r, span] = encodings[i].ids
            mask[r, span] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        made.append(Batch(torch.tensor(rows), ids, mask, positions))
    return made
