"""The model of the dictionary: what a module answers is replaced by what its dictionary makes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.capture import recording
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.dictionary import Crosscoder, CrossLayerTranscoder, SparseCoder, Transcoder
from manifold_unlearn.intervene.hooks import EditedTokens, intervene
from manifold_unlearn.intervene.sequence import ForwardPass

Coder: TypeAlias = "SparseCoder | CrossLayerTranscoder"

Place: TypeAlias = "str | tuple[str | tuple[str, ...], str | tuple[str, ...]]"
"""``site``; ``(site read, site written)``; for a cross-layer transcoder two tuples of sites.
Spelled as one string: ``"a"``, ``"a->b"``, ``"a+b->c+d"``."""

Change: TypeAlias = Callable[[Tensor], Tensor]
"""From activations (..., d_sae) to activations of that shape."""


@dataclass
class LeftAlone:
    """Tokens of the pass now running that keep their rows."""

    token_ids: Collection[int] = ()
    first: bool = False
    sink_ratio: float | None = None
    input_ids: Tensor | None = field(default=None, init=False)
    running: ForwardPass = field(default_factory=ForwardPass, init=False)

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take note of the tokens: a forward pre-hook of the decoder."""
        self.running.begin(module, args, kwargs)
        given = kwargs.get("input_ids", args[0] if args else None)
        if self.token_ids and given is None:
            raise ValueError(
                "the pass was given no input_ids, so leave_tokens cannot be found; pass tokens as "
                "a mask instead."
            )
        self.input_ids = given

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Take note of every pass of the model, if anything is to be known of it."""
        with ExitStack() as stack:
            if self.token_ids or self.first:
                decoder = find_decoder(model).module
                handle = decoder.register_forward_pre_hook(self.begin, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def among(self, *rows: Tensor) -> Tensor:
        """Boolean mask of the tokens left alone, by their rows (..., d) at one site or more."""
        h = rows[0]
        alone = h.new_zeros(h.shape[:-1], dtype=torch.bool)
        if self.token_ids and self.input_ids is not None:
            named = torch.tensor(sorted(self.token_ids), device=self.input_ids.device)
            alone = alone | torch.isin(self.input_ids, named).to(h.device)
        if self.first:
            alone = alone | self.running.present(h)[1]
        if self.sink_ratio is not None:
            for values in rows:
                norm = values.float().norm(dim=-1)
                alone = alone | (norm > self.sink_ratio * norm.median()).to(h.device)
        return alone


@dataclass(frozen=True)
class _Replacing:
    """Map at the site written: rows are made from those read, by a function of both."""

    make: Callable[[Tensor, Tensor], Tensor]
    n_features_in_: int | None
    left: LeftAlone
    site_in: str | None = None
    seen: Mapping[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, h: Tensor) -> Tensor:
        read = h
        if self.site_in is not None:
            if not self.seen[self.site_in]:
                raise ValueError(
                    f"the model has not come to {self.site_in!r}, which the dictionary reads, when "
                    "it comes to the site that it writes to; swap or correct the sites."
                )
            read = self.seen[self.site_in][-1]
            del self.seen[self.site_in][:-1]
        made = self.make(read, h).to(h.device, h.dtype)
        return torch.where(self.left.among(h, read)[..., None], h, made)


@dataclass(frozen=True)
class _Coded:
    """What one dictionary makes of rows read; with its error, what it leaves of rows written."""

    coder: SparseCoder
    error: bool
    change: Change | None

    def __call__(self, read: Tensor, h: Tensor) -> Tensor:
        coder = self.coder
        x = read.to(coder.device, coder.dtype)
        if self.change is None:
            return h if self.error else coder(x)
        code = coder.encode(x)
        made = coder.decode(self.change(code), x)
        if not self.error:
            return made
        return h.to(made) + (made - coder.decode(code, x))


class _CrossLayers:
    """What the layers of a cross-layer transcoder have written so far in the pass now running."""

    def __init__(self, coder: CrossLayerTranscoder, error: bool, change: Change | None) -> None:
        self.coder, self.error, self.change = coder, error, change
        self.written: Tensor | None = None
        self.unchanged: Tensor | None = None

    def at(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Map of one layer."""

        def make(read: Tensor, h: Tensor) -> Tensor:
            if self.error and self.change is None:
                return h
            own, around = self.coder.coders[layer], self.coder.W_skip
            rows = read.to(own.device, own.dtype)
            code = own.encode(rows)
            altered = code if self.change is None else self.change(code)
            made = self.written = self._added(self.written, layer, altered)
            if not self.error:
                wrote = made[..., layer, :]
                return wrote if around is None else wrote + rows @ around[layer]
            plain = self.unchanged = self._added(self.unchanged, layer, code)
            return h.to(made) + (made - plain)[..., layer, :]

        return make

    def _added(self, so_far: Tensor | None, layer: int, code: Tensor) -> Tensor:
        wrote = self.coder.coders[layer].decode(code).unflatten(-1, (-1, self.coder.d_out))
        if layer == 0:
            return wrote + self.coder.b_dec
        if so_far is None or so_far.shape[:-2] != wrote.shape[:-2]:
            raise ValueError(
                f"layer {layer} of the cross-layer transcoder ran before layer 0 in this pass; "
                "give its sites in the order of the model."
            )
        return torch.cat([so_far[..., :layer, :], so_far[..., layer:, :] + wrote], dim=-2)


