"""Smooth curves through the centroids of labeled activations."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, keep_kind, restore, validate
from manifold_unlearn.artifact import SavedMixin
from manifold_unlearn.steer.path_curve import CubicCurve, cubic_curve
from manifold_unlearn.steer.path_lift import commute_coordinates, joined_diffusion, lifted_curve
from manifold_unlearn.steer.path_order import (
    Layout,
    Plane,
    Spacing,
    distinct_labels,
    layout_at,
    layout_of,
)
from manifold_unlearn.steer.paths import (
    ManifoldPath,
    Subspace,
    check_waypoints,
    path_through,
    principal_subspace,
)

Coordinates = Literal["pca", "diffusion"]
Direction = Literal["short", "forward", "backward"]

_DENSE = 32  # points of the curve for each waypoint, and for each segment between centroids


class NearestOnCurve(NamedTuple):
    """Where on a curve some rows are nearest.

    Attributes
    ----------
    parameter : array or Tensor of shape (n_samples,)
    distance : array or Tensor of shape (n_samples,)
        In units of the data.
    """

    parameter: Any
    distance: Any


class CentroidSpline(SavedMixin, BaseEstimator):
    """Smooth curve through the class centroids of a feature such as the days of the week.

    A cubic spline over one parameter, natural (open) or periodic. Laws: with ``smoothing=0`` the
    curve passes through ``centroids_`` at ``parameter_``; rotation and translation of the data
    carry over to the curve.

    Parameters
    ----------
    coordinates : {"pca", "diffusion"}, default="pca"
        ``"pca"``: the spline runs straight through the space; the principal subspace decides the
        order and what the paths carry. A spline is linear in its points, so that its coordinates
        in the subspace are the spline of the centroids' coordinates. ``"diffusion"``: between the
        centroids the curve follows the rows, which a spline through the classes' mean diffusion
        coordinates (:class:`~manifold_unlearn.manifold.diffusion.DiffusionMap`) places along the
        feature; see :func:`~manifold_unlearn.steer.path_lift.lifted_curve`.
    n_components : int or float, default=48
        Of the principal subspace that the paths carry, see
        :func:`~manifold_unlearn.steer.paths.principal_subspace`.
    periodic : bool, default=False
        Whether the feature closes, as the week does.
    order : sequence of labels, optional
        All labels, in the order along the curve. Default, periodic: by the angle in ``plane``;
        open: by the first diffusion coordinate where there is one, else numbers ascending and
        other labels as they first appear.
    spacing : {"angle", "chord", "uniform"}, optional
        Of the parameter between centroids: by the angle in ``plane`` (periodic only), by their
        distances, or equal. Default: ``"angle"`` where the angle decides the order, else
        ``"chord"``.
    smoothing : float, default=0
        Weight of the squared second derivative over the parameter in [0, 1]: 0 interpolates,
        1e-4 rounds what differs between ten classes.
    plane : {"centroids", "coordinates"}, default="centroids"
        Whose angle counts, centered and scaled to unit variance over the centroids: the two
        leading principal directions of the centroids, or the first two ``coordinates`` of the
        data, as in the weekdays experiment cited: where the rows vary most, which may be by
        something else than the label.
    n_diffusion_components : int, default=4
        Of the diffusion map.
    n_neighbors : int, default=64
        Of the diffusion map; fewer where there are fewer rows.
    device : str or torch.device, default="auto"

    Attributes
    ----------
    order_ : list
        Labels along the curve. A periodic one starts at the first label, the smallest number or
        the word that appears first, toward the side on which the second is nearer; an open one by
        a diffusion coordinate at the end that is nearer to the first label.
    centroids_ : array of shape (n_classes, d)
        Class means, in that order.
    parameter_ : array of shape (n_classes,), float64
        Position of each centroid: the first is 0; of an open curve the last is 1, of a periodic
        one 1 is the first again.
    mean_, basis_ : array of shape (d,) and (d, k), float64
    n_features_in_ : int

    References
    ----------
    Goodfire, causalab, manifold steering: spline through the centroids of weekdays over the angle
    in the first two principal components of the data, standardized.
    Hastie and Stuetzle (1989), Principal curves, J. Am. Stat. Assoc. 84.

    Examples
    --------
    >>> import numpy as np
    >>> from manifold_unlearn.steer.spline import CentroidSpline
    >>> angle = np.arange(70) % 7 * 2 * np.pi / 7
    >>> X = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    >>> spline = CentroidSpline(periodic=True).fit(X, np.arange(70) % 7)
    >>> path = spline.path(0, 6, n_waypoints=20)
    >>> [round(float(radius), 2) for radius in path.points.norm(dim=1).aminmax()]
    [1.0, 1.0]
    """

    order_: list[Any]
    centroids_: Any
    parameter_: Any
    mean_: Any
    basis_: Any
    n_features_in_: int

    def __init__(
        self,
        coordinates: Coordinates = "pca",
        *,
        n_components: float = 48,
        periodic: bool = False,
        order: Sequence[Any] | None = None,
        spacing: Spacing | None = None,
        smoothing: float = 0.0,
        plane: Plane = "centroids",
        n_diffusion_components: int = 4,
        n_neighbors: int = 64,
        device: Device = "auto",
    ) -> None:
        self.coordinates = coordinates
        self.n_components = n_components
        self.periodic = periodic
        self.order = order
        self.spacing = spacing
        self.smoothing = smoothing
        self.plane = plane
        self.n_diffusion_components = n_diffusion_components
        self.n_neighbors = n_neighbors
        self.device = device

    def fit(self, X: Array, labels: Any) -> Self:
        """Fit the curve to labeled rows.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, d)
        labels : sequence of shape (n_samples,)
            Numbers or words.

        Raises
        ------
        ValueError
            A parameter out of range, labels of another length than the rows, fewer than 2 classes
            (periodic: 3), an ``order`` that is not of these labels, centroids that fall together,
            or a diffusion graph that falls into parts.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, device=self.device).double()
        names, member = distinct_labels(labels, len(rows))
        self._check_classes(len(names))
        subspace = principal_subspace(rows, self.n_components)
        centroids = _means(rows, member)
        if self.coordinates == "pca":
            along = (centroids - subspace.mean) @ subspace.basis
            layout = self._layout(along, centroids, names)
            return self._keep(X, names, centroids, layout, subspace)
        diffusion = joined_diffusion(
            rows, self.n_diffusion_components, self.n_neighbors, self.device
        )
        embedding = commute_coordinates(diffusion).to(rows)
        along = _means(embedding, member)
        layout = self._layout(along, centroids, names, by_first=True)
        curve = lifted_curve(
            embedding,
            rows,
            layout,
            along,
            centroids,
            period=self._period,
            smoothing=self.smoothing,
        )
        return self._keep(X, names, centroids, layout, subspace, curve)

    def fit_centroids(
        self, centroids: Array, *, parameter: Any = None, labels: Sequence[Any] | None = None
    ) -> Self:
        """Fit the curve to given points, such as mean square roots of output probabilities.

        ``coordinates`` does not count: the spline runs straight through the space, and the
        subspace of the paths is the span of the points.

        Parameters
        ----------
        centroids : array or Tensor of shape (n_classes, d)
        parameter : array of shape (n_classes,), optional
            Position of each, distinct; taken as given, of a periodic curve modulo 1. Such as
            ``parameter_`` of the spline of the activations, so that both share it. Default: from
            the points, as in :meth:`fit`.
        labels : sequence of shape (n_classes,), optional
            Default: 0, 1, ...

        Raises
        ------
        ValueError
            As :meth:`fit`, or positions that are not distinct.
        """
        self._check_parameters()
        points = validate(self, centroids, reset=True, device=self.device).double()
        given = np.arange(len(points)) if labels is None else labels
        names, member = distinct_labels(given, len(points))
        if len(names) < len(points):
            raise ValueError(f"labels name {len(names)} classes for {len(points)} centroids.")
        self._check_classes(len(names))
        points = _means(points, member)
        subspace = principal_subspace(points, len(points))
        if parameter is None:
            along = (points - subspace.mean) @ subspace.basis
            layout = self._layout(along, points, names)
        else:
            at = parameter.detach().cpu() if isinstance(parameter, Tensor) else parameter
            at = np.asarray(at, dtype=np.float64).reshape(-1)
            layout = layout_at(at, member, names, periodic=self.periodic).to(points.device)
        return self._keep(centroids, names, points, layout, subspace)

    def point(self, t: Any) -> Any:
        """Points of the curve.

        Parameters
        ----------
        t : float, or array or Tensor of shape (n,)
            Parameter; of a periodic curve modulo 1, of an open one between its ends.

        Returns
        -------
        array or Tensor of shape (d,), or (n, d)

        Raises
        ------
        ValueError
            A parameter that is not finite, or beyond the ends of an open curve.
        """
        curve = self._fitted()
        wanted = torch.as_tensor(t, dtype=torch.float64, device=curve.knots.device)
        first, last = float(curve.knots[0]), float(curve.knots[-1])
        if not bool(wanted.isfinite().all()):
            raise ValueError("t must be finite.")
        outside = (wanted < first) | (wanted > last)
        if not self.periodic and bool(outside.any()):
            raise ValueError(
                f"t={float(wanted[outside][0])} lies beyond the open curve: it runs from {first} "
                f"to {last}."
            )
        found = curve(wanted.reshape(-1)).reshape(*wanted.shape, -1)
        return restore(found, self.centroids_)

    def nearest(self, X: Array) -> NearestOnCurve:
        """Parameter of the nearest point of the curve, and the distance to it, of each row.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, d)

        Returns
        -------
        NearestOnCurve
        """
        curve = self._fitted()
        rows = validate(self, X, reset=False, device=curve.knots.device).double()
        parameter, distance = curve.nearest(rows)
        return NearestOnCurve(restore(parameter, X), restore(distance, X))

    def path(
        self, a: Any, b: Any, n_waypoints: int = 50, direction: Direction = "short"
    ) -> ManifoldPath:
        """The curve from one centroid to another.

        Parameters
        ----------
        a, b : labels
        n_waypoints : int, default=50
            Both ends included; equally spaced along the length.
        direction : {"short", "forward", "backward"}, default="short"
            Of a periodic curve: the shorter way around, or along ``order_`` or against it.

        Returns
        -------
        ManifoldPath
            Of the kind ``"spline"``.

        Raises
        ------
        ValueError
            A label that was not fitted, the same label twice, or a direction in which an open
            curve does not lead from ``a`` to ``b``.
        """
        start, end = self._ends(a, b)
        if direction not in get_args(Direction):
            raise ValueError(
                f"direction={direction!r} is not known. Use 'short', 'forward' or 'backward'."
            )
        ahead = "forward" if end > start else "backward"
        if not self.periodic:
            if direction not in ("short", ahead):
                raise ValueError(
                    f"an open curve leads from {a!r} to {b!r} only {ahead}. Use direction='short'."
                )
            return self.between(start, end, n_waypoints)
        ways = {
            "forward": end if end > start else end + 1,
            "backward": end if end < start else end - 1,
        }
        if direction != "short":
            return self.between(start, ways[direction], n_waypoints)
        paths = [self.between(start, way, n_waypoints) for way in ways.values()]
        return min(paths, key=lambda path: path.length)

    def between(self, start: float, end: float, n_waypoints: int = 50) -> ManifoldPath:
        """The curve from one parameter to another, forward where ``end`` is greater.

        Of a periodic curve the parameters may lie in any period: ``between(0, 1)`` goes around.

        Raises
        ------
        ValueError
            Equal parameters, or one beyond the ends of an open curve.
        """
        check_waypoints(n_waypoints)
        if start == end:
            raise ValueError(f"start and end are the same point, t={start}: there is no path.")
        self.point(np.array([start, end]))
        curve = self._fitted()
        turns = abs(end - start) / float(curve.knots[-1] - curve.knots[0])
        dense = max(_DENSE * n_waypoints, int(_DENSE * turns * len(curve.knots)) + 2)
        subspace = Subspace(torch.as_tensor(self.mean_), torch.as_tensor(self.basis_))
        return path_through(curve.stretch(start, end, dense), n_waypoints, "spline", subspace)

    def chord(self, a: Any, b: Any, n_waypoints: int = 50) -> ManifoldPath:
        """The straight line between two centroids, with the same subspace: the linear rival."""
        return self.path(a, b, n_waypoints).chord()

    def save(self, directory: str | Path) -> None:
        """Write parameters and fit to a directory that :meth:`load` reads."""
        kept = copy.copy(self)
        if self.order is not None:
            kept.order = np.asarray(self.order).tolist()
        super(CentroidSpline, kept).save(directory)

    # fitting

    def _check_parameters(self) -> None:
        if self.coordinates not in get_args(Coordinates):
            raise ValueError(
                f"coordinates={self.coordinates!r} is not known. Use 'pca' or 'diffusion'."
            )
        if self.spacing is not None and self.spacing not in get_args(Spacing):
            raise ValueError(
                f"spacing={self.spacing!r} is not known. Use 'angle', 'chord' or 'uniform'."
            )
        if self.plane not in get_args(Plane):
            raise ValueError(
                f"plane={self.plane!r} is not known. Use 'centroids' or 'coordinates'."
            )
        if self.spacing == "angle" and not self.periodic:
            raise ValueError("spacing='angle' needs periodic=True. Use 'chord' or 'uniform'.")
        if not 0 <= self.smoothing < math.inf:
            raise ValueError(f"smoothing={self.smoothing} must be finite and not negative.")

    def _check_classes(self, n_classes: int) -> None:
        least = 3 if self.periodic else 2
        if n_classes < least:
            kind = "a periodic" if self.periodic else "an open"
            raise ValueError(
                f"{kind} curve needs at least {least} classes; got {n_classes}. Give labels of "
                "more classes" + (", or periodic=False." if n_classes == 2 else ".")
            )

    @property
    def _period(self) -> float | None:
        return 1.0 if self.periodic else None

    def _layout(
        self, along: Tensor, centroids: Tensor, names: list[Any], *, by_first: bool = False
    ) -> Layout:
        plane = along[:, :2]
        if self.plane == "centroids":
            leading = principal_subspace(centroids, 2)
            plane = (centroids - leading.mean) @ leading.basis
        return layout_of(
            along,
            names,
            periodic=self.periodic,
            order=self.order,
            spacing=self.spacing,
            plane=plane,
            by_first=by_first,
        )

    def _keep(
        self,
        X: Array,
        names: list[Any],
        centroids: Tensor,
        layout: Layout,
        subspace: Subspace,
        curve: CubicCurve | None = None,
    ) -> Self:
        ordered = centroids[layout.order]
        if curve is None:
            curve = cubic_curve(
                layout.parameter, ordered, period=self._period, smoothing=self.smoothing
            )
        self.order_ = [names[i] for i in layout.order.tolist()]
        self.parameter_ = layout.parameter
        self.knots_, self.values_, self.bends_ = curve.knots, curve.values, curve.bends
        self.centroids_ = restore(ordered, X)
        self.mean_, self.basis_ = subspace
        keep_kind(self, X)
        return self

    # answers

    def _fitted(self) -> CubicCurve:
        check_is_fitted(self)
        knots, values = torch.as_tensor(self.knots_), torch.as_tensor(self.values_)
        return CubicCurve(knots, values, torch.as_tensor(self.bends_), self.periodic)

    def _ends(self, a: Any, b: Any) -> tuple[float, float]:
        check_is_fitted(self)
        for label in (a, b):
            if label not in self.order_:
                raise ValueError(f"label {label!r} was not fitted. Use one of {self.order_}.")
        if a == b:
            raise ValueError(f"start and end are the same label, {a!r}: there is no path.")
        at = torch.as_tensor(self.parameter_)
        return float(at[self.order_.index(a)]), float(at[self.order_.index(b)])


def _means(rows: Tensor, member: np.ndarray) -> Tensor:
    """Mean (n_classes, d) of the rows of each class."""
    at = torch.from_numpy(member).to(rows.device)
    size = torch.bincount(at).to(rows)[:, None]
    total = torch.zeros(len(size), rows.shape[1], dtype=rows.dtype, device=rows.device)
    return total.index_add_(0, at, rows) / size
