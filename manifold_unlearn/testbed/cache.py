"""Trained models on disk: found by what they were trained on, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manifold_unlearn.activations.models import load_model
from manifold_unlearn.artifact import digest, replacing, write_json
from manifold_unlearn.testbed.training import Recipe

VERSION = 2
"""Of the training code; another version trains anew."""

_MANIFEST = "testbed.json"


def cache_directory() -> Path:
    """Return where trained models are kept.

    ``$MANIFOLD_UNLEARN_CACHE``, else ``manifold-unlearn`` under ``$XDG_CACHE_HOME`` or
    ``~/.cache``.
    """
    if own := os.environ.get("MANIFOLD_UNLEARN_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "manifold-unlearn"


def key(
    recipe: Recipe,
    tokenizer: Any,
    texts: Sequence[str],
    slots: np.ndarray,
    random_state: int,
    device: torch.device,
) -> str:
    """Hexadecimal digest of all that decides the weights: texts, order, recipe, seed, code."""
    said = json.dumps(
        [
            VERSION,
            asdict(recipe),
            random_state,
            device.type,
            tokenizer.backend_tokenizer.to_str(),
            list(texts),
            list(slots.shape),
        ]
    )
    made = hashlib.sha256(said.encode())
    made.update(np.ascontiguousarray(slots, dtype="<i8").tobytes())
    return made.hexdigest()[:32]


def trained(
    make: Callable[[], tuple[Any, dict[str, Any]]],
    tokenizer: Any,
    name: str,
    device: torch.device,
) -> tuple[Any, dict[str, Any]]:
    """Model of this name from the cache, or made and put there.

    Parameters
    ----------
    make : callable
        Returns the model and what JSON shall hold of its training.
    tokenizer : transformers.PreTrainedTokenizerFast
        Saved beside the model, so that the directory is a model of its own.
    name : str
        Of the directory, with the :func:`key`.
    device : torch.device
        Where a model from the cache goes.

    Warns
    -----
    UserWarning
        If what is there is damaged; it is made anew.
    """
    directory = cache_directory() / "testbed" / name
    if directory.is_dir():
        try:
            return _read(directory, device)
        except (ValueError, OSError, KeyError, TypeError) as error:
            warnings.warn(
                f"the cached model in {directory} is damaged ({error}); it is trained again.",
                stacklevel=2,
            )
    model, record = make()
    with replacing(directory) as staged:
        staged.mkdir()
        write_model(model, tokenizer, staged)
        files = {path.name: digest(path) for path in sorted(staged.iterdir())}
        write_json(staged / _MANIFEST, {"version": VERSION, "sha256": files, "training": record})
    return model, record


def write_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write model and tokenizer as ``from_pretrained`` reads them."""
    from transformers.utils import logging

    silence = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one file, written at once
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    finally:
        if silence:
            logging.enable_progress_bar()


def _read(directory: Path, device: torch.device) -> tuple[Any, dict[str, Any]]:
    manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    files, record = manifest["sha256"], manifest["training"]
    for file, expected in files.items():
        if digest(directory / file) != expected:
            raise ValueError(f"{file} does not match its sha256")
    return load_model(directory.resolve(), device=device)[0], record
