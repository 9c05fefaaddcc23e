"""Linear erasure that moves rows only within the span of chosen decoder directions."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import LabeledMixin, forget_mask, restore, validate
from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.coding import checked_latents
from manifold_unlearn.dictionary.feature_eraser import FeatureEraser
from manifold_unlearn.intervene.mapped import MappedMixin
from manifold_unlearn.intervene.maps import AffineMap

SpanMethod: TypeAlias = Literal["leace", "contrastive", "all"]

_DEPENDENT = 1e-6
"""Singular values of unit decoder rows below this share of the largest count as 0."""


class DecoderSpanEraser(LabeledMixin, MappedMixin, TransformerMixin, BaseEstimator):
    """Affine erasure whose every move lies in the span of a few decoder rows.

    With an orthonormal basis ``V`` of the span, ``z = V'h``, retain mean ``m`` and covariance ``S``
    of ``z``, the map is ``h -> h - V S A (A' S A)^-1 (A'z - A'm)``. Afterwards ``A'z`` is the same
    for every row, and retain rows are uncorrelated, within the span, with what ``A`` read of them
    (but for the shrinkage of ``S``); no affine map that moves rows within the span alone and has
    the latter property moves them less in mean square. What is orthogonal to the span stays as it
    is. Being affine it bakes.

    Parameters
    ----------
    coder : SparseAutoencoder
    n_latents, min_forget_rate, max_retain_rate
        Which latents span; see :class:`FeatureEraser`.
    method : {"leace", "contrastive", "all"}, default="leace"
        ``A``: ``S^-1`` times the difference of the class means, one direction, after which no
        linear read-out of ``z`` tells the classes apart better than a constant; the directions of
        largest forget second moment about ``m`` in units of ``S``; or all of the span, so that
        ``z = m`` for every row.
    rank : int, default=1
        Directions of ``"contrastive"``.
    shrinkage : float in [0, 1], default=0.01
        Weight of the identity (times the mean variance) in ``S``.
    latents : sequence of int, optional
        Span by these instead of choosing.

    Attributes
    ----------
    latents_ : array of shape (m,), int
    matrix_ : array of shape (n_features, n_features)
    bias_ : array of shape (n_features,)
    map_ : AffineMap
    n_features_in_ : int

    References
    ----------
    Belrose et al. (2023), LEACE: Perfect linear concept erasure in closed form.
    """

    def __init__(
        self,
        coder: SparseAutoencoder,
        n_latents: int = 16,
        *,
        min_forget_rate: float = 0.05,
        max_retain_rate: float = 0.01,
        method: SpanMethod = "leace",
        rank: int = 1,
        shrinkage: float = 0.01,
        latents: Any = None,
    ):
        self.coder = coder
        self.n_latents = n_latents
        self.min_forget_rate = min_forget_rate
        self.max_retain_rate = max_retain_rate
        self.method = method
        self.rank = rank
        self.shrinkage = shrinkage
        self.latents = latents

    def fit(self, X: Any, y: Any = None) -> Self:
        """Choose the span and erase within it.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks forget, everything else retain.

        Raises
        ------
        ValueError
            As :meth:`FeatureEraser.fit`; a rank above the dimension of the span; retain rows that
            do not vary in it; class means that are equal there, for ``"leace"``.
        """
        if self.method not in get_args(SpanMethod):
            raise ValueError(f"method={self.method!r} is not one of {get_args(SpanMethod)}.")
        if not isinstance(self.rank, Integral) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be an integer of at least 1.")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage} must lie in [0, 1].")
        rows = validate(self, X, reset=True, min_samples=2)
        forget = forget_mask(y, len(rows)).to(rows.device)
        latents = self._latents(rows, forget)
        basis = span_basis(self.coder.decoder.detach()[latents]).to(rows.device)
        inside = rows.double() @ basis
        center = inside[~forget].mean(0)
        spread = self._spread(inside[~forget] - center, center)
        read = self._directions(inside[forget] - center, spread)
        moved = spread @ read
        write = torch.linalg.solve(read.T @ moved, moved.T).T
        self._keep(latents, AffineMap(basis @ read, basis @ write, center @ read), X)
        return self

    def _latents(self, rows: Tensor, forget: Tensor) -> Tensor:
        if self.latents is not None:
            return checked_latents(self.latents, self.coder.d_sae).to(self.coder.device)
        chosen = FeatureEraser(
            self.coder,
            self.n_latents,
            min_forget_rate=self.min_forget_rate,
            max_retain_rate=self.max_retain_rate,
        )
        return torch.as_tensor(chosen.fit(rows, forget.long()).latents_)

    def _spread(self, centered: Tensor, center: Tensor) -> Tensor:
        covariance = centered.T @ centered / len(centered)
        k = len(covariance)
        scale = covariance.trace() / k
        if float(scale) <= 1e-20 * float(center.square().sum()) or float(scale) == 0:
            raise ValueError(
                "retain rows do not vary in the span of the decoder rows; give more retain rows."
            )
        identity = torch.eye(k, dtype=covariance.dtype, device=covariance.device)
        # a floor keeps a direction without retain variance solvable
        weight = max(self.shrinkage, 1e-9)
        return (1 - weight) * covariance + weight * scale * identity

    def _directions(self, centered: Tensor, spread: Tensor) -> Tensor:
        """Reading directions (k, r) in the coordinates of the span, of forget rows about ``m``."""
        k = len(spread)
        if self.method == "all":
            return torch.eye(k, dtype=spread.dtype, device=spread.device)
        if self.method == "leace":
            difference = centered.mean(0)
            if float(difference.norm()) <= 1e-10 * float(spread.trace().sqrt()):
                raise ValueError(
                    "forget and retain means are equal within the span; use method='contrastive'."
                )
            return torch.linalg.solve(spread, difference)[:, None]
        if self.rank > k:
            raise ValueError(f"rank={self.rank} is above the dimension {k} of the span; lower it.")
        moment = centered.T @ centered / len(centered)
        root = torch.linalg.cholesky(spread)
        half = torch.linalg.solve_triangular(root, moment, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
        _, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
        leading = vectors[:, -self.rank :].flip(1)
        leading = leading * leading.gather(0, leading.abs().argmax(0)[None]).sign()
        return torch.linalg.solve_triangular(root.T, leading, upper=True)

    def _keep(self, latents: Tensor, fitted: AffineMap, like: Any) -> None:
        self.map_ = fitted
        self.latents_ = restore(latents, like)
        self.matrix_ = restore(fitted.matrix_, like)
        self.bias_ = restore(fitted.bias_, like)

    def save(self, directory: str | Path) -> None:
        """Write parameters, dictionary and map to a directory that :meth:`load` reads."""
        check_is_fitted(self)
        directory = Path(directory)
        params = {name: v for name, v in self.get_params(deep=False).items() if name != "coder"}
        given = None if self.latents is None else torch.as_tensor(self.latents_).tolist()
        params["latents"] = given
        config = {
            "params": params,
            "numpy": not isinstance(self.bias_, Tensor),
            "dtype": str(torch.as_tensor(self.bias_).dtype).removeprefix("torch."),
        }
        m = self.map_
        tensors = {"read": m.read, "write": m.write, "offset": m.offset}
        tensors["latents"] = torch.as_tensor(self.latents_)
        artifact.refuse_foreign(directory)
        with artifact.replacing(directory) as staged:
            artifact.save(staged, "DecoderSpanEraser", tensors, config)
            self.coder.save(staged / "coder")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="DecoderSpanEraser")
        coder = SparseAutoencoder.load(Path(directory) / "coder")
        eraser = cls(coder, **config["params"])
        like = torch.empty(0, dtype=getattr(torch, config["dtype"]))
        latents = tensors.pop("latents")
        eraser._keep(latents, AffineMap(**tensors), like.numpy() if config["numpy"] else like)
        eraser.n_features_in_ = coder.d_in
        return eraser


def span_basis(directions: Tensor) -> Tensor:
    """Orthonormal basis (d, k), float64, of the span of rows (m, d).

    Raises
    ------
    ValueError
        All rows are zero.
    """
    wide = directions.double()
    length = wide.norm(dim=1, keepdim=True)
    if not bool((length > 0).any()):
        raise ValueError("all chosen decoder rows are zero; they span nothing.")
    _, sizes, axes = torch.linalg.svd(wide[length[:, 0] > 0] / length[length > 0][:, None], False)
    return axes[sizes > _DEPENDENT * sizes[0]].T.contiguous()
