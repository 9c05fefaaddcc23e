"""Hooks that read: activations of texts at named sites, one row a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from manifold_unlearn import artifact
from manifold_unlearn.activations.models import context_length, evaluating
from manifold_unlearn.activations.prefill import (
    Chunk,
    chunks,
    new_cache,
    require_chunk_size,
    require_kept,
)
from manifold_unlearn.activations.sites import Site, resolve_site
from manifold_unlearn.activations.tokens import (
    Batch,
    Encoding,
    Text,
    TokenSelection,
    TokenTable,
    batches,
    encode,
    select,
)
from manifold_unlearn.arrays import require_finite

SINK_RATIO = 10.0
"""A token is a sink where its norm exceeds this multiple of the site's median norm."""


@dataclass(frozen=True)
class Activations(Mapping[str, Tensor]):
    """Captured rows: a mapping of site to ``(n_tokens, d_site)``, and what each row is."""

    arrays: dict[str, Tensor]
    tokens: TokenTable

    def __getitem__(self, site: str) -> Tensor:
        """Rows of a site, in the model's dtype, on the CPU."""
        return self.arrays[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def save(self, directory: str | Path) -> None:
        """Write rows and token table to a directory that :meth:`load` reads."""
        tensors = {f"sites/{site}": rows for site, rows in self.arrays.items()}
        tensors |= {f"tokens/{f.name}": getattr(self.tokens, f.name) for f in fields(TokenTable)}
        artifact.save(directory, "Activations", tensors, {"sites": list(self.arrays)})

    @classmethod
    def load(cls, directory: str | Path) -> Activations:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="Activations")
        table = TokenTable(**{f.name: tensors[f"tokens/{f.name}"] for f in fields(TokenTable)})
        return cls({site: tensors[f"sites/{site}"] for site in config["sites"]}, table)

    @property
    def text_index(self) -> Tensor:
        """int64 (n_tokens,): index of the text among those given."""
        return self.tokens.text_index

    @property
    def position(self) -> Tensor:
        """int64 (n_tokens,): 0 is the text's first token, whatever the padding."""
        return self.tokens.position

    @property
    def token_id(self) -> Tensor:
        """int64 (n_tokens,)."""
        return self.tokens.token_id

    @property
    def special(self) -> Tensor:
        """Boolean (n_tokens,): put there by the tokenizer."""
        return self.tokens.special

    @property
    def answer(self) -> Tensor:
        """Boolean (n_tokens,): belongs to the answer of a pair."""
        return self.tokens.answer

    @property
    def sink(self) -> Tensor:
        """Boolean (n_tokens,): attention sink at one of the captured sites."""
        return self.tokens.sink


