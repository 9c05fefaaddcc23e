"""See and edit what a language model knows as geometry."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from manifold_unlearn.intervene.hooks import intervene  # eager: it shares its package's name

if TYPE_CHECKING:
    from manifold_unlearn import evaluate, report, testbed
    from manifold_unlearn.activations.capture import Activations, capture, recording
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.erase.subspace import SubspaceEraser
    from manifold_unlearn.intervene.bake import bake, is_bakeable
    from manifold_unlearn.intervene.edit import Edit
    from manifold_unlearn.manifold.diffusion import DiffusionMap
    from manifold_unlearn.pipeline import unlearn

__version__ = "0.1.0"

_HOME = {
    "Activations": "activations.capture",
    "DiffusionMap": "manifold.diffusion",
    "Edit": "intervene.edit",
    "SubspaceEraser": "erase.subspace",
    "bake": "intervene.bake",
    "capture": "activations.capture",
    "is_bakeable": "intervene.bake",
    "load_model": "activations.models",
    "recording": "activations.capture",
    "unlearn": "pipeline",
}
_ROOMS = ("evaluate", "report", "testbed")

__all__ = [
    "Activations",
    "DiffusionMap",
    "Edit",
    "SubspaceEraser",
    "bake",
    "capture",
    "evaluate",
    "intervene",
    "is_bakeable",
    "load_model",
    "recording",
    "report",
    "testbed",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
