"""dictionary_learning: ``ae.pt`` and ``config.json``, its checkpoints and its backups."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.formats.assembly import (
    assembled,
    named,
    number,
    origin,
    scaled,
    whole_number,
    width,
)
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.files import plain
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.source import Family, Source, Which

_PLAIN = {"bias", "encoder.weight", "encoder.bias", "decoder.weight"}
_NEW = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_RANKED = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"}
_GATED = {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"}
_JUMP = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
_NESTED = {"W_enc", "b_enc", "W_dec", "b_dec", "group_sizes"}
_FAMILIES = (_PLAIN, _RANKED, _GATED, _JUMP, _NESTED)
_CHECKPOINT = re.compile(r"ae_\d+\.pt")


def _weights(source: Source, which: Which) -> tuple[Path, dict[str, Any]] | None:
    """Path and fields of the checkpoint that was asked for."""
    if "step" in which:
        inner = source.directory / "checkpoints"
        inner = inner if inner.is_dir() else source.directory
        path = inner / f"ae_{which['step']}.pt"
        value = Source(path).torch(path.name)
        return (path, dict(value)) if isinstance(value, dict) else None
    found = source.checkpoint()
    return found and (source.at(found[0]), found[1])


def _recognizes(source: Source) -> bool:
    found = source.checkpoint()
    if found is None:
        return source.beside("config.json") and "trainer" in source.json("config.json")
    name, fields = found
    if isinstance(fields.get("ae"), dict):
        return True
    keys = {key for key, value in fields.items() if isinstance(value, Tensor)}
    if any(fields[key].ndim == 3 for key in keys):
        return False
    if keys >= _NEW and "bias" not in keys:
        return "dict_class" in _config(source.at(name))
    return any(keys >= family for family in _FAMILIES)


def _config(path: Path) -> dict[str, Any]:
    for directory in (path.parent, path.parent.parent):
        if (directory / "config.json").is_file():
            said = Source(directory / "config.json").json("config.json")
            trainer = said.get("trainer")
            return trainer if isinstance(trainer, dict) else said
        if not _CHECKPOINT.fullmatch(path.name):
            break
    return {}


def _read(source: Source, which: Which) -> SparseAutoencoder:
    found = _weights(source, which)
    if found is None:
        raise DictionaryFormatError(f"{source} holds no checkpoint ae.pt; give its directory.")
    path, fields = found
    config, factor = _config(path), None
    if isinstance(fields.get("ae"), dict):  # a backup of a training that goes on
        inner = fields.get("config")
        config = {**config, **plain(inner if isinstance(inner, dict) else {})}
        factor = fields.get("norm_factor") or config.get("norm_factor")
        fields = fields["ae"]
    tensors = {k.replace("_orig_mod.", ""): v for k, v in fields.items() if isinstance(v, Tensor)}
    rule, own, centered = _taken(path, tensors, str(which.get("dict_class") or _kind(config)))
    if factor is not None:
        factor = number(path, "norm_factor", factor)
        own = {name: _unscaled(name, value, factor) for name, value in own.items()}
    d_sae, d_in = width(path, "the encoder", own["encoder"])
    coder = assembled(path, lambda: SparseAutoencoder(d_in, d_sae, rule, centered=centered), own)
    hook = config.get("submodule_name")
    if not hook and isinstance(config.get("layer"), int):
        hook = f"resid_post_layer_{config['layer']}"
    model = config.get("lm_name")
    site = site_of(str(hook), model) if hook else None
    coder.origin = origin("dictionary_learning", config, model=model, site=site)
    return coder


def _kind(config: dict[str, Any]) -> str:
    return str(config.get("dict_class") or config.get("trainer_class") or "")


def _unscaled(name: str, value: Tensor, factor: float) -> Tensor:
    """Biases and thresholds of rows as they are, from those of rows over the factor."""
    weights = name in ("encoder", "decoder") or name.endswith("log_gain")
    return value if weights or (value.ndim == 0 and value < 0) else scaled(value, factor)


def _taken(
    path: Path, tensors: dict[str, Tensor], kind: str
) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Nonlinearity, tensors by our names, and whether the input is centered."""
    keys = tensors.keys()
    if keys >= _GATED:
        encoder, decoder = named(path, tensors, "encoder.weight", "decoder.weight")
        return (
            {"name": "gated"},
            {
                "encoder": encoder,
                "decoder": decoder.mT,
                "b_enc": torch.zeros_like(tensors["gate_bias"]),
                "b_dec": tensors["decoder_bias"],
                "nonlinearity.gate_bias": tensors["gate_bias"],
                "nonlinearity.magnitude_bias": tensors["mag_bias"],
                "nonlinearity.log_gain": tensors["r_mag"],
            },
            True,
        )
    if "W_enc" in keys:
        encoder, b_enc, decoder, b_dec = named(path, tensors, "W_enc", "b_enc", "W_dec", "b_dec")
        own = {"encoder": encoder.mT, "decoder": decoder, "b_enc": b_enc, "b_dec": b_dec}
        (threshold,) = named(path, tensors, "threshold")
        if threshold.ndim:
            own["nonlinearity.threshold"] = threshold.clamp(min=0)
            return {"name": "jumprelu"}, own, False
        return _batch(path, tensors, own)
    encoder, b_enc, decoder = named(
        path, tensors, "encoder.weight", "encoder.bias", "decoder.weight"
    )
    own = {"encoder": encoder, "decoder": decoder.mT, "b_enc": b_enc}
    if "k" in keys:
        own["b_dec"] = named(path, tensors, "b_dec")[0]
        if "threshold" in keys and "BatchTopK" in kind:
            return _batch(path, tensors, own)
        if "TopK" not in kind and "threshold" in keys:
            raise DictionaryFormatError(
                f"{path} may be of AutoEncoderTopK or of BatchTopKSAE, and no config.json beside "
                "it says which; give dict_class= one of them."
            )
        return {"name": "topk", "k": whole_number(path, "k", tensors["k"])}, own, True
    name = "decoder.bias" if "decoder.bias" in keys and "bias" not in keys else "bias"
    own["b_dec"] = named(path, tensors, name)[0]
    return {"name": "relu"}, own, name == "bias"


def _batch(
    path: Path, tensors: dict[str, Tensor], own: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Of BatchTopK; a threshold below 0 is not yet set, and keeps all that is positive."""
    k = whole_number(path, "k", named(path, tensors, "k")[0])
    own["nonlinearity.threshold"] = tensors["threshold"].float().clamp(min=0)
    return {"name": "batch_topk", "k": k}, own, True


FAMILY = Family(
    "dictionary_learning", "ae.pt, config.json", _recognizes, _read, ("step", "dict_class")
)
