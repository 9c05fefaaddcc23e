"""Distances between distributions, exact where they are equal and where they share no outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, working_dtype

Distance: TypeAlias = Literal["hellinger", "bhattacharyya", "angle"]

SUM_TOLERANCE = 1e-3
"""Most that the probabilities of a distribution may fail 1 by."""


def hellinger(p: Array, q: Array) -> Array:
    """Hellinger distance of distributions, ``|sqrt(p) - sqrt(q)| / sqrt(2)``, in [0, 1].

    Exactly 0 for equal distributions and 1 for such as share no outcome.

    Parameters
    ----------
    p, q : array or Tensor of shape (..., n_outcomes)
        Probabilities; they broadcast. Half precision is widened to float32.

    Returns
    -------
    array or Tensor of shape (...), float32 or float64
        Of the kind and on the device of ``p``.

    Raises
    ------
    ValueError
        Other numbers of outcomes, a negative or non-finite entry, or a sum that is not 1 to 1e-3.
    """
    return _between(p, q, "hellinger")


def bhattacharyya(p: Array, q: Array) -> Array:
    """Bhattacharyya distance ``-log sum sqrt(p q)``; infinite for such as share no outcome.

    Parameters, returns and errors as :func:`hellinger`; exactly 0 for equal distributions.
    """
    return _between(p, q, "bhattacharyya")


def bhattacharyya_angle(p: Array, q: Array) -> Array:
    """Angle between square-root probabilities, ``arccos sum sqrt(p q)``, in [0, pi / 2].

    The length of the shortest way from one to the other through distributions: half of their
    Fisher-Rao distance. Parameters, returns and errors as :func:`hellinger`.
    """
    return _between(p, q, "angle")


def distance_of_chord(chord: np.ndarray, distance: Distance) -> np.ndarray:
    """Distance of distributions whose square roots are ``chord`` apart.

    Raises
    ------
    ValueError
        An unknown distance.
    """
    if distance not in _FROM_CHORD:
        raise ValueError(
            f"distance={distance!r} is not one of {', '.join(map(repr, _FROM_CHORD))}."
        )
    return _FROM_CHORD[distance](chord, np.maximum(1 - chord**2 / 2, 0))


def _of_affinity(chord: np.ndarray, affinity: np.ndarray) -> np.ndarray:
    """``-log affinity``, by the chord where the affinity is near 1."""
    with np.errstate(divide="ignore"):
        near = np.log1p(-(np.minimum(chord, 1) ** 2) / 2)
        return -np.where(chord < 1, near, np.log(affinity))


_FROM_CHORD: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "hellinger": lambda chord, _: np.minimum(chord / np.sqrt(2), 1),
    "bhattacharyya": _of_affinity,
    "angle": lambda chord, _: np.minimum(2 * np.arcsin(np.minimum(chord / 2, 1)), np.pi / 2),
}
"""From the distance of two points of the unit sphere, and their product, to a distance."""

_DISJOINT = {"hellinger": 1.0, "bhattacharyya": np.inf, "angle": np.pi / 2}


def _between(p: Array, q: Array, distance: Distance) -> Array:
    a, b = square_roots(p, "p"), square_roots(q, "q")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"p has {a.shape[-1]} outcomes, q has {b.shape[-1]}; give the same.")
    try:
        np.broadcast_shapes(a.shape, b.shape)
    except ValueError as error:
        raise ValueError(
            f"p has shape {a.shape}, q {b.shape}; give as many distributions, or one, or axes "
            "that broadcast."
        ) from error
    chord = np.sqrt(np.square(a - b).sum(-1))
    affinity = (a * b).sum(-1)
    found = np.where(affinity == 0, _DISJOINT[distance], _FROM_CHORD[distance](chord, affinity))
    found = found.astype(np.result_type(a, b))
    return torch.as_tensor(found, device=p.device) if isinstance(p, Tensor) else found


def probabilities(values: Any, name: str) -> np.ndarray:
    """Float32 or float64 array ``(..., n_outcomes)`` of finite numbers that are not negative.

    Raises
    ------
    ValueError
        No outcomes, or an entry that is negative or not finite.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(working_dtype(values.dtype)).numpy()
    array = np.asarray(values)
    array = array.astype(np.float32 if array.dtype in (np.float16, np.float32) else np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (..., n_outcomes).")
    wrong = ~np.isfinite(array) | (array < 0)
    if wrong.any():
        raise ValueError(
            f"{name} holds {array[wrong][0]} at {np.argwhere(wrong)[0].tolist()}; probabilities "
            "are finite and not negative."
        )
    return array


def square_roots(values: Any, name: str) -> np.ndarray:
    """Square roots of distributions ``(..., n_outcomes)``, checked.

    Raises
    ------
    ValueError
        As :func:`probabilities`, or a sum that is not 1.
    """
    array = probabilities(values, name)
    sums = array.sum(-1)
    wrong = np.abs(sums - 1) > SUM_TOLERANCE
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} sums to {sums[tuple(at)]:.4g} at {at.tolist()}; distributions sum to 1. Add "
            "the probability of all other outcomes as one more."
        )
    return np.sqrt(array)
