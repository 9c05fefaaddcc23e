"""The map from one manifold to another, as fitted: callable on new rows, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import Array, as_rows, restore
from manifold_unlearn.comparison.alternating import Blend, View
from manifold_unlearn.comparison.linear_maps import Affine

__all__ = ["ManifoldAlignment"]

Stage: TypeAlias = Affine | Blend | View
_STAGES: dict[str, Callable[..., Stage]] = {"affine": Affine, "blend": Blend, "view": View}
_ROLES = ("forward", "backward", "into_A", "into_B")


@dataclass(frozen=True, eq=False)
class ManifoldAlignment:
    """A map from the space of A to the space of B.

    As :func:`~manifold_unlearn.comparison.align.align_manifolds` fits it.
    """

    method: str
    score: float
    """Part of the variance of what the rows of A belong to that the map explains, on the rows
    fitted: paired rows of B, or the coupling's means of B"""
    residual: float
    """Root mean square distance from the images to what they belong to, units of B"""
    n_features: tuple[int, int]
    """Columns of A and of B"""
    rows_A: Any
    """(n_fitted_A,) int64: rows of A that were fitted"""
    correspondence: Any
    """(n_fitted_A,) int64: the row of B that each belongs to; of a coupling, the one it gives
    most mass"""
    matrix: Any = None
    """(d_A, d_B) when the map is affine, else None"""
    offset: Any = None
    """(d_B,) likewise: the image is ``X @ matrix + offset``"""
    scale: float | None = None
    """Of ``matrix``, when that is a scaled rotation"""
    correlations: Any = None
    """(n_components,) of the shared coordinates of both sides, descending; cca and
    alternating_diffusion"""
    coupling: Any = None
    """(n_fitted_A, n_fitted_B) of gromov_wasserstein"""
    rows_B: Any = None
    """(n_fitted_B,) int64: rows of B that were fitted"""
    distance: float | None = None
    """Gromov-Wasserstein distance of the coupling, units of the data"""
    stages: dict[str, tuple[Stage, ...]] | None = None
    """The maps themselves, by role"""

    def transform(self, X: Array) -> Any:
        """Images in the space of B of rows in the space of A.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, d_A)

        Returns
        -------
        array or Tensor of shape (n_samples, d_B)

        Raises
        ------
        ValueError
            Another number of columns than A has.
        """
        return self._apply("forward", X, 0)

    def inverse_transform(self, Y: Array) -> Any:
        """Images in the space of A of rows in the space of B.

        For procrustes and rigid gromov_wasserstein maps the exact inverse on the image. For the
        others the map fitted the other way round: a conditional mean, no inverse.

        Parameters
        ----------
        Y : array or Tensor of shape (n_samples, d_B)

        Returns
        -------
        array or Tensor of shape (n_samples, d_A)

        Raises
        ------
        ValueError
            Another number of columns than B has, or a rigid map into fewer dimensions, which has
            no inverse.
        """
        if "backward" not in (self.stages or {}):
            raise ValueError(
                f"the map from {self.n_features[0]} to {self.n_features[1]} dimensions has no "
                "inverse. Align B to A instead."
            )
        return self._apply("backward", Y, 1)

    def shared(self, X: Array, side: Literal["A", "B"] = "A") -> Any:
        """Coordinates that both sides share, of rows of one side; cca and alternating_diffusion.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, d_A) or (n_samples, d_B)
        side : {"A", "B"}, default="A"
            Whose rows these are.

        Returns
        -------
        array or Tensor of shape (n_samples, n_components)
            Of unit variance on the rows fitted.

        Raises
        ------
        ValueError
            The method has no shared coordinates, or another number of columns.
        """
        if side not in ("A", "B"):
            raise ValueError(f"side={side!r} is not known. Use 'A' or 'B'.")
        if f"into_{side}" not in (self.stages or {}):
            raise ValueError(
                f"method={self.method!r} has no shared coordinates. Use 'cca' or "
                "'alternating_diffusion'."
            )
        return self._apply(f"into_{side}", X, "AB".index(side))

    def _apply(self, role: str, X: Array, side: int) -> Any:
        assert self.stages is not None
        rows = as_rows(X, device=self.stages[role][0][0].device)
        if rows.shape[1] != self.n_features[side]:
            raise ValueError(
                f"X has {rows.shape[1]} columns, {'AB'[side]} has {self.n_features[side]}. "
                f"Give rows in the space of {'AB'[side]}."
            )
        values = rows.double()
        for stage in self.stages[role]:
            values = stage(values)
        return restore(values, X)

    def save(self, directory: str | Path) -> None:
        """Write the alignment to ``directory`` (safetensors and JSON)."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        arrays = []
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "stages" or value is None:
                continue
            if hasattr(value, "__array__") and not isinstance(value, float):
                tensors[name] = torch.as_tensor(value)
                if not isinstance(value, Tensor):
                    arrays.append(name)
            else:
                plain[name] = value
        for role, stages in (self.stages or {}).items():
            for number, stage in enumerate(stages):
                kind = type(stage).__name__.lower()
                for part, value in stage._asdict().items():
                    tensors[f"{role}.{number}.{kind}.{part}"] = value
        artifact.save(directory, "ManifoldAlignment", tensors, {"fields": plain, "numpy": arrays})

    @classmethod
    def load(cls, directory: str | Path) -> ManifoldAlignment:
        """What :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="ManifoldAlignment")
        fields = dict(config["fields"])
        fields["n_features"] = tuple(fields["n_features"])
        parts: dict[str, dict[int, tuple[str, dict[str, Tensor]]]] = {}
        for name, value in tensors.items():
            role, *rest = name.split(".")
            if role not in _ROLES:
                fields[name] = value.numpy() if name in config["numpy"] else value
                continue
            number, kind, part = rest
            parts.setdefault(role, {}).setdefault(int(number), (kind, {}))[1][part] = value
        fields["stages"] = {
            role: tuple(_STAGES[kind](**held) for _, (kind, held) in sorted(by_number.items()))
            for role, by_number in parts.items()
        }
        return cls(**fields)
