"""Steering vectors: directions read off contrasting rows, and added to what a model holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn.arrays import (
    LabeledMixin,
    as_rows,
    forget_mask,
    keep_kind,
    require_finite,
    restore,
    validate,
    working_dtype,
)
from manifold_unlearn.artifact import SavedMixin
from manifold_unlearn.steer.directions import mean_difference, principal_axis, probe_normal
from manifold_unlearn.steer.strengths import checked_strength

Method = Literal["mean_difference", "pca", "probe"]
Mode = Literal["add", "ablate"]

GIVEN = "given"
"""Method of a vector that was not fitted but handed over."""


class SteeringVector(LabeledMixin, SavedMixin, TransformerMixin, BaseEstimator):
    """Direction from rows without a concept to rows with it, as a map ``h -> h + strength * v``.

    The methods differ in the direction; the length of ``v`` is the distance of the class means
    whatever the method, so that strengths compare, and the sign is such that rows with the concept
    lie higher along ``v`` on average.

    ``"mean_difference"``
        Mean of the rows with the concept less mean of those without.
    ``"pca"``
        First principal axis of the differences of paired rows (``fit_pairs``) or of all pairs of
        a row with and a row without (``fit``).
    ``"probe"``
        Normal of a logistic regression: where the classes share one covariance ``S``, the
        direction ``S^-1 (mean difference)``, which tells them apart best.

    Parameters
    ----------
    method : {"mean_difference", "pca", "probe"}, default="mean_difference"
    strength : float, default=1.0
        How many times ``vector_`` is added; may be changed after the fit, and may be negative.
        With ``mode="ablate"`` the part of the direction that is taken away.
    mode : {"add", "ablate"}, default="add"
        ``"ablate"`` removes the direction instead, ``h - strength * (h . u) u`` with ``u`` the
        unit vector along ``vector_``.
    normalize : bool, default=False
        Give ``vector_`` length 1, as repeng does, instead of the distance of the class means.
    preserve_norm : bool, default=False
        Rescale every steered row to the length it had. The map is then not affine: it runs as a
        hook and does not bake.
    centered : bool, default=False
        Only for ``"pca"``: take the mean difference out before the axis is found. The axis is then
        along which pairs differ differently, which need not be the concept; repeng's ``pca_diff``
        is this, its ``pca_center`` is the default here.
    regularization : float, default=1.0
        Only for ``"probe"``: weight of the squared norm of the normal against the sum of the log
        losses, for rows scaled to unit mean variance.

    Attributes
    ----------
    vector_ : array of shape (n_features,)
        What strength 1 adds. float64 where the rows were, else float32.
    center_ : array of shape (n_features,)
        Midpoint of the class means, where :meth:`scores` is 0.
    matrix_ : array of shape (n_features, n_features)
    bias_ : array of shape (n_features,)
        The map is ``h -> matrix_ @ h + bias_`` at the strength of the moment; neither is there
        with ``preserve_norm``.
    n_features_in_ : int

    References
    ----------
    Marks and Tegmark (2023), The geometry of truth (mean difference).
    Zou et al. (2023), Representation engineering (principal axis of paired differences).
    Arditi et al. (2024), Refusal in language models is mediated by a single direction (ablation).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(400, 8)), np.repeat([0, 1], 200)
    >>> X[y == 1, 0] += 3
    >>> vector = SteeringVector(strength=2.0).fit(X, y)
    >>> int(abs(vector.vector_).argmax()), bool(vector.transform(X)[0, 0] > X[0, 0] + 5)
    (0, True)
    """

    def __init__(
        self,
        method: Method = "mean_difference",
        *,
        strength: float = 1.0,
        mode: Mode = "add",
        normalize: bool = False,
        preserve_norm: bool = False,
        centered: bool = False,
        regularization: float = 1.0,
    ):
        self.method = method
        self.strength = strength
        self.mode = mode
        self.normalize = normalize
        self.preserve_norm = preserve_norm
        self.centered = centered
        self.regularization = regularization

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit on rows of both classes.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks rows with the concept, everything else rows without.

        Raises
        ------
        ValueError
            A side is empty, data is not finite, an unknown method or mode, equal class means, or
            ``centered`` differences that are all alike.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2)
        concept = forget_mask(y, len(rows)).to(rows.device)
        self._fit(rows[concept], rows[~concept], paired=False, like=X)
        return self

    def fit_pairs(self, positive: Any, negative: Any) -> Self:
        """Fit on pairs: row ``i`` with the concept differs from row ``i`` without in nothing else.

        Parameters
        ----------
        positive, negative : array or Tensor of shape (n_pairs, n_features)

        Raises
        ------
        ValueError
            As :meth:`fit`, and for shapes that differ.
        """
        self._check_parameters()
        above = as_rows(positive, name="positive")
        below = as_rows(negative, device=above.device, name="negative")
        if above.shape != below.shape:
            raise ValueError(
                f"positive has shape {tuple(above.shape)} and negative {tuple(below.shape)}: pairs "
                "need one row of each. Use fit(X, y) for rows that are not paired."
            )
        self._fit(above, below.to(above.dtype), paired=True, like=positive)
        self.n_features_in_ = above.shape[1]
        return self

    def _fit(self, positive: Tensor, negative: Tensor, *, paired: bool, like: Any) -> None:
        above, below = positive.double(), negative.double()
        difference = mean_difference(above, below)
        length = torch.linalg.vector_norm(difference)
        axis = difference
        if self.method == "pca":
            axis = principal_axis(above, below, paired=paired, centered=self.centered)
        elif self.method == "probe":
            axis = probe_normal(above, below, self.regularization)
        axis = axis / torch.linalg.vector_norm(axis)
        along = float(axis @ difference)
        if abs(along) <= 1e-9 * float(length):  # at right angles: no side is the higher one
            along = float(axis[axis.abs().argmax()])
        vector = axis * (-1.0 if along < 0 else 1.0) * (1.0 if self.normalize else length)
        self.vector_ = vector.to(positive.dtype)
        self.center_ = ((above.mean(0) + below.mean(0)) / 2).to(positive.dtype)
        keep_kind(self, like)

    @classmethod
    def given(cls, vector: Any, *, strength: float = 1.0, **parameters: Any) -> Self:
        """Steering map of a vector that is known already, ready to use.

        Parameters
        ----------
        vector : array or Tensor of shape (n_features,)
        strength : float, default=1.0
        **parameters
            ``mode`` or ``preserve_norm``, as in the constructor.

        Raises
        ------
        ValueError
            Not one-dimensional, not finite, or zero.
        """
        made = cls(GIVEN, strength=strength, **parameters)  # type: ignore[arg-type]
        made._check_parameters((*get_args(Method), GIVEN))
        made.vector_ = checked_vector(vector)
        made.center_ = torch.zeros_like(made.vector_)
        made.n_features_in_ = len(made.vector_)
        keep_kind(made, vector)
        return made

    def _check_parameters(self, methods: tuple[str, ...] = get_args(Method)) -> None:
        for name, known in (("method", methods), ("mode", get_args(Mode))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}."
                )
        if not self.regularization > 0:
            raise ValueError(f"regularization={self.regularization!r} must be above 0.")

    @property
    def matrix_(self) -> Any:
        """(n_features, n_features) of the map ``h -> matrix_ @ h + bias_``."""
        vector = self._affine("matrix_")
        matrix = torch.eye(len(vector), dtype=vector.dtype, device=vector.device)
        if self.mode == "ablate":
            unit = vector / torch.linalg.vector_norm(vector)
            matrix -= checked_strength(self.strength) * torch.outer(unit, unit)
        return restore(matrix, self.vector_)

    @property
    def bias_(self) -> Any:
        """(n_features,) of the map ``h -> matrix_ @ h + bias_``."""
        vector = self._affine("bias_")
        added = checked_strength(self.strength) if self.mode == "add" else 0.0
        return restore(added * vector, self.vector_)

    def _affine(self, name: str) -> Tensor:
        check_is_fitted(self)
        if self.preserve_norm:
            raise AttributeError(f"a map that preserves norms is not affine: it has no {name}.")
        return torch.as_tensor(self.vector_)

    def scores(self, X: Any) -> Any:
        """How far each row (n_samples,) lies along the direction, in units of the data.

        ``(x - center_) . u``: 0 halfway between the class means, higher with the concept. Rank
        rows by it to detect the concept.
        """
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        vector, center = (torch.as_tensor(part).to(rows) for part in (self.vector_, self.center_))
        return restore((rows - center) @ (vector / torch.linalg.vector_norm(vector)), X)

    def transform(self, X: Any) -> Any:
        """Steered rows, in the kind, dtype and device of ``X`` (n_samples, n_features)."""
        check_is_fitted(self)
        return restore(self(validate(self, X, reset=False)), X)

    def __call__(self, h: Tensor) -> Tensor:
        """Steer hidden states ``(..., n_features)``; what :func:`intervene` calls."""
        return self.to(h.device, h.dtype)(h)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> VectorMap:
        """Return the map at its strength, ready for hidden states of this device and dtype."""
        check_is_fitted(self)
        vector = torch.as_tensor(self.vector_).to(device, working_dtype(dtype))
        return VectorMap(vector, checked_strength(self.strength), self.mode, self.preserve_norm)

    def linear(self) -> SteeringVector:
        """Return the map without its bias: one that adds nothing, or the ablation itself."""
        self._affine("linear part")
        if self.mode == "ablate":
            return self
        other = copy.copy(self)
        other.strength = 0.0
        return other


@dataclass(frozen=True, eq=False)
class VectorMap:
    """A steering vector at its strength, where and as precise as the rows need it.

    Half precision is steered in float32 and rounded once.
    """

    vector: Tensor
    """(d,)"""
    strength: float
    mode: Mode
    preserve_norm: bool

    def __call__(self, h: Tensor) -> Tensor:
        """Steered rows ``(..., d)``, in the dtype and on the device of ``h``."""
        wide = h.to(working_dtype(h.dtype))
        vector = self.vector.to(wide)
        if self.mode == "add":
            moved = wide + self.strength * vector
        else:
            unit = vector / torch.linalg.vector_norm(vector)
            moved = wide - self.strength * (wide @ unit)[..., None] * unit
        if self.preserve_norm:
            moved = at_norm_of(wide, moved)
        return moved.to(h.dtype)


def at_norm_of(rows: Tensor, moved: Tensor) -> Tensor:
    """``moved`` (..., d) rescaled to the lengths of ``rows``; rows moved to 0 stay there."""
    length, now = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (rows, moved))
    return moved * (length / torch.where(now > 0, now, 1.0))


def checked_vector(vector: Any) -> Tensor:
    """Tensor ``(d,)`` of what shall be added: an array, or a fitted :class:`SteeringVector`.

    A fitted vector counts as what it adds at its own strength, its ``bias_``.

    Raises
    ------
    ValueError
        Not one-dimensional, not finite, zero, or a map that adds no constant vector.
    """
    if isinstance(vector, SteeringVector):
        if vector.mode != "add" or vector.preserve_norm:
            raise ValueError(
                f"mode={vector.mode!r}, preserve_norm={vector.preserve_norm!r}: this map adds no "
                "constant vector. Give one of mode='add', or the vector itself."
            )
        vector = vector.bias_
    values = torch.as_tensor(vector).detach()
    values = (
        values.to(working_dtype(values.dtype)) if values.is_floating_point() else values.double()
    )
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"the vector has shape {tuple(values.shape)}; expected (n_features,).")
    require_finite(values, "the vector")
    if not bool(values.any()):
        raise ValueError("the vector is zero: it has no direction. Fit it on other examples.")
    return values
