"""How well forget and retain rows can be told apart, layer by layer."""

from __future__ import annotations

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor


def linear_separability(
    X: Tensor, is_forget: Tensor, groups: Tensor, *, n_splits: int = 3, random_state: int = 0
) -> float:
    """Cross-validated area under the ROC curve of a shrunk linear discriminant.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
    is_forget : bool Tensor of shape (n_samples,)
    groups : int Tensor of shape (n_samples,)
        Rows of one group (wordings of one fact) stay on one side of every split.
    n_splits : int, default=3
    random_state : int, default=0

    Returns
    -------
    float
        In [0, 1]; 0.5 is chance. NaN where a class has fewer groups than splits.
    """
    rows, labels, group = X.double().numpy(), is_forget.numpy(), groups.numpy()
    if min(len(np.unique(group[labels])), len(np.unique(group[~labels]))) < n_splits:
        return float("nan")
    folds = StratifiedGroupKFold(n_splits, shuffle=True, random_state=random_state)
    areas = []
    for train, test in folds.split(rows, labels, group):
        probe = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        scores = probe.fit(rows[train], labels[train]).decision_function(rows[test])
        areas.append(roc_auc_score(labels[test], scores))
    return float(np.mean(areas))


def separability_by_position(
    X: Tensor,
    from_end: Tensor,
    is_forget: Tensor,
    groups: Tensor,
    *,
    n_positions: int = 4,
) -> list[float]:
    """:func:`linear_separability` of the rows at each position before the end of the prompt.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
    from_end : int Tensor of shape (n_samples,)
        0 is the last token of a prompt; rows with a negative value are left out.
    is_forget, groups
        As for :func:`linear_separability`.
    n_positions : int, default=4

    Returns
    -------
    list of float
        One value a position, the last token of the prompt first.
    """
    found = []
    for position in range(n_positions):
        at = from_end == position
        found.append(linear_separability(X[at], is_forget[at], groups[at]))
    return found
