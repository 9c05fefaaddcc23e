"""Qwen Scope: ``layerN.sae.pt``, the number of latents a row said by the repository's name."""

from __future__ import annotations

import re
from typing import Any

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.formats.assembly import (
    assembled,
    named,
    origin,
    whole_number,
    width,
)
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.source import Family, Source, Which, one_layer

_LAYER = r"layer(\d+)\.sae\.pt"
_REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+?)-W\d+K-L0_(?P<k>\d+)")


def _recognizes(source: Source) -> bool:
    return bool(source.matching(_LAYER))


def _read(source: Source, which: Which) -> SparseAutoencoder:
    layer, name = one_layer(source, source.matching(_LAYER), which)
    path = source.at(name)
    repository = _REPOSITORY.search("/".join(path.resolve().parts))
    k = which.get("k") or (repository and int(repository["k"]))
    if k is None:
        raise DictionaryFormatError(
            f"{path} does not hold how many latents fire, and no part of its path is named as the "
            "repository (...-W32K-L0_50); give k= that number."
        )
    fields = source.torch(name)
    tensors: dict[str, Any] = dict(fields) if isinstance(fields, dict) else {}
    encoder, decoder, b_enc, b_dec = named(path, tensors, "W_enc", "W_dec", "b_enc", "b_dec")
    d_sae, d_in = width(path, "W_enc", encoder)
    rule = {"name": "topk", "k": whole_number(path, "k", k)}
    own = {"encoder": encoder, "decoder": decoder.mT, "b_enc": b_enc, "b_dec": b_dec}
    coder = assembled(path, lambda: SparseAutoencoder(d_in, d_sae, rule, centered=False), own)
    model = f"Qwen/{repository['model']}" if repository else None
    coder.origin = origin("qwen_scope", {"k": rule["k"]}, model=model, site=f"layers.{layer}")
    return coder


FAMILY = Family("qwen_scope", "layerN.sae.pt", _recognizes, _read, ("layer", "k"))
