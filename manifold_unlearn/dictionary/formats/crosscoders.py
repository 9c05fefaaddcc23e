"""Crosscoders of two models: ``cfg.json`` and ``cc_weights.pt``, and crosscoder_learning's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.dictionary.crosscoder import SHARED, Crosscoder
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
from manifold_unlearn.dictionary.formats.hooks import site_of
from manifold_unlearn.dictionary.formats.source import Family, Source, Which

_HUB = "model.safetensors"
_NORMS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
_LEARNED = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def _recognizes(source: Source) -> bool:
    found = source.checkpoint()
    weights = None if found is None else found[1].get("W_enc")
    return isinstance(weights, Tensor) and weights.ndim == 3


def _read(source: Source, which: Which) -> Crosscoder:
    found = source.checkpoint()
    if found is None:
        raise DictionaryFormatError(f"{source} holds no single .pt file; give its path.")
    path, tensors, config = source.at(found[0]), found[1], source.json("cfg.json")
    encoder, decoder, b_enc, b_dec = named(path, tensors, "W_enc", "W_dec", "b_enc", "b_dec")
    n, d, d_sae = width(path, "W_enc", encoder, 3)
    width(path, "W_dec", decoder, 3)
    scale = _scale(path, which.get("scale"), n)
    if scale is not None:
        encoder = scaled(encoder, scale[:, None, None])
        decoder, b_dec = scaled(decoder, 1 / scale[:, None]), scaled(b_dec, 1 / scale[:, None])
    own = {
        "encoder": encoder.flatten(0, 1).mT,
        "decoder": decoder.flatten(1),
        "b_enc": b_enc,
        "b_dec": b_dec.flatten(),
        "owner": torch.full((d_sae,), SHARED),
    }
    coder = assembled(path, lambda: Crosscoder(n, d, d_sae, {"name": "relu"}), own)
    hook, model = config.get("hook_point"), config.get("model_name")
    site = site_of(str(hook), model) if hook else None
    said = {**config, "scale": None if scale is None else scale.tolist()}
    coder.origin = origin("crosscoder", said, model=model, site=site)
    return coder


def _scale(path: Path, given: Any, n: int) -> Tensor | None:
    """Factor of each stream, so that its mean norm is ``sqrt(d)``; the file does not hold it."""
    if given is None:
        warnings.warn(
            f"{path} reads each stream scaled to a mean norm of sqrt(d), by factors that it does "
            "not hold. Scale the rows, or give scale= one factor a stream.",
            stacklevel=2,
        )
        return None
    if not isinstance(given, Sequence) or len(given) != n:
        raise ValueError(f"scale={given!r} needs one factor for each of {n} streams.")
    return torch.tensor([number(path, "scale", value) for value in given])


def _tensors(source: Source) -> tuple[Path, dict[str, Any]] | None:
    if source.has(_HUB):
        path, fields = source.at(_HUB), source.safetensors(_HUB)
    elif (found := source.checkpoint()) is not None:
        path, fields = source.at(found[0]), found[1]
    else:
        return None
    return path, {name.replace("_orig_mod.", ""): value for name, value in fields.items()}


def _recognizes_learned(source: Source) -> bool:
    if source.has(_HUB):
        names = source.safetensors_names(_HUB)
        return {name.replace("_orig_mod.", "") for name in names} >= set(_LEARNED)
    found = _tensors(source)
    if found is None or not found[1].keys() >= set(_LEARNED):
        return False
    return getattr(found[1]["encoder.weight"], "ndim", 0) == 3


def _read_learned(source: Source, _: Which) -> Crosscoder:
    found = _tensors(source)
    if found is None:
        raise DictionaryFormatError(f"{source} holds neither {_HUB} nor a single .pt file.")
    (path, tensors), config = found, source.json("config.json")
    _require_unnormalized(path, tensors)
    encoder, b_enc, decoder, b_dec = named(path, tensors, *_LEARNED)
    n, d, d_sae = width(path, "encoder.weight", encoder, 3)
    if len(width(path, "decoder.weight", decoder, 3)) == 3 and len(decoder) != n:
        raise DictionaryFormatError(
            f"{path} reads {n} layers and writes {len(decoder)}; a Crosscoder writes what it reads."
        )
    rule, learned, ranked = _rule(path, tensors, config)
    own = {
        "encoder": encoder.flatten(0, 1).mT,
        "decoder": decoder.transpose(0, 1).flatten(1),
        "b_enc": b_enc,
        "b_dec": b_dec.flatten(),
        "owner": torch.full((d_sae,), SHARED),
    }
    coder = assembled(
        path, lambda: Crosscoder(n, d, d_sae, rule, rank_by_norm=ranked), {**own, **learned}
    )
    coder.origin = origin("crosscoder_learning", config)
    return coder


def _require_unnormalized(path: Path, tensors: Mapping[str, Any]) -> None:
    idle = {"activation_mean": 0, "activation_std": 1, "activation_global_scale": 1}
    for name, value in tensors.items():
        for word, still in idle.items():
            if name.split(".")[-1] == word and isinstance(value, Tensor) and (value != still).any():
                raise DictionaryFormatError(
                    f"{path} normalizes its input by {name}, which is not read; fold it into the "
                    "weights first."
                )


def _rule(
    path: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Nonlinearity, its tensors, and whether it ranks by the sum of the decoder's norms."""
    kind = _normalization(path, tensors, config)
    if "k" not in tensors or "threshold" not in tensors:
        return {"name": "relu"}, {}, kind == "CROSSCODER"
    threshold, decoder = tensors["threshold"], tensors["decoder.weight"]
    if kind == "DECOUPLED" or threshold.numel() != 1:
        raise DictionaryFormatError(
            f"{path} is DECOUPLED: each layer has a code of its own, which a Crosscoder has not."
        )
    unset = bool(threshold.flatten()[0] < 0)
    if unset:
        warnings.warn(
            f"{path} has no threshold yet: until one is learned, all that is positive fires.",
            stacklevel=2,
        )
    least = threshold.flatten()[0].float().clamp(min=0)
    k = whole_number(path, "k", tensors["k"])
    if kind in ("CROSSCODER", "NONE") or unset:
        rule = {"name": "batch_topk", "k": k}
        return rule, {"nonlinearity.threshold": least}, kind == "CROSSCODER"
    norm = _norm(path, decoder, kind, config).clamp(min=torch.finfo(torch.float32).tiny)
    jump = (least / norm).clamp(max=torch.finfo(torch.float32).max)
    return {"name": "jumprelu"}, {"nonlinearity.threshold": jump}, False


def _normalization(path: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if isinstance(at := tensors.get("code_normalization_id"), Tensor):
        at = whole_number(path, "code_normalization_id", at)
        return _NORMS[at - 1] if at <= len(_NORMS) else str(at)
    return str(config.get("code_normalization", _NORMS[0])).split(".")[-1].upper()


def _norm(path: Path, decoder: Tensor, kind: str, config: Mapping[str, Any]) -> Tensor:
    """What the activations are multiplied by where they are compared, (d_sae,)."""
    joint = decoder.float().transpose(0, 1).flatten(1).norm(dim=1)
    if kind == "SAE":
        return joint
    if kind != "MIXED":
        raise DictionaryFormatError(f"{path}: code normalization {kind} is not one of {_NORMS}.")
    each = decoder.float().norm(dim=2).sum(0)
    alpha = config.get("code_normalization_alpha_sae", 1.0)
    return joint * alpha + each * config.get("code_normalization_alpha_cc", 0.1)


FAMILY = Family("crosscoder", "cfg.json, cc_weights.pt", _recognizes, _read, ("scale",))
LEARNED = Family(
    "crosscoder_learning", f"config.json, {_HUB}; or one .pt", _recognizes_learned, _read_learned
)
