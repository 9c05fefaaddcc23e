"""Names of places in a model, and the modules they mean, for every decoder layout.

=====================  =============================================================
name                   rows read there
=====================  =============================================================
``embed``              what enters block 0 (token plus position embedding)
``layers.i``           residual stream after block ``i``
``layers.i.attn``      what the attention of block ``i`` answers
``layers.i.mlp``       what the MLP of block ``i`` answers
``layers.i.mlp.input``   what the MLP of block ``i`` is given: rows behind its norm
``layers.i.mlp.hidden``  input of the MLP's output matrix
any module path        that module's output, as ``model.named_modules()`` spells it
=====================  =============================================================
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Attribute names of one family of decoders, relative to the decoder or to one block."""

    blocks: str
    embed: str
    """Module whose output enters block 0."""
    tables: tuple[str, ...]
    """Embedding tables that add up to that output; the first is the token table."""
    attn: str
    attn_out: str
    mlp: str
    mlp_out: str
    final_norm: str


LAYOUTS = {
    "llama": Layout(
        "layers", "embed_tokens", ("embed_tokens",), "self_attn", "o_proj", "mlp", "down_proj",
        "norm",
    ),
    "gpt2": Layout("h", "drop", ("wte", "wpe"), "attn", "c_proj", "mlp", "c_proj", "ln_f"),
    "gpt_neox": Layout(
        "layers", "emb_dropout", ("embed_in",), "attention", "dense", "mlp", "dense_4h_to_h",
        "final_layer_norm",
    ),
}  # fmt: skip
"""Llama, Mistral, Qwen 2 and 3 and Gemma share the first."""


@dataclass(frozen=True)
class Decoder:
    """The decoder found inside a model, with the layout it was verified against."""

    module: nn.Module
    layout: Layout

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks in order."""
        return getattr(self.module, self.layout.blocks)

    @property
    def tables(self) -> list[nn.Embedding]:
        """Embedding tables whose rows add up to the ``embed`` site."""
        return [getattr(self.module, name) for name in self.layout.tables]

    @property
    def final_norm(self) -> nn.Module:
        """Normalization between the last block and the output embedding."""
        return getattr(self.module, self.layout.final_norm)

    @property
    def normalizes_writes(self) -> bool:
        """Whether a norm stands between the writers and the stream (Gemma 2 and 3, OLMo 2)."""
        return hasattr(self.blocks[0], "post_feedforward_layernorm")


@dataclass(frozen=True)
class Site:
    """A resolved place: rows are the output (or the input) of ``module``."""

    name: str
    module: nn.Module
    reads: Literal["output", "input"] = "output"


def find_decoder(model: nn.Module) -> Decoder:
    """Decoder of a model of a known layout, verified to have all the parts the layout names.

    Raises
    ------
    ValueError
        No module of the model has the parts of a known layout.
    """
    for module in model.modules():
        for layout in LAYOUTS.values():
            if _fits(module, layout):
                return Decoder(module, layout)
    raise ValueError(
        f"{type(model).__name__} has none of the known decoder layouts ({', '.join(LAYOUTS)}); "
        "address its modules by their paths in named_modules()."
    )


def _fits(module: nn.Module, layout: Layout) -> bool:
    blocks = getattr(module, layout.blocks, None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        return False
    parts = (layout.embed, layout.final_norm, *layout.tables)
    return all(isinstance(getattr(module, part, None), nn.Module) for part in parts) and all(
        isinstance(getattr(getattr(block, part, None), out, None), nn.Module)
        for block in blocks
        for part, out in ((layout.attn, layout.attn_out), (layout.mlp, layout.mlp_out))
    )


_BLOCK_SITE = re.compile(r"layers\.(\d+)(?:\.(attn|mlp|mlp\.hidden|mlp\.input))?")


def resolve_site(model: nn.Module, name: str) -> Site:
    """Module and side that a site name means in this model.

    Parameters
    ----------
    model : torch.nn.Module
    name : str
        See the table at the top of this module.

    Returns
    -------
    Site

    Raises
    ------
    ValueError
        No such site; the message lists those nearest to it.
    """
    match = _BLOCK_SITE.fullmatch(name)
    if match or name == "embed":
        decoder = find_decoder(model)
        if name == "embed":
            return Site(name, getattr(decoder.module, decoder.layout.embed))
        assert match is not None
        index, part = int(match[1]), match[2]
        if index < len(decoder.blocks):
            return _block_site(name, decoder.blocks[index], part, decoder.layout)
    else:
        modules = dict(model.named_modules())
        if name and name in modules:
            return Site(name, modules[name])
    raise ValueError(_no_such_site(model, name))


def _block_site(name: str, block: nn.Module, part: str | None, layout: Layout) -> Site:
    if part is None:
        return Site(name, block)
    if part == "attn":
        return Site(name, getattr(block, layout.attn))
    mlp = getattr(block, layout.mlp)
    if part == "mlp":
        return Site(name, mlp)
    if part == "mlp.input":
        return Site(name, mlp, "input")
    return Site(name, getattr(mlp, layout.mlp_out), "input")


def site_names(model: nn.Module) -> list[str]:
    """All named sites of a model of a known layout, in the order in which they are computed."""
    names = ["embed"]
    for i in range(len(find_decoder(model).blocks)):
        parts = (".attn", ".mlp.input", ".mlp.hidden", ".mlp", "")
        names += [f"layers.{i}{part}" for part in parts]
    return names


def _no_such_site(model: nn.Module, name: str) -> str:
    try:
        known = site_names(model)
        n_blocks = len(find_decoder(model).blocks)
        extent = f" It has {n_blocks} blocks, layers.0 to layers.{n_blocks - 1}."
    except ValueError:
        known, extent = [], ""
    paths = [path for path, _ in model.named_modules() if path]
    near = difflib.get_close_matches(name, known + paths, n=5, cutoff=0.4)
    if match := re.match(r"layers\.\d+(.*)", name):  # the right part of a block that is not there
        last = [n for n in known if n.endswith(match[1]) and n.startswith("layers.")][-2:]
        near = list(dict.fromkeys(last + near))[:5]
    hint = f" Near it: {', '.join(near)}." if near else ""
    return f"{type(model).__name__} has no site {name!r}.{extent}{hint}"