def sites_of(place: Place) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sites read and sites written that a key of :func:`spliced` means.

    Examples
    --------
    >>> sites_of("layers.0"), sites_of("layers.0.mlp.input->layers.0.mlp")
    ((('layers.0',), ('layers.0',)), (('layers.0.mlp.input',), ('layers.0.mlp',)))
    """
    if isinstance(place, str):
        read, _, written = place.partition("->")
        sides: tuple[Any, Any] = (read, written or read)
        named = tuple(tuple(side.split("+")) for side in sides)
    else:
        if len(place) != 2:
            raise ValueError(f"{place!r} is not a site or a pair (site read, site written).")
        named = tuple((side,) if isinstance(side, str) else tuple(side) for side in place)
    return named[0], named[1]


@contextmanager
def spliced(
    model: nn.Module,
    coders: Mapping[Any, Coder],
    *,
    error: bool = False,
    change: Change | None = None,
    leave_tokens: Collection[int] = (),
    leave_first: bool = False,
    sink_ratio: float | None = None,
    tokens: EditedTokens = "all",
) -> Iterator[nn.Module]:
    """Run a model on what its dictionaries make of it, for as long as the ``with`` block lasts.

    On exit, also by an exception, no hook is left; weights and dictionaries are as they were. With
    several dictionaries each reads what those before it have made.

    Parameters
    ----------
    model : torch.nn.Module
    coders : mapping of place to SparseCoder or CrossLayerTranscoder
        An autoencoder stands at a site. A transcoder stands at ``(site read, site written)``, such
        as ``("layers.3.mlp.input", "layers.3.mlp")``, a cross-layer transcoder at ``((reads of all
        layers), (writes of all layers))``; ``"a->b"`` and ``"a+b->c+d"`` are the same as one
        string. They are put in evaluation mode meanwhile.
    error : bool, default=False
        Add back what the dictionaries do not reconstruct: the model is then itself, but for what
        ``change`` does.
    change : callable, optional
        Of the activations (..., d_sae), before they are decoded.
    leave_tokens : collection of int
        Ids of tokens whose rows stay as they are, such as ``tokenizer.all_special_ids``.
    leave_first : bool, default=False
        Leave the first token of each sequence as it is. In many models it becomes the attention
        sink, and the blocks before it does so already carry what makes it one, at a norm that no
        ratio tells from others. Dictionaries of a stream without sinks have never read it.
    sink_ratio : float, optional
        Leave rows as they are whose norm, where it is read or written, exceeds this multiple of
        the median of the pass; ``capture`` flags them by 10.
    tokens
        As for :func:`~manifold_unlearn.intervene.hooks.intervene`.

    Yields
    ------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        No dictionary, a site that does not exist or is written twice, a crosscoder (it reads all
        its streams before it writes one), a dictionary that does not fit its place.

    Examples
    --------
    >>> with spliced(model, {"layers.3": sae}):  # doctest: +SKIP
    ...     model(**inputs).loss
    """
    placed = _placed(coders)
    left = LeftAlone(leave_tokens, leave_first, sink_ratio)
    seen: dict[str, list[Tensor]] = {}
    maps: dict[str, Any] = {}
    for (reads, writes), coder in placed:
        makes: list[Callable[[Tensor, Tensor], Tensor]]
        if isinstance(coder, CrossLayerTranscoder):
            shared = _CrossLayers(coder, error, change)
            makes = [shared.at(i) for i in range(coder.n_layers)]
        else:
            makes = [_Coded(coder, error, change)]
        for make, read, written in zip(makes, reads, writes, strict=True):
            if written in maps:
                raise ValueError(f"two dictionaries write to {written!r}; give one a site.")
            if read != written:
                seen[read] = []
            site_in = read if read != written else None
            maps[written] = _Replacing(make, coder.d_out, left, site_in, seen)
    with ExitStack() as stack:
        for _, coder in placed:
            stack.enter_context(evaluating(coder))
        stack.enter_context(_replaced(model, maps, left, tokens))
        if seen:  # after the edits, so that what they left is read
            now = stack.enter_context(recording(model, list(seen)))
            seen.update(now)
        yield model


@contextmanager
def ablated(
    model: nn.Module,
    rows: Mapping[str, Tensor | None],
    *,
    leave_tokens: Collection[int] = (),
    leave_first: bool = False,
    sink_ratio: float | None = None,
    tokens: EditedTokens = "all",
) -> Iterator[nn.Module]:
    """Run a model with every row of some sites replaced by one row, or by zeros.

    Parameters
    ----------
    model : torch.nn.Module
    rows : mapping of str to Tensor of shape (d_site,) or None
        None: zeros.
    leave_tokens, leave_first, sink_ratio, tokens
        As :func:`spliced`.
    """
    left = LeftAlone(leave_tokens, leave_first, sink_ratio)

    def filled(row: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        if row is None:
            return lambda _, h: torch.zeros_like(h)
        return lambda _, h: row.to(h).expand_as(h)

    maps = {
        site: _Replacing(filled(row), None if row is None else len(row), left)
        for site, row in rows.items()
    }
    with _replaced(model, maps, left, tokens):
        yield model


@contextmanager
def edited_but(
    model: nn.Module,
    site_maps: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    leave_tokens: Collection[int] = (),
    leave_first: bool = False,
    sink_ratio: float | None = None,
    tokens: EditedTokens = "all",
) -> Iterator[nn.Module]:
    """As :func:`~manifold_unlearn.intervene.hooks.intervene`, with some tokens left alone.

    Parameters
    ----------
    model : torch.nn.Module
    site_maps : mapping of str to callable
        Maps ``(..., d) -> (..., d)``, none of them sequential.
    leave_tokens, leave_first, sink_ratio, tokens
        As :func:`spliced`.
    """
    left = LeftAlone(leave_tokens, leave_first, sink_ratio)

    def made(site_map: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda _, h: site_map(h)

    maps = {
        site: _Replacing(made(site_map), getattr(site_map, "n_features_in_", None), left)
        for site, site_map in site_maps.items()
    }
    with _replaced(model, maps, left, tokens):
        yield model


@contextmanager
def _replaced(
    model: nn.Module, maps: Mapping[str, Any], left: LeftAlone, tokens: EditedTokens
) -> Iterator[None]:
    with left.watching(model), intervene(model, maps, tokens=tokens):
        yield


def _placed(
    coders: Mapping[Any, Coder],
) -> list[tuple[tuple[tuple[str, ...], tuple[str, ...]], Coder]]:
    """Sites of every dictionary, checked against its kind."""
    if not coders:
        raise ValueError("coders is empty; give at least one dictionary with its site.")
    placed = []
    for place, coder in coders.items():
        reads, writes = sites_of(place)
        if isinstance(coder, Crosscoder):
            raise ValueError(
                f"the Crosscoder at {place!r} reads all its streams before it writes one, so no "
                "pass of the model can run on it; splice autoencoders or transcoders."
            )
        n_layers = coder.n_layers if isinstance(coder, CrossLayerTranscoder) else 1
        if len(reads) != n_layers or len(writes) != n_layers:
            raise ValueError(
                f"{place!r} names {len(reads)} sites read and {len(writes)} written; the "
                f"{type(coder).__name__} needs {n_layers} of each."
            )
        apart = isinstance(coder, Transcoder | CrossLayerTranscoder)
        if apart and reads == writes:
            raise ValueError(
                f"the {type(coder).__name__} at {place!r} writes other rows than it reads; give "
                "(site read, site written), such as ('layers.0.mlp.input', 'layers.0.mlp')."
            )
        placed.append(((reads, writes), coder))
    return placed


def sites_written(coders: Mapping[Any, Coder] | Sequence[Any]) -> list[str]:
    """Sites whose rows the dictionaries at these places replace, in their order."""
    return [site for place in coders for site in sites_of(place)[1]]
