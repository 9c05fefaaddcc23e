"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 and of those before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coder import SparseCoder
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
from manifold_unlearn.dictionary.formats.seal import require_unchanged
from manifold_unlearn.dictionary.formats.source import Family, Source, Which
from manifold_unlearn.dictionary.transcoder import Transcoder

WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_BATCH = ("batchtopk", "matryoshka_batchtopk")
_SHAPES = ("standard", "gated", "topk", "abstopk", "jumprelu", *_BATCH)
_NORMALIZATIONS = {
    "none": "none",
    "expected_average_only_in": "none",  # folded into the weights, or stored beside them
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "unit_rms",
}
_REFUSED = {
    "matching_pursuit": "its code is found by iteration, not by an encoder",
    "temporal": "its code depends on the tokens before, through attention",
}


def _recognizes(source: Source) -> bool:
    return source.has(WEIGHTS) and "encoder.weight" not in source.safetensors_names(WEIGHTS)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of version 6, whatever version wrote them."""
    config = {_RENAMED.get(name, name): value for name, value in config.items()}
    metadata = config.get("metadata")
    config = {**(metadata if isinstance(metadata, dict) else {}), **config}
    config.setdefault("architecture", "standard")
    arguments = config.get("activation_fn_kwargs") or {}
    if config.get("activation_fn") == "topk" and arguments.get("k") is not None:
        config["architecture"], config["k"] = "topk", arguments["k"]
    normalize = config.get("normalize_activations")
    if not isinstance(normalize, str):
        config["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    return config


def _read(source: Source, _: Which) -> SparseCoder:
    path = source.at(WEIGHTS)
    require_unchanged(source, WEIGHTS, CONFIG)
    said = source.json(CONFIG)
    if not said:
        raise DictionaryFormatError(f"{source.at(CONFIG)} is missing; fetch it with the weights.")
    config, tensors = _settings(said), source.safetensors(WEIGHTS)
    architecture = config["architecture"]
    if architecture in _REFUSED:
        raise DictionaryFormatError(
            f"{source} is of the architecture {architecture}: {_REFUSED[architecture]}. It cannot "
            "be expressed here; use SAELens."
        )
    transcodes = architecture in _TRANSCODERS
    shape = _TRANSCODERS.get(architecture, architecture)
    normalization = _NORMALIZATIONS.get(config["normalize_activations"])
    if normalization is None and config["normalize_activations"] == "covariance_whitening":
        normalization = "none"
    _require_known(source, config, shape, normalization, transcodes)
    d_in, d_sae = width(path, "W_enc", named(path, tensors, "W_enc")[0])
    d_out = width(path, "W_dec", named(path, tensors, "W_dec")[0])[1]
    nonlinearity, learned = _nonlinearity(path, shape, config, tensors)
    own = {"encoder": tensors["W_enc"].mT, "decoder": _decoder(path, tensors), **learned}
    own["b_dec"] = named(path, tensors, "b_dec")[0]
    own["b_enc"] = torch.zeros_like(own["encoder"][:, 0])
    if shape != "gated":
        own["b_enc"] = named(path, tensors, "b_enc")[0]
    skip = "skip" in architecture
    if skip:
        own["W_skip"] = named(path, tensors, "W_skip")[0].mT
    ranked = bool(config.get("rescale_acts_by_decoder_norm")) and "topk" in shape

    def make() -> SparseCoder:
        if transcodes:
            return Transcoder(d_in, d_sae, d_out, nonlinearity, skip=skip)
        return SparseAutoencoder(
            d_in,
            d_sae,
            nonlinearity,
            centered=bool(config.get("apply_b_dec_to_input", True)),
            normalization=normalization,  # type: ignore[arg-type]
            rank_by_norm=ranked,
        )

    coder = _unscaled(source, config, assembled(path, make, own))
    coder.origin = _origin(said, config, transcodes)
    return coder


def _require_known(
    source: Source, config: dict[str, Any], shape: str, normalization: str | None, transcodes: bool
) -> None:
    if shape not in _SHAPES:
        raise DictionaryFormatError(
            f"{source} is of the architecture {config['architecture']!r}, which is not one of "
            f"{', '.join((*_SHAPES, *_TRANSCODERS))}."
        )
    known = config.get("activation_fn") in (None, "relu", "topk")
    if not known:
        raise DictionaryFormatError(
            f"{source} has the activation {config['activation_fn']!r}; relu and topk are read."
        )
    if normalization is None or (transcodes and normalization != "none"):
        raise DictionaryFormatError(
            f"{source} has normalize_activations={config['normalize_activations']!r}, which "
            f"cannot be expressed here for {config['architecture']}."
        )


def _nonlinearity(
    path: Path, shape: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if shape in ("topk", "abstopk"):
        name = "topk" if shape == "topk" else "abs_topk"
        return {"name": name, "k": whole_number(path, "k", config.get("k"))}, {}
    if shape in _BATCH:
        k = max(1, round(number(path, "k", config.get("k"))))
        threshold = named(path, tensors, "topk_threshold")[0]
        return {"name": "batch_topk", "k": k}, {"nonlinearity.threshold": threshold}
    if shape == "jumprelu":
        if "log_threshold" in tensors:
            threshold = tensors["log_threshold"].exp()
        else:
            (threshold,) = named(path, tensors, "threshold")
        threshold = threshold.clamp(min=0)  # below 0 they keep relu(pre), not pre
        rule: dict[str, Any] = {"name": "jumprelu"}
        if config.get("jumprelu_bandwidth") is not None:  # of its training
            rule["bandwidth"] = number(path, "jumprelu_bandwidth", config["jumprelu_bandwidth"])
        return rule, {"nonlinearity.threshold": threshold}
    if shape == "gated":
        gate, magnitude, gain = named(path, tensors, "b_gate", "b_mag", "r_mag")
        return {"name": "gated"}, {
            "nonlinearity.gate_bias": gate,
            "nonlinearity.magnitude_bias": magnitude,
            "nonlinearity.log_gain": gain,
        }
    return {"name": "relu"}, {}


def _decoder(path: Path, tensors: dict[str, Tensor]) -> Tensor:
    """The decoder, with the factor that a fine-tuning after the training gave to each latent."""
    (decoder,) = named(path, tensors, "W_dec")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = tensors.get(name)
        if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
            return scaled(decoder, factor[:, None])
    return decoder


def _unscaled(source: Source, config: dict[str, Any], coder: SparseCoder) -> SparseCoder:
    """The coder of unscaled rows, where a checkpoint of a training keeps its scale beside it."""
    kept = source.json("activation_scaler.json")
    if config["normalize_activations"] == "covariance_whitening" or kept.get("has_whitening"):
        return _unwhitened(source, coder)
    factor = kept.get("scaling_factor")
    if config["normalize_activations"] != "expected_average_only_in":
        return coder
    if factor is not None:
        return coder.fold_scale(number(source.at("activation_scaler.json"), "factor", factor))
    warnings.warn(
        f"{source} says normalize_activations='expected_average_only_in' without the factor: it "
        "reads rows scaled to a mean norm of sqrt(d_in). Scale them, or call "
        "fold_scale(sqrt(d_in) / mean norm).",
        stacklevel=2,
    )
    return coder


@torch.no_grad()
def _unwhitened(source: Source, coder: SparseCoder) -> SparseCoder:
    name = "activation_whitening.safetensors"
    path = source.at(name)
    if not source.beside(name):
        raise DictionaryFormatError(f"{path} is missing: the weights read whitened rows.")
    mean, matrix, back = named(path, source.safetensors(name), "mean", "matrix", "inverse_matrix")
    d = (coder.d_in, coder.d_in)
    if mean.shape != d[:1] or matrix.shape != d or back.shape != d or coder.rank_by_norm:
        raise DictionaryFormatError(
            f"{path} has shapes {tuple(mean.shape)}, {tuple(matrix.shape)}; {d[0]} features are "
            "whitened here, and no rule of rank by the decoder's norm survives it."
        )
    wide, dtype = torch.float64, coder.dtype
    encoder = coder.encoder.to(wide) @ matrix.to(wide).mT
    if not coder.centered:
        coder.b_enc.sub_((encoder @ mean.to(wide)).to(dtype))
    coder.encoder.copy_(encoder.to(dtype))
    coder.decoder.copy_((coder.decoder.to(wide) @ back.to(wide)).to(dtype))
    coder.b_dec.copy_((coder.b_dec.to(wide) @ back.to(wide) + mean.to(wide)).to(dtype))
    return coder


def _origin(said: dict[str, Any], config: dict[str, Any], transcodes: bool) -> dict[str, Any]:
    model, hook = config.get("model_name"), config.get("hook_name")
    site = site_of(str(hook), model) if hook else None
    if not transcodes:
        return origin("saelens", said, model=model, site=site)
    out = config.get("hook_name_out")
    site_out = site_of(str(out), model) if out else None
    return origin("saelens", said, model=model, site_in=site, site_out=site_out)


FAMILY = Family("saelens", f"{CONFIG}, {WEIGHTS}", _recognizes, _read)
