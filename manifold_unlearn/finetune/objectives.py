"""Objectives by the names that tables and the command line use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from manifold_unlearn.finetune.ascent import WGA, GradDiff, GradientAscent, SatImp
from manifold_unlearn.finetune.disentangle import Disentangled
from manifold_unlearn.finetune.distillation import CEU, UNDIAL
from manifold_unlearn.finetune.preference import DPO, NPO, SimNPO
from manifold_unlearn.finetune.remain import SFRon
from manifold_unlearn.finetune.representation import RMU, AdaptiveRMU, CircuitBreaker
from manifold_unlearn.finetune.rules import Objective


def _disentangled(*, gamma: float = 1.0, alpha: float = 1.0, **settings: Any) -> Disentangled:
    return Disentangled(GradDiff(gamma=gamma, alpha=alpha), **settings)


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "ga": GradientAscent,
    "graddiff": GradDiff,
    "npo": NPO,
    "simnpo": SimNPO,
    "idkdpo": DPO,
    "altpo": partial(DPO, preferred="perturbed"),
    "rmu": RMU,
    "adaptive-rmu": AdaptiveRMU,
    "circuit-breaker": CircuitBreaker,
    "undial": UNDIAL,
    "wga": WGA,
    "satimp": SatImp,
    "ceu": CEU,
    "sfr-on": SFRon,
    "disentangled": _disentangled,
}
"""What makes an objective of each name, with its published defaults."""


def objective(name: str, **settings: Any) -> Objective:
    """Objective of a name, published defaults replaced by ``settings``.

    Raises
    ------
    ValueError
        No such name, or no such setting; names those there are.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)}.")
    make = OBJECTIVES[name]
    try:
        return make(**settings)
    except TypeError as error:
        known = [f.name for f in fields(make())]  # type: ignore[arg-type]
        raise ValueError(f"{name}: {error}. Its settings are {', '.join(known)}.") from error