def read_rows(output: Any, site: str) -> Tensor:
    """Hidden states in what a module was given or answered: a tensor, or a tuple that leads one."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"site {site!r} carries a {type(hidden).__name__}, not a tensor; choose a module whose "
            "output is hidden states."
        )
    return hidden


@contextmanager
def recording(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record what passes the sites while anything runs: forward passes, or ``generate``.

    Parameters
    ----------
    model : torch.nn.Module
    sites : sequence of str
        See :mod:`manifold_unlearn.activations.sites`.

    Yields
    ------
    dict of str to list of Tensor
        For each site one tensor ``(batch, length, d_site)`` a forward pass, as the model holds it
        (detached, not copied). In generation the first is the prompt, then one token each.

    Examples
    --------
    >>> with recording(model, ["layers.3"]) as seen:  # doctest: +SKIP
    ...     model.generate(**inputs, max_new_tokens=5)
    >>> torch.cat(seen["layers.3"], dim=1).shape  # doctest: +SKIP
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda hidden: seen[name].append(hidden.detach())

    with _reading([resolve_site(model, name) for name in seen], keep):
        yield seen


@contextmanager
def _reading(
    sites: Sequence[Site], reader: Callable[[str], Callable[[Tensor], None]]
) -> Iterator[None]:
    with ExitStack() as hooks:
        for site in sites:
            read = reader(site.name)
            handle = (
                site.module.register_forward_hook(_output_hook(site.name, read))
                if site.reads == "output"
                else site.module.register_forward_pre_hook(_input_hook(site.name, read))
            )
            hooks.callback(handle.remove)
        yield


def _output_hook(name: str, read: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        read(read_rows(output, name))

    return hook


def _input_hook(name: str, read: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any) -> None:
        read(read_rows(args, name))

    return hook


class _AllRead(Exception):  # noqa: N818 (control flow: ends a forward pass, is never an error)
    """Every wanted site has been read; the rest of the forward pass is of no use."""


def capture(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    sites: str | Sequence[str],
    *,
    tokens: TokenSelection = "all",
    batch_size: int | Literal["auto"] = "auto",
    stop_at: str | None = None,
    max_length: int | None = None,
    sink_ratio: float = SINK_RATIO,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> Activations:
    """Activations of texts at named sites.

    Layers behind the deepest wanted site do not run. Padding never enters a row, and the rows do
    not depend on the batch size or the tokenizer's padding side.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str or (prompt, answer)
        A pair is read as one text; its answer brings its own leading space.
    sites : str or sequence of str
        ``embed``, ``layers.i`` (stream after block i, before the final norm), ``layers.i.attn``,
        ``layers.i.mlp``, ``layers.i.mlp.input``, ``layers.i.mlp.hidden``, or any module path.
    tokens : {"all", "last", "answer"} or sequence of bool masks, default="all"
        Rows to keep: every token that is not padding, the last of each text, the answers' of
        pairs, or one mask a text.
    batch_size : int or "auto", default="auto"
        Texts a forward pass; ``"auto"`` batches by length up to 2,048 tokens.
    stop_at : str, optional
        Run on to this site although it is not wanted. Default: stop at the deepest of ``sites``.
    max_length : int, optional
        Cut longer texts. Without it a text longer than the model's context is an error.
    sink_ratio : float, default=10
        Tokens whose norm at a site exceeds this multiple of the site's median norm over all rows
        are flagged in ``sink``. They belong in no fit.
    chunk_size : int, optional
        Read so many tokens of a text at a time, with a KV cache: long texts in bounded memory,
        for of the states only one chunk's are held, and the cache of the layers up to the deepest
        site. Same rows to 1e-5 relative. Default: every text in one pass.
    progress : bool, optional
        Show a progress bar. Default: only on a terminal.

    Returns
    -------
    Activations
        ``acts[site]`` is ``(n_tokens, d_site)`` in the model's dtype on the CPU, texts in order;
        ``acts.text_index``, ``.position``, ``.token_id``: int64; ``.special``, ``.answer``,
        ``.sink``: bool.

    Raises
    ------
    ValueError
        No texts or sites, a site that does not exist (lists those near it), a text without tokens
        or longer than the context, an activation that is not finite (names site and text); with
        ``chunk_size`` a model that keeps its past in something else than a KV cache.
    """
    require_chunk_size(chunk_size)
    names = [sites] if isinstance(sites, str) else list(dict.fromkeys(sites))
    if not names:
        raise ValueError("sites is empty; name at least one, such as 'layers.0'.")
    wanted = [resolve_site(model, name) for name in names]
    last = [] if stop_at is None or stop_at in names else [resolve_site(model, stop_at)]
    rows = encode(
        tokenizer,
        list(texts),
        max_length=max_length,
        context=None if max_length else context_length(model),
    )
    masks = select(rows, tokens)
    starts = torch.tensor([0, *(int(mask.sum()) for mask in masks)]).cumsum(0)
    kept: dict[str, Tensor] = {}

    def place(batch: Batch, chunk: Chunk, seen: Mapping[str, Tensor]) -> None:
        row, column, target = _picked(batch, chunk, masks, starts)
        for name in names:
            chosen = seen[name][row.to(seen[name].device), column.to(seen[name].device)].cpu()
            if name not in kept:
                kept[name] = chosen.new_empty(int(starts[-1]), chosen.shape[-1])
            kept[name][target] = chosen

    _run(model, wanted + last, batches(rows, batch_size=batch_size), place, chunk_size, progress)
    table = _token_table(rows, masks, kept, sink_ratio)
    for name in names:
        _require_finite(kept[name], name, table.text_index)
    return Activations({name: kept[name] for name in names}, table)


def _picked(
    batch: Batch, chunk: Chunk, masks: Sequence[Tensor], starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a chunk that are kept: which text, which column, and where among all rows kept."""
    row, column, target = [], [], []
    for r, i in enumerate(batch.index.tolist()):
        kept = masks[i].nonzero()[:, 0]
        inside = ((kept >= chunk.start) & (kept < chunk.stop)).nonzero()[:, 0]
        row.append(torch.full_like(inside, r))
        column.append(kept[inside] - chunk.start)
        target.append(starts[i] + inside)
    return torch.cat(row), torch.cat(column), torch.cat(target)


