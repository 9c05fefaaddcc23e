"""Covariances as points of the manifold of symmetric positive definite matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, require_finite, restore
from manifold_unlearn.manifold.grassmann import Backend, geomstats_numpy, shares

SpdMetric: TypeAlias = Literal["affine", "log_euclidean"]

_STEPS = 200


def spd_distance(A: Array, B: Array, *, metric: SpdMetric = "affine") -> Any:
    """Distance of symmetric positive definite matrices.

    ``"affine"``: ``|log(A**-1/2 B A**-1/2)|``, the same after any invertible linear change of the
    data (Pennec, Fillard and Ayache 2006). ``"log_euclidean"``: ``|log A - log B|``, cheaper, the
    same after rotation and scale (Arsigny et al. 2007). Equal where A and B commute.

    Parameters
    ----------
    A, B : array or Tensor of shape (..., d, d)
    metric : {"affine", "log_euclidean"}, default="affine"

    Returns
    -------
    array or Tensor of shape (...,)

    Raises
    ------
    ValueError
        A matrix that is not symmetric positive definite, other shapes, or an unknown metric.
    """
    _check_metric(metric)
    first, second = _checked(A, "A"), _checked(B, "B")
    second = second.to(first.device)
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"A is {first.shape[-1]} x {first.shape[-1]}, B is {second.shape[-1]} x "
            f"{second.shape[-1]}. Give matrices of one size."
        )
    if metric == "log_euclidean":
        difference = _function(first, torch.log) - _function(second, torch.log)
        return restore(torch.linalg.matrix_norm(difference), A)
    factor = torch.linalg.cholesky(first)
    half = torch.linalg.solve_triangular(factor, second, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    values = torch.linalg.eigvalsh((whitened + whitened.mT) / 2)
    return restore(values.clamp_min(1e-300).log().norm(dim=-1), A)


def spd_mean(
    matrices: Array,
    *,
    weights: Array | None = None,
    metric: SpdMetric = "affine",
    backend: Backend = "torch",
    tol: float = 1e-12,
) -> Any:
    """Fréchet mean of symmetric positive definite matrices.

    ``"affine"``: of two, their geometric mean; by fixed-point iteration from the log-Euclidean
    mean. ``"log_euclidean"``: ``exp(mean log)``, in closed form. Neither swells the determinant as
    the arithmetic mean does: it is the geometric mean of the determinants.

    Parameters
    ----------
    matrices : array or Tensor of shape (n, d, d)
    weights : array or Tensor of shape (n,), optional
        Not negative; default: equal.
    metric : {"affine", "log_euclidean"}, default="affine"
    backend : {"torch", "geomstats"}, default="torch"
    tol : float
        Norm of a step at which the iteration rests.

    Returns
    -------
    array or Tensor of shape (d, d)

    Raises
    ------
    ValueError
        As :func:`spd_distance`, and for bad weights or an unknown backend.
    ImportError
        geomstats is not installed.
    """
    _check_metric(metric)
    stack = _checked(matrices, "matrices")
    if stack.ndim != 3 or len(stack) == 0:
        raise ValueError(f"matrices have shape {tuple(stack.shape)}; expected (n, d, d), n >= 1.")
    share = shares(weights, len(stack), stack.device)
    if backend == "geomstats":
        return restore(_mean_by_geomstats(stack, share, metric), matrices)
    if backend != "torch":
        raise ValueError(f"backend={backend!r} is not known. Use 'torch' or 'geomstats'.")
    mean = _function((share[:, None, None] * _function(stack, torch.log)).sum(0), torch.exp)
    if metric == "log_euclidean":
        return restore(mean, matrices)
    size = 1.0
    previous = float("inf")
    for _ in range(_STEPS):
        root, inverse = _function(mean, torch.sqrt), _function(mean, torch.rsqrt)
        logs = _function(inverse @ stack @ inverse, torch.log)
        step = (share[:, None, None] * logs).sum(0)
        length = float(torch.linalg.matrix_norm(step))
        if length <= tol:
            break
        size = size / 2 if length > previous else size  # far apart: full steps overshoot
        previous = length
        mean = root @ _function(size * step, torch.exp) @ root
        mean = (mean + mean.mT) / 2
    return restore(mean, matrices)


def _check_metric(metric: str) -> None:
    if metric not in ("affine", "log_euclidean"):
        raise ValueError(f"metric={metric!r} is not known. Use 'affine' or 'log_euclidean'.")


def _checked(matrices: Array, name: str) -> Tensor:
    if not isinstance(matrices, Tensor):
        matrices = torch.from_numpy(np.array(matrices, dtype=np.float64))
    narrow = matrices.dtype in (torch.float32, torch.float16, torch.bfloat16)
    values = matrices.detach().double()
    if values.ndim < 2 or values.shape[-1] != values.shape[-2] or values.shape[-1] < 1:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected (..., d, d).")
    require_finite(values if values.ndim > 2 else values[None], name)
    flat = values.reshape(-1, *values.shape[-2:])
    scale = flat.abs().amax((1, 2)).clamp_min(1e-300)
    uneven = (flat - flat.mT).abs().amax((1, 2)) > (1e-2 if narrow else 1e-8) * scale
    values = (values + values.mT) / 2
    least = torch.linalg.eigvalsh(values).reshape(flat.shape[:2])[:, 0]
    bad = uneven | (least <= 0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        what = "not symmetric" if bool(uneven[row]) else f"of least eigenvalue {least[row]:.3g}"
        raise ValueError(
            f"{name} must be symmetric positive definite; matrix {row} is {what}. "
            "Add a multiple of the identity to a singular covariance."
        )
    return values


def _function(matrices: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Function of symmetric matrices through their eigenvalues."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    if of is not torch.exp:
        values = values.clamp_min(1e-300)
    return (vectors * of(values)[..., None, :]) @ vectors.mT


def _mean_by_geomstats(stack: Tensor, share: Tensor, metric: str) -> Tensor:
    geomstats_numpy()
    from geomstats.geometry.spd_matrices import (
        SPDAffineMetric,
        SPDLogEuclideanMetric,
        SPDMatrices,
    )
    from geomstats.learning.frechet_mean import FrechetMean

    space = SPDMatrices(stack.shape[-1], equip=False)
    space.equip_with_metric(SPDAffineMetric if metric == "affine" else SPDLogEuclideanMetric)
    mean = FrechetMean(space)
    if metric == "affine":
        mean.set(epsilon=1e-12, max_iter=_STEPS)
    mean.fit(stack.cpu().numpy(), weights=share.cpu().numpy())
    return torch.from_numpy(np.asarray(mean.estimate_)).to(stack.device)
