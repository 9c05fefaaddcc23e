"""Where latents fire: strongest contexts, samples at every strength, histograms; streamed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifold_unlearn.activations.tokens import Text, TokenTable
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.coding import checked_latents, without_zeros
from manifold_unlearn.dictionary.corpus import stream_codes, token_strings

NO_TOKEN = -1
"""Token id in a window beyond the ends of the text."""


@dataclass(frozen=True)
class Context:
    """A token on which a latent fires, and what stands around it."""

    text: int
    """Index of the text."""
    position: int
    """Of the token, from the text's first."""
    value: float
    """Activation there."""
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    """Activations of ``tokens``."""
    at: int
    """Index of the token among ``tokens``."""


@dataclass(frozen=True, eq=False)
class ContextTable:
    """Contexts of every latent, k at most; empty places have ``text == -1``."""

    text: np.ndarray
    """int64 (n_latents, k)"""
    position: np.ndarray
    """int64 (n_latents, k)"""
    value: np.ndarray
    """float32 (n_latents, k)"""
    window_id: np.ndarray
    """int64 (n_latents, k, before + 1 + after); ``NO_TOKEN`` beyond the text"""
    window_value: np.ndarray
    """float32, of the same shape"""


@dataclass(frozen=True, eq=False)
class FeatureContexts:
    """Where each latent fires; arrays have one row a latent.

    Attributes
    ----------
    latents : array of shape (m,), int64
        Numbers in the dictionary.
    count : array of shape (m,), int64
        Tokens on which it fires, of ``n_tokens``.
    mean : array of shape (m,), float64
        Strength, the absolute activation, where it fires; 0 for one that never does.
    act_max : array of shape (m,), float64
        Largest strength.
    histogram : array of shape (m, n_bins), int64
        Of the strengths where it fires, in equal bins from 0 to ``upper``.
    upper : array of shape (m,), float64
        The power of 2 above ``act_max``.
    top : ContextTable
        Strongest first.
    sampled : ContextTable
        Drawn alike from all tokens on which the latent fires, in random order.
    n_tokens, n_left_out, n_texts : int
        Tokens counted; first and special ones, which are not.
    before : int
        Tokens of a window before the one that fires.
    strings : dict of int to str
        Texts of the tokens in the windows.
    """

    latents: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    act_max: np.ndarray
    histogram: np.ndarray
    upper: np.ndarray
    top: ContextTable
    sampled: ContextTable
    n_tokens: int
    n_left_out: int
    n_texts: int
    before: int
    strings: dict[int, str]

    @property
    def frequency(self) -> np.ndarray:
        """Share of the tokens on which each fires, (m,)."""
        return self.count / self.n_tokens

    def index(self, latent: int) -> int:
        """Row of a latent; raises ``ValueError`` if it was not looked for."""
        found = np.flatnonzero(self.latents == latent)
        if len(found) == 0:
            raise ValueError(f"latent {latent} was not looked for; it is not among `latents`.")
        return int(found[0])

    def strongest(self, latent: int, n: int | None = None) -> list[Context]:
        """Contexts of largest strength, the strongest first."""
        return self._contexts(self.top, self.index(latent))[:n]

    def by_quantile(
        self, latent: int, n_quantiles: int = 5, n: int = 4
    ) -> list[tuple[float, float, list[Context]]]:
        """Contexts at every strength, the strong ones first.

        The sample is cut into ``n_quantiles`` equal parts by strength, as far as it goes.

        Returns
        -------
        list of (least strength, largest strength, contexts)
        """
        if n_quantiles < 1:
            raise ValueError(f"n_quantiles={n_quantiles} must be at least 1.")
        found = self._contexts(self.sampled, self.index(latent))
        order = np.argsort([-abs(one.value) for one in found], kind="stable")
        parts = [p for p in np.array_split(order, min(n_quantiles, max(len(order), 1))) if len(p)]
        return [
            (
                abs(found[part[-1]].value),
                abs(found[part[0]].value),
                [found[i] for i in sorted(part)[:n]],
            )
            for part in parts
        ]

    def _contexts(self, table: ContextTable, row: int) -> list[Context]:
        return [self._context(table, row, k) for k in np.flatnonzero(table.text[row] >= 0)]

    def _context(self, table: ContextTable, row: int, k: int) -> Context:
        ids = table.window_id[row, k]
        there = np.flatnonzero(ids != NO_TOKEN)
        return Context(
            text=int(table.text[row, k]),
            position=int(table.position[row, k]),
            value=float(table.value[row, k]),
            tokens=tuple(self.strings[int(i)] for i in ids[there]),
            values=tuple(table.window_value[row, k, there].tolist()),
            at=int(np.searchsorted(there, self.before)),
        )


