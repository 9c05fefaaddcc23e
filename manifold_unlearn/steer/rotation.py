"""Rotation in a plane: steering that changes where a row points, not how long it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    keep_kind,
    require_finite,
    restore,
    validate,
    working_dtype,
)
from manifold_unlearn.artifact import SavedMixin

Plane = Literal["pca", "pairs", "candidates"]
Rotate = Literal["to", "by"]
Adaptive = bool | Literal["midpoint"]

PARALLEL = 1e-6
"""Share of a second direction beside the first below which the two span no plane."""


@dataclass(frozen=True, eq=False)
class PlaneRotation:
    """Rows with their component in a plane rotated; what is orthogonal to it stays."""

    basis: Tensor
    """(d, 2), orthonormal: the concept direction, and the one that completes the plane"""
    angle: float
    """radians, from the concept direction toward the second"""
    rotate: Rotate
    """``"to"`` the angle, or ``"by"`` it"""
    strength: float
    """share of the way to go"""
    threshold: float | None
    """only rows that reach further along the concept direction are rotated; None for all"""

    def __call__(self, h: Tensor) -> Tensor:
        """Rotated rows ``(..., d)``, in the dtype and on the device of ``h``."""
        kind = working_dtype(h.dtype)
        basis, rows = self.basis.to(h.device, kind), h.to(kind)
        at = rows @ basis
        edited = (rows + (self._moved(at) - at) @ basis.T).to(h.dtype)
        if self.threshold is None:
            return edited
        return torch.where(at[..., :1] > self.threshold, edited, h)

    def _moved(self, at: Tensor) -> Tensor:
        """Coordinates in the plane ``(..., 2)`` after the rotation."""
        if self.rotate == "by":
            return at @ _turn(self.strength * self.angle).to(at).T
        now = torch.atan2(at[..., 1], at[..., 0])
        gap = torch.remainder(self.angle - now + math.pi, 2 * math.pi) - math.pi
        goal = now + self.strength * gap
        if self.strength == 1:  # the same angle for every row, to the bit
            goal = torch.full_like(now, self.angle)
        radius = torch.hypot(at[..., 0], at[..., 1])
        return torch.stack([radius * goal.cos(), radius * goal.sin()], dim=-1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PlaneRotation:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        basis = self.basis.to(device, working_dtype(dtype))
        return PlaneRotation(basis, self.angle, self.rotate, self.strength, self.threshold)

    def save(self, directory: str | Path) -> None:
        """Write the map to a directory that :meth:`load` reads."""
        config = {
            "angle": self.angle,
            "rotate": self.rotate,
            "strength": self.strength,
            "threshold": self.threshold,
        }
        artifact.save(directory, "PlaneRotation", {"basis": self.basis}, config)

    @classmethod
    def load(cls, directory: str | Path) -> PlaneRotation:
        """Read the map that :meth:`save` wrote; raises as :func:`~.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="PlaneRotation")
        return cls(tensors["basis"], **config)


def _turn(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


class RotationSteering(LabeledMixin, SavedMixin, TransformerMixin, BaseEstimator):
    """Angular steering: the component of a row in a plane is rotated, its norm kept.

    With an orthonormal basis ``b_1, b_2`` of the plane and ``p = (b_1'h, b_2'h)`` the map is
    ``h -> h + B (p' - p)``. For ``rotate="to"`` it is ``p' = |p| (cos t, sin t)``, the same angle
    ``t`` for every row; for ``rotate="by"`` each row turns by ``t``, which is a linear map, so
    that it bakes. ``b_1`` is the difference of the class means, toward the concept.

    Parameters
    ----------
    plane : {"pca", "pairs", "candidates"}, default="pca"
        What ``b_2`` is.

        ``"pca"``
            The direction of largest variance of the rows about their class means, among those
            orthogonal to ``b_1``.
        ``"pairs"``
            The same of the differences within pairs: the i-th row of the concept belongs to the
            i-th of the others.
        ``"candidates"``
            As published: the first principal component of candidate directions (those of several
            sites, say), orthogonalized to ``b_1``.
    angle : float, default=0.0
        Degrees from the concept (0) over ``b_2`` (90) to its opposite (180).
    rotate : {"to", "by"}, default="to"
    strength : float, default=1.0
        Share of the way along the arc: 0 leaves every row, 1 arrives. May be changed after the fit.
    adaptive : bool or "midpoint", default=False
        Rotate only rows that lean to the concept, ``b_1'h > 0``; with ``"midpoint"`` those beyond
        the middle of the class means instead, where activations are not centered. The others stay
        as they are, to the bit.

    Attributes
    ----------
    basis_ : array of shape (n_features, 2), float64
        ``b_1`` and ``b_2``; the sign of ``b_2`` makes its largest entry positive.
    midpoint_ : float
        Middle of the class means along ``b_1``.
    n_features_in_ : int
    matrix_, bias_ : array of shape (n_features, n_features) and (n_features,)
        Only with ``rotate="by"`` and ``adaptive=False``: the map is ``h -> matrix_ @ h + bias_``.

    Notes
    -----
    The rotation is about the origin, so that attention sinks, which have the largest norms, move
    furthest: leave them out by ``tokens=`` of :func:`intervene`, or use ``adaptive``. A row without
    a component in the plane stays. In half precision the norm is kept to the rounding of the
    entries.

    References
    ----------
    Vu and Nguyen (2025), Angular Steering: Behavior Control via Rotation in Activation Space.
    Candidates are there the differences of class means at the inputs of all norms of the model, and
    one plane serves all sites.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(200, 6)), np.repeat([0, 1], 100)
    >>> X[y == 1, 0] += 3
    >>> steer = RotationSteering(angle=0).fit(X, y)
    >>> moved = steer.transform(X)
    >>> bool(np.allclose(np.linalg.norm(moved, axis=1), np.linalg.norm(X, axis=1)))
    True
    """

    def __init__(
        self,
        *,
        plane: Plane = "pca",
        angle: float = 0.0,
        rotate: Rotate = "to",
        strength: float = 1.0,
        adaptive: Adaptive = False,
    ):
        self.plane = plane
        self.angle = angle
        self.rotate = rotate
        self.strength = strength
        self.adaptive = adaptive

    def fit(self, X: Any, y: Any = None, *, candidates: Any = None) -> RotationSteering:
        """Find the plane.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks the concept, everything else its opposite.
        candidates : array or Tensor of shape (n_candidates, n_features), optional
            Needed with ``plane="candidates"``, and only then.

        Returns
        -------
        RotationSteering

        Raises
        ------
        ValueError
            A parameter out of its range, a side that is empty, data that is not finite, equal
            means, fewer than two features, unequal numbers with ``plane="pairs"``, candidates that
            are missing or not used, or nothing that varies beside the concept direction.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2).double()
        if rows.shape[1] < 2:
            raise ValueError(f"X has {rows.shape[1]} feature(s); a plane needs at least 2.")
        concept = forget_mask(y, len(rows)).to(rows.device)
        if (candidates is None) == (self.plane == "candidates"):
            raise ValueError(
                f"plane={self.plane!r} with candidates={'None' if candidates is None else 'given'}:"
                " plane='candidates' and candidates go together."
            )
        means = torch.stack([rows[concept].mean(0), rows[~concept].mean(0)])
        size = torch.linalg.vector_norm(means[0] - means[1])
        if size <= 1e-10 * rows.std(0).square().mean().sqrt():
            raise ValueError("the class means are equal, so there is no direction between them.")
        first = (means[0] - means[1]) / size
        if self.plane == "candidates":
            given = as_rows(candidates, device=rows.device, name="candidates", min_samples=2)
            self._require_width(given, "candidates")
            second = _leading(given.double(), None)
        elif self.plane == "pairs":
            second = _leading(_paired_differences(rows, concept), first)
        else:
            second = _leading(rows, first)  # without it the class means are one
        self.basis_ = _orthonormal(first, second)
        self.midpoint_ = float(means.mean(0) @ first)
        keep_kind(self, X)
        return self

    @classmethod
    def from_plane(
        cls, direction: Any, second: Any, *, midpoint: float = 0.0, **params: Any
    ) -> RotationSteering:
        """Steering in a plane that is known.

        Parameters
        ----------
        direction, second : array or Tensor of shape (n_features,)
            The second is orthogonalized to the first; its sign is kept.
        midpoint : float, default=0.0
            ``midpoint_``, for ``adaptive="midpoint"``.
        **params
            Parameters of the class.

        Raises
        ------
        ValueError
            Directions of other shapes, not finite, zero, or parallel.
        """
        made = cls(**params)
        made._check_parameters()
        a, b = (torch.as_tensor(v).detach().double() for v in (direction, second))
        if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
            raise ValueError(
                f"direction has shape {tuple(a.shape)}, second {tuple(b.shape)}; give two vectors "
                "of one length, at least 2."
            )
        require_finite(torch.stack([a, b]), "the directions")
        if not bool(a.any()):
            raise ValueError("direction is zero; give one that points to the concept.")
        made.basis_ = _orthonormal(a / torch.linalg.vector_norm(a), b)
        made.midpoint_ = float(midpoint)
        made.n_features_in_ = len(a)
        keep_kind(made, direction)
        return made

    @classmethod
    def from_candidates(cls, candidates: Any, **params: Any) -> RotationSteering:
        """Plane of candidate directions alone, as published.

        The concept direction is the candidate of the highest mean cosine to all, the second their
        first principal component.

        Parameters
        ----------
        candidates : array or Tensor of shape (n_candidates, n_features)
            Differences of class means, one a site.
        **params
            Parameters of the class; ``plane`` is ``"candidates"``.

        Raises
        ------
        ValueError
            Candidates that are not finite, a zero one, or all parallel.
        """
        given = as_rows(candidates, name="candidates", min_samples=2).double()
        sizes = torch.linalg.vector_norm(given, dim=1, keepdim=True)
        if not bool((sizes > 0).all()):
            raise ValueError(f"candidate {int(sizes.argmin())} is zero; leave it out.")
        unit = given / sizes
        chosen = int((unit @ unit.T).mean(1).argmax())
        second = _leading(given, None)
        return cls.from_plane(
            restore(given[chosen], candidates),
            restore(second, candidates),
            **{**params, "plane": "candidates"},
        )

    def _require_width(self, given: Tensor, name: str) -> None:
        if given.shape[1] != self.n_features_in_:
            raise ValueError(f"{name} has {given.shape[1]} features; X has {self.n_features_in_}.")

    def _check_parameters(self) -> None:
        for name, kinds in (("plane", Plane), ("rotate", Rotate)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(get_args(kinds))}.")
        if self.adaptive not in (False, True, "midpoint"):
            raise ValueError(f"adaptive={self.adaptive!r} is not False, True or 'midpoint'.")
        for name in ("angle", "strength"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be finite.")

    @property
    def map_(self) -> PlaneRotation:
        """The map at the present parameters, frozen."""
        check_is_fitted(self)
        self._check_parameters()
        threshold = {False: None, True: 0.0, "midpoint": self.midpoint_}[self.adaptive]
        basis = torch.as_tensor(self.basis_)
        return PlaneRotation(
            basis, math.radians(self.angle), self.rotate, float(self.strength), threshold
        )

    @property
    def matrix_(self) -> Any:
        """(n_features, n_features); an AttributeError where the map is not affine."""
        check_is_fitted(self)
        self._check_parameters()
        if self.rotate != "by" or self.adaptive:
            raise AttributeError(
                "a rotation to an angle, or of some rows only, is not affine: use rotate='by' and "
                "adaptive=False, or keep it as a hook with intervene()."
            )
        basis = torch.as_tensor(self.basis_)
        change = _turn(self.strength * math.radians(self.angle)).to(basis) - torch.eye(2).to(basis)
        return restore(torch.eye(len(basis)).to(basis) + basis @ change @ basis.T, self.basis_)

    @property
    def bias_(self) -> Any:
        """(n_features,) of zeros; an AttributeError where the map is not affine."""
        return self.matrix_[0] * 0

    def transform(self, X: Any) -> Any:
        """Rotated rows, in the kind, dtype and device of ``X`` (n_samples, n_features)."""
        check_is_fitted(self)
        return restore(self.map_(validate(self, X, reset=False)), X)

    def __call__(self, h: Tensor) -> Tensor:
        """Rotate hidden states ``(..., n_features)``; what :func:`intervene` calls."""
        return self.map_(h)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PlaneRotation:
        """Return the map at the present parameters, ready for hidden states of this kind."""
        return self.map_.to(device, dtype)


def _paired_differences(rows: Tensor, concept: Tensor) -> Tensor:
    n_concept, n_other = int(concept.sum()), int((~concept).sum())
    if n_concept != n_other:
        raise ValueError(
            f"plane='pairs' needs a partner for each row: {n_concept} rows of the concept, "
            f"{n_other} others. Give equal numbers in one order, or use plane='pca'."
        )
    return rows[concept] - rows[~concept]


def _leading(rows: Tensor, without: Tensor | None) -> Tensor:
    """First principal component ``(d,)`` of rows, among the directions orthogonal to one."""
    centered = rows - rows.mean(0)
    if without is not None:
        centered = centered - torch.outer(centered @ without, without)
    n, d = centered.shape
    values, vectors = torch.linalg.eigh(centered @ centered.T if n < d else centered.T @ centered)
    if float(values[-1]) <= 1e-20 * max(float(rows.square().sum()), 1e-300):
        raise ValueError(
            "nothing varies beside the concept direction, so no plane is seen; give rows or "
            "candidates that differ, or name both directions with from_plane()."
        )
    leading = centered.T @ vectors[:, -1] if n < d else vectors[:, -1]
    return leading * leading[leading.abs().argmax()].sign()


def _orthonormal(first: Tensor, second: Tensor) -> Tensor:
    """Basis ``(d, 2)`` of a plane from a unit vector and another direction."""
    size = torch.linalg.vector_norm(second)
    rest = second - (second @ first) * first
    rest = rest - (rest @ first) * first  # once more, for what rounding left
    left = torch.linalg.vector_norm(rest)
    if not float(left) > PARALLEL * float(size):
        raise ValueError(
            "the second direction is zero or parallel to the first, so they span no plane; give "
            "another."
        )
    return torch.stack([first, rest / left], dim=1)
