"""transcoder_circuits: one ``.pt`` of weights and a pickled configuration, which stays inert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.formats.assembly import assembled, named, origin, width
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.files import plain
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.inert import Made
from manifold_unlearn.dictionary.formats.source import Family, Source, Which
from manifold_unlearn.dictionary.transcoder import Transcoder


def _recognizes(source: Source) -> bool:
    found = source.checkpoint()
    return found is not None and {"cfg", "state_dict"} <= found[1].keys()


def _read(source: Source, _: Which) -> SparseCoder:
    found = source.checkpoint()
    if found is None or not isinstance(found[1].get("state_dict"), Mapping):
        raise DictionaryFormatError(f"{source} holds no single .pt file of weights; give its path.")
    path, tensors = source.at(found[0]), dict(found[1]["state_dict"])
    said = found[1].get("cfg")
    config: dict[str, Any] = plain(said) if isinstance(said, Made | Mapping) else {}
    encoder, decoder, b_enc, b_dec = named(path, tensors, "W_enc", "W_dec", "b_enc", "b_dec")
    d_in, d_sae = width(path, "W_enc", encoder)
    d_out = width(path, "W_dec", decoder)[1]
    own = {"encoder": encoder.mT, "decoder": decoder, "b_enc": b_enc, "b_dec": b_dec}
    transcodes = "b_dec_out" in tensors
    if transcodes:
        own |= {"b_in": b_dec, "b_dec": named(path, tensors, "b_dec_out")[0]}

    def make() -> SparseCoder:
        if transcodes:
            return Transcoder(d_in, d_sae, d_out, {"name": "relu"})
        return SparseAutoencoder(d_in, d_sae, {"name": "relu"}, centered=True)

    coder = assembled(path, make, own)
    hooks = {"site_in": "hook_point", "site_out": "out_hook_point"}
    if not transcodes:
        hooks = {"site": "hook_point"}
    model = config.get("model_name")
    where = {
        name: site_of(config[hook], model)
        for name, hook in hooks.items()
        if isinstance(config.get(hook), str)
    }
    coder.origin = origin("transcoder_circuits", config, model=model, **where)
    return coder


FAMILY = Family("transcoder_circuits", "one .pt file of cfg and state_dict", _recognizes, _read)