def find_contexts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    coder: SparseCoder,
    site: str | Sequence[str] | None = None,
    *,
    latents: Sequence[int] | Tensor | None = None,
    n_top: int = 20,
    n_sampled: int = 20,
    before: int = 10,
    after: int = 5,
    n_bins: int = 40,
    one_a_text: bool = True,
    random_state: int = 0,
    **options: Any,
) -> FeatureContexts:
    """Contexts of latents over a corpus, in one pass and in bounded memory.

    Held are the running strongest and a running random sample of every latent, and one block's
    codes. First tokens of texts and special tokens are left out, but shown in windows. The result
    does not depend on the blocks.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
    coder : SparseCoder
    site : str or sequence of str, optional
        Default: what ``coder.origin`` says.
    latents : sequence of int, optional
        Default: all.
    n_top, n_sampled : int
        Contexts a latent.
    before, after : int
        Tokens of a window on either side.
    n_bins : int, default=40
        Of the histograms; even.
    one_a_text : bool, default=True
        At most one of the strongest contexts from a text, its strongest.
    random_state : int, default=0
    **options
        As :func:`~manifold_unlearn.dictionary.corpus.stream_codes`.

    Returns
    -------
    FeatureContexts

    Raises
    ------
    ValueError
        No token left to count, counts out of range, or as ``stream_codes``.
    """
    names = range(coder.d_sae) if latents is None else latents
    chosen = checked_latents(names, coder.d_sae)
    finder = ContextFinder(
        chosen,
        n_top=n_top,
        n_sampled=n_sampled,
        before=before,
        after=after,
        n_bins=n_bins,
        one_a_text=one_a_text,
        random_state=random_state,
    )
    kept = None if latents is None else chosen
    for part in stream_codes(model, tokenizer, texts, coder, site, latents=kept, **options):
        finder.add(part.code, part.tokens, part.counted)
    return finder.result(tokenizer)


