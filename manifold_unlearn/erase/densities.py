"""Log ratios of the forget to the retain density, frozen: maps from rows to nats."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from manifold_unlearn.arrays import working_dtype


class LogRatio(Protocol):
    """A differentiable map of rows ``(..., d)`` to log ratios ``(...)`` in nats."""

    def __call__(self, h: Tensor, /) -> Tensor:
        """Log ratio of each row, in its working dtype."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        ...


@dataclass(frozen=True, eq=False)
class KernelRatio:
    """Ratio of two kernel sums over landmarks, each above a background.

    ``log((sum_j k(h, z_j) f_j + b) / (sum_j k(h, z_j) r_j + b))``. With ``n_neighbors=0`` the
    kernel is Gaussian, ``exp(-|h - z|**2 / (4 * bandwidth))``, over all landmarks; else
    ``bandwidth / (bandwidth + |h - z|**2)`` over so many nearest ones. The background makes the
    ratio bounded, and 0 far from all landmarks. One row costs ``n_landmarks * d`` multiplications.
    """

    center: Tensor
    """(d,): taken off rows, so that squared distances round little"""
    landmarks: Tensor
    """(n_landmarks, d): centered"""
    squared: Tensor
    """(n_landmarks,): their squared lengths"""
    weights: Tensor
    """(n_landmarks, 2): ``f`` and ``r``"""
    bandwidth: float
    """squared units of the data"""
    background: float
    """in units of one landmark"""
    n_neighbors: int = 0

    def __call__(self, h: Tensor) -> Tensor:
        """Log ratio ``(...)`` of rows ``(..., d)``."""
        weights = self.weights.to(h.device, working_dtype(h.dtype))
        squared = self.squared_distances(h)
        if self.n_neighbors:
            near, at = squared.topk(self.n_neighbors, dim=-1, largest=False)
            masses = (inverse(near, self.bandwidth)[..., None] * weights[at]).sum(-2)
        else:
            masses = gaussian(squared, self.bandwidth) @ weights
        return ratio_of(masses, self.background)

    def squared_distances(self, h: Tensor) -> Tensor:
        """``(..., n_landmarks)`` of rows ``(..., d)`` to every landmark."""
        center, landmarks, squared = (
            part.to(h.device, working_dtype(h.dtype))
            for part in (self.center, self.landmarks, self.squared)
        )
        rows = h.to(center.dtype) - center
        own = rows.square().sum(-1, keepdim=True)
        return (own + squared - 2 * (rows @ landmarks.T)).clamp_min(0)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> KernelRatio:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        return _moved(self, device, dtype)


@dataclass(frozen=True, eq=False)
class LinearRatio:
    """Ratio of two normal densities of one covariance: ``(h - center) @ direction``."""

    center: Tensor
    """(d,): midway between the means"""
    direction: Tensor
    """(d,): nats per unit of the data"""

    def __call__(self, h: Tensor) -> Tensor:
        """Log ratio ``(...)`` of rows ``(..., d)``."""
        center, direction = (
            part.to(h.device, working_dtype(h.dtype)) for part in (self.center, self.direction)
        )
        return (h.to(center.dtype) - center) @ direction

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LinearRatio:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        return _moved(self, device, dtype)


def gaussian(squared_distances: Tensor, bandwidth: float) -> Tensor:
    """``exp(-r**2 / (4 * bandwidth))``."""
    return torch.exp(squared_distances * (-0.25 / bandwidth))


def inverse(squared_distances: Tensor, bandwidth: float) -> Tensor:
    """``bandwidth / (bandwidth + r**2)``: inverse squared distance, at most 1."""
    return bandwidth / (bandwidth + squared_distances)


def ratio_of(masses: Tensor, background: float) -> Tensor:
    """``log((f + background) / (r + background))`` of kernel sums ``(..., 2)``."""
    logs = (masses + background).log()
    return logs[..., 0] - logs[..., 1]


def tensors_of(ratio: KernelRatio | LinearRatio) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fields of a ratio, split into tensors and numbers."""
    parts = {field.name: getattr(ratio, field.name) for field in fields(ratio)}
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    return tensors, {name: part for name, part in parts.items() if name not in tensors}


def _moved(ratio: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    kind = working_dtype(dtype)
    tensors, _ = tensors_of(ratio)
    return replace(ratio, **{name: part.to(device, kind) for name, part in tensors.items()})
