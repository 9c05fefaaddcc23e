"""A path between two labels of some rows, of any kind, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from manifold_unlearn.arrays import Array, as_rows
from manifold_unlearn.manifold.geodesic import GeodesicMap
from manifold_unlearn.manifold.tangent import TangentBundle
from manifold_unlearn.steer.path_geodesic import geodesic_path
from manifold_unlearn.steer.path_tangent import tangent_path
from manifold_unlearn.steer.paths import ManifoldPath
from manifold_unlearn.steer.spline import CentroidSpline, Coordinates

PathKind: TypeAlias = Literal["chord", "spline", "diffusion", "geodesic", "tangent"]


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
    kind : {"chord", "spline", "diffusion", "geodesic", "tangent"}, default="spline"
        ``"spline"``, ``"diffusion"``: through the means of all labels
        (:class:`~manifold_unlearn.steer.spline.CentroidSpline` in those coordinates).
        ``"chord"``: straight from one mean to the other. ``"geodesic"``: along the rows
        (:func:`~manifold_unlearn.steer.path_geodesic.geodesic_path`). ``"tangent"``: that,
        shortened on the charts of the rows
        (:func:`~manifold_unlearn.steer.path_tangent.tangent_path`).
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
    if kind in ("geodesic", "tangent") and (periodic or order is not None):
        raise ValueError(
            f"kind={kind!r} finds its way along the rows; periodic and order are for splines."
        )
    if kind in ("chord", "spline", "diffusion"):
        coordinates: Coordinates = "diffusion" if kind == "diffusion" else "pca"
        spline = CentroidSpline(coordinates, periodic=periodic, order=order)
        path = spline.fit(X, labels).path(start, end, n_waypoints)
        return path.chord() if kind == "chord" else path
    rows, member = as_rows(X), np.asarray(labels)
    if len(member) != len(rows):
        raise ValueError(f"{len(member)} labels for {len(rows)} rows; give one a row.")
    ends = [rows[torch.as_tensor(member == label, device=rows.device)] for label in (start, end)]
    for label, own in zip((start, end), ends, strict=True):
        if not len(own):
            raise ValueError(f"no row is labeled {label!r}; labels are {np.unique(member)[:20]}.")
    path = geodesic_path(GeodesicMap(1).fit(X), ends[0], ends[1], n_waypoints)
    return tangent_path(TangentBundle().fit(X), path) if kind == "tangent" else path
