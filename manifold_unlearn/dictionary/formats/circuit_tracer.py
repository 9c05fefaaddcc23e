"""circuit-tracer: transcoders of each layer, and cross-layer transcoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.formats.assembly import (
    assembled,
    named,
    origin,
    whole_number,
    width,
)
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.source import Family, Source, Which, one_layer
from manifold_unlearn.dictionary.transcoder import Transcoder

_CONFIG = "config.yaml"
_LAYER = r"layer_(\d+)\.safetensors"
_ENCODER = r"W_enc_(\d+)\.safetensors"
_THRESHOLD = "activation_function.threshold"


def _recognizes(source: Source) -> bool:
    return bool(source.matching(_LAYER)) or _says(source, "transcoder_set")


def _says(source: Source, kind: str) -> bool:
    return source.has(_CONFIG) and source.yaml(_CONFIG).get("model_kind") == kind


def _require_files(source: Source, found: dict[int, str], config: dict[str, Any]) -> None:
    """The files themselves, which a configuration may only name."""
    if not found:
        named_there = [str(uri) for uri in config.get("transcoders") or []][:3]
        where = f" at {', '.join(named_there)}, ..." if named_there else " elsewhere"
        raise FileNotFoundError(
            f"{source} holds no weights: they lie{where}. Fetch them, and give their directory or "
            "one of their files."
        )


def _where(config: dict[str, Any], layer: int) -> dict[str, str]:
    """Sites of a layer, by the parts of a block that the configuration names."""
    found = {}
    for name, hook in (("site_in", "feature_input_hook"), ("site_out", "feature_output_hook")):
        if isinstance(config.get(hook), str):
            found[name] = site_of(f"blocks.{layer}.{config[hook]}", config.get("model_name"))
    return found


def _read(source: Source, which: Which) -> Transcoder:
    found, config = source.matching(_LAYER), source.yaml(_CONFIG)
    _require_files(source, found, config)
    layer, name = one_layer(source, found, which)
    path, tensors = source.at(name), source.safetensors(name)
    encoder, decoder, b_enc, b_dec = named(path, tensors, "W_enc", "W_dec", "b_enc", "b_dec")
    d_sae, d_in = width(path, "W_enc", encoder)
    d_out = width(path, "W_dec", decoder)[1]
    own = {"encoder": encoder, "decoder": decoder, "b_enc": b_enc, "b_dec": b_dec}
    if "W_skip" in tensors:
        own["W_skip"] = tensors["W_skip"].mT
    rule, learned = _rule(source, config, tensors)
    skip = "W_skip" in tensors
    coder = assembled(
        path, lambda: Transcoder(d_in, d_sae, d_out, rule, skip=skip), {**own, **learned}
    )
    model = config.get("model_name")
    coder.origin = origin("circuit_tracer", config, model=model, **_where(config, layer))
    return coder


def _rule(
    source: Source, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    activation = config.get("activation") or ("jumprelu" if _THRESHOLD in tensors else "relu")
    k = config.get("k", tensors.get("k"))
    if activation == "topk" or "k" in tensors:
        return {"name": "topk", "k": whole_number(source.path, "k", k)}, {}
    if activation == "relu":
        return {"name": "relu"}, {}
    if str(activation).replace("_", "") == "jumprelu":
        (threshold,) = named(source.path, tensors, _THRESHOLD)
        return {"name": "jumprelu"}, {"nonlinearity.threshold": threshold}
    raise DictionaryFormatError(
        f"{source}: activation={activation!r} is not one of relu, jumprelu, topk."
    )


def _recognizes_cross_layer(source: Source) -> bool:
    return bool(source.matching(_ENCODER)) or _says(source, "cross_layer_transcoder")


def _read_cross_layer(source: Source, _: Which) -> CrossLayerTranscoder:
    source = Source(source.directory)
    found, config = source.matching(_ENCODER), source.yaml(_CONFIG)
    _require_files(source, found, config)
    if list(found) != list(range(len(found))):
        raise DictionaryFormatError(
            f"{source} holds the encoders of layers {', '.join(map(str, found))}; a cross-layer "
            "transcoder needs all from 0 on. Fetch the missing ones."
        )
    n_layers, own, biases, shapes, jumps = len(found), {}, [], set(), set()
    for i, name in found.items():
        path, tensors = source.at(name), source.safetensors(name)
        if f"W_skip_{i}" in tensors:
            raise DictionaryFormatError(
                f"{path} holds W_skip_{i}: no definition says which way it is turned, and "
                "circuit-tracer does not read it."
            )
        encoder, b_enc, b_dec = named(path, tensors, f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}")
        wrote = source.at(f"W_dec_{i}.safetensors")
        (decoder,) = named(wrote, source.safetensors(wrote.name), f"W_dec_{i}")
        shape = width(wrote, f"W_dec_{i}", decoder, 3)
        if shape[1] != n_layers - i:
            raise DictionaryFormatError(
                f"{wrote} writes {shape[1]} layers from {i} on, of {n_layers} that are here; fetch "
                "the missing files."
            )
        shapes.add((*width(path, f"W_enc_{i}", encoder), shape[2]))
        biases.append(b_dec)
        own[f"layers.{i}.encoder"], own[f"layers.{i}.b_enc"] = encoder, b_enc
        own[f"layers.{i}.decoder"] = decoder.flatten(1)
        own[f"layers.{i}.b_dec"] = torch.zeros(shape[2] * shape[1], dtype=b_dec.dtype)
        jumps.add(f"threshold_{i}" in tensors)
        if f"threshold_{i}" in tensors:
            own[f"layers.{i}.nonlinearity.threshold"] = tensors[f"threshold_{i}"].flatten()
    if len(shapes) != 1 or len(jumps) != 1 or len({len(bias) for bias in biases}) != 1:
        raise DictionaryFormatError(
            f"{source}: the layers differ in shape ({sorted(shapes)}) or in having thresholds."
        )
    d_sae, d_in, d_out = shapes.pop()
    rule = {"name": "jumprelu" if jumps.pop() else "relu"}
    own["b_dec"] = torch.stack(biases)
    coder = assembled(
        source.path, lambda: CrossLayerTranscoder(n_layers, d_in, d_sae, d_out, rule), own
    )
    sites = [_where(config, i) for i in range(n_layers)]
    where = {name: [site[name] for site in sites] for name in sites[0]}
    model = config.get("model_name")
    coder.origin = origin("circuit_tracer_clt", config, model=model, **where)
    return coder


FAMILY = Family("circuit_tracer", f"{_CONFIG}, layer_i.safetensors", _recognizes, _read, ("layer",))
CROSS_LAYER = Family(
    "circuit_tracer_clt",
    f"{_CONFIG}, W_enc_i.safetensors, W_dec_i.safetensors",
    _recognizes_cross_layer,
    _read_cross_layer,
)
