"""OpenAI's sparse autoencoders: one ``.pt`` whose ``activation`` is a word."""

from __future__ import annotations

from collections.abc import Mapping

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import Normalization
from manifold_unlearn.dictionary.formats.assembly import (
    assembled,
    named,
    origin,
    whole_number,
    width,
)
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.source import Family, Source, Which


def _recognizes(source: Source) -> bool:
    found = source.checkpoint()
    return found is not None and {"pre_bias", "latent_bias"} <= found[1].keys()


def _read(source: Source, _: Which) -> SparseAutoencoder:
    found = source.checkpoint()
    if found is None:
        raise DictionaryFormatError(f"{source} holds no single .pt file; give its path.")
    path, fields = source.at(found[0]), found[1]
    encoder, decoder, b_enc, b_dec = named(
        path, fields, "encoder.weight", "decoder.weight", "latent_bias", "pre_bias"
    )
    d_sae, d_in = width(path, "encoder.weight", encoder)
    activation = fields.get("activation", "ReLU")
    state = fields.get("activation_state_dict")
    state = dict(state) if isinstance(state, Mapping) else {}
    rule: dict[str, object] = {"name": "relu"}
    normalization: Normalization = "none"
    if activation == "TopK":
        if (after := state.get("postact_fn", "ReLU")) != "ReLU":
            raise DictionaryFormatError(f"{path}: TopK followed by {after!r}; ReLU is read.")
        rule = {"name": "topk", "k": whole_number(path, "k", state.get("k"))}
        normalization = "layer_norm"
    elif activation != "ReLU":
        raise DictionaryFormatError(f"{path}: activation={activation!r}; TopK and ReLU are read.")
    own = {"encoder": encoder, "decoder": decoder.mT, "b_enc": b_enc, "b_dec": b_dec}
    coder = assembled(
        path,
        lambda: SparseAutoencoder(d_in, d_sae, rule, centered=True, normalization=normalization),
        own,
    )
    coder.origin = origin("openai", {"activation": activation, "activation_state_dict": state})
    return coder


FAMILY = Family("openai", "one .pt file with pre_bias and latent_bias", _recognizes, _read)
