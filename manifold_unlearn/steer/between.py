"""A path between two labels of some rows, of any kind, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch

from manifold_unlearn.arrays import Array, as_rows
from manifold_unlearn.manifold.geodesic import GeodesicMap
from manifold_unlearn.manifold.tangent import TangentBundle
from manifold_unlearn.steer.path_geodesic import geodesic_path
from manifold_unlearn.steer.path_order import distinct_labels
from manifold_unlearn.steer.path_tangent import tangent_path
from manifold_unlearn.steer.paths import ManifoldPath
from manifold_unlearn.steer.preimage import KernelPreimage
from manifold_unlearn.steer.spline import CentroidSpline, Coordinates

PathKind: TypeAlias = Literal["chord", "spline", "diffusion", "geodesic", "tangent", "preimage"]


def path_between(
    X: Array,
    labels: Sequence[Any],
    start: Any,
    end: Any,
    n_waypoints: int = 50,
    *,
    kind: PathKind = "spline",
    periodic: bool = False,
    order: Sequence[Any] | None = None,
) -> ManifoldPath:
    """Path from the rows of one label to those of another.

    The parameters of each kind are its defaults: for others call what makes it, which is named
    here.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, d)
    labels : sequence of shape (n_samples,)
    start, end : labels
    n_waypoints : int, default=50
        Both ends included; equally spaced.
    kind : {"chord", "spline", "diffusion", "geodesic", "tangent", "preimage"}, default="spline"
        ``"spline"``, ``"diffusion"``: through the means of all labels
        (:class:`~manifold_unlearn.steer.spline.CentroidSpline` in those coordinates).
        ``"chord"``: straight from one mean to the other. ``"geodesic"``: along the rows
        (:func:`~manifold_unlearn.steer.path_geodesic.geodesic_path`). ``"tangent"``: that,
        shortened on the charts of the rows
        (:func:`~manifold_unlearn.steer.path_tangent.tangent_path`). ``"preimage"``: straight
        between the means in kernel principal components, brought back
        (:class:`~manifold_unlearn.steer.preimage.KernelPreimage`).
    periodic : bool, default=False
        Whether the labels close a circle; splines then go the shorter way around.
    order : sequence of labels, optional
        All labels in their order, for a spline; default as :class:`CentroidSpline` finds it.

    Returns
    -------
    ManifoldPath

    Raises
    ------
    ValueError
        An unknown kind, ``periodic`` or ``order`` with a kind that has no use for it, a label that
        no row has, the same label twice, and as the function that makes the kind.
    """
    if kind not in get_args(PathKind):
        raise ValueError(f"kind={kind!r} is not one of {', '.join(get_args(PathKind))}.")
    if kind in ("chord", "spline", "diffusion"):
        coordinates: Coordinates = "diffusion" if kind == "diffusion" else "pca"
        spline = CentroidSpline(coordinates, periodic=periodic, order=order)
        path = spline.fit(X, labels).path(start, end, n_waypoints)
        return path.chord() if kind == "chord" else path
    if periodic or order is not None:
        raise ValueError(
            f"kind={kind!r} finds its way by the rows; periodic and order are for splines."
        )
    rows = as_rows(X)
    names, member = distinct_labels(labels, len(rows))
    for label in (start, end):
        if label not in names:
            raise ValueError(f"no row is labeled {label!r}; labels are {names[:20]}.")
    if start == end:
        raise ValueError(f"start and end are the same label, {start!r}: there is no path.")
    at = torch.from_numpy(member).to(rows.device)
    ends = [rows[at == names.index(label)] for label in (start, end)]
    if kind == "preimage":
        return KernelPreimage().fit(X).path(ends[0], ends[1], n_waypoints)
    path = geodesic_path(GeodesicMap(1).fit(X), ends[0], ends[1], n_waypoints)
    return tangent_path(TangentBundle().fit(X), path) if kind == "tangent" else path
