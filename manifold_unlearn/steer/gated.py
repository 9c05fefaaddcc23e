"""A vector behind a gate: added where the gate opens, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import as_rows, restore, working_dtype
from manifold_unlearn.intervene.edit import Edit
from manifold_unlearn.steer.strengths import checked_strength
from manifold_unlearn.steer.vectors import at_norm_of, checked_vector

Evidence: TypeAlias = Literal["token", "sequence"]


class Opening(Protocol):
    """What says how far each row is steered, in [0, 1]; without any state."""

    @property
    def evidence(self) -> Evidence:
        """``"token"``: each row by itself; ``"sequence"``: all rows of a text up to it."""
        ...

    def __call__(self, h: Tensor, /) -> Tensor:
        """Opening ``(...)`` of rows ``(..., d)``, each by itself."""
        ...

    def step(self, h: Tensor, start: Tensor, present: Tensor, /) -> tuple[Tensor, Tensor]:
        """Opening and evidence, both ``(batch, length)``; arguments as ``SequentialSiteMap``."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype, /) -> Opening:
        """Return the same where and as precise as rows of ``dtype`` need it."""
        ...


@dataclass(frozen=True, eq=False)
class GatedShift:
    """``h -> h + g(h) v``; where ``g`` is 0 a row is returned as it came, to the bit.

    Half precision is steered in float32 and rounded once.
    """

    shift: Tensor
    """(d,): what an open gate adds"""
    opening: Any
    """An :class:`Opening`"""
    preserve_norm: bool = False

    @property
    def evidence(self) -> Evidence:
        """Whether the rows before count too; see :class:`Opening`."""
        return self.opening.evidence

    def __call__(self, h: Tensor) -> Tensor:
        """Steered rows ``(..., d)``, each by itself.

        Raises
        ------
        ValueError
            The evidence is a sequence's: rows alone do not say where a sequence begins.
        """
        if self.evidence != "token":
            raise ValueError(
                "evidence='sequence' needs the rows of a sequence in order: use step(), as "
                "intervene() does, or a gate of evidence='token'."
            )
        return self.moved(h, self.opening(h))

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Steer the next rows of sequences; see :class:`SequentialSiteMap`."""
        opening, evidence = self.opening.step(h, start, present)
        return self.moved(h, opening * present), evidence

    def moved(self, h: Tensor, opening: Tensor) -> Tensor:
        """Rows ``(..., d)`` moved by the part ``opening`` ``(...)`` of the shift."""
        wide, part = h.to(working_dtype(h.dtype)), opening[..., None]
        moved = wide + part.to(wide.dtype) * self.shift.to(wide)
        if self.preserve_norm:
            moved = at_norm_of(wide, moved)
        return torch.where(part > 0, moved.to(h.dtype), h)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> GatedShift:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        shift = self.shift.to(device, working_dtype(dtype))
        return GatedShift(shift, self.opening.to(device, dtype), self.preserve_norm)


@dataclass(frozen=True, eq=False)
class GatedVector:
    """A vector added where a gate that was fitted by itself opens.

    ``h -> h + g(h) * strength * vector``; where the gate is closed a row is returned as it came,
    to the bit.
    """

    vector: Tensor
    """(d,), or a fitted :class:`SteeringVector`, which counts as what it adds at its strength."""
    gate: Any
    """Anything fitted with ``gate(X) -> (n_samples,)`` in [0, 1], such as a forget gate or a
    manifold eraser. One whose evidence is a sequence's is followed along each sequence."""
    strength: float = 1.0
    """May be negative."""
    preserve_norm: bool = False
    """Rescale every steered row to the length it had."""

    def __post_init__(self) -> None:
        """Check the vector against the gate."""
        object.__setattr__(self, "vector", checked_vector(self.vector))
        if not callable(getattr(self.gate, "gate", None)):
            raise ValueError(
                f"{type(self.gate).__name__} has no gate(X); give a fitted gate, or fit a "
                "ConditionalVector on examples of where to steer."
            )
        width = getattr(self.gate, "n_features_in_", self.n_features_in_)
        if width != self.n_features_in_:
            raise ValueError(
                f"the gate was fitted for width {width}, the vector has {self.n_features_in_} "
                "entries; fit both at one site."
            )

    @property
    def n_features_in_(self) -> int:
        """Width of the rows."""
        return len(self.vector)

    @property
    def vector_(self) -> Tensor:
        """(d,): what strength 1 adds where the gate is fully open."""
        return self.vector

    @property
    def evidence(self) -> Evidence:
        """Whether the rows before count too; see :class:`Opening`."""
        return _opening_of(self.gate).evidence

    def transform(self, X: Any, sequence: Any = None) -> Any:
        """Steered rows, in the kind of ``X`` (n_samples, n_features).

        ``sequence`` (n_samples,) int says which text a row is of, for gates that take it; rows of
        one text are in order.
        """
        rows = as_rows(X)
        told = () if sequence is None else (sequence,)
        opening = torch.as_tensor(self.gate.gate(rows, *told)).to(rows)
        return restore(self.to(rows.device, rows.dtype).moved(rows, opening), X)

    def __call__(self, h: Tensor) -> Tensor:
        """Steer hidden states ``(..., d)``; what :func:`intervene` calls."""
        return self.to(h.device, h.dtype)(h)

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Steer the next rows of sequences; see :class:`SequentialSiteMap`."""
        return self.to(h.device, h.dtype).step(h, start, present)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> GatedShift:
        """Return the map at its strength, ready for hidden states of this device and dtype."""
        shift = checked_strength(self.strength) * self.vector
        return GatedShift(shift, _opening_of(self.gate), self.preserve_norm).to(device, dtype)

    def save(self, directory: str | Path) -> None:
        """Write vector and gate to a directory that :meth:`load` reads.

        Raises
        ------
        ValueError
            The gate has no ``save`` and ``load``.
        """
        directory = Path(directory)
        config = {"strength": float(self.strength), "preserve_norm": self.preserve_norm}
        artifact.refuse_foreign(directory)
        with artifact.replacing(directory) as staged:
            artifact.save(staged, "GatedVector", {"vector": self.vector}, config)
            Edit({"gate": self.gate}).save(staged / "gate")

    @classmethod
    def load(cls, directory: str | Path, kinds: dict[str, Any] | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        directory : path
        kinds : mapping of str to class, optional
            Class of the gate by its name, where it is no public name of this package.

        Raises
        ------
        FileNotFoundError, ValueError
            As :func:`manifold_unlearn.artifact.load`; a gate of a class that is not known.
        """
        tensors, config, _ = artifact.load(directory, kind="GatedVector")
        gate = Edit.load(Path(directory) / "gate", kinds)["gate"]
        return cls(tensors["vector"], gate, **config)


