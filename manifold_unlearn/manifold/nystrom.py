"""Nyström extension: eigenfunctions of a Markov operator at rows it was not fitted on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.kernels import (
    NEAR,
    relative_bandwidth_function,
    scaled_block,
    support_radius,
)
from manifold_unlearn.manifold.markov import LEAST_EIGENVALUE


class FittedOperator(NamedTuple):
    """What the extension needs of a fit; tensors on one device.

    Attributes
    ----------
    landmarks : Tensor of shape (n_landmarks, n_features)
        The rows fitted.
    center : Tensor of shape (n_features,)
        Subtracted before distances are taken.
    squared_support : Tensor of shape (n_landmarks,)
        Squared radius of each fitted row's kernel.
    kernel_sums : Tensor of shape (n_landmarks,)
    eigenfunctions : Tensor of shape (n_landmarks, n_components)
    rates : Tensor of shape (n_components,)
        Eigenvalues of minus the generator, times the bandwidth.
    scale : Tensor of shape (n_landmarks,) or None
        Variable bandwidth ``rho``, in units of ``typical_scale``; None where it is 1.
    typical_scale, intrinsic_dimension : float
        What ``rho`` of new rows is made with.
    bandwidth, alpha : float
    cutoff, far_cutoff : float
        ``r**2 / (4 * bandwidth)`` to which every kernel reaches, and beyond which none does.
    n_neighbors : int
    """

    landmarks: Tensor
    center: Tensor
    squared_support: Tensor
    kernel_sums: Tensor
    eigenfunctions: Tensor
    rates: Tensor
    scale: Tensor | None
    typical_scale: float
    intrinsic_dimension: float
    bandwidth: float
    alpha: float
    cutoff: float
    far_cutoff: float
    n_neighbors: int


class Extended(NamedTuple):
    """Eigenfunctions (n_samples, n_components), float64, and how many rows no kernel reaches."""

    eigenfunctions: Tensor
    n_far: int


def extend(X: Tensor, fitted: FittedOperator) -> Extended:
    """Eigenfunctions at the rows of ``X``.

    The rows' kernel to the fitted ones is normalized as in the fit, applied to the eigenfunctions
    and divided by their eigenvalues: fitted rows return their own. Rows beyond the kernel's reach
    are placed by their nearest neighbors.
    """
    landmarks = fitted.landmarks - fitted.center
    squared = landmarks.square().sum(1)
    width = 4 * fitted.bandwidth
    base, far = width * fitted.cutoff, width * fitted.far_cutoff
    weights = fitted.kernel_sums**-fitted.alpha
    n_components = fitted.eigenfunctions.shape[1]
    result = torch.empty(len(X), n_components, dtype=torch.float64, device=X.device)
    n_far = 0
    for part in row_blocks(len(X), max(1, 2**22 // len(landmarks))):
        queries = X[part].to(landmarks.dtype) - fitted.center
        block = scaled_block(queries, landmarks, queries.square().sum(1), squared)
        own = torch.ones(len(queries), dtype=block.dtype, device=X.device)
        if fitted.scale is not None:
            k = min(NEAR + 1, len(landmarks))
            near = block.topk(k, dim=1, largest=False, sorted=False).values
            own, _ = relative_bandwidth_function(
                near, fitted.intrinsic_dimension, fitted.typical_scale
            )
            block = block / (own[:, None] * fitted.scale[None, :])
        nearest = block.amin(1, keepdim=True)
        n_far += int((nearest > far).sum())
        reach = support_radius(block, fitted.n_neighbors, base, far)
        keep = block <= torch.maximum(reach[:, None], fitted.squared_support[None, :])
        keep |= block <= nearest + base
        kernel = torch.where(keep, torch.exp((nearest - block).double() / width), 0.0)
        kernel *= weights
        kernel /= kernel.sum(1, keepdim=True)
        eigenvalues = 1 - fitted.rates * own[:, None].double() ** 2
        eigenvalues = torch.where(
            eigenvalues.abs() < LEAST_EIGENVALUE, LEAST_EIGENVALUE, eigenvalues
        )
        result[part] = kernel @ fitted.eigenfunctions / eigenvalues
    return Extended(result, n_far)
