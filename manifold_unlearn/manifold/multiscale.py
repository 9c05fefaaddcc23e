"""Dimension of a point cloud from how its local spectra grow with scale."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks

_BLOCK = 2**22  # entries of one gathered block of neighbors
_CURVED = 1.5  # growth, over that of the leading direction, from which a direction is curvature
_STILL = 0.3  # growth, over that expected of a tangent, below which a direction is noise
_FLOOR = 1e-13  # of the leading eigenvalue
_CLEAR = 1.1  # gap, a factor of 3, from which a fine scale is believed and no coarser one asked


class ScaleSpectra(NamedTuple):
    """Logarithms of local covariance eigenvalues, of equally many points at every scale.

    Attributes
    ----------
    logs : Tensor of shape (n_rows, n_scales, n_directions)
        Descending along the last axis.
    sizes : list of int
        Neighbors that each scale spans, doubling.
    """

    logs: Tensor
    sizes: list[int]


class Dimension(NamedTuple):
    """Dimension, the scale that shows it best, and by how much it stands out.

    ``gap`` is the logarithm of the last tangential over the first normal eigenvalue at ``scale``.
    """

    dimension: int
    scale: int
    gap: float


def scale_sizes(n_neighbors: int, available: int) -> list[int]:
    """``n_neighbors`` times powers of 2, up to 16 times or a third of the rows available."""
    most = max(n_neighbors, min(16 * n_neighbors, available // 3))
    return [n_neighbors << j for j in range(5) if n_neighbors << j <= most]


def scale_spectra(
    rows: Tensor, landmarks: Tensor, neighbors: Tensor, sizes: list[int]
) -> ScaleSpectra:
    """Spectra of every 2**j-th of the nearest rows, so that sampling error is alike at all scales.

    Parameters
    ----------
    rows : Tensor of shape (n_rows, d)
    landmarks : Tensor of shape (n_landmarks, d)
    neighbors : Tensor of shape (n_rows, at least sizes[-1]), int
        Of ``rows`` among ``landmarks``, nearest first.
    sizes : list of int
        As :func:`scale_sizes` gives them.
    """
    each = sizes[0]
    n_directions = min(each - 1, landmarks.shape[1])
    logs = torch.empty(len(rows), len(sizes), n_directions, dtype=torch.float64, device=rows.device)
    for part in row_blocks(len(rows), max(1, _BLOCK // (each * landmarks.shape[1]))):
        for scale, size in enumerate(sizes):
            step = size // each
            chosen = neighbors[part, step - 1 : size : step]
            points = (landmarks[chosen] - rows[part, None]).double()
            points = points - points.mean(1, keepdim=True)
            short = points if points.shape[1] <= points.shape[2] else points.mT
            values = torch.linalg.eigvalsh(short @ short.mT).flip(1)[:, :n_directions]
            floor = (_FLOOR * values[:, :1]).clamp_min(1e-300)
            logs[part, scale] = torch.maximum(values, floor).log()
    return ScaleSpectra(logs, sizes)


def dimension_of(spectra: ScaleSpectra) -> Dimension:
    """Dimension that the median spectrum of all rows shows.

    Eigenvalues of tangential directions grow as the square of the radius, those of curvature as
    its fourth power, those of noise not at all (Little, Maggioni and Rosasco 2017). Among
    directions that grow as tangents do, the dimension is the one before the widest gap, at the
    finest scale with a gap of a factor 3, or else at the scale where the gap is widest.
    """
    gaps = _tangential_gaps(spectra.logs.median(0, keepdim=True).values, spectra.sizes)[0]
    widest = gaps.amax(1)
    clear = (widest >= _CLEAR).nonzero()[:, 0]
    scale = int(clear[0]) if len(clear) else int(widest.argmax())
    return Dimension(int(gaps[scale].argmax()) + 1, scale, float(widest[scale]))


def local_dimensions(spectra: ScaleSpectra, nearby: Tensor, scale: int) -> Tensor:
    """Dimension (n_rows,) of each row at a scale, from the average spectrum of ``nearby`` rows.

    ``nearby`` (n_rows, m) are indices of rows.
    """
    mean = spectra.logs[nearby].mean(1)
    return _tangential_gaps(mean, spectra.sizes)[:, scale].argmax(1) + 1


def _tangential_gaps(logs: Tensor, sizes: list[int]) -> Tensor:
    """Gap (n_rows, n_scales, n_candidates) after each direction; far below 0 if no tangent."""
    _, n_scales, n_directions = logs.shape
    half = max(1, min(n_directions, sizes[0] // 2))
    following = logs[:, :, 1 : half + 1]
    if half == n_directions:  # no normal direction is left: as wide as rounding lets it be
        following = torch.cat([following, logs[:, :, :1] + math.log(_FLOOR)], 2)
    gaps = logs[:, :, :half] - following
    if n_scales == 1:
        return gaps
    growth = logs[:, 1:, :half] - logs[:, :-1, :half]
    growth = torch.cat([growth, growth[:, -1:]], 1)
    expected = 2 * math.log(2) / torch.arange(1, half + 1, device=logs.device)
    curved = growth > _CURVED * growth[:, :, :1].clamp_min(1e-3)
    curved &= logs[:, :, :half] < logs[:, :, :1] - 1
    still = growth < _STILL * expected
    return torch.where(curved | still, gaps - 1e3, gaps)
