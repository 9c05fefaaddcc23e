"""Classical multidimensional scaling, from all distances or those of landmarks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks

_DENSE = 600  # landmarks up to which the eigenproblem is solved densely
_NEGLIGIBLE = 1e-6  # of the largest eigenvalue
_ITERATIONS = 300
_TOLERANCE = 1e-7
_BLOCK = 2**24


class Scaling(NamedTuple):
    """The linear map from squared distances to coordinates, float64.

    ``triangulation`` (m, n_components); ``mean_squared`` (m,); ``eigenvalues`` (n_components,),
    descending, 0 where the distances embed in fewer coordinates.
    """

    triangulation: Tensor
    mean_squared: Tensor
    eigenvalues: Tensor

    def coordinates(self, distances: Tensor) -> Tensor:
        """Coordinates (n, n_components) of points at ``distances`` (m, n) from the landmarks."""
        out = torch.empty(
            distances.shape[1],
            self.triangulation.shape[1],
            dtype=torch.float64,
            device=distances.device,
        )
        for block in row_blocks(len(out), max(1, _BLOCK // len(distances))):
            gap = distances[:, block].double().square() - self.mean_squared[:, None]
            out[block] = -gap.mT @ self.triangulation / 2
        return out


def classical_scaling(distances: Tensor, n_components: int) -> Scaling:
    """Scaling of symmetric ``distances`` (m, m).

    Leading eigenvectors of the doubly centered squared distances; the largest entry of each is
    positive. New points are placed by triangulation, which returns the embedding at the landmarks.

    References
    ----------
    Torgerson (1952), Psychometrika 17. De Silva and Tenenbaum (2004), Sparse multidimensional
    scaling using landmark points.
    """
    m = len(distances)
    if m <= _DENSE:
        squared = distances.double().square()
        mean = squared.mean(0)
        centered = -(squared - mean - mean[:, None] + mean.mean()) / 2
        values, vectors = torch.linalg.eigh(centered)
        values, vectors = values.flip(0)[:n_components], vectors.flip(1)[:, :n_components]
    else:
        mean, values, vectors = _by_iteration(distances, n_components)
    at = vectors.abs().argmax(0)
    vectors = vectors * vectors[at, torch.arange(vectors.shape[1], device=at.device)].sign()
    carried = values > _NEGLIGIBLE * values[:1]
    scale = torch.where(carried, values.clamp_min(1e-300).rsqrt(), 0.0)
    return Scaling(vectors * scale, mean, torch.where(carried, values, 0.0))


def _by_iteration(distances: Tensor, n_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squares, eigenvalues and eigenvectors, by subspace iteration from a fixed start."""
    m = len(distances)
    squared = distances.square()
    mean = squared.mean(0, dtype=torch.float64)
    width = min(m, 2 * n_components + 8)
    made = torch.Generator().manual_seed(0)
    start = torch.randn(m, width, generator=made, dtype=torch.float64)
    basis = torch.linalg.qr(start.to(distances.device)).Q
    before = torch.zeros(n_components, dtype=torch.float64, device=distances.device)
    for _ in range(_ITERATIONS):
        basis = basis - basis.mean(0)
        image = (squared @ basis.to(squared)).double() / -2
        image = image - image.mean(0)
        values, rotation = torch.linalg.eigh(basis.mT @ image)
        order = values.argsort(descending=True)[:n_components]
        values = values[order]
        if bool(((values - before).abs() <= _TOLERANCE * values[0].abs()).all()):
            break
        before, basis = values, torch.linalg.qr(image).Q
    return mean, values, basis @ rotation[:, order]


def stress(distances: Tensor, landmarks: Tensor, embedding: Tensor) -> float:
    """``sqrt(sum (d - |y - y'|)**2 / sum d**2)`` over landmarks (rows) and points (columns).

    Parameters
    ----------
    distances : Tensor of shape (m, n)
    landmarks : Tensor of shape (m, n_components)
    embedding : Tensor of shape (n, n_components)
    """
    wrong = total = 0.0
    for block in row_blocks(len(distances), max(1, _BLOCK // len(embedding))):
        given = distances[block].double()
        kept = torch.cdist(landmarks[block], embedding)
        wrong += float((given - kept).square().sum())
        total += float(given.square().sum())
    return (wrong / total) ** 0.5 if total > 0 else 0.0
