"""What every writer of a foreign format needs: refusals by name, and a directory at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.crosscoder import Crosscoder
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.seal import sealed
from manifold_unlearn.dictionary.formats.source import Coder


def refused(format: str, what: str, mend: str) -> DictionaryFormatError:  # noqa: A002
    """The error of a dictionary that a format cannot hold."""
    return DictionaryFormatError(f"the format {format} cannot hold {what}; {mend}.")


def require_simple(coder: Coder, format: str) -> SparseCoder:  # noqa: A002
    """A coder of one encoder and one decoder, without hidden layers or a shift of its own.

    Raises
    ------
    DictionaryFormatError
        It has what neither of the foreign formats has a word for.
    """
    mend = "save it with format='own'"
    if not isinstance(coder, SparseCoder) or isinstance(coder, Crosscoder):
        raise refused(format, f"a {type(coder).__name__}", mend)
    if coder.deep:
        raise refused(format, f"hidden layers (deep={coder.deep})", mend)
    if coder.b_in is not None:
        raise refused(format, "an input shift of its own (b_in)", mend)
    for name, value in coder.state_dict().items():
        if not value.isfinite().all():
            raise DictionaryFormatError(f"{name} holds values that are not finite; train again.")
    return coder


def write_directory(
    path: str | Path,
    weights: str,
    tensors: Mapping[str, Tensor],
    config_name: str,
    config: Mapping[str, Any],
) -> None:
    """Write a configuration and sealed weights as one directory, or nothing.

    Raises
    ------
    FileExistsError
        The directory holds other files than these two.
    """
    path = Path(path)
    names = {weights, config_name}
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - names):
        raise FileExistsError(
            f"{path} exists and holds more than {weights} and {config_name}; choose another "
            "directory or remove it."
        )
    with artifact.replacing(path) as staged:
        staged.mkdir()
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        (staged / config_name).write_text(text, encoding="utf-8")
        apart = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        save_file(apart, staged / weights, sealed(apart, staged / config_name))
