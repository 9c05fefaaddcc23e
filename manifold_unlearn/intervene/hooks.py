"""Hooks that edit: put fitted maps into a model for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.capture import read_rows
from manifold_unlearn.activations.sites import find_decoder, resolve_site
from manifold_unlearn.intervene.maps import (
    AnyMap,
    SequentialSiteMap,
    SiteMap,
    bias_free,
    callable_map,
    is_sequential,
)
from manifold_unlearn.intervene.sequence import ForwardPass

STREAM = "stream"
"""Name that stands for all writers of the residual stream together."""

EditedTokens: TypeAlias = "Literal['all', 'but_first', 'last', 'prompt', 'generated'] | Tensor"

_keys = count()


class _Edit:
    """One site's hook: replaces the rows that pass it; the rows it was given stay as they are."""

    def __init__(
        self,
        name: str,
        site_map: SiteMap | SequentialSiteMap,
        running: ForwardPass,
        gate: Callable[[Tensor], Tensor] | None,
    ):
        self.name = name
        self.fitted: Any = site_map
        self.placed: Any = site_map
        self.place: tuple[torch.device, torch.dtype] | None = None
        self.width = _width(site_map)
        self.running = running
        self.gate = gate
        self.key = next(_keys) if is_sequential(site_map) else None

    def put(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the map to where the rows are."""
        move = getattr(self.fitted, "to", None)
        self.placed = move(device, dtype) if move else self.fitted
        self.place = (device, dtype)

    def edited(self, hidden: Tensor) -> Tensor:
        if self.place != (hidden.device, hidden.dtype):
            self.put(hidden.device, hidden.dtype)
        if self.width not in (None, hidden.shape[-1]):
            raise ValueError(
                f"the map at {self.name!r} was fitted for width {self.width}; the site has width "
                f"{hidden.shape[-1]}. Fit it on activations of this site."
            )
        result = self.placed(hidden) if self.key is None else self._stepped(hidden, self.key)
        if result.shape != hidden.shape:
            raise ValueError(
                f"the map at {self.name!r} answered {tuple(result.shape)} to "
                f"{tuple(hidden.shape)}; it must keep the shape."
            )
        if self.gate is not None:
            result = torch.where(self.gate(hidden), result, hidden)
        return result

    def _stepped(self, hidden: Tensor, key: int) -> Tensor:
        if hidden.ndim != 3:
            raise ValueError(
                f"site {self.name!r} carries rows {tuple(hidden.shape)}; evidence over a sequence "
                "needs (batch, length, d). Choose a site of the decoder."
            )
        shape = tuple(getattr(self.placed, "evidence_shape", ()))
        present, first = self.running.present(hidden)
        counted = present & ~first
        start = self.running.start(key, hidden, shape)
        result, evidence = self.placed.step(hidden, start, counted)
        if evidence.shape != (*hidden.shape[:2], *shape):
            raise ValueError(
                f"the map at {self.name!r} answered evidence of shape {tuple(evidence.shape)}; "
                f"expected {(*hidden.shape[:2], *shape)}, one a row."
            )
        self.running.gather(key, evidence)
        if result.shape != hidden.shape:
            return result
        return torch.where(counted[..., None], result.to(hidden.dtype), hidden)

    def on_output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return self._replaced(output)

    def on_input(self, _module: nn.Module, args: Any) -> Any:
        return self._replaced(args)

    def _replaced(self, carried: Any) -> Any:
        edited = self.edited(read_rows(carried, self.name))
        if isinstance(carried, tuple):
            return (edited, *carried[1:])
        return [edited, *carried[1:]] if isinstance(carried, list) else edited


def _width(site_map: Any) -> int | None:
    """Width that a map was fitted for, where it says so."""
    bias = getattr(site_map, "bias_", None)
    width = getattr(site_map, "n_features_in_", None) if bias is None else bias.shape[0]
    return None if width is None else int(width)


@contextmanager
def intervene(
    model: nn.Module,
    site_maps: Mapping[str, AnyMap],
    *,
    tokens: EditedTokens = "all",
) -> Iterator[nn.Module]:
    """Edit the rows that pass the sites, for as long as the ``with`` block lasts.

    On exit, also by an exception, no hook is left; the weights are never touched. Blocks may be
    nested: the inner edit sees what the outer one left.

    Parameters
    ----------
    model : torch.nn.Module
    site_maps : mapping of str to SiteMap
        For each site (see :mod:`manifold_unlearn.activations.sites`) a callable
        ``(..., d) -> (..., d)``, or an object with ``matrix_`` and ``bias_``. A fitted eraser is
        one. The name ``"stream"`` stands for all writers of the residual stream together: the
        linear part acts on ``embed``, every ``attn`` and every ``mlp``, the bias on ``embed``.
        A :class:`~manifold_unlearn.intervene.maps.SequentialSiteMap` is used through its ``step``:
        what a sequence has shown so far is kept with its keys and values in the KV cache, so that
        cached, padded, beam and assisted generation edit what one pass over the text edits; the
        first token of a sequence and padding neither count nor are edited.
    tokens : {"all", "but_first", "last", "prompt", "generated"} or bool Tensor, default="all"
        Rows to edit: all; all but the first of each sequence, which in many models is the
        attention sink and tells nothing; the last of each sequence in each pass; those of the first
        pass (prefill); those of later passes (decoding with a KV cache); or those of a mask (batch,
        length) aligned with the first pass (nothing generated is edited then). Padding does not
        matter.

    Yields
    ------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        No map, a site that does not exist, a map of another width than the site; for a sequential
        map a site outside the decoder, or a cache that has no list of layers.

    Warns
    -----
    UserWarning
        A sequential map meets a cache filled outside the block: what it holds is no evidence.

    Examples
    --------
    >>> with intervene(model, {"layers.12": eraser}):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    if not site_maps:
        raise ValueError("site_maps is empty; give at least one site with its map.")
    maps = {n: callable_map(m, n) for n, m in expand_stream(model, site_maps).items()}
    sites = {name: resolve_site(model, name) for name in maps}
    running = ForwardPass()
    gate = None if isinstance(tokens, str) and tokens == "all" else _gate(tokens, running)
    edits = {name: _Edit(name, maps[name], running, gate) for name in maps}
    keys = [edit.key for edit in edits.values() if edit.key is not None]
    _retrace(model)
    with ExitStack() as stack:
        if gate is not None or keys:
            decoder = _decoder(model)
            handle = decoder.register_forward_pre_hook(running.begin, with_kwargs=True)
            stack.callback(handle.remove)
        if keys:
            _check_inside(decoder, {n: sites[n].module for n in maps if edits[n].key is not None})
            stack.callback(decoder.register_forward_hook(running.end).remove)
            stack.callback(running.withdraw, keys)
        for name, site in sites.items():
            edit = edits[name]
            edit.put(*_place(site.module, model))
            handle = (
                site.module.register_forward_hook(edit.on_output)
                if site.reads == "output"
                else site.module.register_forward_pre_hook(edit.on_input)
            )
            stack.callback(handle.remove)
        yield model


def _retrace(model: nn.Module) -> None:
    """Have a compiled model compiled again: what was traced without hooks looks for none."""
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    if compiled or hasattr(model, "_orig_mod"):
        torch.compiler.reset()


def _decoder(model: nn.Module) -> nn.Module:
    """Module that is given the cache and the attention mask of a pass."""
    try:
        return find_decoder(model).module
    except ValueError:
        return model


def _check_inside(decoder: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    inside = set(decoder.modules())
    for name, module in modules.items():
        if module not in inside:
            raise ValueError(
                f"site {name!r} lies outside the decoder, where no sequence of evidence can be "
                "followed. Choose a site of the decoder, such as 'layers.0'."
            )


def _place(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the rows of a module will be; if it turns out otherwise the map moves once more."""
    for parameter in (*module.parameters(), *model.parameters()):
        if parameter.dtype.is_floating_point:
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def is_intervened(model: nn.Module) -> bool:
    """Whether a hook of :func:`intervene` is in the model now."""
    return any(
        isinstance(getattr(hook, "__self__", None), _Edit)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def expand_stream(model: nn.Module, site_maps: Mapping[str, AnyMap]) -> dict[str, AnyMap]:
    """Replace ``"stream"`` by the writers it stands for.

    Raises
    ------
    ValueError
        A writer is named beside ``"stream"``, or a norm stands between the writers and the stream.
    """
    if STREAM not in site_maps:
        return dict(site_maps)
    decoder = find_decoder(model)
    if decoder.normalizes_writes:
        raise ValueError(
            f"{type(model).__name__} normalizes what its blocks write, so no edit of the writers "
            "acts linearly on the stream; use layers.i.mlp or layers.i.attn."
        )
    whole = site_maps[STREAM]
    linear = bias_free(whole, STREAM)
    writers: dict[str, AnyMap] = {"embed": whole}
    for i in range(len(decoder.blocks)):
        writers |= {f"layers.{i}.attn": linear, f"layers.{i}.mlp": linear}
    others = {name: site_map for name, site_map in site_maps.items() if name != STREAM}
    if both := sorted(writers.keys() & others.keys()):
        raise ValueError(f"'stream' already edits {both}; name either it or the writers.")
    return {**writers, **others}


def _gate(tokens: EditedTokens, running: ForwardPass) -> Callable[[Tensor], Tensor]:
    """Build the function that says, for the hidden states of a pass, which rows to edit."""
    if isinstance(tokens, str) and tokens not in ("but_first", "last", "prompt", "generated"):
        raise ValueError(
            f"tokens={tokens!r} is not 'all', 'but_first', 'last', 'prompt', 'generated' or a "
            "boolean mask."
        )

    def gate(hidden: Tensor) -> Tensor:
        batch, length = hidden.shape[0], hidden.shape[1]
        if isinstance(tokens, Tensor):
            chosen = _mask_rows(tokens, int(running.past), batch, length).to(hidden.device)
        elif tokens == "but_first":
            chosen = ~running.present(hidden)[1]
        elif tokens == "last":
            present, _ = running.present(hidden)
            at = torch.arange(length, device=hidden.device)
            chosen = at == length - 1 - present.flip(1).int().argmax(1)[:, None]
        else:
            later = (running.past > 0) == (tokens == "generated")
            none = hidden.new_zeros(batch, length, dtype=torch.bool)
            chosen = none | later
        return chosen[..., None]

    return gate


def _mask_rows(mask: Tensor, past: int, batch: int, length: int) -> Tensor:
    if past > 0:
        return torch.zeros(batch, length, dtype=torch.bool)
    if mask.ndim != 2 or batch % mask.shape[0] or mask.shape[1] != length:
        raise ValueError(
            f"tokens has shape {tuple(mask.shape)}; the pass has (batch, length) = "
            f"({batch}, {length})."
        )
    return mask.to(torch.bool).repeat_interleave(batch // mask.shape[0], dim=0)
