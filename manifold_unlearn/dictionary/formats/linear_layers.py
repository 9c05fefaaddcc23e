"""Two linear layers in one ``.pt``: the autoencoders of Goodfire and of DeepSeek-R1."""

from __future__ import annotations

import re

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.formats.assembly import assembled, named, origin, width
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.source import Family, Source, Which

_SPELLINGS = (("encoder", "decoder"), ("encoder_linear", "decoder_linear"))


def _names(first: str, second: str) -> list[str]:
    return [f"{part}.{what}" for part in (first, second) for what in ("weight", "bias")]


def _recognizes(source: Source) -> bool:
    found = source.checkpoint()
    if found is None or "dict_class" in (source.json("config.json").get("trainer") or {}):
        return False
    keys = found[1].keys()
    if not any(set(_names(*spelling)) == keys for spelling in _SPELLINGS):
        return False
    return all(getattr(value, "ndim", 0) < 3 for value in found[1].values())


def _read(source: Source, _: Which) -> SparseAutoencoder:
    found = source.checkpoint()
    if found is None:
        raise DictionaryFormatError(f"{source} holds no single .pt file; give its path.")
    path, fields = source.at(found[0]), found[1]
    spelling = _SPELLINGS[1 if "encoder_linear.weight" in fields else 0]
    encoder, b_enc, decoder, b_dec = named(path, fields, *_names(*spelling))
    d_sae, d_in = width(path, "the encoder", encoder)
    own = {"encoder": encoder, "decoder": decoder.mT, "b_enc": b_enc, "b_dec": b_dec}
    coder = assembled(
        path, lambda: SparseAutoencoder(d_in, d_sae, {"name": "relu"}, centered=False), own
    )
    layer = re.search(r"(?:^|[-_.])l(\d+)(?:[-_.]|$)", path.name)
    coder.origin = origin("linear_layers", site=f"layers.{layer[1]}" if layer else None)
    return coder


FAMILY = Family(
    "linear_layers", "one .pt file of encoder.* and decoder.* alone", _recognizes, _read
)
