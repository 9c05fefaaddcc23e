"""Hooks that edit: put fitted maps into a model for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.capture import read_rows
from manifold_unlearn.activations.sites import find_decoder, resolve_site
from manifold_unlearn.intervene.maps import AffineSiteMap, SiteMap, bias_free, callable_map

STREAM = "stream"
"""Name that stands for all writers of the residual stream together."""

EditedTokens: TypeAlias = "Literal['all', 'last', 'prompt', 'generated'] | Tensor"


@dataclass
class _Pass:
    """Where the forward pass now running stands in its sequences."""

    past: int
    attention_mask: Tensor | None


class _Edit:
    """One site's hook: replaces the rows that pass it; the rows it was given stay as they are."""

    def __init__(self, name: str, site_map: SiteMap, gate: Callable[[Tensor], Tensor] | None):
        self.name = name
        self.fitted = site_map
        self.placed = site_map
        self.place: tuple[torch.device, torch.dtype] | None = None
        self.gate = gate

    def edited(self, hidden: Tensor) -> Tensor:
        if self.place != (hidden.device, hidden.dtype):
            move = getattr(self.fitted, "to", None)
            self.placed = move(hidden.device, hidden.dtype) if move else self.fitted
            self.place = (hidden.device, hidden.dtype)
            self._check_width(hidden)
        result = self.placed(hidden)
        if result.shape != hidden.shape:
            raise ValueError(
                f"the map at {self.name!r} answered {tuple(result.shape)} to "
                f"{tuple(hidden.shape)}; it must keep the shape."
            )
        if self.gate is not None:
            result = torch.where(self.gate(hidden), result, hidden)
        return result

    def _check_width(self, hidden: Tensor) -> None:
        width = getattr(getattr(self.fitted, "bias_", None), "shape", hidden.shape[-1:])[0]
        if width != hidden.shape[-1]:
            raise ValueError(
                f"the map at {self.name!r} was fitted for width {width}; the site has width "
                f"{hidden.shape[-1]}. Fit it on activations of this site."
            )

    def on_output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return self._replaced(output)

    def on_input(self, _module: nn.Module, args: Any) -> Any:
        return self._replaced(args)

    def _replaced(self, carried: Any) -> Any:
        edited = self.edited(read_rows(carried, self.name))
        if isinstance(carried, tuple):
            return (edited, *carried[1:])
        return [edited, *carried[1:]] if isinstance(carried, list) else edited


@contextmanager
def intervene(
    model: nn.Module,
    site_maps: Mapping[str, SiteMap | AffineSiteMap],
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
    tokens : {"all", "last", "prompt", "generated"} or bool Tensor (batch, length), default="all"
        Rows to edit: all; the last of each sequence in each pass; those of the first pass
        (prefill); those of later passes (decoding with a KV cache); or those of a mask aligned
        with the first pass (nothing generated is edited then). Padding does not matter.

    Yields
    ------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        No map, a site that does not exist, a map of another width than the site.

    Examples
    --------
    >>> with intervene(model, {"layers.12": eraser}):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    if not site_maps:
        raise ValueError("site_maps is empty; give at least one site with its map.")
    maps = {n: callable_map(m, n) for n, m in expand_stream(model, site_maps).items()}
    sites = {name: resolve_site(model, name) for name in maps}
    with ExitStack() as stack:
        gate = None
        if not (isinstance(tokens, str) and tokens == "all"):
            gate = _gate(model, tokens, stack)
        for name, site in sites.items():
            edit = _Edit(name, maps[name], gate)
            handle = (
                site.module.register_forward_hook(edit.on_output)
                if site.reads == "output"
                else site.module.register_forward_pre_hook(edit.on_input)
            )
            stack.callback(handle.remove)
        yield model


def is_intervened(model: nn.Module) -> bool:
    """Whether a hook of :func:`intervene` is in the model now."""
    return any(
        isinstance(getattr(hook, "__self__", None), _Edit)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def expand_stream(
    model: nn.Module, site_maps: Mapping[str, SiteMap | AffineSiteMap]
) -> dict[str, SiteMap | AffineSiteMap]:
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
    writers: dict[str, SiteMap | AffineSiteMap] = {"embed": whole}
    for i in range(len(decoder.blocks)):
        writers |= {f"layers.{i}.attn": linear, f"layers.{i}.mlp": linear}
    others = {name: site_map for name, site_map in site_maps.items() if name != STREAM}
    if both := sorted(writers.keys() & others.keys()):
        raise ValueError(f"'stream' already edits {both}; name either it or the writers.")
    return {**writers, **others}


def _gate(model: nn.Module, tokens: EditedTokens, stack: ExitStack) -> Callable[[Tensor], Tensor]:
    """Build the function that says, for the hidden states of a pass, which rows to edit."""
    if isinstance(tokens, str) and tokens not in ("last", "prompt", "generated"):
        raise ValueError(
            f"tokens={tokens!r} is not 'all', 'last', 'prompt', 'generated' or a boolean mask."
        )
    running = _Pass(0, None)

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        running.past = int(cache.get_seq_length()) if cache is not None else 0
        running.attention_mask = kwargs.get("attention_mask")

    try:
        root = find_decoder(model).module
    except ValueError:
        root = model
    handle = root.register_forward_pre_hook(note, with_kwargs=True)
    stack.callback(handle.remove)

    def gate(hidden: Tensor) -> Tensor:
        batch, length = hidden.shape[0], hidden.shape[1]
        if isinstance(tokens, Tensor):
            chosen = _mask_rows(tokens, running.past, batch, length)
        elif tokens == "last":
            chosen = _last_rows(running.attention_mask, batch, length)
        else:
            chosen = torch.full((batch, length), (running.past > 0) == (tokens == "generated"))
        return chosen.to(hidden.device)[..., None]

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


def _last_rows(attention_mask: Tensor | None, batch: int, length: int) -> Tensor:
    chosen = torch.zeros(batch, length, dtype=torch.bool)
    last = torch.full((batch,), length - 1)
    if attention_mask is not None and attention_mask.ndim == 2:
        present = attention_mask[:, -length:].to("cpu", torch.int64)
        last = length - 1 - present.flip(1).argmax(1)
    chosen[torch.arange(batch), last] = True
    return chosen
