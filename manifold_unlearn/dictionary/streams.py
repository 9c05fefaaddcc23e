"""Batches of rows for training: from memory, from disk, or from models without storing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.capture import SINK_RATIO, Activations, capture
from manifold_unlearn.activations.tokens import Text, encode
from manifold_unlearn.arrays import generator

Rows: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""What a dictionary reads, (n, d) or (n, streams, d); and what it shall write, if that differs."""

Batch: TypeAlias = "dict[str, Rows]"
"""Rows of each dictionary by its name; all of the same tokens."""

Site: TypeAlias = "str | tuple[str | list[str], str | list[str]] | list[str]"
"""One site, (site read, site written), or several sites side by side."""


class Position(NamedTuple):
    """Where a stream stands: the next batch is number ``batch`` of a block of an epoch."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


START = Position()


class Kept(NamedTuple):
    """Which tokens a stream keeps."""

    sinks: bool
    special: bool
    first: bool

    def rows(self, *seen: Activations) -> Tensor:
        """Boolean mask of the tokens to keep, by what they are in all of several models."""
        keep = torch.ones_like(seen[0].sink)
        for acts in seen:
            keep &= self.sinks | ~acts.sink
            keep &= self.special | ~acts.special
            keep &= self.first | (acts.position > 0)
        return keep


class RowStream:
    """Batches from blocks of rows, shuffled alike whenever the same block is read again.

    Iterating gives one epoch. Blocks come in an order, and the rows of a block in another, that
    follow from ``random_state`` and their numbers alone: nothing but a :class:`Position` is
    needed to go on from any batch, at the cost of reading one block again.

    Parameters
    ----------
    read : callable
        From epoch and block to the block's rows by name.
    n_blocks : int
    batch_size : int
        Rows a batch. What a block leaves over is dropped, but for a block smaller than a batch.
    random_state : int
    """

    def __init__(
        self,
        read: Callable[[int, int], Batch],
        n_blocks: int,
        batch_size: int,
        random_state: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.read, self.n_blocks, self.batch_size = read, n_blocks, int(batch_size)
        self.random_state = random_state

    def __iter__(self) -> Iterator[Batch]:
        for _, batch in self._epoch(Position(), 0, 1):
            yield batch

    def walk(
        self, start: Position = START, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Position, Batch]]:
        """Batches from ``start`` on, epoch after epoch without end.

        Parameters
        ----------
        start : Position
        rank, world : int
            Processes that share the stream read other blocks each, or other batches where there
            are fewer blocks than processes.

        Yields
        ------
        position : Position
            Where to go on after the batch.
        batch : dict
        """
        for epoch in count(start.epoch):
            none = True
            here = start if epoch == start.epoch else Position(epoch)
            for found in self._epoch(here, rank, world):
                none = False
                yield found
            if none and here == Position(epoch):
                raise ValueError(
                    f"the stream has no batch for process {rank} of {world}: give more rows."
                )

    def _epoch(self, start: Position, rank: int, world: int) -> Iterator[tuple[Position, Batch]]:
        order = _permutation(self.n_blocks, self.random_state, start.epoch)
        by_block = self.n_blocks >= world
        mine = order[rank::world][: self.n_blocks // world] if by_block else order
        for number in range(start.block, len(mine)):
            rows = self.read(start.epoch, mine[number])
            n_rows = len(_first(next(iter(rows.values()))))
            shuffled = torch.tensor(
                _permutation(n_rows, self.random_state, start.epoch, mine[number] + 1)
            )
            made = max(n_rows // self.batch_size, min(n_rows, 1))
            stride, offset = (1, 0) if by_block else (world, rank)
            first = start.batch if number == start.block else 0
            for k in range(first, made // stride):
                at = (k * stride + offset) * self.batch_size
                index = shuffled[at : at + self.batch_size]
                batch = {name: _taken(given, index) for name, given in rows.items()}
                yield Position(start.epoch, number, k + 1), batch
            rows = {}  # not held while the next block is read


def _permutation(n: int, *seeds: int) -> list[int]:
    mixed = 0
    for seed in seeds:  # splitmix64, so that neighboring seeds give unrelated orders
        mixed = (mixed + seed + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    found: list[int] = torch.randperm(n, generator=generator(mixed & (2**63 - 1))).tolist()
    return found


def _first(rows: Rows) -> Tensor:
    return rows[0] if isinstance(rows, tuple) else rows


def _taken(rows: Rows, index: Tensor) -> Rows:
    if isinstance(rows, tuple):
        return rows[0][index.to(rows[0].device)], rows[1][index.to(rows[1].device)]
    return rows[index.to(rows.device)]


def stream_rows(
    rows: Tensor | Activations | Mapping[str, Rows],
    *,
    batch_size: int = 1024,
    random_state: int = 0,
) -> RowStream:
    """Batches of rows that are in memory.

    Parameters
    ----------
    rows : Tensor of shape (n, d), Activations, or mapping of str to rows or (rows, rows)
        Row i of all belongs to one token. A single tensor is called ``""``. Rows of
        ``Activations`` that are sinks are left out.
    batch_size, random_state
        As :class:`RowStream`.

    Raises
    ------
    ValueError
        No rows, or arrays of other lengths.
    """
    if isinstance(rows, Activations):
        rows = {site: rows[site][~rows.sink] for site in rows}
    named: Batch = {"": rows} if isinstance(rows, Tensor) else dict(rows)
    flat = [t for given in named.values() for t in (given if isinstance(given, tuple) else [given])]
    lengths = sorted({len(array) for array in flat})
    if len(lengths) != 1 or lengths == [0]:
        raise ValueError(f"rows have lengths {lengths}; all need one length above 0.")
    return RowStream(lambda _epoch, _block: named, 1, batch_size, random_state)


def stream_saved(
    directories: Sequence[str | Path],
    sites: Site | Sequence[Site] | Mapping[str, Site],
    *,
    batch_size: int = 1024,
    keep_sinks: bool = False,
    keep_special: bool = True,
    keep_first: bool = True,
    random_state: int = 0,
) -> RowStream:
    """Batches of activations on disk, a directory at a time.

    Parameters
    ----------
    directories : sequence of path
        Each as ``Activations.save`` writes; a digest that does not match is an error.
    sites, batch_size, keep_sinks, keep_special, keep_first, random_state
        As :func:`stream_activations`.
    """
    if len(directories) == 0:
        raise ValueError("directories is empty; give at least one.")
    specs = named_sites(sites)
    keep = Kept(keep_sinks, keep_special, keep_first)

    def read(_epoch: int, block: int) -> Batch:
        return rows_of(Activations.load(directories[block]), specs, keep)

    return RowStream(read, len(directories), batch_size, random_state)


def stream_activations(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    sites: Site | Sequence[Site] | Mapping[str, Site],
    *,
    batch_size: int = 1024,
    block_tokens: int = 65_536,
    keep_sinks: bool = False,
    keep_special: bool = True,
    keep_first: bool = True,
    max_length: int | None = None,
    read_size: int | Literal["auto"] = "auto",
    sink_ratio: float = SINK_RATIO,
    random_state: int = 0,
) -> RowStream:
    """Batches of activations, read from the model as they are needed and never stored.

    Texts are drawn anew into blocks every epoch. All sites come from one pass over the model.

    Parameters
    ----------
    model, tokenizer, texts
        As :func:`~manifold_unlearn.activations.capture.capture`.
    sites : str, sequence or mapping
        Of one dictionary or of each of several: a site; a tuple ``(site read, site written)`` for
        a transcoder; a list of sites for a crosscoder over layers, rows (n, sites, d); a tuple of
        two lists for a cross-layer transcoder. A mapping names them; else sites name themselves:
        ``"a"``, ``"a->b"``, ``"a+b"``.
    batch_size : int
        Rows a batch.
    block_tokens : int
        Tokens read at once, and among whose rows is shuffled: more mix better and hold more memory.
    keep_sinks : bool, default=False
        Keep attention sinks, tokens whose norm exceeds ``sink_ratio`` times the median of the
        block at one of the sites: they swamp every other row's error.
    keep_special : bool, default=True
        Keep tokens that the tokenizer puts there.
    keep_first : bool, default=True
        Keep the first token of each text, which has nothing to attend to but itself. Where
        dictionaries of a stream without sinks are spliced in, ``leave_first`` goes with it.
    max_length : int, optional
        Cut longer texts. Without it a text longer than the model's context is an error.
    read_size : int or "auto"
        Texts a forward pass.
    sink_ratio : float
    random_state : int

    Returns
    -------
    RowStream

    Raises
    ------
    ValueError
        No texts or sites; as ``capture`` where a block is read.
    """
    specs = named_sites(sites)
    wanted, keep = _wanted(specs), Kept(keep_sinks, keep_special, keep_first)
    blocks = _TextBlocks(tokenizer, texts, block_tokens, max_length, random_state)

    def read(epoch: int, block: int) -> Batch:
        acts = capture(
            model, tokenizer, blocks.texts(epoch, block), wanted, batch_size=read_size,
            max_length=max_length, sink_ratio=sink_ratio, progress=False,
        )  # fmt: skip
        return rows_of(acts, specs, keep)

    return RowStream(read, blocks.n_blocks, batch_size, random_state)


def stream_paired(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    tokenizer: Any,
    texts: Sequence[Text],
    sites: str | Sequence[str] | Mapping[str, str],
    *,
    batch_size: int = 1024,
    block_tokens: int = 65_536,
    keep_sinks: bool = False,
    keep_special: bool = True,
    keep_first: bool = True,
    max_length: int | None = None,
    read_size: int | Literal["auto"] = "auto",
    sink_ratio: float = SINK_RATIO,
    random_state: int = 0,
) -> RowStream:
    """Batches of the same tokens in several models, for crosscoders: rows (n, models, d).

    Parameters
    ----------
    models : sequence or mapping of torch.nn.Module
        Two or more, in the order of the streams.
    tokenizer : PreTrainedTokenizerBase, or sequence of them
        One for all models; of several, one a model, all must give the same tokens.
    texts, batch_size, block_tokens, max_length, read_size, sink_ratio, random_state
        As :func:`stream_activations`.
    sites : str, sequence or mapping of str
        One crosscoder a site; a mapping names them.
    keep_sinks : bool, default=False
        Keep tokens that are a sink in one of the models.
    keep_special, keep_first : bool, default=True

    Raises
    ------
    ValueError
        Fewer than two models, tokenizers that differ, a model without a row of embeddings for
        every token, or streams of other widths.
    """
    streams = list(models.values() if isinstance(models, Mapping) else models)
    if len(streams) < 2:
        raise ValueError(f"{len(streams)} model given; a crosscoder over models needs two or more.")
    specs = named_sites(sites)
    wanted, keep = _wanted(specs), Kept(keep_sinks, keep_special, keep_first)
    tokenizer = _one_tokenizer(tokenizer, streams)
    blocks = _TextBlocks(tokenizer, texts, block_tokens, max_length, random_state)

    def read(epoch: int, block: int) -> Batch:
        chosen = blocks.texts(epoch, block)
        seen = [
            capture(
                model, tokenizer, chosen, wanted, batch_size=read_size, max_length=max_length,
                sink_ratio=sink_ratio, progress=False,
            )
            for model in streams
        ]  # fmt: skip
        own = keep.rows(*seen)
        return {name: _side_by_side([a[str(s)][own] for a in seen]) for name, s in specs.items()}

    return RowStream(read, blocks.n_blocks, batch_size, random_state)


def named_sites(sites: Site | Sequence[Site] | Mapping[str, Site]) -> dict[str, Site]:
    """Sites of each dictionary by its name; see :func:`stream_activations`."""
    if isinstance(sites, Mapping):
        named = dict(sites)
    elif isinstance(sites, str):
        named = {sites: sites}
    else:
        named = {_spelled(site): site for site in sites}
    if not named:
        raise ValueError("sites is empty; name at least one, such as 'layers.0'.")
    return named


def rows_of(acts: Activations, specs: Mapping[str, Site], keep: Kept) -> Batch:
    """Rows of each dictionary from captured activations."""
    own = keep.rows(acts)
    rows = {site: acts[site] if own.all() else acts[site][own] for site in acts}

    def picked(site: str | list[str]) -> Tensor:
        return rows[site] if isinstance(site, str) else _side_by_side([rows[s] for s in site])

    return {
        name: (picked(site[0]), picked(site[1])) if isinstance(site, tuple) else picked(site)
        for name, site in specs.items()
    }


def _side_by_side(arrays: Sequence[Tensor]) -> Tensor:
    widths = sorted({array.shape[1] for array in arrays})
    if len(widths) > 1:
        raise ValueError(f"streams have widths {widths}; a crosscoder needs one width.")
    return torch.stack([array.to(arrays[0].dtype) for array in arrays], dim=1)


def _spelled(site: Site | str | list[str]) -> str:
    if isinstance(site, tuple):
        return "->".join(_spelled(part) for part in site)
    return site if isinstance(site, str) else "+".join(site)


def _wanted(specs: Mapping[str, Site]) -> list[str]:
    """Every site once, in order of mention."""
    parts = [p for site in specs.values() for p in (site if isinstance(site, tuple) else (site,))]
    flat = [name for part in parts for name in ([part] if isinstance(part, str) else part)]
    return list(dict.fromkeys(flat))


def _one_tokenizer(tokenizer: Any, models: Sequence[nn.Module]) -> Any:
    given = list(tokenizer) if isinstance(tokenizer, list | tuple) else [tokenizer]
    vocabulary = given[0].get_vocab()
    for i, other in enumerate(given[1:], 1):
        if other.get_vocab() != vocabulary:
            raise ValueError(
                f"tokenizer {i} gives other tokens than tokenizer 0; paired streams need one."
            )
    largest = max(vocabulary.values())
    for i, model in enumerate(models):
        table = model.get_input_embeddings()  # type: ignore[operator]
        if table.weight.shape[0] <= largest:
            raise ValueError(
                f"model {i} has {table.weight.shape[0]} embeddings; the tokenizer goes up to "
                f"token {largest}. Give models of one tokenizer."
            )
    return given[0]


class _TextBlocks:
    """Texts dealt into blocks of about ``block_tokens``; another deal every epoch."""

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[Text],
        block_tokens: int,
        max_length: int | None,
        random_state: int,
    ) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens={block_tokens} must be at least 1.")
        self._texts, self._random_state = texts, random_state
        n_tokens = sum(  # a thousand at a time, for only their number is kept
            len(row)
            for start in range(0, max(len(texts), 1), 1000)
            for row in encode(tokenizer, texts[start : start + 1000], max_length=max_length)
        )
        self.n_blocks = min(max(round(n_tokens / block_tokens), 1), len(texts))
        self._epoch = -1
        self._order: list[int] = []

    def texts(self, epoch: int, block: int) -> list[Text]:
        """Of one block of one epoch."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = _permutation(len(self._texts), self._random_state, epoch, 0)
        return [self._texts[i] for i in self._order[block :: self.n_blocks]]