def _run(
    model: nn.Module,
    sites: Sequence[Site],
    made: Sequence[Batch],
    place: Callable[[Batch, Chunk, Mapping[str, Tensor]], None],
    chunk_size: int | None,
    progress: bool | None,
) -> None:
    device = next(model.parameters()).device
    body = getattr(model, "base_model", model)  # no logits are wanted
    needs_past = any(site.name != "embed" for site in sites)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        seen: dict[str, Tensor] = {}
        missing: set[str] = set()

        def keep(name: str) -> Callable[[Tensor], None]:
            def read(hidden: Tensor) -> None:
                seen[name] = hidden
                missing.discard(name)
                if not missing:
                    raise _AllRead

            return read

        stack.enter_context(_reading(sites, keep))

        def run(chunk: Chunk, cache: Any) -> None:
            past = {} if cache is None else {"past_key_values": cache}
            seen.clear()
            missing.update(site.name for site in sites)
            try:
                body(
                    input_ids=chunk.input_ids.to(device),
                    attention_mask=chunk.attention_mask.to(device),
                    position_ids=chunk.position_ids.to(device),
                    use_cache=cache is not None,
                    **past,
                )
            except _AllRead:
                pass
            else:
                raise ValueError(
                    f"the forward pass never came to {sorted(missing)}; choose sites that the "
                    "model runs on text."
                )

        disable = None if progress is None else not progress
        for batch in tqdm(made, desc="capture", unit="batch", disable=disable, leave=False):
            longer = chunk_size is not None and batch.input_ids.shape[1] > chunk_size
            cache = new_cache(model) if longer else None
            for chunk in chunks(batch, chunk_size):
                run(chunk, cache)
                if longer and needs_past:
                    require_kept(model, cache, chunk.stop)
                place(batch, chunk, seen)


def _require_finite(values: Tensor, name: str, text_index: Tensor) -> None:
    try:
        require_finite(values, f"site {name!r}")
    except ValueError as error:
        row = int((~torch.isfinite(values).all(dim=1)).nonzero()[0, 0])
        raise ValueError(f"{error} It belongs to text {int(text_index[row])}.") from None


def _token_table(
    rows: Sequence[Encoding],
    masks: Sequence[Tensor],
    kept: Mapping[str, Tensor],
    sink_ratio: float,
) -> TokenTable:
    counts = torch.tensor([int(mask.sum()) for mask in masks])
    sink = torch.zeros(int(counts.sum()), dtype=torch.bool)
    for values in kept.values():
        norms = torch.linalg.vector_norm(values.float(), dim=1)
        sink |= norms > sink_ratio * norms.median()
    return TokenTable(
        text_index=torch.repeat_interleave(torch.arange(len(rows)), counts),
        position=torch.cat([mask.nonzero()[:, 0] for mask in masks]),
        token_id=torch.cat([row.ids[mask] for row, mask in zip(rows, masks, strict=True)]),
        special=torch.cat([row.special[mask] for row, mask in zip(rows, masks, strict=True)]),
        answer=torch.cat([row.answer[mask] for row, mask in zip(rows, masks, strict=True)]),
        sink=sink,
    )
