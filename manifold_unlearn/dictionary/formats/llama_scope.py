"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``, and its successor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.formats.assembly import (
    assembled,
    named,
    number,
    origin,
    scaled,
    width,
)
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.files import read_safetensors
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.source import Family, Source, Which
from manifold_unlearn.dictionary.transcoder import Transcoder

_CONFIG, _WEIGHTS = "hyperparams.json", "final.safetensors"
_LATER = "sae_weights.safetensors"
_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def _recognizes(source: Source) -> bool:
    if source.has(_CONFIG) or source.has(_WEIGHTS):
        return True
    return source.has(_LATER) and "log_jumprelu_threshold" in source.safetensors_names(_LATER)


def _read(source: Source, _: Which) -> SparseCoder:
    if source.has(_LATER):
        path, config = source.at(_LATER), source.json("config.json")
        tensors = source.safetensors(_LATER)
        threshold = named(path, tensors, "log_jumprelu_threshold")[0].exp()
        return _coder(path, config, tensors, threshold, 1.0, 1.0)
    directory = source.directory
    if source.has(_WEIGHTS):
        directory = directory.parent
    config = Source(directory).json(_CONFIG)
    if not config:
        raise DictionaryFormatError(
            f"{directory / _CONFIG} is missing: it holds the threshold and the norm of the data."
        )
    path = directory / "checkpoints" / _WEIGHTS
    tensors = read_safetensors(path)[0]
    d_in = width(path, "encoder.weight", named(path, tensors, "encoder.weight")[0])[1]
    norms = config.get("dataset_average_activation_norm")
    norms = norms if isinstance(norms, dict) else {}
    factor = math.sqrt(d_in) / number(path, "dataset_average_activation_norm.in", norms.get("in"))
    out = factor
    if _transcodes(config):
        d_out = len(tensors["decoder.bias"])
        norm_out = number(path, "dataset_average_activation_norm.out", norms.get("out"))
        out = math.sqrt(d_out) / norm_out
    (bias,) = named(path, tensors, "encoder.bias")
    jump = number(path, "jump_relu_threshold", config.get("jump_relu_threshold"))
    threshold = torch.full(bias.shape, jump * factor)
    return _coder(path, config, tensors, threshold, factor, out)


def _transcodes(config: dict[str, Any]) -> bool:
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    return writes is not None and writes != reads


def _coder(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    threshold: torch.Tensor,
    factor: float,
    out: float,
) -> SparseCoder:
    """Of rows times ``factor`` and outputs times ``out``, folded into the weights."""
    encoder, b_enc, decoder, b_dec = named(path, tensors, *_NAMES)
    d_sae, d_in = width(path, "encoder.weight", encoder)
    d_out = width(path, "decoder.weight", decoder)[0]
    transcodes = _transcodes(config)
    if factor != 1:
        encoder, decoder, b_dec = (
            scaled(encoder, factor),
            scaled(decoder, 1 / out),
            scaled(b_dec, 1 / out),
        )
    own = {
        "encoder": encoder,
        "decoder": decoder.mT,
        "b_enc": b_enc,
        "b_dec": b_dec,
        "nonlinearity.threshold": threshold,
    }
    rule = {"name": "jumprelu"}

    def make() -> SparseCoder:
        if transcodes:
            return Transcoder(d_in, d_sae, d_out, rule)
        return SparseAutoencoder(d_in, d_sae, rule, centered=False)

    coder = assembled(path, make, own)
    hooks = [config.get("hook_point_in"), config.get("hook_point_out")]
    sites = [None if hook is None else site_of(str(hook)) for hook in hooks]
    names = ("site_in", "site_out") if transcodes else ("site",)
    where = dict(zip(names, sites, strict=False))
    coder.origin = origin("llama_scope", config, model=config.get("model_name"), **where)
    return coder


FAMILY = Family("llama_scope", f"{_CONFIG}, checkpoints/{_WEIGHTS}", _recognizes, _read)