class ContextFinder:
    """Running contexts of latents: codes of whole texts in, block by block.

    Parameters
    ----------
    latents : sequence of int
        Numbers of the latents in the dictionary, in the order of the codes that will come.
    n_top, n_sampled, before, after, n_bins, one_a_text, random_state
        As :func:`find_contexts`.
    """

    def __init__(
        self,
        latents: Sequence[int] | Tensor,
        *,
        n_top: int = 20,
        n_sampled: int = 20,
        before: int = 10,
        after: int = 5,
        n_bins: int = 40,
        one_a_text: bool = True,
        random_state: int = 0,
    ) -> None:
        if min(n_top, n_sampled) < 1 or min(before, after) < 0 or n_bins < 2 or n_bins % 2:
            raise ValueError(
                f"n_top={n_top} and n_sampled={n_sampled} must be at least 1, before={before} and "
                f"after={after} not be negative, n_bins={n_bins} be even and at least 2."
            )
        self.latents = torch.as_tensor(latents).to(torch.int64).cpu()
        self.before, self.after, self.one_a_text = before, after, one_a_text
        self.random_state = random_state
        m, width = len(self.latents), before + 1 + after
        self._top, self._sampled = _empty(m, n_top, width), _empty(m, n_sampled, width)
        self._sums = torch.zeros(2, m, dtype=torch.float64)
        self._max = torch.zeros(m, dtype=torch.float64)
        self._histogram = torch.zeros(m, n_bins, dtype=torch.int64)
        self._upper = torch.zeros(m, dtype=torch.float64)
        self._n_tokens = self._n_left_out = self._n_texts = 0

    def add(self, code: SparseCode, tokens: TokenTable, counted: Tensor | None = None) -> None:
        """Take in the codes of whole texts.

        Parameters
        ----------
        code : SparseCode
            Of the latents, in their order; one row a token.
        tokens : TokenTable
            Texts one after the other, each whole.
        counted : Tensor of shape (n_tokens,), bool, optional
            Tokens that count; the others appear in windows only. Default: all.

        Raises
        ------
        ValueError
            Shapes that do not fit.
        """
        m = len(self.latents)
        if code.n_latents != m or code.n_rows != len(tokens):
            raise ValueError(
                f"the code is {code.n_rows} rows of {code.n_latents} latents; expected "
                f"{len(tokens)} tokens and {m} latents."
            )
        counted = torch.ones(len(tokens), dtype=torch.bool) if counted is None else counted.cpu()
        fired = without_zeros(code)
        row, latent, value = fired.row.cpu(), fired.latent.cpu(), fired.value.detach().float().cpu()
        keys, order = (row * m + latent).sort()
        block = _Block(tokens, keys, value[order], m, self.before, self.after)
        kept = counted[row]
        row, latent, value = row[kept], latent[kept], value[kept]
        strength = value.abs().double()
        self._count(latent, strength)
        self._n_tokens += int(counted.sum())
        self._n_left_out += int((~counted).sum())
        self._n_texts += len(tokens.text_index.unique())
        near = strength > self._top["score"][latent, -1]
        best = _best_of_texts(tokens.text_index[row], latent, strength, near, self.one_a_text)
        _merge(self._top, latent[best], strength[best], row[best], value[best], block)
        drawn = _noise(
            self.latents[latent], tokens.text_index[row], tokens.position[row], self.random_state
        )
        _merge(self._sampled, latent, drawn, row, value, block)

    def result(self, tokenizer: Any) -> FeatureContexts:
        """What was found so far; raises ``ValueError`` if no token counted."""
        if self._n_tokens == 0:
            raise ValueError(
                "no token counts: the texts hold nothing but first and special tokens. Give "
                "longer texts."
            )
        count, total = self._sums
        ids = torch.cat([part["window_id"].flatten() for part in (self._top, self._sampled)])
        return FeatureContexts(
            latents=self.latents.numpy(),
            count=count.long().numpy(),
            mean=(total / count.clamp_min(1)).numpy(),
            act_max=self._max.numpy().copy(),
            histogram=self._histogram.numpy().copy(),
            upper=self._upper.numpy().copy(),
            top=_table(self._top),
            sampled=_table(self._sampled),
            n_tokens=self._n_tokens,
            n_left_out=self._n_left_out,
            n_texts=self._n_texts,
            before=self.before,
            strings=token_strings(tokenizer, ids),
        )

    def _count(self, latent: Tensor, strength: Tensor) -> None:
        """Counts, sums, largest, and histograms whose range doubles when it is exceeded."""
        self._sums.index_add_(1, latent, torch.stack([torch.ones_like(strength), strength]))
        self._max.scatter_reduce_(0, latent, strength, "amax")
        n_bins = self._histogram.shape[1]
        needed = torch.exp2(torch.log2(self._max.clamp_min(1e-300)).floor() + 1)
        fresh = (self._upper == 0) & (self._max > 0)
        self._upper[fresh] = needed[fresh]
        while bool((short := (self._upper < needed) & (self._max > 0)).any()):
            pairs = self._histogram[short].unflatten(1, (n_bins // 2, 2)).sum(2)
            self._histogram[short] = torch.cat([pairs, torch.zeros_like(pairs)], dim=1)
            self._upper[short] *= 2
        place = (strength / self._upper[latent] * n_bins).long().clamp(max=n_bins - 1)
        flat = self._histogram.view(-1)
        flat.index_add_(0, latent * n_bins + place, torch.ones_like(place))


@dataclass(frozen=True, eq=False)
class _Block:
    """Tokens and codes of a block, to cut windows from."""

    tokens: TokenTable
    keys: Tensor  # row * n_latents + latent, ascending
    values: Tensor
    n_latents: int
    before: int
    after: int

    def windows(self, row: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and activations around rows, (n, width)."""
        text, n = self.tokens.text_index, len(self.tokens)
        at = row[:, None] + torch.arange(-self.before, self.after + 1)
        inside = at.clamp(0, max(n - 1, 0))
        there = (at == inside) & (text[inside] == text[row][:, None])
        ids = torch.where(there, self.tokens.token_id[inside], NO_TOKEN)
        wanted = inside * self.n_latents + latent[:, None]
        place = torch.searchsorted(self.keys, wanted).clamp(max=max(len(self.keys) - 1, 0))
        hit = there & (self.keys[place] == wanted)
        return ids, torch.where(hit, self.values[place], 0.0)


def _empty(m: int, k: int, width: int) -> dict[str, Tensor]:
    return {
        "score": torch.full((m, k), -math.inf, dtype=torch.float64),
        "text": torch.full((m, k), -1),
        "position": torch.full((m, k), -1),
        "value": torch.zeros(m, k),
        "window_id": torch.full((m, k, width), NO_TOKEN),
        "window_value": torch.zeros(m, k, width),
    }


def _table(held: dict[str, Tensor]) -> ContextTable:
    return ContextTable(**{k: v.numpy().copy() for k, v in held.items() if k != "score"})


def _best_of_texts(
    text: Tensor, latent: Tensor, strength: Tensor, near: Tensor, one_a_text: bool
) -> Tensor:
    """Entries that may be among the strongest: of each text only its strongest, the first of it."""
    entries = near.nonzero()[:, 0]
    if not one_a_text or len(entries) == 0:
        return entries
    entries = entries[strength[entries].sort(descending=True, stable=True).indices]
    span = int(text.max()) + 1
    key = (latent[entries] * span + text[entries]).sort(stable=True)
    new = torch.ones_like(key.values, dtype=torch.bool)
    new[1:] = key.values[1:] != key.values[:-1]
    return entries[key.indices[new]].sort().values


def _merge(
    held: dict[str, Tensor],
    latent: Tensor,
    score: Tensor,
    row: Tensor,
    value: Tensor,
    block: _Block,
) -> None:
    """Keep the best of each latent among those held and those new; of equals the earlier."""
    k = held["score"].shape[1]
    better = (score > held["score"][latent, -1]).nonzero()[:, 0]
    if len(better) == 0:
        return
    order = better[score[better].sort(descending=True, stable=True).indices]
    order = order[latent[order].sort(stable=True).indices]
    mine = latent[order]
    rank = torch.arange(len(mine)) - torch.searchsorted(mine, mine)
    order, rank = order[rank < k], rank[rank < k]
    present, place = latent[order].unique(return_inverse=True)
    ids, values = block.windows(row[order], latent[order])
    found = {
        "score": score[order],
        "text": block.tokens.text_index[row[order]],
        "position": block.tokens.position[row[order]],
        "value": value[order],
        "window_id": ids,
        "window_value": values,
    }
    fresh = _empty(len(present), k, ids.shape[1])
    for name, part in fresh.items():
        part[place, rank] = found[name]
    both = {name: torch.cat([held[name][present], fresh[name]], dim=1) for name in held}
    best = both["score"].sort(dim=1, descending=True, stable=True).indices[:, :k]
    picked = torch.arange(len(present))[:, None]
    for name, part in held.items():
        part[present] = both[name][picked, best]


def _noise(latent: Tensor, text: Tensor, position: Tensor, random_state: int) -> Tensor:
    """A number in [0, 1) that follows from what the entry is, whatever block it comes in.

    The finalizer of splitmix64 (Steele, Lea and Flood 2014) over the four numbers, one by one.
    """
    mixed = torch.full_like(latent, random_state)
    for part in (latent, text, position):
        mixed = mixed + part + _signed(0x9E3779B97F4A7C15)
        mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
        mixed = mixed ^ _shifted(mixed, 31)
    return _shifted(mixed, 11).double() / 2**53


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _shifted(values: Tensor, by: int) -> Tensor:
    """Shift to the right of 64 bits without a sign."""
    return (values >> by) & (2 ** (64 - by) - 1)
