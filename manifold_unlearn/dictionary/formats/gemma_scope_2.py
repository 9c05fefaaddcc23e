"""Gemma Scope 2: ``config.json`` and ``params.safetensors``, or one file a layer."""

from __future__ import annotations

import re
from typing import Any

import torch

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.formats.assembly import assembled, named, origin, width
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.source import Coder, Family, Source, Which
from manifold_unlearn.dictionary.transcoder import Transcoder

_WEIGHTS = "params.safetensors"
_LAYER = r"params_layer_(\d+)\.safetensors"
_NAMES = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"


def _recognizes(source: Source) -> bool:
    return source.has(_WEIGHTS) or bool(source.matching(_LAYER))


def _read(source: Source, _: Which) -> Coder:
    config = source.json("config.json")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise DictionaryFormatError(
            f"{source} is of the architecture {config['architecture']!r}; jump_relu is read."
        )
    return _one(source, config) if source.has(_WEIGHTS) else _across(source, config)


def _one(source: Source, config: dict[str, Any]) -> SparseCoder:
    path, tensors = source.at(_WEIGHTS), source.safetensors(_WEIGHTS)
    encoder, decoder, b_enc, b_dec, threshold = named(path, tensors, *_NAMES)
    d_in, d_sae = width(path, "w_enc", encoder)
    d_out = width(path, "w_dec", decoder)[1]
    reads, writes = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    skip = _SKIP in tensors
    own = {
        "encoder": encoder.mT,
        "decoder": decoder,
        "b_enc": b_enc,
        "b_dec": b_dec,
        "nonlinearity.threshold": threshold.clamp(min=0),
    }
    if skip:
        own["W_skip"] = tensors[_SKIP]
    transcodes = skip or d_in != d_out or (writes is not None and writes != reads)
    rule = {"name": "jumprelu"}

    def make() -> SparseCoder:
        if transcodes:
            return Transcoder(d_in, d_sae, d_out, rule, skip=skip)
        return SparseAutoencoder(d_in, d_sae, rule, centered=False)

    coder = assembled(path, make, own)
    model = config.get("model_name")
    sites = [None if hook is None else site_of(str(hook), model) for hook in (reads, writes)]
    names = ("site_in", "site_out") if transcodes else ("site",)
    where = dict(zip(names, sites, strict=False))
    coder.origin = origin("gemma_scope_2", config, model=model, **where)
    return coder


def _across(source: Source, config: dict[str, Any]) -> CrossLayerTranscoder:
    found = source.matching(_LAYER)
    if list(found) != list(range(len(found))):
        raise DictionaryFormatError(
            f"{source} holds the layers {', '.join(map(str, found))}; a cross-layer transcoder "
            "needs all from 0 on. Fetch the missing ones."
        )
    own: dict[str, torch.Tensor] = {}
    biases, skips, n_layers, shapes = [], [], len(found), set()
    for i, name in found.items():
        path, tensors = source.at(name), source.safetensors(name)
        if _SKIP in tensors:
            skips.append(tensors[_SKIP])
        encoder, decoder, b_enc, b_dec, threshold = named(path, tensors, *_NAMES)
        d_in, d_sae = width(path, "w_enc", encoder)
        _, wrote, d_out = width(path, "w_dec", decoder, 3)
        if wrote != n_layers or decoder[:, :i].any():
            raise DictionaryFormatError(
                f"{path}: w_dec writes {wrote} layers, some of them before its own, of {n_layers} "
                "that are here; fetch the missing files."
            )
        shapes.add((d_in, d_sae, d_out))
        biases.append(b_dec)
        own[f"layers.{i}.encoder"] = encoder.mT
        own[f"layers.{i}.decoder"] = decoder[:, i:].flatten(1)
        own[f"layers.{i}.b_enc"] = b_enc
        own[f"layers.{i}.b_dec"] = torch.zeros(d_out * (n_layers - i), dtype=b_dec.dtype)
        own[f"layers.{i}.nonlinearity.threshold"] = threshold.clamp(min=0)
    if len(shapes) != 1 or len(skips) not in (0, n_layers):
        raise DictionaryFormatError(
            f"{source}: the layers have the shapes {sorted(shapes)}, and {len(skips)} of the "
            f"{n_layers} hold {_SKIP}; all must be alike."
        )
    d_in, d_sae, d_out = shapes.pop()
    if skips:
        own["W_skip"] = torch.stack(skips)
    own["b_dec"] = torch.stack(biases)
    rule = {"name": "jumprelu"}

    def make() -> CrossLayerTranscoder:
        return CrossLayerTranscoder(n_layers, d_in, d_sae, d_out, rule, skip=bool(skips))

    coder = assembled(source.path, make, own)
    where = {
        name: _every_layer(config.get(hook), n_layers)
        for name, hook in (("site_in", "hf_hook_point_in"), ("site_out", "hf_hook_point_out"))
    }
    coder.origin = origin("gemma_scope_2", config, model=config.get("model_name"), **where)
    return coder


def _every_layer(hook: Any, n_layers: int) -> list[str] | None:
    """The site of each layer, of a name that holds the number of one."""
    if not isinstance(hook, str) or not re.search(r"layers\.[^.]+", hook):
        return None
    return [site_of(re.sub(r"layers\.[^.]+", f"layers.{i}", hook)) for i in range(n_layers)]


FAMILY = Family(
    "gemma_scope_2",
    f"config.json, {_WEIGHTS}; or params_layer_i.safetensors",
    _recognizes,
    _read,
)
