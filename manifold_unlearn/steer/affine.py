"""Affine steering in closed form: from where rows are to where those of the concept are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.covariance import oas
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn.arrays import (
    LabeledMixin,
    forget_mask,
    keep_kind,
    require_finite,
    restore,
    validate,
)
from manifold_unlearn.artifact import SavedMixin
from manifold_unlearn.intervene.mapped import MappedMixin
from manifold_unlearn.intervene.maps import AffineMap, DenseAffineMap
from manifold_unlearn.steer.strengths import checked_strength

Method = Literal["mean_shift", "optimal_transport", "least_squares"]
Targets = Literal["pairs", "transport"]
Shrinkage = float | Literal["oas"]

SINGULAR = 1e-12
"""Smallest over largest eigenvalue below which a covariance counts as singular."""


class _Steering(LabeledMixin, MappedMixin, SavedMixin, TransformerMixin, BaseEstimator, ABC):
    """What affine steering maps share that are fitted; ``map_`` is their own."""

    shrinkage: Shrinkage
    strength: float

    @property
    @abstractmethod
    def _like(self) -> Any:
        """A fitted array, of the kind that others shall have."""

    @property
    @abstractmethod
    def map_(self) -> AffineMap | DenseAffineMap:
        """The map at the present strength, frozen."""

    @property
    def matrix_(self) -> Any:
        """(n_features, n_features) of the map ``h -> matrix_ @ h + bias_`` at this strength."""
        return restore(self.map_.matrix_, self._like)

    @property
    def bias_(self) -> Any:
        """(n_features,) of the map ``h -> matrix_ @ h + bias_`` at this strength."""
        return restore(self.map_.bias_, self._like)

    def _check_shrinkage(self) -> None:
        checked_strength(self.strength)
        if self.shrinkage != "oas" and not 0 <= float(self.shrinkage) <= 1:
            raise ValueError(f"shrinkage={self.shrinkage!r} must be 'oas' or lie in [0, 1].")


class AffineSteering(_Steering):
    """Affine map that takes rows of the opposite to where those of the concept are.

    ``T(h) = target_mean_ + slope_ (h - source_mean_)``, applied as ``h + strength (T(h) - h)``. The
    methods differ in ``slope_``:

    ``"mean_shift"``
        The identity: rows move by the difference of the means, the least change that makes the
        means equal.
    ``"optimal_transport"``
        ``S_0^-1/2 (S_0^1/2 S_1 S_0^1/2)^1/2 S_0^-1/2`` with the covariances of the opposite and of
        the concept: the means *and* covariances become those of the concept, at the least mean
        square change.
    ``"least_squares"``
        ``I + cov(target - source, source) (S_0 + c I)^-1`` from pairs: the i-th row of the concept
        is what the i-th other row should become.

    Parameters
    ----------
    method : {"mean_shift", "optimal_transport", "least_squares"}, default="optimal_transport"
    strength : float, default=1.0
        0 leaves every row, 1 applies ``T``. May be changed after the fit.
    shrinkage : "oas" or float in [0, 1], default="oas"
        Weight ``w`` of the mean variance ``m`` in a covariance, ``(1 - w) S + w m I``; for least
        squares the penalty is ``c = m w / (1 - w)`` on ``|slope_ - I|**2``. At 1 the covariances
        count no more: least squares is then the mean shift. Too little, with fewer rows than
        features, and noise is amplified.

    Attributes
    ----------
    matrix_, bias_ : array of shape (n_features, n_features) and (n_features,)
        The map is ``h -> matrix_ @ h + bias_`` at the present strength, so that it bakes.
    slope_ : array of shape (n_features, n_features), float64, or None for the identity
    source_mean_, target_mean_ : array of shape (n_features,), float64
        Of the opposite and of the concept.
    source_shrinkage_, target_shrinkage_ : float
        What was used; 0 where the method has no use for it.
    n_features_in_ : int

    References
    ----------
    Singh et al. (2024), Representation Surgery: Theory and Practice of Affine Steering (mean shift,
    and MiMiC, which matches means and covariances).
    Knott and Smith (1984), On the optimal mapping of distributions, for the transport map.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(400, 3)), np.repeat([0, 1], 200)
    >>> X[y == 1] = 2 * X[y == 1] + 5
    >>> moved = AffineSteering().fit(X, y).transform(X[y == 0])
    >>> bool(abs(moved.mean(0) - X[y == 1].mean(0)).max() < 1e-6)
    True
    """

    slope_: Any
    source_mean_: Any
    target_mean_: Any

    def __init__(
        self,
        method: Method = "optimal_transport",
        *,
        strength: float = 1.0,
        shrinkage: Shrinkage = "oas",
    ):
        self.method = method
        self.strength = strength
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any = None) -> AffineSteering:
        """Fit on rows of both sides.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks the concept, everything else its opposite. For least squares the i-th row of
            one side belongs to the i-th of the other.

        Returns
        -------
        AffineSteering

        Raises
        ------
        ValueError
            A parameter out of its range, a side that is empty, data that is not finite, unequal
            numbers of rows for least squares, a side of one row or a singular covariance where the
            method needs it.
        """
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r} is not one of {', '.join(get_args(Method))}.")
        self._check_shrinkage()
        source, target = _sides(validate(self, X, reset=True, min_samples=2), y)
        self.slope_ = None
        self.source_shrinkage_ = self.target_shrinkage_ = 0.0
        self.source_mean_, self.target_mean_ = source.mean(0), target.mean(0)
        if self.method == "optimal_transport":
            from_, to = _spread(source, self.shrinkage), _spread(target, self.shrinkage)
            self.slope_ = _transport(from_.covariance, to.covariance, len(source))
            self.source_shrinkage_, self.target_shrinkage_ = from_.weight, to.weight
        elif self.method == "least_squares":
            fitted = _regress(source, target, self.shrinkage)
            self.slope_ = torch.eye(len(fitted.slope)).to(fitted.slope) + fitted.slope
            self.source_shrinkage_ = fitted.weight
        keep_kind(self, X)
        return self

    @property
    def _like(self) -> Any:
        return self.source_mean_

    @property
    def map_(self) -> AffineMap | DenseAffineMap:
        """The map at the present strength, frozen."""
        check_is_fitted(self)
        checked_strength(self.strength)
        source, target = torch.as_tensor(self.source_mean_), torch.as_tensor(self.target_mean_)
        if self.slope_ is None:
            shift = (self.strength * (target - source))[:, None]
            return AffineMap(torch.zeros_like(shift), shift, shift.new_ones(1))
        slope = torch.as_tensor(self.slope_)
        identity = torch.eye(len(slope)).to(slope)
        bias = self.strength * (target - slope @ source)
        return DenseAffineMap(identity + self.strength * (slope - identity), bias)


class LowRankSteering(_Steering):
    """Edit of a few directions, ``h + R' (A h + b - R h)``, fitted in closed form.

    This is the form of LoReFT. ``R`` (orthonormal rows), ``A`` and ``b`` are not trained through
    the model but fitted to a wanted change of each row: no edit of this form and rank has a lower
    ``mean |wanted change - R'(A h + b - R h)|**2 + c |A - R|**2`` (reduced-rank regression).

    Parameters
    ----------
    rank : int, default=1
    targets : {"pairs", "transport"}, default="pairs"
        The wanted change of a row of the opposite.

        ``"pairs"``
            To its partner: the i-th row of the concept belongs to the i-th other row.
        ``"transport"``
            To where optimal transport takes it (:class:`AffineSteering`), for sets without pairs;
            the mean is then over the normal distribution with the fitted moments.
    strength : float, default=1.0
        Factor of the change; may be changed after the fit.
    shrinkage : "oas" or float in [0, 1], default="oas"
        As for :class:`AffineSteering`; with pairs ``c = m w / (1 - w)``, with transport ``c = 0``.

    Attributes
    ----------
    directions_ : array of shape (rank, n_features), float64
        ``R``; the direction that carries most of the change first.
    read_ : array of shape (rank, n_features), float64
        ``A``.
    offset_ : array of shape (rank,), float64
        ``b``.
    explained_ : float
        ``1 - mean |wanted - made|**2 / mean |wanted|**2``.
    matrix_, bias_ : array of shape (n_features, n_features) and (n_features,)
        The map is ``h -> matrix_ @ h + bias_`` at the present strength, so that it bakes.
    source_mean_ : array of shape (n_features,), float64
    source_shrinkage_ : float
        These and ``explained_`` only after a fit, not :meth:`from_parts`.
    n_features_in_ : int

    References
    ----------
    Wu et al. (2024), ReFT: Representation Finetuning for Language Models (LoReFT).
    Izenman (1975), Reduced-rank regression for the multivariate linear model.
    """

    directions_: Any
    read_: Any
    offset_: Any

    def __init__(
        self,
        rank: int = 1,
        *,
        targets: Targets = "pairs",
        strength: float = 1.0,
        shrinkage: Shrinkage = "oas",
    ):
        self.rank = rank
        self.targets = targets
        self.strength = strength
        self.shrinkage = shrinkage

    def fit(self, X: Any, y: Any = None) -> LowRankSteering:
        """Fit on rows of both sides; parameters and errors are those of :class:`AffineSteering`.

        Raises
        ------
        ValueError
            Also where ``rank`` is not in 1 .. n_features.
        """
        if self.targets not in get_args(Targets):
            raise ValueError(f"targets={self.targets!r} is not one of pairs, transport.")
        if not isinstance(self.rank, Integral) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be an integer of at least 1.")
        self._check_shrinkage()
        source, target = _sides(validate(self, X, reset=True, min_samples=2), y)
        if self.rank > self.n_features_in_:
            raise ValueError(
                f"rank={self.rank} is above the {self.n_features_in_} feature(s) of X; lower it."
            )
        mean, shift = source.mean(0), target.mean(0) - source.mean(0)
        if self.targets == "pairs":
            slope, metric, weight = _regress(source, target, self.shrinkage)
        else:
            metric, weight = _spread(source, self.shrinkage)
            there = _spread(target, self.shrinkage).covariance
            slope = _transport(metric, there, len(source)) - torch.eye(len(mean)).to(mean)
        moment = slope @ metric @ slope.T + torch.outer(shift, shift)
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        leading = vectors[:, -int(self.rank) :].flip(1).T
        at = leading.abs().argmax(1, keepdim=True)
        leading = leading * leading.gather(1, at).sign()
        self.directions_ = leading
        self.read_ = leading + leading @ slope
        self.offset_ = leading @ (shift - slope @ mean)
        if self.targets == "pairs":
            wanted = target - source
            made = (source @ slope.T + shift - slope @ mean) @ leading.T @ leading
            left, whole = float((wanted - made).square().sum()), float(wanted.square().sum())
        else:
            left, whole = float(values[: -int(self.rank)].clamp(min=0).sum()), float(values.sum())
        self.explained_ = 1 - left / whole if whole > 0 else 1.0
        self.source_mean_, self.source_shrinkage_ = mean, weight
        keep_kind(self, X)
        return self

    @classmethod
    def from_parts(cls, directions: Any, read: Any, offset: Any, **params: Any) -> LowRankSteering:
        """Edit whose parts are known, say from training.

        Parameters
        ----------
        directions : array or Tensor of shape (rank, n_features)
            ``R``, with orthonormal rows.
        read : array or Tensor of shape (rank, n_features)
            ``A``.
        offset : array or Tensor of shape (rank,)
            ``b``.
        **params
            Parameters of the class but ``rank``.

        Raises
        ------
        ValueError
            Shapes that do not fit together, parts that are not finite, or rows of ``directions``
            that are not orthonormal to 1e-4.
        """
        parts = [torch.as_tensor(part).detach().double() for part in (directions, read, offset)]
        r, a, b = parts
        if r.ndim != 2 or a.shape != r.shape or b.shape != r.shape[:1] or not r.numel():
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"directions, read and offset have shapes {shapes}; expected (rank, n_features) "
                "twice and (rank,)."
            )
        for part, name in zip(parts, ("directions", "read", "offset"), strict=True):
            require_finite(part, name)
        off = float((r @ r.T - torch.eye(len(r)).to(r)).abs().max())
        if off > 1e-4:
            raise ValueError(
                f"the rows of directions are {off:.2g} from orthonormal; orthonormalize them, and "
                "adapt read and offset."
            )
        made = cls(len(r), **params)
        made._check_shrinkage()
        made.directions_, made.read_, made.offset_ = parts
        made.n_features_in_ = r.shape[1]
        keep_kind(made, directions)
        return made

    @property
    def _like(self) -> Any:
        return self.directions_

    @property
    def map_(self) -> AffineMap:
        """The map at the present strength, frozen."""
        check_is_fitted(self)
        checked_strength(self.strength)
        r, a, b = (torch.as_tensor(v) for v in (self.directions_, self.read_, self.offset_))
        return AffineMap((r - a).T.contiguous(), self.strength * r.T.contiguous(), b)


class _Spread(NamedTuple):
    covariance: Tensor
    weight: float


class _Regression(NamedTuple):
    slope: Tensor
    metric: Tensor
    weight: float


def _sides(rows: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    """Rows of the opposite and of the concept, in float64."""
    concept = forget_mask(y, len(rows)).to(rows.device)
    return rows[~concept].double(), rows[concept].double()


def _spread(rows: Tensor, shrinkage: Shrinkage) -> _Spread:
    """Covariance, normalized by the count and shrunk, and the weight of the identity in it."""
    n, d = rows.shape
    if n < 2:
        raise ValueError(
            "a side has 1 sample, and a covariance needs 2 of each; add rows, or use "
            "AffineSteering('mean_shift')."
        )
    centered = rows - rows.mean(0)
    covariance = centered.T @ centered / n
    weight = float(oas(rows.cpu().numpy())[1]) if shrinkage == "oas" else float(shrinkage)
    identity = torch.eye(d).to(covariance)
    return _Spread((1 - weight) * covariance + weight * covariance.trace() / d * identity, weight)


def _transport(source: Tensor, target: Tensor, n: int) -> Tensor:
    """Slope of the optimal transport between normal distributions of these covariances."""
    values, vectors = torch.linalg.eigh(source)
    _require_regular(values, n)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse = (vectors / values.sqrt()) @ vectors.T
    middle, axes = torch.linalg.eigh(root @ target @ root)
    half = (axes * middle.clamp(min=0).sqrt()) @ axes.T
    slope = inverse @ half @ inverse
    return (slope + slope.T) / 2


def _regress(source: Tensor, target: Tensor, shrinkage: Shrinkage) -> _Regression:
    """Ridge regression of the change of each row on the row, with an intercept."""
    if len(source) != len(target):
        raise ValueError(
            f"pairs need a partner for each row: {len(target)} rows of the concept, {len(source)} "
            "others. Give equal numbers in one order, or a method that needs no pairs."
        )
    centered, change = source - source.mean(0), target - source
    spread = _spread(source, shrinkage)
    keep = 1 - spread.weight
    if keep == 0:
        return _Regression(torch.zeros_like(spread.covariance), spread.covariance, 1.0)
    metric = spread.covariance / keep  # S + m w / (1 - w) I
    values, vectors = torch.linalg.eigh(metric)
    _require_regular(values, len(source))
    cross = (change - change.mean(0)).T @ centered / len(source)
    return _Regression((cross @ vectors / values) @ vectors.T, metric, spread.weight)


def _require_regular(values: Tensor, n: int) -> None:
    """Raise where eigenvalues, ascending, are those of a singular covariance."""
    if not float(values[0]) > SINGULAR * float(values[-1]):
        rank = int((values > SINGULAR * values[-1]).sum()) if float(values[-1]) > 0 else 0
        raise ValueError(
            f"the {n} rows of the opposite span {rank} of {len(values)} dimensions, so their "
            "covariance is singular; raise shrinkage, add rows, or use "
            "AffineSteering('mean_shift')."
        )
