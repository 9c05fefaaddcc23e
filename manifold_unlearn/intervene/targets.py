"""What the residual stream shall be, and where: targets that a bake or a fine-tune aims at."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.models import context_length
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.activations.tokens import Encoding, Text, TokenSelection, encode, select
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.intervene.maps import AffineSiteMap, SiteMap


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Texts padded on the right to one rectangle, and which of their tokens count."""

    input_ids: Tensor
    """int64 (n, T); 0 in the padding"""
    attention_mask: Tensor
    """int64 (n, T)"""
    where: Tensor
    """bool (n, T): the tokens that count"""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def n_tokens(self) -> int:
        """Tokens of all texts, without padding: the cost of one forward pass."""
        return int(self.attention_mask.sum())

    @property
    def rank(self) -> Tensor:
        """int64 (n, T): at every token that counts, its number among all of them."""
        return self.where.flatten().cumsum(0).reshape(self.where.shape) - 1

    @property
    def masks(self) -> list[np.ndarray]:
        """The tokens that count, text by text without padding, as ``capture`` takes them."""
        lengths = self.attention_mask.sum(1).tolist()
        return [row[:n].cpu().numpy() for row, n in zip(self.where, lengths, strict=True)]

    def take(self, index: Tensor | Sequence[int]) -> TokenRows:
        """Return the texts of these indices, in this order, cut to the longest of them."""
        return TokenRows(*_cut(self, torch.as_tensor(index, dtype=torch.int64)))


@dataclass(frozen=True, eq=False)
class StateTargets(TokenRows):
    """What the residual stream shall be behind some blocks at the tokens that count."""

    states: Mapping[int, Tensor]
    """block index -> (where.sum(), d), the order of ``where.nonzero()``; the model's dtype, CPU"""

    def take(self, index: Tensor | Sequence[int]) -> StateTargets:
        """Return the texts of these indices, in this order, cut to the longest of them."""
        index = torch.as_tensor(index, dtype=torch.int64)
        counts = self.where.sum(1)
        ends = counts.cumsum(0)
        spans = [torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in index.tolist()]
        rows = torch.cat(spans) if spans else index
        states = {layer: values[rows] for layer, values in self.states.items()}
        return StateTargets(*_cut(self, index), states)


