"""Names of places in other libraries, and the sites that they are here.

========================================  ==========================
there                                     here
========================================  ==========================
``blocks.i.hook_resid_post``              ``layers.i``
``blocks.i.hook_resid_pre``               ``layers.(i - 1)`` or ``embed``
``blocks.i.hook_attn_out``                ``layers.i.attn``
``blocks.i.hook_mlp_out``                 ``layers.i.mlp``
``blocks.i.mlp.hook_in``                  ``layers.i.mlp.input``
``blocks.i.mlp.hook_post``                ``layers.i.mlp.hidden``
``model.layers.i.output``                 ``layers.i``
``h.i.mlp``, ``layers.i.self_attn``, ...  ``layers.i.mlp``, ``layers.i.attn``
``resid_post_layer_i``                    ``layers.i``
========================================  ==========================

In Gemma 2 and 3 a norm stands between a module and the stream, and ``hook_attn_out`` and
``hook_mlp_out`` are read behind it: the output of that norm is their site. Any other name is kept
as it is.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(?:blocks\.(\d+)\.)(.+)")
_MODULE = re.compile(r"(?:[a-z_]+\.)*?(?:layers|h)\.(\d+)(?:\.(.+))?")
_NUMBERED = re.compile(r"(resid_post|resid_pre|attention_out|attn_out|mlp_out)_layer_(\d+)")
_LENS = {
    "hook_resid_post": "",
    "hook_attn_out": ".attn",
    "attn.hook_out": ".attn",
    "hook_mlp_out": ".mlp",
    "mlp.hook_out": ".mlp",
    "mlp.hook_in": ".mlp.input",
    "mlp.hook_post": ".mlp.hidden",
}
_PARTS = {
    None: "",
    "self_attn": ".attn",
    "attn": ".attn",
    "attention": ".attn",
    "mlp": ".mlp",
    "mlp.input": ".mlp.input",
    "mlp.down_proj.input": ".mlp.hidden",
    "mlp.c_proj.input": ".mlp.hidden",
    "mlp.dense_4h_to_h.input": ".mlp.hidden",
}
_BEHIND = {
    "hook_attn_out": "post_attention_layernorm",
    "hook_mlp_out": "post_feedforward_layernorm",
    "mlp.hook_out": "post_feedforward_layernorm",
}
_NORMED = re.compile(r"gemma-?[23]", re.IGNORECASE)


def site_of(hook: str, model: str | None = None) -> str:
    """Site of a name of TransformerLens, of a module, or of dictionary_learning.

    Parameters
    ----------
    hook : str
    model : str, optional
        Name of the model: what ``hook_mlp_out`` reads depends on it.
    """
    if found := _NUMBERED.fullmatch(hook):
        place = found[1].replace("attention", "attn")
        return site_of(f"blocks.{found[2]}.hook_{place}", model)
    if found := _BLOCK.fullmatch(hook):
        layer, place = int(found[1]), found[2]
        if place == "hook_resid_pre":
            return f"layers.{layer - 1}" if layer else "embed"
        if place in _BEHIND and _NORMED.search(model or ""):
            return f"model.layers.{layer}.{_BEHIND[place]}"
        return f"layers.{layer}{_LENS[place]}" if place in _LENS else hook
    bare = hook.removesuffix(".output")
    if bare.split(".")[-1] in ("embed_tokens", "embed_in"):
        return "embed"
    if (found := _MODULE.fullmatch(bare)) and found[2] in _PARTS:
        return f"layers.{found[1]}{_PARTS[found[2]]}"
    return bare


def hook_of(site: str) -> str:
    """Name in TransformerLens of a site; one that has none there is kept as it is."""
    if site == "embed":
        return "blocks.0.hook_resid_pre"
    found = re.fullmatch(r"layers\.(\d+)(.*)", site)
    for place, part in _LENS.items():
        if found and found[2] == part:
            return f"blocks.{found[1]}.{place}"
    return site
