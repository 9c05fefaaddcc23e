"""Subspaces as points of the Grassmann manifold: angles, geodesics, means, transported frames."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, require_finite, restore

Backend: TypeAlias = Literal["torch", "geomstats"]

_STEPS = 200
_RANK = 1e-10  # of a basis' largest singular value, below which its columns are dependent
_RIGHT_ANGLE = 1e-7  # radians from 90 degrees at which a geodesic is no longer unique


def subspace_angles(A: Array, B: Array) -> Any:
    """Principal angles between the column spaces of ``A`` and ``B``.

    From cosines and sines together, so that small angles keep their relative accuracy and right
    ones too (Björck and Golub 1973).

    Parameters
    ----------
    A : array or Tensor of shape (..., d, k)
        Columns of full rank; they are orthonormalized. Leading axes broadcast.
    B : array or Tensor of shape (..., d, l)

    Returns
    -------
    array or Tensor of shape (..., min(k, l))
        Radians in [0, pi / 2], ascending.

    Raises
    ------
    ValueError
        Other shapes, NaN or infinity, or dependent columns.

    References
    ----------
    Björck and Golub (1973), Numerical methods for computing angles between linear subspaces,
    Math. Comp. 27.
    """
    first, second = _pair(A, B)
    return restore(angles_between(first, second), A)


def subspace_distance(A: Array, B: Array) -> Any:
    """Geodesic distance on the Grassmann manifold, the norm of the principal angles.

    Parameters
    ----------
    A, B : array or Tensor of shape (..., d, k)
        As in :func:`subspace_angles`, of one dimension.

    Returns
    -------
    array or Tensor of shape (...,)
        Radians, at most ``sqrt(k) * pi / 2``.

    Raises
    ------
    ValueError
        As :func:`subspace_angles`, and for subspaces of different dimensions.
    """
    first, second = _pair(A, B, alike=True)
    return restore(angles_between(first, second).norm(dim=-1), A)


def subspace_path(A: Array, B: Array, times: Array) -> Any:
    """Subspaces along the shortest geodesic from ``A`` (time 0) to ``B`` (time 1).

    Parameters
    ----------
    A, B : array or Tensor of shape (d, k)
    times : array or Tensor of shape (n_times,)
        Beyond 0 to 1 the geodesic goes on.

    Returns
    -------
    array or Tensor of shape (n_times, d, k)
        Orthonormal bases; their columns move in parallel.

    Raises
    ------
    ValueError
        As :func:`subspace_distance`, and where a principal angle is right: the geodesic is then
        not unique.
    """
    first, second = _pair(A, B, alike=True)
    if first.ndim != 2:
        raise ValueError(f"A has shape {tuple(first.shape)}; expected (d, k), one subspace.")
    at = torch.as_tensor(times, dtype=torch.float64, device=first.device).reshape(-1)
    largest = float(angles_between(first, second)[-1])
    if largest > math.pi / 2 - _RIGHT_ANGLE:
        raise ValueError(
            "the subspaces meet at a right angle: no shortest geodesic is unique. "
            "Go by way of a third subspace."
        )
    velocity = _log(first, second)
    path = _exp(first.expand(len(at), -1, -1), at[:, None, None] * velocity)
    return restore(path, A)


def subspace_mean(
    bases: Array, *, weights: Array | None = None, backend: Backend = "torch", tol: float = 1e-10
) -> Any:
    """Fréchet mean of subspaces: the one of least mean squared geodesic distance.

    The mean tangent of a region is the mean of its tangent bases.

    Parameters
    ----------
    bases : array or Tensor of shape (n, d, k)
    weights : array or Tensor of shape (n,), optional
        Not negative; default: equal.
    backend : {"torch", "geomstats"}, default="torch"
        ``"torch"``: gradient steps from the leading eigenvectors of the mean projector, on bases.
        ``"geomstats"``: that package, on d x d projectors: for small d.
    tol : float
        Length of a step, in radians, at which the iteration rests.

    Returns
    -------
    array or Tensor of shape (d, k)
        Orthonormal basis.

    Raises
    ------
    ValueError
        Other shapes, bad weights, or an unknown backend.
    ImportError
        geomstats is not installed.
    """
    stack = _orthonormal(_checked(bases, "bases"), "bases")
    if stack.ndim != 3 or len(stack) == 0:
        raise ValueError(f"bases have shape {tuple(stack.shape)}; expected (n, d, k), n >= 1.")
    share = shares(weights, len(stack), stack.device)
    if backend == "geomstats":
        return restore(_mean_by_geomstats(stack, share), bases)
    if backend != "torch":
        raise ValueError(f"backend={backend!r} is not known. Use 'torch' or 'geomstats'.")
    n, d, k = stack.shape
    spread = (stack * share.sqrt()[:, None, None]).movedim(1, 0).reshape(d, n * k)
    mean = torch.linalg.svd(spread, full_matrices=False).U[:, :k]
    for _ in range(_STEPS):
        step = (share[:, None, None] * _log(mean.expand(n, -1, -1), stack)).sum(0)
        mean = _exp(mean[None], step[None])[0]
        if float(torch.linalg.matrix_norm(step)) <= tol:
            break
    return restore(mean, bases)


def align_frames(source: Array, target: Array) -> Any:
    """Orthogonal maps between the coordinates of tangent frames at neighboring points.

    ``O`` of least ``|source - target @ O|``, a discrete parallel transport: coordinates ``c`` of a
    vector in ``source`` become ``O @ c`` in ``target`` (Singer and Wu 2012).

    Parameters
    ----------
    source, target : array or Tensor of shape (..., d, k)
        Orthonormal columns, as :meth:`TangentBundle.tangent_bases` gives them.

    Returns
    -------
    array or Tensor of shape (..., k, k)

    Raises
    ------
    ValueError
        Other shapes, NaN or infinity.

    References
    ----------
    Singer and Wu (2012), Vector diffusion maps and the connection Laplacian, Comm. Pure Appl.
    Math. 65.
    """
    first, second = _checked(source, "source"), _checked(target, "target")
    _require_alike(first, second, "source", "target")
    U, _, Vh = torch.linalg.svd(second.to(first.device).mT @ first, full_matrices=False)
    return restore(U @ Vh, source)


def transport(vectors: Array, source: Array, target: Array) -> Any:
    """Tangent vectors carried from the space of ``source`` to that of ``target``.

    Parameters
    ----------
    vectors : array or Tensor of shape (..., d)
        Components normal to ``source`` are dropped.
    source, target : array or Tensor of shape (..., d, k)
        Orthonormal columns. Along a path, transport from point to point.

    Returns
    -------
    array or Tensor of shape (..., d)
        As long as the tangential part of ``vectors``.
    """
    first, second = _checked(source, "source"), _checked(target, "target").to(torch.float64)
    moved = torch.as_tensor(align_frames(first, second))
    v = torch.as_tensor(vectors, dtype=torch.float64, device=first.device)
    if v.shape[-1] != first.shape[-2]:
        raise ValueError(f"vectors have {v.shape[-1]} entries; expected {first.shape[-2]}.")
    carried = second.to(first.device) @ (moved @ (first.mT @ v[..., None]))
    return restore(carried[..., 0], vectors)


def shares(weights: Array | None, count: int, device: torch.device) -> Tensor:
    """Weights that sum to 1, float64; equal for None.

    Raises
    ------
    ValueError
        Another length, a negative or non-finite weight, or all zero.
    """
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64, device=device)
    share = torch.as_tensor(weights, dtype=torch.float64, device=device)
    if share.shape != (count,):
        raise ValueError(f"weights have shape {tuple(share.shape)}; expected ({count},).")
    if not bool(torch.isfinite(share).all()) or bool((share < 0).any()) or not float(share.sum()):
        raise ValueError("weights must be finite, not negative and not all zero.")
    return share / share.sum()


def geomstats_numpy() -> None:
    """Make sure that geomstats is there and computes with numpy.

    Raises
    ------
    ImportError
        It is not installed, or was imported with another backend.
    """
    try:
        import geomstats.backend
    except ImportError as error:
        raise ImportError(
            "backend='geomstats' needs geomstats: pip install geomstats, or backend='torch'."
        ) from error
    if geomstats.backend.__name__ != "geomstats.numpy":
        raise ImportError(
            "geomstats runs on another backend than numpy. Set GEOMSTATS_BACKEND=numpy before it "
            "is imported, or use backend='torch'."
        )


def _checked(bases: Array, name: str) -> Tensor:
    if not isinstance(bases, Tensor):
        bases = torch.from_numpy(np.array(bases, dtype=np.float64))
    bases = bases.detach().double()
    if bases.ndim < 2 or bases.shape[-1] < 1 or bases.shape[-1] > bases.shape[-2]:
        raise ValueError(
            f"{name} has shape {tuple(bases.shape)}; expected (..., d, k) with 1 <= k <= d."
        )
    require_finite(bases if bases.ndim > 2 else bases[None], name)
    return bases


def _orthonormal(bases: Tensor, name: str) -> Tensor:
    U, values, Vh = torch.linalg.svd(bases, full_matrices=False)
    if bases.numel() and bool((values[..., -1] <= _RANK * values[..., 0]).any()):
        raise ValueError(
            f"{name} has dependent columns and spans fewer than {bases.shape[-1]} dimensions. "
            "Drop the dependent ones."
        )
    return U @ Vh  # the nearest orthonormal basis: one already so stays itself


def _require_alike(first: Tensor, second: Tensor, one: str, other: str) -> None:
    if first.shape[-2:] != second.shape[-2:]:
        raise ValueError(
            f"{one} has shape {tuple(first.shape)}, {other} {tuple(second.shape)}: both must be "
            "(..., d, k) with the same d and k."
        )


def _pair(A: Array, B: Array, *, alike: bool = False) -> tuple[Tensor, Tensor]:
    first, second = _checked(A, "A"), _checked(B, "B")
    second = second.to(first.device)
    if alike:
        _require_alike(first, second, "A", "B")
    if first.shape[-2] != second.shape[-2]:
        raise ValueError(f"A has {first.shape[-2]} rows, B has {second.shape[-2]}; give the same.")
    return _orthonormal(first, "A"), _orthonormal(second, "B")


def angles_between(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles ``(..., k)``, ascending, of orthonormal bases ``(..., d, k or more)``."""
    if first.shape[-1] < second.shape[-1]:
        first, second = second, first
    product = first.mT @ second
    cosines = torch.linalg.svdvals(product)
    sines = torch.linalg.svdvals(second - first @ product).flip(-1)
    return torch.atan2(sines[..., : cosines.shape[-1]], cosines)


