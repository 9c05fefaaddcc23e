"""Paths through the space of the activations: what they are, and the straight line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import Array, as_rows, require_finite
from manifold_unlearn.manifold.straighten import resampled

How: TypeAlias = Literal["replace", "add", "coordinates"]

_ORTHONORMAL = 1e-3  # most that basis.T @ basis may differ from the identity
_RANK = 1e-7  # singular value over the largest under which a direction is none
_ROUNDING = 1e-13  # likewise, over the largest entry of the data
_EQUAL = 1e-9  # distance of two points, over their norm, under which they are one


class Subspace(NamedTuple):
    """Affine subspace ``mean + span(basis)``.

    Attributes
    ----------
    mean : Tensor of shape (d,), float64
    basis : Tensor of shape (d, k), float64
        Orthonormal columns.
    """

    mean: Tensor
    basis: Tensor


@dataclass(frozen=True, eq=False)
class ManifoldPath:
    """Curve through the space of the activations, as waypoints.

    Attributes
    ----------
    points : Tensor of shape (n_waypoints, d), float32
        From the start (t = 0) to the end (t = 1), in the space of the activations.
    times : Tensor of shape (n_waypoints,), float32
        In [0, 1], increasing; of every path made here the part of the length passed.
    kind : str
        ``"chord"``, ``"geodesic"``, ``"tangent"``, ``"spline"`` or ``"preimage"``.
    mean : Tensor of shape (d,), float32
        Of the data the path was made from.
    basis : Tensor of shape (d, k), float32
        Orthonormal columns: the subspace whose coordinates count as the manifold's. The points
        need not lie in ``mean + span(basis)``.

    Raises
    ------
    ValueError
        Fewer than two waypoints, shapes that do not fit, an entry that is not finite, times that
        do not increase from 0 to 1, or a basis that is not orthonormal.
    """

    points: Tensor
    times: Tensor
    kind: str
    mean: Tensor
    basis: Tensor

    def __post_init__(self) -> None:
        """Check the shapes and make every tensor float32 on the device of the points."""
        points = torch.as_tensor(self.points).detach()
        for name in ("points", "times", "mean", "basis"):
            value = torch.as_tensor(getattr(self, name)).detach()
            object.__setattr__(self, name, value.to(points.device, torch.float32))
        _check(self)

    @property
    def n_waypoints(self) -> int:
        """Number of points."""
        return len(self.points)

    @property
    def coordinates(self) -> Tensor:
        """``(points - mean) @ basis`` (n_waypoints, k), float32."""
        return (self.points - self.mean) @ self.basis

    @property
    def length(self) -> float:
        """Length of the polygon through the waypoints, in units of the activations."""
        return float((self.points[1:] - self.points[:-1]).double().norm(dim=1).sum())

    @property
    def distortion(self) -> float:
        """Length over the distance of the ends: 1 for a straight line, infinite for a loop."""
        apart = float((self.points[-1] - self.points[0]).double().norm())
        return self.length / apart if apart > 0 else float("inf")

    def at(self, t: float | Array) -> Tensor:
        """Points of the polygon at times ``t``.

        Parameters
        ----------
        t : float, or array or Tensor of shape (n,)
            In [0, 1].

        Returns
        -------
        Tensor of shape (d,), or (n, d), float32

        Raises
        ------
        ValueError
            A time outside [0, 1], or not finite.
        """
        wanted = torch.as_tensor(t, dtype=torch.float32, device=self.points.device)
        if not bool(((wanted >= 0) & (wanted <= 1)).all()):
            raise ValueError(f"t={t} must lie in [0, 1]: 0 is the start, 1 the end.")
        step = torch.searchsorted(self.times, wanted.reshape(-1).contiguous(), right=True) - 1
        step = step.clamp(0, self.n_waypoints - 2)
        span = self.times[step + 1] - self.times[step]
        part = ((wanted.reshape(-1) - self.times[step]) / span)[:, None]
        found = torch.lerp(self.points[step], self.points[step + 1], part)
        return found.reshape(*wanted.shape, -1)

    def resampled(self, n_waypoints: int) -> ManifoldPath:
        """The path with ``n_waypoints`` points equally spaced along its length.

        Raises
        ------
        ValueError
            ``n_waypoints`` below 2, or a path without length.
        """
        check_waypoints(n_waypoints)
        if self.length == 0:
            raise ValueError("all waypoints are equal: a path of length 0 cannot be resampled.")
        points = resampled(self.points.double(), n_waypoints)
        return replace(self, points=points, times=torch.linspace(0, 1, n_waypoints))

    def reversed(self) -> ManifoldPath:
        """The path from its end to its start."""
        return replace(self, points=self.points.flip(0), times=1 - self.times.flip(0))

    def chord(self) -> ManifoldPath:
        """The straight line between the ends, with as many waypoints and the same subspace."""
        kept = Subspace(self.mean, self.basis)
        return chord(self.points[0], self.points[-1], self.n_waypoints, subspace=kept)

    def lead(self, h: Tensor, aim: Tensor, how: How) -> Tensor:
        """Rows led to points of the path.

        Parameters
        ----------
        h : Tensor of shape (..., d)
            On the path's device.
        aim : Tensor of shape (d,) or (..., d)
            Points of the path, one for all rows or one each.
        how : {"replace", "add", "coordinates"}
            The point itself; ``h + aim - points[0]``; or ``h`` with the coordinates of ``aim``,
            ``h + basis basis' (aim - h)``.

        Returns
        -------
        Tensor of shape (..., d), the dtype of ``h``
        """
        aim = aim.to(h.dtype)
        if how == "replace":
            return aim.expand_as(h)
        if how == "add":
            return h + (aim - self.points[0].to(h.dtype))
        basis = self.basis.to(h.dtype)
        return h + ((aim - h) @ basis) @ basis.mT

    def to(self, device: str | torch.device) -> ManifoldPath:
        """The path on another device."""
        return replace(self, points=self.points.to(device))

    def save(self, directory: str | Path) -> None:
        """Write the path to ``directory`` (safetensors and JSON)."""
        names = ("points", "times", "mean", "basis")
        tensors = {name: getattr(self, name) for name in names}
        artifact.save(directory, type(self).__name__, tensors, {"kind": self.kind})

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The path that :meth:`save` wrote to ``directory``."""
        tensors, config, _ = artifact.load(directory, kind=cls.__name__)
        return cls(kind=config["kind"], **tensors)


