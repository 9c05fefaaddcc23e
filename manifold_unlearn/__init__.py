"""See and edit what a language model knows as geometry."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from manifold_unlearn.intervene.hooks import intervene  # eager: it shares its package's name

if TYPE_CHECKING:
    from manifold_unlearn import (
        attack,
        comparison,
        dictionary,
        evaluate,
        finetune,
        manifold,
        phenomenology,
        report,
        steer,
        testbed,
    )
    from manifold_unlearn.activations.capture import Activations, capture, recording
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.comparison.align import align_manifolds
    from manifold_unlearn.comparison.compare import compare_manifolds
    from manifold_unlearn.erase.compose import ComposedEraser
    from manifold_unlearn.erase.gate import ForgetGate
    from manifold_unlearn.erase.manifold import ManifoldEraser
    from manifold_unlearn.erase.subspace import SubspaceEraser
    from manifold_unlearn.intervene.bake import bake, is_bakeable
    from manifold_unlearn.intervene.edit import Edit
    from manifold_unlearn.intervene.hooked_bake import LeastSquares
    from manifold_unlearn.manifold.diffusion import DiffusionMap
    from manifold_unlearn.manifold.dimension import intrinsic_dimension
    from manifold_unlearn.manifold.geodesic import GeodesicMap
    from manifold_unlearn.manifold.tangent import TangentBundle
    from manifold_unlearn.manifold.validity import check_manifold
    from manifold_unlearn.pipeline import unlearn

__version__ = "0.1.0"

_HOME = {
    "Activations": "activations.capture",
    "ComposedEraser": "erase.compose",
    "DiffusionMap": "manifold.diffusion",
    "Edit": "intervene.edit",
    "ForgetGate": "erase.gate",
    "GeodesicMap": "manifold.geodesic",
    "LeastSquares": "intervene.hooked_bake",
    "ManifoldEraser": "erase.manifold",
    "SubspaceEraser": "erase.subspace",
    "TangentBundle": "manifold.tangent",
    "align_manifolds": "comparison.align",
    "bake": "intervene.bake",
    "capture": "activations.capture",
    "check_manifold": "manifold.validity",
    "compare_manifolds": "comparison.compare",
    "intrinsic_dimension": "manifold.dimension",
    "is_bakeable": "intervene.bake",
    "load_model": "activations.models",
    "recording": "activations.capture",
    "unlearn": "pipeline",
}
_ROOMS = (
    "attack",
    "comparison",
    "dictionary",
    "evaluate",
    "finetune",
    "manifold",
    "phenomenology",
    "report",
    "steer",
    "testbed",
)

__all__ = [
    "Activations",
    "ComposedEraser",
    "DiffusionMap",
    "Edit",
    "ForgetGate",
    "GeodesicMap",
    "LeastSquares",
    "ManifoldEraser",
    "SubspaceEraser",
    "TangentBundle",
    "align_manifolds",
    "attack",
    "bake",
    "capture",
    "check_manifold",
    "compare_manifolds",
    "comparison",
    "dictionary",
    "evaluate",
    "finetune",
    "intervene",
    "intrinsic_dimension",
    "is_bakeable",
    "load_model",
    "manifold",
    "phenomenology",
    "recording",
    "report",
    "steer",
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
