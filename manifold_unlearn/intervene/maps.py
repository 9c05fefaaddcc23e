"""What can be put into a model: maps ``h -> h'`` on the rows of a site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import working_dtype


@runtime_checkable
class SiteMap(Protocol):
    """Anything that maps hidden states ``(..., d_site)`` to hidden states of the same shape."""

    def __call__(self, h: Tensor, /) -> Tensor:
        """Edited hidden states, same shape, dtype and device."""
        ...


@runtime_checkable
class SequentialSiteMap(Protocol):
    """A map whose answer to a row depends on the rows before it, through gathered evidence.

    The evidence is all it remembers: rows in two passes are edited as in one, if the second starts
    with the evidence that the first ended with. A map may carry ``evidence_shape``, a tuple, when
    one number a row is not enough: the shapes below then end in it. With
    ``evidence == "token"`` the map is used as a :class:`SiteMap` instead.
    """

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edited rows, and the evidence after every row.

        Parameters
        ----------
        h : Tensor of shape (batch, length, d_site)
            The next rows of every sequence.
        start : Tensor of shape (batch,), float32, or float64 for such rows
            Evidence before the first of them; 0 at the beginning of a sequence.
        present : Tensor of shape (batch, length), bool
            False for rows that neither count nor are edited: padding, and each sequence's first
            token, which is an attention sink. Their evidence is that of the row before.

        Returns
        -------
        edited : Tensor of shape (batch, length, d_site)
            Same dtype and device as ``h``.
        evidence : Tensor of shape (batch, length)
        """
        ...


@runtime_checkable
class AffineSiteMap(Protocol):
    """A map ``h -> matrix_ @ h + bias_``, which :func:`bake` can write into weights."""

    @property
    def matrix_(self) -> Any:
        """``(d_site, d_site)``."""
        ...

    @property
    def bias_(self) -> Any:
        """``(d_site,)``."""
        ...


AnyMap: TypeAlias = SiteMap | SequentialSiteMap | AffineSiteMap
"""What :func:`intervene` takes at a site."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """Low-rank change of the identity, ``h -> h - write (read' h - offset)``.

    One row costs ``2 d r`` multiplications instead of ``d**2``; half precision is edited in
    float32. With ``read' write = I`` the map is idempotent: what it reads is ``offset`` afterwards.
    """

    read: Tensor
    """(d, r): directions whose read-out is replaced"""
    write: Tensor
    """(d, r): directions along which a row moves"""
    offset: Tensor
    """(r,): read-out that every row has after the map"""

    def __call__(self, h: Tensor) -> Tensor:
        """Edited rows ``(..., d)``, in the dtype and on the device of ``h``."""
        read, write, offset = (
            part.to(h.device, working_dtype(h.dtype))
            for part in (self.read, self.write, self.offset)
        )
        excess = h.to(read.dtype) @ read - offset
        return h - (excess @ write.T).to(h.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> AffineMap:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        kind = working_dtype(dtype)
        return AffineMap(*(t.to(device, kind) for t in (self.read, self.write, self.offset)))

    @property
    def matrix_(self) -> Tensor:
        """(d, d) of the map ``h -> matrix_ @ h + bias_``."""
        identity = torch.eye(self.read.shape[0], dtype=self.read.dtype, device=self.read.device)
        return identity - self.write @ self.read.T

    @property
    def bias_(self) -> Tensor:
        """(d,) of the map ``h -> matrix_ @ h + bias_``."""
        return self.write @ self.offset

    def linear(self) -> AffineMap:
        """Return the map without its bias."""
        return AffineMap(self.read, self.write, torch.zeros_like(self.offset))

    def save(self, directory: str | Path) -> None:
        """Write the map to a directory that :meth:`load` reads."""
        tensors = {"read": self.read, "write": self.write, "offset": self.offset}
        artifact.save(directory, "AffineMap", tensors, {})

    @classmethod
    def load(cls, directory: str | Path) -> AffineMap:
        """Read the map that :meth:`save` wrote; raises as :func:`~.artifact.load`."""
        tensors, _, _ = artifact.load(directory, kind="AffineMap")
        return cls(**tensors)


@dataclass(frozen=True, eq=False)
class DenseAffineMap:
    """An :class:`AffineSiteMap` that is not callable by itself, made so."""

    matrix_: Tensor
    """(d, d)"""
    bias_: Tensor
    """(d,)"""

    def __call__(self, h: Tensor) -> Tensor:
        """Edited rows ``(..., d)``."""
        kind = working_dtype(h.dtype)
        matrix, bias = self.matrix_.to(h.device, kind), self.bias_.to(h.device, kind)
        return (h.to(kind) @ matrix.T + bias).to(h.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> DenseAffineMap:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        kind = working_dtype(dtype)
        return DenseAffineMap(self.matrix_.to(device, kind), self.bias_.to(device, kind))

    def linear(self) -> DenseAffineMap:
        """Return the map without its bias."""
        return DenseAffineMap(self.matrix_, torch.zeros_like(self.bias_))


def is_sequential(site_map: object) -> bool:
    """Whether a map is used through ``step``: it has one, and its evidence is not a token's own."""
    return callable(getattr(site_map, "step", None)) and (
        getattr(site_map, "evidence", "sequence") != "token"
    )


def is_affine(site_map: object) -> TypeGuard[AffineSiteMap]:
    """Whether a map has a matrix and a bias; one whose matrix cannot be told has none."""
    return hasattr(site_map, "matrix_") and hasattr(site_map, "bias_")


def affine_parts(site_map: AnyMap, name: str) -> tuple[Tensor, Tensor]:
    """Matrix and bias of an affine map in float64 on the CPU.

    Raises
    ------
    ValueError
        The map is not affine, its parts do not fit together, or they are not finite.
    """
    if not is_affine(site_map):
        raise ValueError(
            f"the map at {name!r} is a {type(site_map).__name__} without matrix_ and bias_: only "
            "an affine map bakes exactly. Fit it first, or keep it as a hook with intervene()."
        )
    matrix = torch.as_tensor(site_map.matrix_).detach().to("cpu", torch.float64)
    bias = torch.as_tensor(site_map.bias_).detach().to("cpu", torch.float64)
    if matrix.ndim != 2 or matrix.shape != (len(bias), len(bias)):
        raise ValueError(
            f"the map at {name!r} has matrix_ {tuple(matrix.shape)} and bias_ {tuple(bias.shape)}; "
            "expected (d, d) and (d,)."
        )
    if not (torch.isfinite(matrix).all() and torch.isfinite(bias).all()):
        raise ValueError(f"the map at {name!r} is not finite; fit it again on finite data.")
    return matrix, bias


def callable_map(site_map: AnyMap, name: str) -> SiteMap | SequentialSiteMap:
    """``site_map`` itself if it can be used as it is, else its matrix and bias made callable."""
    if is_sequential(site_map) or callable(site_map):
        return cast("SiteMap | SequentialSiteMap", site_map)
    return DenseAffineMap(*affine_parts(site_map, name))


def bias_free(site_map: AnyMap, name: str) -> SiteMap:
    """Return the linear part of an affine map."""
    if hasattr(site_map, "linear"):
        return site_map.linear()
    return DenseAffineMap(*affine_parts(site_map, name)).linear()
