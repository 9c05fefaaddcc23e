"""sparsify: ``cfg.json`` and ``sae.safetensors``, one directory a hookpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.formats.assembly import (
    assembled,
    named,
    origin,
    whole_number,
    width,
)
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.seal import require_unchanged
from manifold_unlearn.dictionary.formats.source import Coder, Family, Source, Which
from manifold_unlearn.dictionary.formats.writing import refused, require_simple, write_directory
from manifold_unlearn.dictionary.nonlinearity import AbsTopK, GroupMax, TopK
from manifold_unlearn.dictionary.transcoder import Transcoder

_WEIGHTS, _CONFIG = "sae.safetensors", "cfg.json"
_RULES = ("topk", "groupmax")
_TRAINED = ("expansion_factor", "normalize_decoder", "multi_topk")


def _recognizes(source: Source) -> bool:
    return source.has(_WEIGHTS)


def _read(source: Source, _: Which) -> SparseCoder:
    path = source.at(_WEIGHTS)
    require_unchanged(source, _WEIGHTS, _CONFIG)
    config, tensors = source.json(_CONFIG), source.safetensors(_WEIGHTS)
    if not config:
        raise DictionaryFormatError(f"{source.at(_CONFIG)} is missing; fetch it with the weights.")
    encoder, bias, b_dec = named(path, tensors, "encoder.weight", "encoder.bias", "b_dec")
    (decoder,) = named(path, tensors, "W_dec")
    d_sae, d_in = width(path, "encoder.weight", encoder)
    rule = config.get("activation", "topk")
    if rule not in _RULES:
        raise DictionaryFormatError(f"{source}: activation={rule!r} is not one of {_RULES}.")
    said = config.get("num_latents") or d_in * config.get("expansion_factor", 32)
    if said != d_sae or config.get("d_in", d_in) != d_in:
        raise DictionaryFormatError(
            f"{source.at(_CONFIG)} says {said} latents of {config.get('d_in')} features; "
            f"encoder.weight has shape {(d_sae, d_in)}. Restore the one that is damaged."
        )
    nonlinearity = {"name": rule, "k": whole_number(path, "k", config.get("k"))}
    if rule == "groupmax" and d_sae % nonlinearity["k"]:
        raise DictionaryFormatError(f"{source}: k={nonlinearity['k']} does not divide {d_sae}.")
    transcodes, skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    own = {"encoder": encoder, "decoder": decoder, "b_enc": bias, "b_dec": b_dec}
    if skip:
        own["W_skip"] = named(path, tensors, "W_skip")[0].mT

    def make() -> SparseCoder:
        if transcodes:
            return Transcoder(d_in, d_sae, d_in, nonlinearity, skip=skip)
        if skip:
            return SparseCoder(d_in, d_sae, d_in, nonlinearity, centered=True, skip=True)
        return SparseAutoencoder(d_in, d_sae, nonlinearity, centered=True)

    coder = assembled(path, make, own)
    coder.origin = _origin(source, config, transcodes)
    return coder


def _origin(source: Source, config: dict[str, Any], transcodes: bool) -> dict[str, Any]:
    folder = source.directory.resolve()
    if re.fullmatch(r"seed\d+", folder.name):
        folder = folder.parent
    training = folder.parent / "config.json"
    beside = Source(training).json("config.json") if training.is_file() else {}
    model = beside.get("model")
    site: str | None = config.get("site") or site_of(folder.name, model)
    if not re.match(r"layers\.\d|embed|.*\.\d+(\.|$)", site or ""):
        site = None
    if transcodes:
        given = f"{site}.input" if re.fullmatch(r"layers\.\d+\.mlp", site or "") else None
        return origin("sparsify", config, model=model, site_in=given, site_out=site)
    return origin("sparsify", config, model=model, site=site)


def write_sparsify(coder: Coder, path: str | Path) -> None:
    """Write ``cfg.json`` and ``sae.safetensors``; see ``save``."""
    coder, own = require_simple(coder, "sparsify"), "save it with format='own'"
    rule, transcodes = coder.nonlinearity, isinstance(coder, Transcoder)
    if not isinstance(rule, TopK | GroupMax) or isinstance(rule, AbsTopK):
        mend = "save it with format='saelens'" if rule.name != "groupmax" else own
        raise refused("sparsify", f"the nonlinearity {rule.name}, only topk and groupmax", mend)
    if coder.normalization != "none":
        raise refused("sparsify", f"normalization={coder.normalization!r}", own)
    if coder.rank_by_norm:
        raise refused("sparsify", "a rule of rank by the decoder's norm", own)
    if coder.d_in != coder.d_out:
        raise refused("sparsify", f"{coder.d_out} outputs of {coder.d_in} inputs", own)
    if coder.centered == transcodes:
        what = "a transcoder that is centered" if transcodes else "an input that is not centered"
        raise refused("sparsify", what, own)
    trained = coder.origin.get("config") if coder.origin.get("format") == "sparsify" else None
    config = {
        "activation": rule.name,
        "expansion_factor": max(1, round(coder.d_sae / coder.d_in)),
        "normalize_decoder": False,
        "num_latents": coder.d_sae,
        "k": rule.k,
        "multi_topk": False,
        "skip_connection": coder.W_skip is not None,
        "transcode": transcodes,
        "d_in": coder.d_in,
        **{name: trained[name] for name in _TRAINED if trained and name in trained},
    }
    site = coder.origin.get("site_out" if transcodes else "site")
    if isinstance(site, str):
        config["site"] = site
    tensors: dict[str, Tensor] = {
        "encoder.weight": coder.encoder,
        "encoder.bias": coder.b_enc,
        "W_dec": coder.decoder,
        "b_dec": coder.b_dec,
    }
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip.mT
    write_directory(path, _WEIGHTS, tensors, _CONFIG, config)


FAMILY = Family("sparsify", f"{_CONFIG}, {_WEIGHTS}", _recognizes, _read)