def _opening_of(gate: Any) -> _FrozenOpening | _RowOpening:
    """How a fitted gate is used on hidden states.

    A gate that carries the frozen form it computes with (``frozen_``, or ``map_.gate``) is used
    through that: it moves to the device of the rows and can follow sequences.
    """
    frozen = getattr(gate, "frozen_", None)
    if frozen is None:
        frozen = getattr(getattr(gate, "map_", None), "gate", None)
    needed = ("log_ratio", "accumulate", "opening", "to")
    if frozen is not None and all(hasattr(frozen, name) for name in needed):
        return _FrozenOpening(frozen)
    return _RowOpening(gate)


@dataclass(frozen=True, eq=False)
class _FrozenOpening:
    """A frozen gate: log ratios, which it accumulates to evidence, which opens it."""

    frozen: Any

    @property
    def evidence(self) -> Evidence:
        return "sequence" if self.frozen.sequential else "token"

    def __call__(self, h: Tensor) -> Tensor:
        return self.frozen.opening(self.frozen.log_ratio(h.to(working_dtype(h.dtype))))

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        ratios = self.frozen.log_ratio(h.to(working_dtype(h.dtype)))
        evidence = self.frozen.accumulate(ratios, start, present)
        return self.frozen.opening(evidence), evidence

    def to(self, device: torch.device | str, dtype: torch.dtype) -> _FrozenOpening:
        return _FrozenOpening(self.frozen.to(device, dtype))


@dataclass(frozen=True, eq=False)
class _RowOpening:
    """A gate known only by ``gate(X)``: it sees each row by itself."""

    gate: Any
    evidence: Evidence = "token"

    def __call__(self, h: Tensor) -> Tensor:
        rows = h.detach().to(working_dtype(h.dtype)).reshape(-1, h.shape[-1])
        opening = torch.as_tensor(self.gate.gate(rows), device=h.device)
        if opening.shape != rows.shape[:1]:
            raise ValueError(
                f"gate(X) answered {tuple(opening.shape)} to {len(rows)} rows; expected one number "
                "a row."
            )
        return opening.reshape(h.shape[:-1])

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        return self(h), start[:, None].expand(present.shape)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> _RowOpening:  # noqa: ARG002
        return self
