"""Codes of a corpus: a model, its texts and a dictionary in, sparse codes out, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.tokens import Text, TokenTable
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.coding import code_rows, join_codes

_CHARACTERS = 4  # of a token, to guess how many texts make a block


class CorpusCode(NamedTuple):
    """Codes of whole texts, one row a token, and which token each row is."""

    code: SparseCode
    tokens: TokenTable

    @property
    def counted(self) -> Tensor:
        """Boolean (n_tokens,): neither the first token of a text nor one that is no text.

        First tokens are attention sinks in most models, where dictionaries fire on anything.
        """
        return (self.tokens.position > 0) & ~self.tokens.special


def stream_codes(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    coder: SparseCoder,
    site: str | Sequence[str] | None = None,
    *,
    latents: Sequence[int] | Tensor | None = None,
    token_budget: int = 16384,
    max_length: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    progress: bool | None = None,
) -> Iterator[CorpusCode]:
    """Codes of texts, block by block, so that no more than a block's activations are held.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
    coder : SparseCoder
    site : str or sequence of str, optional
        Where the coder reads; several for a crosscoder of layers. Default: what
        ``coder.origin`` says.
    latents : sequence of int, optional
        Keep these alone, numbered in this order.
    token_budget : int, default=16384
        Tokens a block, about: whole texts, counted as four characters a token.
    max_length, batch_size
        As :func:`~manifold_unlearn.activations.capture.capture`.
    progress : bool, optional
        Default: only on a terminal.

    Yields
    ------
    CorpusCode
        ``tokens.text_index`` counts all texts.

    Raises
    ------
    ValueError
        No site is known, a site of another width than the coder reads, or as ``capture``.
    """
    sites = _sites(coder, site)
    disable = None if progress is None else not progress
    first = 0
    for block in tqdm(_blocks(texts, token_budget), desc="codes", disable=disable, leave=False):
        acts = capture(
            model,
            tokenizer,
            block,
            sites,
            max_length=max_length,
            batch_size=batch_size,
            progress=False,
        )
        rows = [acts[name] for name in sites]
        given = rows[0] if len(rows) == 1 else torch.stack(rows, dim=1)
        table = {f.name: getattr(acts.tokens, f.name) for f in fields(TokenTable)}
        table["text_index"] = table["text_index"] + first
        yield CorpusCode(code_rows(coder, given, latents=latents), TokenTable(**table))
        first += len(block)


def corpus_codes(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    coder: SparseCoder,
    site: str | Sequence[str] | None = None,
    **options: Any,
) -> CorpusCode:
    """All blocks of :func:`stream_codes` as one: what fires is held, activations are not."""
    found = list(stream_codes(model, tokenizer, texts, coder, site, **options))
    table = {
        f.name: torch.cat([getattr(part.tokens, f.name) for part in found])
        for f in fields(TokenTable)
    }
    return CorpusCode(join_codes(part.code for part in found), TokenTable(**table))


def token_strings(tokenizer: Any, ids: Any) -> dict[int, str]:
    """Text of each token by itself, with the space that it brings.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    ids : array or Tensor of int
        Negative ones are left out.
    """
    wanted = torch.as_tensor(ids).flatten().unique()
    numbers = wanted[wanted >= 0].tolist()
    raw = tokenizer.convert_ids_to_tokens(numbers)
    decoded = tokenizer.batch_decode(
        [[number] for number in numbers], clean_up_tokenization_spaces=False
    )
    return {
        number: piece.replace("\u2581", " ") if piece and "\u2581" in piece else text
        for number, piece, text in zip(numbers, raw, decoded, strict=True)
    }


def _sites(coder: SparseCoder, site: str | Sequence[str] | None) -> list[str]:
    known = site or coder.origin.get("site") or coder.origin.get("site_in")
    if not known:
        raise ValueError(
            "coder.origin names no site; say where the coder reads, such as site='layers.3'."
        )
    return [known] if isinstance(known, str) else list(known)


def _blocks(texts: Sequence[Text], token_budget: int) -> list[list[Text]]:
    """Whole texts, in order, about ``token_budget`` tokens together."""
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget} must be at least 1.")
    if len(texts) == 0:
        raise ValueError("texts is empty; give at least one text.")
    made: list[list[Text]] = [[]]
    size = 0
    for text in texts:
        length = sum(map(len, text)) if isinstance(text, tuple) else len(text)
        if made[-1] and size + length > _CHARACTERS * token_budget:
            made.append([])
            size = 0
        made[-1].append(text)
        size += length
    return made
