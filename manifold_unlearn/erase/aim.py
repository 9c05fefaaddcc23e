"""What forgotten rows are sent to: the rows that may be targets, and which belong to whom."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn.erase.subspace import SubspaceEraser
from manifold_unlearn.manifold.neighbors import nearest_neighbors

TargetKind: TypeAlias = Literal["retain", "reference", "semantic"]


class Aim(NamedTuple):
    """Rows that landmarks may be sent to.

    Attributes
    ----------
    rows : Tensor of shape (n_rows, n_features)
    choice : Tensor of shape (n_landmarks, k), int64, or None
        The rows that each landmark is to be sent to: its pair (k = 1) or its semantic neighbors.
        None leaves the choice to the mode.
    """

    rows: Tensor
    choice: Tensor | None

    @property
    def pairs(self) -> Tensor | None:
        """Rows (n_landmarks, n_features) where every landmark has one of its own, else None."""
        if self.choice is None or self.choice.shape[1] != 1:
            return None
        return self.rows[self.choice[:, 0]]


def label_free(rows: Tensor, forget: Tensor) -> Tensor:
    """Rows without what a linear read-out could tell of their label.

    Parameters
    ----------
    rows : Tensor of shape (n, n_features)
    forget : Tensor of shape (n,), bool

    Returns
    -------
    Tensor of shape (n, n_features), float64
        Both classes have one mean in them (:class:`SubspaceEraser` with ``method="leace"``).
    """
    rows = rows.double()
    gap = rows[forget].mean(0) - rows[~forget].mean(0)
    spread = (rows - rows.mean(0)).square().mean().sqrt()
    if float(gap.norm()) <= 1e-9 * float(spread):
        return rows
    return SubspaceEraser("leace", protect_retain=False).fit_transform(rows, forget.long())


def semantic_choice(landmarks: Tensor, retain: Tensor, n_neighbors: int) -> Tensor:
    """Indices (n_landmarks, k) of the retain rows nearest to each landmark but for its label.

    Parameters
    ----------
    landmarks : Tensor of shape (n_landmarks, n_features)
        Forget rows.
    retain : Tensor of shape (n_retain, n_features)
    n_neighbors : int
        So many of them, but at least two, for one has no barycenter.
    """
    forget = torch.arange(len(landmarks) + len(retain), device=retain.device) < len(landmarks)
    plain = label_free(torch.cat([landmarks, retain]), forget)
    k = min(max(n_neighbors, 2), len(retain))
    return nearest_neighbors(plain[forget], k, plain[~forget]).indices