def _log(base: Tensor, other: Tensor) -> Tensor:
    """Velocity (..., d, k) at ``base`` of the geodesic that reaches ``other`` at time 1."""
    U, cosines, Vh = torch.linalg.svd(base.mT @ other)
    turned = other @ Vh.mT  # columns that pair with those of base @ U
    away = turned - base @ (base.mT @ turned)
    sines = away.norm(dim=-2)
    angles = torch.atan2(sines, cosines)
    scale = torch.where(sines > 0, angles / sines.clamp_min(1e-300), 1.0)
    return (away * scale[..., None, :]) @ U.mT


def _exp(base: Tensor, velocity: Tensor) -> Tensor:
    U, angles, Vh = torch.linalg.svd(velocity, full_matrices=False)
    turned = (base @ Vh.mT) * angles.cos()[..., None, :] + U * angles.sin()[..., None, :]
    return torch.linalg.qr(turned).Q @ _signs(turned) @ Vh


def _signs(turned: Tensor) -> Tensor:
    """Undo the signs that a QR decomposition gives its columns."""
    return torch.diag_embed(torch.linalg.qr(turned).R.diagonal(dim1=-2, dim2=-1).sign())


def _mean_by_geomstats(stack: Tensor, share: Tensor) -> Tensor:
    geomstats_numpy()
    from geomstats.geometry.grassmannian import Grassmannian
    from geomstats.learning.frechet_mean import FrechetMean

    d, k = stack.shape[1:]
    projectors = (stack @ stack.mT).cpu().numpy()
    mean = FrechetMean(Grassmannian(d, k))
    mean.set(epsilon=1e-10, max_iter=_STEPS)
    mean.fit(projectors, weights=share.cpu().numpy())
    _, vectors = np.linalg.eigh(np.asarray(mean.estimate_))
    return torch.from_numpy(vectors[:, ::-1][:, :k].copy()).to(stack.device)
