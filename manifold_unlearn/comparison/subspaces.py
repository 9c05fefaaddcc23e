"""Leading principal subspaces of clouds, the angles between them and their geodesic distance."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, generator, restore
from manifold_unlearn.comparison.mmd import all_equal, two_clouds
from manifold_unlearn.manifold.grassmann import angles_between

__all__ = ["grassmann_distance", "principal_angles", "principal_axes"]

Dimension: TypeAlias = "int | tuple[int, int] | Literal['auto']"

_EXACT = 1536  # rows or columns up to which the spectrum is computed whole
_SKETCH = 256  # leading directions computed beyond that
_PASSES = 4  # of the sketch over the data
_LEAST_SHARE, _MOST_SHARE = 0.5, 0.99  # of the variance that an automatic dimension may hold
_CLEAR = 2.0  # ratio of one variance to the next that is a gap
_RELATIVE_RANK = 1e-10  # variance, relative to the largest, below which a direction is rounding


class PrincipalAxes(NamedTuple):
    """Leading principal directions of a cloud.

    ``directions`` (n_features, count), orthonormal; ``dimension``, where the spectrum is best cut;
    ``clear``, whether the variance falls there by at least a half.
    """

    directions: Tensor
    dimension: int
    clear: bool


def principal_axes(X: Tensor, random_state: Any = 0) -> PrincipalAxes:
    """Principal directions of the rows of ``X``, float64, and where to cut them.

    The cut is at the largest ratio of one variance to the next, between the dimensions that hold
    half and 99 % of the variance: there the subspace is determined best. Where no ratio reaches 2,
    it is at the participation ratio ``sum(variance)**2 / sum(variance**2)``. Beyond 1,536 rows and
    columns the 256 leading directions come from a randomized block power iteration.

    Raises
    ------
    ValueError
        All rows are equal.
    """
    centered = (X - X.mean(0)).double()
    scale = centered.abs().max()
    if float(scale) == 0 or all_equal(X):
        raise ValueError(
            f"all {len(X)} rows are equal and span no subspace. Give data with distinct rows."
        )
    centered = centered / scale
    variances, directions = _leading(centered, random_state)
    rank = int((variances > _RELATIVE_RANK * variances[0]).sum())
    variances = variances[:rank]
    total = float(centered.square().sum())
    share = variances.cumsum(0) / total
    least, most = (min(int((share < part).sum()), rank - 1) for part in (_LEAST_SHARE, _MOST_SHARE))
    rest = max(total - float(variances.sum()), 0.0)  # of directions not computed
    n_rest = max(min(X.shape) - rank, 1)
    following = torch.cat([variances[1:], variances.new_full((1,), rest / n_rest)])
    ratios = variances / following.clamp_min(_RELATIVE_RANK * float(variances[0]))
    at = least + int(ratios[least : most + 1].argmax())
    if float(ratios[at]) >= _CLEAR:
        return PrincipalAxes(directions[:, :rank], at + 1, True)
    squares = float(variances.square().sum()) + rest**2 / n_rest
    cut = min(max(round(total**2 / squares), 1), rank)
    return PrincipalAxes(directions[:, :rank], cut, False)


def leading_directions(axes: PrincipalAxes, dimension: int) -> Tensor:
    """The first ``dimension`` directions.

    Raises
    ------
    ValueError
        There are not so many.
    """
    count = axes.directions.shape[1]
    if isinstance(dimension, str) or not 1 <= dimension <= count:
        raise ValueError(
            f"dimension={dimension!r} must lie between 1 and {count}, the directions in which the "
            f"rows vary{'' if count < _SKETCH else ' or that are computed'}. "
            "Lower it, or use 'auto'."
        )
    return axes.directions[:, :dimension]


def _leading(X: Tensor, random_state: Any) -> tuple[Tensor, Tensor]:
    """Variances, descending, and orthonormal directions ``(n_features, count)``."""
    n, d = X.shape
    if min(n, d) > _EXACT:
        start = torch.randn(d, _SKETCH + 16, generator=generator(random_state), dtype=torch.float64)
        basis = torch.linalg.qr(start.to(X.device)).Q
        for _ in range(_PASSES):
            basis = torch.linalg.qr(X.T @ (X @ basis)).Q
        values, rotation = torch.linalg.eigh((X @ basis).T @ (X @ basis))
        return values.flip(0)[:_SKETCH], (basis @ rotation.flip(1))[:, :_SKETCH]
    if d <= n:
        values, vectors = torch.linalg.eigh(X.T @ X)
        return values.flip(0).clamp_min(0), vectors.flip(1)
    values, vectors = torch.linalg.eigh(X @ X.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    count = int((values > _RELATIVE_RANK * values[0]).sum())
    return values[:count], torch.linalg.qr(X.T @ vectors[:, :count]).Q


def principal_angles(
    A: Array,
    B: Array,
    *,
    dimension: Dimension = "auto",
    device: Device = "auto",
    random_state: Any = 0,
) -> Any:
    """Principal angles between the leading principal subspaces of two clouds.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_A, n_features) and (n_B, n_features)
        The mean of either is taken off.
    dimension : int, pair of int or "auto", default="auto"
        Of the subspaces; a pair: of A's and of B's. ``"auto"``: where :func:`principal_axes` cuts
        either spectrum; the lower of both unless both fall by half there.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Starts the power iteration of large data.

    Returns
    -------
    array or Tensor of shape (min(dimension_A, dimension_B),)
        In radians, ascending, in [0, pi / 2]; accurate for tiny angles too.

    Raises
    ------
    ValueError
        Unequal features, fewer than 2 rows, equal rows, or a dimension above the rank.

    References
    ----------
    Björck and Golub (1973), Numerical methods for computing angles between linear subspaces, Math.
    Comp. 27 (sines for small angles).
    """
    bases = principal_bases(A, B, dimension, device, random_state)
    return restore(angles_between(*bases), A)


def principal_bases(
    A: Array, B: Array, dimension: Dimension, device: Device, random_state: Any
) -> tuple[Tensor, Tensor]:
    """Bases of the leading principal subspaces of both sides, float64."""
    X, Y = two_clouds(A, B, device, min_samples=2)
    found = []
    for name, side in (("A", X), ("B", Y)):
        try:
            found.append(principal_axes(side, random_state))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if isinstance(dimension, tuple):
        sizes = dimension
    elif dimension == "auto":
        sizes = (found[0].dimension, found[1].dimension)
        if not (found[0].clear and found[1].clear):
            sizes = (min(sizes), min(sizes))
    else:
        sizes = (dimension, dimension)
    return leading_directions(found[0], sizes[0]), leading_directions(found[1], sizes[1])


def grassmann_distance(
    A: Array,
    B: Array,
    *,
    dimension: Dimension = "auto",
    backend: Literal["torch", "geomstats"] = "torch",
    device: Device = "auto",
    random_state: Any = 0,
) -> float:
    """Geodesic distance on the Grassmannian of the leading principal subspaces of two clouds.

    Root of the sum of squared principal angles; for subspaces of different dimension each missing
    angle counts as a right one.

    Parameters
    ----------
    A, B, dimension, device, random_state
        As in :func:`principal_angles`.
    backend : {"torch", "geomstats"}, default="torch"
        ``"geomstats"``: by its logarithm map, in the span of both subspaces and in our units: its
        own distance is sqrt(2) times as long. It has no logarithm at a right angle.

    Returns
    -------
    float
        In radians, at most ``pi / 2 * sqrt(max dimension)``.

    Raises
    ------
    ValueError
        As :func:`principal_angles`; with geomstats, subspaces of different dimension or at a right
        angle.
    ImportError
        geomstats is not installed.

    References
    ----------
    Ye and Lim (2016), Schubert varieties and distances between subspaces of different dimensions,
    SIAM J. Matrix Anal. Appl. 37.
    """
    if backend not in ("torch", "geomstats"):
        raise ValueError(f"backend={backend!r} is not known. Use 'torch' or 'geomstats'.")
    first, second = principal_bases(A, B, dimension, device, random_state)
    if backend == "geomstats":
        return _by_geomstats(first, second)
    return geodesic_length(first, second)


def geodesic_length(first: Tensor, second: Tensor) -> float:
    """Length of the geodesic between the spans of two orthonormal bases, in radians."""
    missing = abs(first.shape[1] - second.shape[1])
    squared = float(angles_between(first, second).square().sum())
    return math.sqrt(squared + missing * (math.pi / 2) ** 2)


def _by_geomstats(first: Tensor, second: Tensor) -> float:
    try:
        from geomstats.geometry.grassmannian import Grassmannian
    except ImportError as error:
        raise ImportError(
            "backend='geomstats' needs geomstats: pip install geomstats, or backend='torch'."
        ) from error
    dimension = first.shape[1]
    if second.shape[1] != dimension:
        raise ValueError(
            f"the subspaces have dimensions {dimension} and {second.shape[1]}; geomstats compares "
            "equal ones. Give dimension, or use backend='torch'."
        )
    if float(angles_between(first, second)[-1]) > math.pi / 2 - 1e-6:
        raise ValueError(
            "the subspaces meet at a right angle, where geomstats has no logarithm. "
            "Use backend='torch'."
        )
    n_features = first.shape[0]
    if 2 * dimension < n_features:  # both lie in this many coordinates
        joint = torch.linalg.qr(torch.cat([first, second], 1)).Q
        first, second = joint.T @ first, joint.T @ second
    if first.shape[0] == dimension:
        return 0.0  # the whole space
    projections = [(basis @ basis.T).cpu().numpy() for basis in (first, second)]
    space = Grassmannian(first.shape[0], dimension)
    return float(space.metric.dist(*projections)) / math.sqrt(2)
