"""Targets in diffusion coordinates: swap those that separate the classes, keep the others."""

from __future__ import annotations

import warnings

import torch
from scipy.stats import rankdata
from torch import Tensor

from manifold_unlearn.erase.aim import Aim
from manifold_unlearn.erase.targets import Targets
from manifold_unlearn.manifold.diffusion import DiffusionMap
from manifold_unlearn.manifold.lift import lift
from manifold_unlearn.manifold.neighbors import nearest_neighbors

_COMPONENTS = 16
_SEPARATING = 0.3  # of |2 AUC - 1|: coordinates that tell the classes apart


def diffusion_targets(landmarks: Tensor, aim: Aim, *, n_neighbors: int) -> Targets:
    """Landmarks with the diffusion coordinates that separate the classes taken from retain rows.

    Coordinates of landmarks and rows together in which one class ranks above the other are
    replaced by their mean over the rows chosen for a landmark, or over the rows nearest in the
    coordinates left; the coordinate that separates most is always one of them. The difference of
    the lifts (geometric harmonics) of new and old coordinates is added, so that what coordinates
    do not describe stays.

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # parts and clamped neighbors are legal here
        fitted = DiffusionMap(min(_COMPONENTS, n - 2), n_neighbors=min(64, n - 1)).fit(joint)
    old = fitted.embedding_.double()
    separating = _separation(old, m) >= _SEPARATING
    separating[_separation(old, m).argmax()] = True
    choice = aim.choice
    if choice is None:
        kept = old[:, ~separating] * fitted.eigenvalues_[~separating].abs()
        kept = joint if kept.shape[1] == 0 else kept
        choice = nearest_neighbors(kept[:m], min(n_neighbors, n - m), kept[m:]).indices
    new = old[:m].clone()
    new[:, separating] = old[m:, separating][choice].mean(1)
    queries = torch.cat([new, old[:m]])
    lifted = lift(old, joint, queries, n_neighbors=min(n_neighbors, n - 1)).values
    return Targets(landmarks.double() + lifted[:m] - lifted[m:], None)


def _separation(coordinates: Tensor, m: int) -> Tensor:
    """``|2 AUC - 1|`` (n_components,) of each coordinate, the first ``m`` rows against the rest."""
    n = len(coordinates)
    ranks = torch.from_numpy(rankdata(coordinates.cpu().numpy(), axis=0)).to(coordinates)
    auc = (ranks[:m].mean(0) - (m + 1) / 2) / (n - m)
    return (2 * auc - 1).abs()
