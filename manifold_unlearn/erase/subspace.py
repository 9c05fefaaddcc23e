"""Linear erasure: remove what a few directions read of the forget set, at least cost to retain."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import (
    LabeledMixin,
    as_rows,
    forget_mask,
    restore,
    row_weights,
    validate,
)
from manifold_unlearn.erase.moments import Moments, oas_shrinkage, shrink
from manifold_unlearn.intervene.mapped import MappedMixin
from manifold_unlearn.intervene.maps import AffineMap

FIXED_TOLERANCE = 1e-2
"""Directions of fixed rows with a smaller share of the largest singular value are not held."""

Method = Literal["mean_difference", "pca", "contrastive", "leace"]


class SubspaceEraser(LabeledMixin, MappedMixin, TransformerMixin, BaseEstimator):
    """Projection that makes chosen directions read the same of every row.

    With reading directions ``A``, retain mean ``mu`` and retain covariance ``S`` the map is
    ``h -> h - S A (A' S A)^+ A' (h - mu)``. After it ``A'h = A'mu`` for every row, and retain rows
    are uncorrelated with what ``A`` read of them; no affine map with the latter property moves
    them less in mean square. The methods differ in ``A``:

    ``"mean_difference"``
        Difference of the class means. One direction.
    ``"pca"``
        Leading eigenvectors of the forget rows' second moment about the retain mean.
    ``"contrastive"``
        Directions where the forget rows' second moment about the retain mean is largest in units
        of the retain covariance (generalized eigenvectors).
    ``"leace"``
        ``S^-1`` times the difference of the class means: afterwards the means coincide, so no
        linear classifier tells the classes apart better than a constant. One direction. With
        ``protect_retain=False``, ``S`` is the covariance of all rows, as LEACE is published.

    Parameters
    ----------
    method : {"mean_difference", "pca", "contrastive", "leace"}, default="contrastive"
    rank : int, default=1
        Number of directions. An error above what the method and the data have.
    protect_retain : bool, default=True
        Move rows along ``S A``, which disturbs the retain rows least. Without it rows move along
        ``A`` (orthogonal projection): shorter moves, more harm to what is retained.
    affine : bool, default=True
        Keep the retain mean by a bias. Without it the map is linear: ``A`` is made orthogonal to
        the retain mean instead (for ``"leace"`` the bias is dropped), so that weights of
        architectures without biases can hold it.
    shrinkage : "oas" or float in [0, 1], default="oas"
        Weight of the identity in ``S``. Too little overfits where rows are fewer than features;
        too much forgets which directions the retain rows use.

    Attributes
    ----------
    matrix_ : array of shape (n_features, n_features)
    bias_ : array of shape (n_features,)
        The map is ``h -> matrix_ @ h + bias_``.
    directions_ : array of shape (n_features, rank)
        ``A``, columns of unit length.
    contrast_ : array of shape (rank,)
        Forget second moment over retain variance along each direction.
    map_ : AffineMap
        The same map as frozen low-rank factors.
    shrinkage_ : float
    n_features_in_ : int

    References
    ----------
    Belrose et al. (2023), LEACE: Perfect linear concept erasure in closed form.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(400, 8)), np.repeat([0, 1], 200)
    >>> X[y == 1, 0] += 3
    >>> erased = SubspaceEraser("leace").fit(X, y).transform(X)
    >>> bool(abs(erased[y == 1].mean(0) - erased[y == 0].mean(0)).max() < 1e-2)
    True
    """

    def __init__(
        self,
        method: Method = "contrastive",
        rank: int = 1,
        *,
        protect_retain: bool = True,
        affine: bool = True,
        shrinkage: float | Literal["oas"] = "oas",
    ):
        self.method = method
        self.rank = rank
        self.protect_retain = protect_retain
        self.affine = affine
        self.shrinkage = shrinkage

    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, *, fixed: Any = None
    ) -> SubspaceEraser:
        """Fit on rows of both classes.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks forget, everything else retain.
        sample_weight : array or Tensor of shape (n_samples,), optional
            How much each row counts; a retain row of weight 2 is protected as if it stood twice.
        fixed : array or Tensor of shape (n_fixed, n_features), optional
            Rows that the map must leave where they are (attention sinks): ``A`` is kept
            orthogonal to their leading directions, those with a singular value above 1 % of the
            largest. They do not enter the moments. No rows are as good as None.

        Returns
        -------
        SubspaceEraser

        Raises
        ------
        ValueError
            A side is empty, data is not finite, an unknown method, a rank above the data's, or
            equal means where the method reads their difference.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2)
        forget = forget_mask(y, rows.shape[0]).to(rows.device)
        weight = row_weights(sample_weight, rows, forget)
        forget_moments = Moments.of(rows[forget], weight[forget])
        retain_moments = Moments.of(rows[~forget], weight[~forget])
        if fixed is not None and len(fixed) == 0:
            fixed = None
        if fixed is not None:
            fixed = as_rows(fixed, device=rows.device, name="fixed").to(torch.float64)
            if fixed.shape[1] != rows.shape[1]:
                raise ValueError(f"fixed has {fixed.shape[1]} features; X has {rows.shape[1]}.")
        self._fit_moments(forget_moments, retain_moments, fixed, like=X)
        return self

    def _fit_moments(
        self, forget: Moments, retain: Moments, fixed: Tensor | None, like: Any
    ) -> None:
        whole = retain.merge(forget) if self._reads_all_rows else retain
        weight = (
            oas_shrinkage(whole.covariance, whole.count)
            if self.shrinkage == "oas"
            else float(self.shrinkage)
        )
        spread = shrink(whole.covariance, weight)
        center = whole.mean
        free = self._free_subspace(center, fixed)
        read = self._directions(forget, retain, spread, center, free)
        read = read / torch.linalg.vector_norm(read, dim=0)
        moved = spread @ read if self._moves_along_spread else read
        write = torch.linalg.solve(read.T @ moved, moved.T).T
        offset = read.T @ center if self.affine else torch.zeros_like(read[0])
        self.shrinkage_ = weight
        self._set_map(AffineMap(read.contiguous(), write.contiguous(), offset), like)
        retain_variance = (read * (spread @ read)).sum(0)
        self.contrast_ = restore(
            (read * (forget.about(center) @ read)).sum(0) / retain_variance, like
        )

    def _set_map(self, fitted: AffineMap, like: Any) -> None:
        """Set the map and the attributes that follow from it, in the kind of ``like``."""
        self.map_ = fitted
        self.directions_ = restore(fitted.read, like)
        self.matrix_ = restore(fitted.matrix_, like)
        self.bias_ = restore(fitted.bias_, like)

    @property
    def _reads_all_rows(self) -> bool:
        return self.method == "leace" and not self.protect_retain

    @property
    def _moves_along_spread(self) -> bool:
        return self.protect_retain or self.method == "leace"

    def _free_subspace(self, center: Tensor, fixed: Tensor | None) -> Tensor | None:
        """Orthonormal basis ``(d, k)`` of the directions that may be read; None for all."""
        d = center.shape[0]
        bound = []
        if not self.affine and self.method != "leace" and bool(center.any()):
            bound.append(center[None] / torch.linalg.vector_norm(center))
        if fixed is not None and len(fixed):
            held = fixed - center if self.affine else fixed
            _, sizes, axes = torch.linalg.svd(held, full_matrices=False)
            bound.append(axes[sizes > FIXED_TOLERANCE * sizes[0]])
        if not bound:
            return None
        _, sizes, axes = torch.linalg.svd(torch.cat(bound), full_matrices=True)
        n_bound = int((sizes > 1e-6).sum())  # unit rows: the mean may lie among the fixed axes
        if n_bound >= d:
            raise ValueError(
                f"{n_bound} fixed directions leave nothing of {d} features to read; "
                "give fewer fixed rows."
            )
        return axes[n_bound:].T

    def _directions(
        self, forget: Moments, retain: Moments, spread: Tensor, center: Tensor, free: Tensor | None
    ) -> Tensor:
        """Reading directions ``(d, rank)``, strongest first."""
        if free is not None:
            spread = free.T @ spread @ free
        if self.method in ("mean_difference", "leace"):
            difference = forget.mean - retain.mean
            reduced = self._mean_direction(
                difference if free is None else free.T @ difference, spread
            )
            return reduced if free is None else free @ reduced
        moment = forget.about(center)
        if free is not None:
            moment = free.T @ moment @ free
        metric = spread
        if self.method == "pca":
            metric = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        values = torch.linalg.eigvalsh(moment)
        n_directions = int((values > 1e-10 * values[-1].clamp(min=1e-300)).sum())
        self._require_rank(n_directions)
        root = torch.linalg.cholesky(metric)
        half = torch.linalg.solve_triangular(root, moment, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
        _, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
        leading = vectors[:, -self.rank :].flip(1)
        leading = leading * leading.gather(0, leading.abs().argmax(0)[None]).sign()
        read = torch.linalg.solve_triangular(root.T, leading, upper=True)
        return read if free is None else free @ read

    def _mean_direction(self, difference: Tensor, spread: Tensor) -> Tensor:
        self._require_rank(1)
        scale = spread.diagonal().mean().sqrt()
        if torch.linalg.vector_norm(difference) <= 1e-10 * scale:
            raise ValueError(
                f"method={self.method!r} reads the difference of the forget and retain means, "
                "which is zero; use method='contrastive'."
            )
        if self.method == "leace":
            difference = torch.linalg.solve(spread, difference)
        return difference[:, None]

    def _require_rank(self, n_directions: int) -> None:
        if self.rank > n_directions:
            raise ValueError(
                f"rank={self.rank} is above the data's: method={self.method!r} finds "
                f"{n_directions} direction(s) in {self.n_features_in_} features. Lower rank, or "
                "add forget rows."
            )

    def _check_parameters(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is not one of {', '.join(get_args(Method))}.")
        if not isinstance(self.rank, Integral) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be an integer of at least 1.")
        if self.shrinkage != "oas" and not 0 <= float(self.shrinkage) <= 1:
            raise ValueError(f"shrinkage={self.shrinkage!r} must be 'oas' or lie in [0, 1].")

    def save(self, directory: str | Path) -> None:
        """Write parameters and fitted map to a directory that :meth:`load` reads."""
        check_is_fitted(self)
        m = self.map_
        config = {
            "params": self.get_params(),
            "shrinkage": self.shrinkage_,
            "dtype": str(torch.as_tensor(self.bias_).dtype).removeprefix("torch."),
            "numpy": not isinstance(self.bias_, Tensor),
        }
        tensors = {"read": m.read, "write": m.write, "offset": m.offset}
        tensors["contrast"] = torch.as_tensor(self.contrast_)
        artifact.save(directory, "SubspaceEraser", tensors, config)

    @classmethod
    def load(cls, directory: str | Path) -> SubspaceEraser:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="SubspaceEraser")
        eraser = cls(**config["params"])
        like = torch.empty(0, dtype=getattr(torch, config["dtype"]))
        kind = like.numpy() if config["numpy"] else like
        eraser._set_map(AffineMap(tensors["read"], tensors["write"], tensors["offset"]), kind)
        eraser.shrinkage_ = config["shrinkage"]
        eraser.contrast_ = restore(tensors["contrast"], kind)
        eraser.n_features_in_ = tensors["read"].shape[0]
        return eraser