def chord(
    start: Array, end: Array, n_waypoints: int = 50, *, subspace: Subspace | None = None
) -> ManifoldPath:
    """Straight line between two points: linear steering, the rival of every curved path.

    Parameters
    ----------
    start, end : array or Tensor of shape (d,), or (n, d)
        Points, or sets whose means are taken.
    n_waypoints : int, default=50
        Both ends included.
    subspace : Subspace, optional
        Carried by the path, see :func:`principal_subspace`. Default: the middle of the two points
        and the direction between them.

    Returns
    -------
    ManifoldPath
        Of the kind ``"chord"``.

    Raises
    ------
    ValueError
        ``n_waypoints`` below 2, ends that are equal or of different widths, or not finite.
    """
    first, last = ends(start, end)
    if subspace is None:
        direction = (last - first) / (last - first).norm()
        subspace = Subspace((first + last) / 2, direction[:, None])
    return path_through(torch.stack([first, last]), n_waypoints, "chord", subspace)


def principal_subspace(X: Array, n_components: float = 0.99) -> Subspace:
    """Mean and leading principal directions of rows.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, d)
    n_components : int or float, default=0.99
        Number of directions, at most the rank of the centered rows; a float below 1: as many as
        hold that part of the variance.

    Returns
    -------
    Subspace
        The largest entry by size of each direction is positive.

    Raises
    ------
    ValueError
        ``n_components`` not positive, or all rows equal.
    """
    rows = as_rows(X).double()
    if not n_components > 0:
        raise ValueError(f"n_components={n_components} must be positive.")
    mean = rows.mean(0)
    values, directions = _principal(rows - mean)
    floor = max(_RANK * float(values[0]), _ROUNDING * float(rows.abs().max()))
    rank = int((values > floor).sum())
    if rank == 0:
        raise ValueError(f"all {len(rows)} rows are equal: they span no subspace.")
    wanted = int(n_components)
    if n_components < 1:
        share = values.square().cumsum(0) / values.square().sum()
        wanted = int((share < n_components).sum()) + 1
    basis = torch.linalg.qr(directions[:, : min(wanted, rank)]).Q
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return Subspace(mean, (basis * largest.sign()).contiguous())


