"""A digest in files written here for other libraries, so that a changed bit is seen when read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.source import Source

_WEIGHTS = "manifold_unlearn.sha256"
_CONFIG = "manifold_unlearn.config_sha256"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Lower-case hexadecimal sha256 of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def sealed(tensors: Mapping[str, Tensor], config: Path) -> dict[str, str]:
    """Metadata of a safetensors file: the digests of its tensors and of a configuration."""
    return {"format": "pt", _WEIGHTS: digest(tensors), _CONFIG: artifact.digest(config)}


def require_unchanged(source: Source, weights: str, config: str) -> None:
    """Raise if a file that bears a digest is not what was written.

    Raises
    ------
    DictionaryFormatError
        A value of the weights, or a letter of the configuration, is another.
    """
    said = source.said(weights)
    if _WEIGHTS not in said and _CONFIG not in said:  # written by the other library
        return
    expected = {
        _WEIGHTS: digest(source.safetensors(weights)),
        _CONFIG: artifact.digest(source.at(config)) if source.beside(config) else "no file",
    }
    for name, found in expected.items():
        if said.get(name) != found:
            path = source.at(weights if name == _WEIGHTS else config)
            raise DictionaryFormatError(
                f"{path} is not what was written (sha256 {found[:12]}, its seal says "
                f"{str(said.get(name))[:12]}). Restore it; to keep a change, remove the metadata "
                f"from {weights}."
            )