def _cut(rows: TokenRows, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = int(rows.attention_mask[index].sum(1).max()) if len(index) else 0
    parts = (rows.input_ids, rows.attention_mask, rows.where)
    return tuple(part[index, :width] for part in parts)  # type: ignore[return-value]


def token_rows(
    model: Any, tokenizer: Any, texts: Sequence[Text], *, where: TokenSelection = "all"
) -> TokenRows:
    """Texts as token rows without states: what is to be kept as it is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Only its context length is asked.
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
    where : {"all", "last", "answer"} or sequence of bool masks, default="all"
        See :func:`~manifold_unlearn.activations.capture.capture`.

    Raises
    ------
    ValueError
        No texts, a text without tokens or longer than the context, masks that do not fit.
    """
    encodings = _encode(model, tokenizer, texts)
    return padded(encodings, select(encodings, where))


def own_targets(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    layers: Sequence[int] | None = None,
    where: TokenSelection = "all",
) -> StateTargets:
    """The states that the model has now: targets that hold it where it is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
    layers : sequence of int, optional
        Blocks behind which to read. Default: all.
    where : {"all", "last", "answer"} or sequence of bool masks, default="all"

    Raises
    ------
    ValueError
        As :func:`token_rows`; a block that does not exist; a state that is not finite.
    """
    encodings = _encode(model, tokenizer, texts)
    masks = select(encodings, where)
    chosen = chosen_layers(model, layers)
    return StateTargets(
        *_parts(padded(encodings, masks)), _states(model, tokenizer, texts, chosen, masks)
    )


def hooked_targets(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    site_maps: Mapping[str, SiteMap | AffineSiteMap],
    *,
    layers: Sequence[int] | None = None,
    where: TokenSelection | None = None,
) -> StateTargets:
    """States of the model under :func:`intervene`: the hooked model is the teacher.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
    site_maps : mapping of str to SiteMap
        What :func:`intervene` takes.
    layers : sequence of int, optional
        Blocks behind which to read. Default: all.
    where : {"all", "last", "answer"} or sequence of bool masks, optional
        Default: the tokens whose state the hooks change behind at least one of the blocks, which
        takes a second pass. Texts that the hooks leave as they are drop out, with a warning;
        blocks behind which they change nothing drop out of the states.

    Raises
    ------
    ValueError
        As :func:`own_targets`; the hooks change no token of any text.
    """
    chosen = chosen_layers(model, layers)
    encodings = _encode(model, tokenizer, texts)
    masks = select(encodings, "all" if where is None else where)
    with intervene(model, site_maps):
        states = _states(model, tokenizer, texts, chosen, masks)
    if where is not None:
        return StateTargets(*_parts(padded(encodings, masks)), states)
    bare = _states(model, tokenizer, texts, chosen, masks)
    changed = {layer: (states[layer] != bare[layer]).any(1) for layer in chosen}
    moved = torch.stack(list(changed.values())).any(0)
    masks = list(moved.split([len(row) for row in encodings]))
    kept = without_idle(masks, "the hooks change no token")
    states = {i: states[i][moved] for i in chosen if bool(changed[i].any())}
    return StateTargets(*_parts(padded([encodings[i] for i in kept], masks, kept)), states)


def counterfactual_targets(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    counterfactuals: Sequence[Text],
    *,
    layers: Sequence[int] | None = None,
) -> StateTargets:
    """States of the same model on other texts: about a subject, say, that it never heard of.

    Tokens are aligned with those of the counterfactual from the first that differs: one by one
    where both have the same number of them; else by the longest runs that are alike, and a
    differing run is aligned one by one if it is as long as its counterpart, and by its last token
    if it is not. All tokens aligned count; those before the first that differs do not.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
        What the states shall stand at.
    counterfactuals : sequence of str or (prompt, answer)
        For each text the one whose states it shall have.
    layers : sequence of int, optional
        Blocks behind which to read. Default: all.

    Raises
    ------
    ValueError
        Another number of counterfactuals, none that differs from its text, or as
        :func:`own_targets`.

    Warns
    -----
    UserWarning
        Texts that do not differ from their counterfactual are left out: names the count.
    """
    if len(texts) != len(counterfactuals):
        raise ValueError(
            f"{len(texts)} texts and {len(counterfactuals)} counterfactuals; give one a text."
        )
    chosen = chosen_layers(model, layers)
    encodings = _encode(model, tokenizer, texts)
    others = _encode(model, tokenizer, counterfactuals)
    pairs = [aligned(a.ids, b.ids) for a, b in zip(encodings, others, strict=True)]
    masks = [mask_of(len(row), pair[0]) for row, pair in zip(encodings, pairs, strict=True)]
    kept = without_idle(masks, "the counterfactual is the text itself")
    sources = [mask_of(len(others[i]), pairs[i][1]) for i in kept]
    states = _states(model, tokenizer, [counterfactuals[i] for i in kept], chosen, sources)
    return StateTargets(*_parts(padded([encodings[i] for i in kept], masks, kept)), states)


def aligned(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in two token sequences that stand for each other, from the first difference on.

    Parameters
    ----------
    ids : int64 Tensor of shape (n,)
    others : int64 Tensor of shape (m,)

    Returns
    -------
    (int64 Tensor of shape (k,), int64 Tensor of shape (k,))
        Increasing positions in each; empty where the sequences are alike.
    """
    if len(ids) == len(others):
        differing = (ids != others).nonzero()[:, 0]
        start = int(differing[0]) if len(differing) else len(ids)
        span = torch.arange(start, len(ids))
        return span, span
    left: list[int] = []
    right: list[int] = []
    matcher = SequenceMatcher(None, ids.tolist(), others.tolist(), autojunk=False)
    for number, (kind, a, a_end, b, b_end) in enumerate(matcher.get_opcodes()):
        if (kind == "equal" and number == 0) or a == a_end or b == b_end:
            continue
        if a_end - a != b_end - b:
            a, b = a_end - 1, b_end - 1
        left += range(a, a_end)
        right += range(b, b_end)
    return torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64)


def _encode(model: Any, tokenizer: Any, texts: Sequence[Text]) -> list[Encoding]:
    return encode(tokenizer, list(texts), context=context_length(model))


def chosen_layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    """Blocks to read behind, in their order; all by default."""
    n_blocks = len(find_decoder(model).blocks)
    chosen = sorted(set(range(n_blocks) if layers is None else map(int, layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_blocks:
        raise ValueError(
            f"layers={chosen} must name at least one of the blocks 0 to {n_blocks - 1}."
        )
    return chosen


def _states(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    layers: Sequence[int],
    masks: Sequence[Tensor],
) -> dict[int, Tensor]:
    sites = [f"layers.{layer}" for layer in layers]
    read = capture(model, tokenizer, texts, sites, tokens=[np.asarray(mask) for mask in masks])
    return {layer: read[site] for layer, site in zip(layers, sites, strict=True)}


def mask_of(length: int, positions: Tensor) -> Tensor:
    """Boolean mask (length,) of some positions."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[positions] = True
    return mask


def without_idle(masks: Sequence[Tensor], why: str) -> list[int]:
    """Indices of the texts that have a token to aim at."""
    kept = [i for i, mask in enumerate(masks) if bool(mask.any())]
    if not kept:
        raise ValueError(f"none of the {len(masks)} texts has a target: {why} in any of them.")
    if idle := len(masks) - len(kept):
        first = next(i for i, mask in enumerate(masks) if not bool(mask.any()))
        warnings.warn(
            f"{idle} of {len(masks)} texts are left out, the first is text {first}: {why}.",
            stacklevel=3,
        )
    return kept


def padded(
    encodings: Sequence[Encoding], masks: Sequence[Tensor], chosen: Sequence[int] | None = None
) -> TokenRows:
    """Encodings as one rectangle; the masks are theirs, or those of the ``chosen`` of all texts."""
    masks = masks if chosen is None else [masks[i] for i in chosen]
    rows = torch.nn.utils.rnn.pad_sequence([row.ids for row in encodings], batch_first=True)
    lengths = torch.tensor([len(row) for row in encodings])
    present = torch.arange(rows.shape[1]) < lengths[:, None]
    where = torch.nn.utils.rnn.pad_sequence(list(masks), batch_first=True)
    return TokenRows(rows, present.to(torch.int64), where)


def _parts(rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    return rows.input_ids, rows.attention_mask, rows.where
