"""Targets in diffusion coordinates: swap those that separate the classes, keep the others."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from manifold_unlearn.erase.aim import Aim, semantic_choice
from manifold_unlearn.erase.targets import Targets
from manifold_unlearn.manifold.diffusion import DiffusionMap
from manifold_unlearn.manifold.lift import lift
from manifold_unlearn.manifold.neighbors import nearest_neighbors

_COMPONENTS = 16
_SEPARATING = 0.5  # of the 2 that unrelated rows differ by in the square: it goes with the label
_ACROSS = 2.0  # exponent of the kernel across the gap between classes that no edge joins


def diffusion_targets(landmarks: Tensor, aim: Aim, *, n_neighbors: int) -> Targets:
    """Landmarks with the diffusion coordinates that separate the classes taken from retain rows.

    Coordinates of landmarks and rows together separate where landmarks and their semantic
    neighbors (:func:`semantic_choice`) differ, on average by more than a fourth of what unrelated
    rows do; the one that differs most always does. They are replaced by their mean over the rows
    chosen for a landmark, or over the rows nearest in the coordinates left. The difference of the
    lifts (geometric harmonics) of new and old coordinates is added, so that what coordinates do
    not describe stays.

    Parameters
    ----------
    landmarks : Tensor of shape (n_landmarks, n_features)
    aim : Aim
    n_neighbors : int
        Rows that a mean is taken over.

    Raises
    ------
    ValueError
        Fewer than 6 landmarks and rows together.
    """
    joint = torch.cat([landmarks.double(), aim.rows.double()])
    n, m = len(joint), len(landmarks)
    if n < 6:
        raise ValueError(
            f"mode='diffusion' needs at least 6 distinct rows of both classes together; got {n}. "
            "Add data, or use mode='transport'."
        )
    old, eigenvalues = _coordinates(joint, m)
    alike = aim.choice
    if alike is None:
        alike = semantic_choice(joint[:m], joint[m:], n_neighbors)
    apart = (old[:m] - old[m:][alike].mean(1)).square().mean(0)
    separating = apart >= _SEPARATING
    separating[apart.argmax()] = True
    choice = aim.choice
    if choice is None:
        kept = joint if bool(separating.all()) else (old * eigenvalues.abs())[:, ~separating]
        choice = nearest_neighbors(kept[:m], min(n_neighbors, n - m), kept[m:]).indices
    new = old[:m].clone()
    new[:, separating] = old[m:, separating][choice].mean(1)
    queries = torch.cat([new, old[:m]])
    lifted = lift(old, joint, queries, n_neighbors=min(n_neighbors, n - 1)).values
    return Targets(landmarks.double() + lifted[:m] - lifted[m:], None)


def _coordinates(joint: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Diffusion coordinates (n, n_components) and their eigenvalues; the first m rows are forget.

    Where the graph falls apart the kernel is made as wide as the gap between the classes.
    """
    n = len(joint)
    k, wide = min(_COMPONENTS, n - 2), min(64, n - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # parts and clamped neighbors are legal here
        fitted = DiffusionMap(k, n_neighbors=wide).fit(joint)
        if fitted.n_components_connected_ > 1:
            gap = nearest_neighbors(joint[:m], 1, joint[m:]).squared_distances.median()
            bandwidth = max(fitted.bandwidth_, float(gap) / (4 * _ACROSS))
            fitted = DiffusionMap(k, n_neighbors=wide, bandwidth=bandwidth).fit(joint)
    return fitted.embedding_.double(), fitted.eigenvalues_.double()
