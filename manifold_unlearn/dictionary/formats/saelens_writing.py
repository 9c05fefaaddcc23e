"""Dictionaries as SAELens 6 writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.formats.hooks import hook_of
from manifold_unlearn.dictionary.formats.saelens import CONFIG, WEIGHTS
from manifold_unlearn.dictionary.formats.source import Coder
from manifold_unlearn.dictionary.formats.writing import (
    refused,
    require_simple,
    write_directory,
)
from manifold_unlearn.dictionary.nonlinearity import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    TopK,
)
from manifold_unlearn.dictionary.transcoder import Transcoder

_NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "unit_rms": "constant_norm_rescale",
}
_ABOUT = (
    "model_name",
    "hook_name",
    "hook_name_out",
    "hf_hook_name",
    "hf_hook_name_out",
    "hook_head_index",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
)
_OWN = "save it with format='own'"


def write_saelens(coder: Coder, path: str | Path) -> None:
    """Write ``cfg.json`` and ``sae_weights.safetensors``; see ``save``."""
    coder = require_simple(coder, "saelens")
    transcodes = isinstance(coder, Transcoder) or coder.W_skip is not None
    shape, tensors = _shape(coder)
    config: dict[str, Any] = {
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "dtype": str(coder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": coder.centered,
        "normalize_activations": _NORMALIZATIONS[coder.normalization],
        "reshape_activations": _said(coder).get("reshape_activations", "none"),
        "metadata": _metadata(coder),
        "architecture": shape,
    }
    if isinstance(coder.nonlinearity, TopK):
        config |= {"k": coder.nonlinearity.k, "rescale_acts_by_decoder_norm": coder.rank_by_norm}
    if transcodes:
        config |= {"d_out": coder.d_out, "architecture": _transcoder(coder, shape)}
    tensors |= {"W_enc": coder.W_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip.mT
    write_directory(path, WEIGHTS, tensors, CONFIG, config)


def _shape(coder: SparseCoder) -> tuple[str, dict[str, Tensor]]:
    rule = coder.nonlinearity
    if isinstance(rule, Gated):
        if coder.b_enc.any():
            raise refused(
                "saelens",
                "a gated dictionary with an encoder bias beside those of gate and magnitude",
                "call dictionary.formats.fold_encoder_bias(coder) first, which changes no code",
            )
        return "gated", {
            "b_gate": rule.gate_bias,
            "b_mag": rule.magnitude_bias,
            "r_mag": rule.log_gain,
        }
    tensors: dict[str, Tensor] = {"b_enc": coder.b_enc}
    if isinstance(rule, JumpReLU):
        if (rule.threshold < 0).any():
            raise refused("saelens", "thresholds below 0, where it keeps relu(pre)", _OWN)
        return "jumprelu", {**tensors, "threshold": rule.threshold}
    if isinstance(rule, BatchTopK):
        return "jumprelu", {**tensors, "threshold": _threshold(coder, rule)}
    for kind, name in ((AbsTopK, "abstopk"), (TopK, "topk"), (ReLU, "standard")):
        if isinstance(rule, kind):
            return name, tensors
    raise refused("saelens", f"the nonlinearity {rule.name}", _OWN)


def _threshold(coder: SparseCoder, rule: BatchTopK) -> Tensor:
    """The learned threshold of every latent, in the units of its own activation."""
    threshold = rule.threshold.clamp(min=0).expand(coder.d_sae)
    norm = coder.ranking()
    if norm is None:
        return threshold
    never = torch.finfo(coder.dtype).max
    return torch.where(norm > 0, threshold / norm, never).clamp(max=never)


def _transcoder(coder: SparseCoder, shape: str) -> str:
    if shape not in ("standard", "jumprelu"):
        raise refused("saelens", f"a transcoder with {coder.nonlinearity.name}", _OWN)
    if coder.normalization != "none" or coder.centered:
        raise refused("saelens", "a transcoder with a normalization or a centered input", _OWN)
    first = "" if shape == "standard" else "jumprelu_"
    return f"{first}{'' if coder.W_skip is None else 'skip_'}transcoder"


def _said(coder: SparseCoder) -> dict[str, Any]:
    """What SAELens had said about it, where it came from there."""
    if coder.origin.get("format") != "saelens":
        return {}
    said = dict(coder.origin.get("config") or {})
    return {**said, **(said.get("metadata") or {})}


def _metadata(coder: SparseCoder) -> dict[str, Any]:
    said, where = _said(coder), coder.origin
    found = {name: said[name] for name in _ABOUT if said.get(name) is not None}
    if not found:
        hooks = {"hook_name": ("site", "site_in"), "hook_name_out": ("site_out",)}
        for name, keys in hooks.items():
            site = next((where[key] for key in keys if isinstance(where.get(key), str)), None)
            if site is not None:
                found[name] = hook_of(site)
        if where.get("model"):
            found["model_name"] = where["model"]
    if isinstance(coder.nonlinearity, BatchTopK):
        found |= {"training_architecture": "batchtopk", "training_k": coder.nonlinearity.k}
    if isinstance(coder.nonlinearity, JumpReLU):
        found["jumprelu_bandwidth"] = coder.nonlinearity.bandwidth
    return {"sae_lens_version": "6.0.0", **found}


@torch.no_grad()
def fold_encoder_bias(coder: SparseCoder) -> SparseCoder:
    """Move the encoder's bias of a gated dictionary into its gate and magnitude, in place.

    The two say the same twice; formats with gates know only the latter.

    Raises
    ------
    ValueError
        The dictionary is not gated.
    """
    rule = coder.nonlinearity
    if not isinstance(rule, Gated):
        raise ValueError(f"nonlinearity {rule.name!r} has no gate to fold the encoder's bias into.")
    rule.gate_bias.add_(coder.b_enc)
    rule.magnitude_bias.add_(coder.b_enc * rule.log_gain.exp())
    coder.b_enc.zero_()
    return coder
