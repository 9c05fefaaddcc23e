"""Estimators whose fit is a map of hidden states."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn.arrays import restore, validate


class MappedMixin:
    """An estimator as a site map: what it fitted, ``map_``, is what is applied.

    Attributes
    ----------
    map_ : AffineMap or DenseAffineMap
        Frozen, small, without the estimator.
    """

    map_: Any

    def transform(self, X: Any) -> Any:
        """Mapped rows, in the kind, dtype and device of ``X`` (n_samples, n_features)."""
        check_is_fitted(self)
        return restore(self.map_(validate(self, X, reset=False)), X)

    def __call__(self, h: Tensor) -> Tensor:
        """Map hidden states ``(..., n_features)``; what :func:`intervene` calls."""
        check_is_fitted(self)
        found: Tensor = self.map_(h)
        return found

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """Return the fitted map, ready for hidden states of this device and dtype."""
        check_is_fitted(self)
        return self.map_.to(device, dtype)

    def linear(self) -> Any:
        """Return the fitted map without its bias."""
        check_is_fitted(self)
        return self.map_.linear()
