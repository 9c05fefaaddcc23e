"""How well forget and retain rows can be told apart, layer by layer."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from manifold_unlearn.erase.subspace import SubspaceEraser


def linear_separability(
    X: Tensor,
    is_forget: Tensor,
    groups: Tensor,
    wordings: Tensor | None = None,
    *,
    n_splits: int = 3,
    random_state: int = 0,
) -> float:
    """Cross-validated area under the ROC curve of a shrunk linear discriminant.

    The discriminant is the direction that LEACE would erase.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
    is_forget : bool Tensor of shape (n_samples,)
    groups : int Tensor of shape (n_samples,)
        Rows of one group (wordings of one fact) stay on one side of every split.
    wordings : int Tensor of shape (n_samples,), optional
        With it a probe is also tested only on wordings that it was not trained on: what it finds is
        then the topic and not the template.
    n_splits : int, default=3
    random_state : int, default=0

    Returns
    -------
    float
        In [0, 1]; 0.5 is chance. NaN where a class has fewer groups than splits.
    """
    labels, group = is_forget.numpy(), groups.numpy()
    wording = np.zeros(len(labels)) if wordings is None else wordings.numpy()
    if min(len(np.unique(group[labels])), len(np.unique(group[~labels]))) < n_splits:
        return float("nan")
    folds = StratifiedGroupKFold(n_splits, shuffle=True, random_state=random_state)
    areas = []
    for train, test in folds.split(labels, labels, group):
        for seen in np.unique(wording):
            fitted = train[wording[train] == seen]
            asked = test if wordings is None else test[wording[test] != seen]
            if len(np.unique(labels[fitted])) < 2 or len(np.unique(labels[asked])) < 2:
                continue
            probe = SubspaceEraser("leace").fit(X[fitted], labels[fitted])
            scores = X[asked].double() @ probe.map_.read[:, 0]
            areas.append(roc_auc_score(labels[asked], scores.numpy()))
    return float(np.mean(areas)) if areas else float("nan")


def separability_by_position(
    X: Tensor,
    from_end: Tensor,
    is_forget: Tensor,
    groups: Tensor,
    wordings: Tensor | None = None,
    *,
    n_positions: int = 4,
    n_splits: int = 3,
) -> list[float]:
    """:func:`linear_separability` of the rows at each position before the end of the prompt.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
    from_end : int Tensor of shape (n_samples,)
        0 is the last token of a prompt; rows with a negative value are left out.
    is_forget, groups, wordings
        As for :func:`linear_separability`.
    n_positions : int, default=4
    n_splits : int, default=3

    Returns
    -------
    list of float
        One value a position, the last token of the prompt first.
    """
    found = []
    for position in range(n_positions):
        at = from_end == position
        chosen = None if wordings is None else wordings[at]
        found.append(
            linear_separability(X[at], is_forget[at], groups[at], chosen, n_splits=n_splits)
        )
    return found
