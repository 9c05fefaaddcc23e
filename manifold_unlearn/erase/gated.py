"""The fitted form of a manifold eraser: a frozen gate and the map behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn.arrays import working_dtype
from manifold_unlearn.erase.landmark_map import LandmarkMap
from manifold_unlearn.intervene.maps import AffineMap

if TYPE_CHECKING:
    from manifold_unlearn.erase.gate import FrozenGate

Evidence: TypeAlias = Literal["token", "sequence"]


def require_token_evidence(evidence: Evidence) -> None:
    """Raise ``ValueError`` where rows alone do not say where a sequence begins."""
    if evidence != "token":
        raise ValueError(
            "evidence='sequence' needs the rows of a sequence in order: use step(), as "
            "intervene() does, transform(X, sequence), or fit with evidence='token'."
        )


@dataclass(frozen=True, eq=False)
class GatedMap:
    """``h -> h + g (T(h) - h)``: the move ``T`` behind the gate ``g``.

    Where the gate is closed a row is returned as it came, to the bit. Half precision is edited in
    float32.
    """

    gate: FrozenGate
    move: LandmarkMap
    preserve_norm: bool
    """Whether an edited row keeps its length."""

    @property
    def evidence(self) -> Evidence:
        """``"token"``: each row opens the gate by itself; ``"sequence"``: all rows up to it do."""
        return "sequence" if self.gate.sequential else "token"

    def __call__(self, h: Tensor) -> Tensor:
        """Edited rows ``(..., d)``, in the dtype and on the device of ``h``.

        Raises
        ------
        ValueError
            The evidence is a sequence's: rows alone do not say where a sequence begins.
        """
        require_token_evidence(self.evidence)
        return self.edit(h, self.opening(self.log_ratio(h)))

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the next rows of sequences.

        Parameters
        ----------
        h : Tensor of shape (batch, length, d)
        start : Tensor of shape (batch,)
            Evidence before the first of these rows, nats; 0 at the beginning of a sequence.
        present : Tensor of shape (batch, length), bool
            False for padding, which neither counts nor is edited.

        Returns
        -------
        rows : Tensor of shape (batch, length, d)
        evidence : Tensor of shape (batch, length)
            After every row.
        """
        evidence = self.gathered(h, start, present)
        return self.edit(h, self.opening(evidence) * present), evidence

    def log_ratio(self, h: Tensor) -> Tensor:
        """Log density ratio ``(...)`` of forget against retain, in nats."""
        return self.gate.log_ratio(h.to(working_dtype(h.dtype)))

    def gathered(self, h: Tensor, start: Tensor, present: Tensor) -> Tensor:
        """Evidence ``(batch, length)`` after every row; arguments as :meth:`step`."""
        return self.gate.accumulate(self.log_ratio(h), start, present)

    def opening(self, evidence: Tensor) -> Tensor:
        """How far the gate is open, in [0, 1]: exactly 0 below the threshold."""
        return self.gate.opening(evidence)

    def edit(self, h: Tensor, opening: Tensor) -> Tensor:
        """Rows ``(..., d)`` moved by the part ``opening`` ``(...)`` of their way."""
        rows, part = h.reshape(-1, h.shape[-1]), opening.reshape(-1)
        if h.device.type == "cpu" and not torch.compiler.is_compiling():
            at = part.nonzero()[:, 0]  # there is nothing to wait for here, and little to move
            if len(at) == 0:
                return h
            edited = rows.index_copy(0, at, self._moved(rows[at], part[at]))
            return edited.reshape(h.shape)
        edited = torch.where(part[:, None] > 0, self._moved(rows, part), rows)
        return edited.reshape(h.shape)

    def _moved(self, rows: Tensor, part: Tensor) -> Tensor:
        wide = rows.to(working_dtype(rows.dtype))
        moved = wide + part[:, None].to(wide.dtype) * (self.move(wide) - wide)
        if self.preserve_norm:
            length, now = (t.norm(dim=1, keepdim=True) for t in (wide, moved))
            moved = moved * (length / torch.where(now > 0, now, 1.0))
        return moved.to(rows.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> GatedMap:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        placed = self.gate.to(device, dtype), self.move.to(device, dtype)
        return GatedMap(*placed, self.preserve_norm)


@dataclass(frozen=True, eq=False)
class UngatedMap:
    """A linear map in the place of a gated one: it edits every row."""

    move: AffineMap
    evidence: Literal["token"] = "token"

    def __call__(self, h: Tensor) -> Tensor:
        """Edited rows ``(..., d)``, in the dtype and on the device of ``h``."""
        return self.move(h)

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the rows that are ``present``; the evidence stays. As :meth:`GatedMap.step`."""
        edited = torch.where(present[..., None], self.move(h), h)
        return edited, start[:, None].expand(present.shape)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> UngatedMap:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        return UngatedMap(self.move.to(device, dtype))