def _principal(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and right singular vectors (d, m), nearly orthonormal."""
    n, d = centered.shape
    gram = centered @ centered.mT if n <= d else centered.mT @ centered
    squares, vectors = torch.linalg.eigh(gram)
    values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    if n <= d:
        vectors = centered.mT @ vectors / values.clamp_min(1e-300)
    return values, vectors


def path_through(curve: Tensor, n_waypoints: int, kind: str, subspace: Subspace) -> ManifoldPath:
    """Path of ``n_waypoints`` points equally spaced along the polygon ``curve`` (m, d)."""
    check_waypoints(n_waypoints)
    times = torch.linspace(0, 1, n_waypoints)
    return ManifoldPath(resampled(curve, n_waypoints), times, kind, *subspace)


def ends(start: Any, end: Any) -> tuple[Tensor, Tensor]:
    """Two different points (d,), float64, each a point or the mean of a set of rows."""
    first, last = end_point(start, "start"), end_point(end, "end")
    last = last.to(first.device)
    if first.shape != last.shape:
        raise ValueError(f"start has {len(first)} features, end has {len(last)}.")
    require_apart(first, last)
    return first, last


def end_point(value: Any, name: str) -> Tensor:
    """Point (d,), float64, of a point (d,) or of a set (n, d): its mean."""
    value = value if isinstance(value, Tensor) else np.asarray(value)
    if value.ndim not in (1, 2):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; give a point (d,) or a set of rows (n, d)."
        )
    rows = as_rows(value[None] if value.ndim == 1 else value, name=name)
    return rows.double().mean(0)


def require_apart(first: Tensor, last: Tensor, tol: float = _EQUAL) -> None:
    """Raise ``ValueError`` if two points are one, to rounding: to ``tol`` times their norm."""
    size = torch.maximum(first.norm(), last.norm())
    if bool((first - last).norm() <= tol * size):
        raise ValueError("start and end are the same point: there is no path. Give two points.")


def check_waypoints(n_waypoints: int) -> None:
    """Raise ``ValueError`` unless there are at least two waypoints, a whole number of them."""
    if not isinstance(n_waypoints, Integral) or n_waypoints < 2:
        raise ValueError(
            f"n_waypoints={n_waypoints!r} must be an integer of at least 2: the start and the end."
        )


def _check(path: ManifoldPath) -> None:
    points, times, mean, basis = path.points, path.times, path.mean, path.basis
    if points.ndim != 2 or len(points) < 2:
        raise ValueError(
            f"points has shape {tuple(points.shape)}; a path needs (n_waypoints, d) with at "
            "least 2 waypoints."
        )
    for name in ("points", "times", "mean", "basis"):
        require_finite(getattr(path, name), name)
    n, d = points.shape
    if times.shape != (n,) or mean.shape != (d,) or basis.ndim != 2 or len(basis) != d:
        raise ValueError(
            f"points {tuple(points.shape)}, times {tuple(times.shape)}, mean {tuple(mean.shape)} "
            f"and basis {tuple(basis.shape)} do not fit: expected ({n}, {d}), ({n},), ({d},) and "
            f"({d}, k)."
        )
    rising = bool((times[1:] > times[:-1]).all())
    if not rising or float(times[0]) != 0 or abs(float(times[-1]) - 1) > 1e-6:
        raise ValueError(f"times must increase from 0 to 1; got {times.tolist()[:3]} ... .")
    identity = torch.eye(basis.shape[1], device=basis.device)
    if basis.shape[1] < 1 or float((basis.mT @ basis - identity).abs().max()) > _ORTHONORMAL:
        raise ValueError(
            f"basis {tuple(basis.shape)} must have orthonormal columns, at least one. "
            "Orthonormalize it (torch.linalg.qr)."
        )
