"""Gemma Scope 1: ``params.npz``, the rest said by the path."""

from __future__ import annotations

import math
import re
from typing import Any

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.formats.assembly import assembled, named, origin, scaled, width
from manifold_unlearn.dictionary.formats.files import read_npz
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.source import Family, Source, Which
from manifold_unlearn.dictionary.transcoder import Transcoder

_WEIGHTS = "params.npz"
_REPOSITORY = re.compile(r"gemma-scope-(\w+)-(pt|it)-(res|att|mlp|transcoders)")


def _recognizes(source: Source) -> bool:
    return source.has(_WEIGHTS) or (len(source.names) == 1 and source.names[0].endswith(".npz"))


def _read(source: Source, _: Which) -> SparseCoder:
    path = source.at(_WEIGHTS if source.has(_WEIGHTS) else source.names[0])
    found = {name.lower(): value for name, value in read_npz(path).items()}
    encoder, decoder, b_enc, b_dec, threshold = named(
        path, found, "w_enc", "w_dec", "b_enc", "b_dec", "threshold"
    )
    d_in, d_sae = width(path, "W_enc", encoder)
    d_out = width(path, "W_dec", decoder)[1]
    where = _where(path.resolve().parts)
    if where.get("site") == "embed":  # trained on rows before Gemma scales them
        encoder, decoder = scaled(encoder, 1 / math.sqrt(d_in)), scaled(decoder, math.sqrt(d_in))
    own = {
        "encoder": encoder.mT,
        "decoder": decoder,
        "b_enc": b_enc,
        "b_dec": b_dec,
        "nonlinearity.threshold": threshold.clamp(min=0),
    }
    rule = {"name": "jumprelu"}

    def make() -> SparseCoder:
        if "site_out" in where or d_in != d_out:
            return Transcoder(d_in, d_sae, d_out, rule)
        return SparseAutoencoder(d_in, d_sae, rule, centered=False)

    coder = assembled(path, make, own)
    coder.origin = origin("gemma_scope", {"path": "/".join(path.parts[-5:])}, **where)
    return coder


def _where(parts: tuple[str, ...]) -> dict[str, Any]:
    """Model and sites that a path names, such as ``gemma-scope-2b-pt-res/layer_20/...``."""
    found = _REPOSITORY.search("/".join(parts))
    layer = next((m[1] for part in parts if (m := re.fullmatch(r"layer_(\d+)", part))), None)
    where: dict[str, Any] = {}
    if found:
        model = f"google/gemma-2-{found[1]}" + ("-it" if found[2] == "it" else "")
        where["model"] = model
    if "embedding" in parts:
        where["site"] = "embed"
    elif layer is not None and found:
        block, model = f"blocks.{layer}", where["model"]
        if found[3] == "transcoders":
            where["site_in"] = f"{block}.ln2.hook_normalized"
            where["site_out"] = site_of(f"{block}.hook_mlp_out", model)
        else:
            hooks = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}
            where["site"] = site_of(f"{block}.{hooks[found[3]]}", model)
    return where


FAMILY = Family("gemma_scope", _WEIGHTS, _recognizes, _read)
