"""A path as a steering map: every row goes a part of the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import working_dtype
from manifold_unlearn.steer.paths import How, ManifoldPath

Way: TypeAlias = How | Literal["onward"]
WAYS = (*get_args(How), "onward")
_PARTS = ("points", "times", "mean", "basis")


@dataclass(frozen=True, eq=False)
class PathSteering:
    """Map ``h -> h'`` that leads rows along a path, ``strength`` of the way.

    ``"replace"``
        Every row becomes the point at ``strength``.
    ``"add"``
        ``h`` plus the way from the start to that point.
    ``"coordinates"``
        The coordinates in ``path.basis`` become those of that point; the rest of the row stays.
    ``"onward"``
        Each row goes on from where it stands: from the time ``u`` of the waypoint that is nearest
        to its coordinates, ``h`` plus the way from ``u`` to ``u + strength``, at most to the end.

    Attributes
    ----------
    path : ManifoldPath
    strength : float, default=1
        In [0, 1]: time on the path, for ``"onward"`` the time that passes.
    how : {"replace", "add", "coordinates", "onward"}, default="coordinates"

    Raises
    ------
    ValueError
        A strength outside [0, 1], or an unknown way.

    Examples
    --------
    >>> with intervene(model, {"layers.20": PathSteering(path, 0.5)}):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    path: ManifoldPath
    strength: float = 1.0
    how: Way = "coordinates"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"strength={self.strength} must be in [0, 1]: a path has nothing behind its ends."
            )
        if self.how not in WAYS:
            raise ValueError(f"how={self.how!r} is not one of {', '.join(WAYS)}.")

    @property
    def n_features_in_(self) -> int:
        """Width of the rows."""
        return self.path.points.shape[1]

    def __call__(self, h: Tensor) -> Tensor:
        """Steered rows ``(..., d)``, in the dtype and on the device of ``h``."""
        kind = working_dtype(h.dtype)
        path, x = self.path.to(h.device), h.to(kind)
        if self.how == "onward":
            moved = x + self._onward(path, (x - path.mean.to(kind)) @ path.basis.to(kind))
        else:
            moved = path.lead(x, path.at(self.strength), self.how)
        return moved.to(h.dtype)

    def _onward(self, path: ManifoldPath, coordinates: Tensor) -> Tensor:
        rows = coordinates.reshape(-1, coordinates.shape[-1])
        near = torch.cdist(rows, path.coordinates.to(rows)).argmin(1)
        start = path.times[near]
        way = path.at((start + self.strength).clamp(max=1)) - path.points[near]
        return way.to(rows).reshape(*coordinates.shape[:-1], -1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PathSteering:  # noqa: ARG002
        """Return the same map where rows are; it works in their precision, or float32."""
        return replace(self, path=self.path.to(device))

    def save(self, directory: str | Path) -> None:
        """Write the map to a directory that :meth:`load` reads."""
        tensors = {name: getattr(self.path, name) for name in _PARTS}
        config = {"kind": self.path.kind, "strength": float(self.strength), "how": self.how}
        artifact.save(directory, "PathSteering", tensors, config)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read the map that :meth:`save` wrote; raises as :func:`~.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="PathSteering")
        points, times, mean, basis = (tensors[name] for name in _PARTS)
        path = ManifoldPath(points, times, config["kind"], mean, basis)
        return cls(path, config["strength"], config["how"])
