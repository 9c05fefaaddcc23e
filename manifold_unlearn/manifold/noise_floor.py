"""The directions of a point cloud that rise above its noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST = 2048  # the smaller side of the data up to which its spectrum is taken
_OUTLYING = 30.0  # times the median distance from the center: such rows would rule the spectrum
_MARGIN = 1.1  # over the edge of the noise
_ROUNDING = 1e-13


class SignalSpace(NamedTuple):
    """``center`` (d,) and ``basis`` (d, r), orthonormal columns; float64."""

    center: Tensor
    basis: Tensor


def signal_space(X: Tensor) -> SignalSpace | None:
    """The principal directions of ``X`` above a flat floor of noise, or None where there is none.

    White noise gives covariance eigenvalues that follow the law of Marchenko and Pastur; its level
    is read off their median, as by Gavish and Donoho, and directions up to 1.1 times the edge of
    the law are noise. The smaller half of the eigenvalues must fit the law: a decaying spectrum is
    left whole. A spectrum that is zero beyond some rank is cut there, which loses nothing.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
        With the smaller side above 2048, or with rows beyond 30 times the median distance from the
        center, the answer is None.

    References
    ----------
    Marchenko and Pastur (1967). Gavish and Donoho (2014), IEEE Trans. Inf. Theory 60.
    """
    n_samples, n_features = X.shape
    if min(n_samples, n_features) > _LARGEST or n_features < 2:
        return None
    center = X.double().mean(0)
    offsets = X.double() - center
    norms = offsets.norm(dim=1)
    if bool(norms.max() > _OUTLYING * norms.median()):
        return None
    wide = n_features > n_samples
    gram = offsets @ offsets.mT if wide else offsets.mT @ offsets
    values, vectors = torch.linalg.eigh(gram / max(n_samples, n_features))
    kept = values > _floor(values, min(X.shape) / max(X.shape))
    if not bool(kept.any()) or (bool(kept.all()) and not wide):
        return None
    basis = vectors[:, kept]
    if wide:
        basis = torch.linalg.qr(offsets.mT @ basis).Q
    return SignalSpace(center, basis)


def _floor(values: Tensor, aspect: float) -> float:
    """Largest eigenvalue that noise explains; ``values`` ascending."""
    largest, median = float(values[-1]), float(values.median())
    rounding = _ROUNDING * largest
    if median <= rounding:
        return rounding
    level = median / _median_of_noise(aspect)
    upper, lower = level * (1 + aspect**0.5) ** 2, level * (1 - aspect**0.5) ** 2
    tenth = float(values[len(values) // 10])
    quantile = lower + (median - lower) * 0.05
    return _MARGIN * upper if tenth >= quantile and len(values) >= 8 else rounding


def _median_of_noise(aspect: float) -> float:
    """Median of the Marchenko-Pastur law of unit variance."""
    edge = torch.tensor([(1 - aspect**0.5) ** 2, (1 + aspect**0.5) ** 2], dtype=torch.float64)
    angle = torch.linspace(0, torch.pi, 4001, dtype=torch.float64)
    x = edge.mean() - (edge[1] - edge[0]) / 2 * torch.cos(angle)
    mass = (torch.sin(angle) ** 2 / x.clamp_min(1e-12)).cumsum(0)
    return float(x[int((mass >= mass[-1] / 2).nonzero()[0, 0])])
