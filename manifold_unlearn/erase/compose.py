"""Several forgotten concepts at one site, each of which can be added or withdrawn by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import as_rows, restore
from manifold_unlearn.erase.gated import Evidence, GatedMap, require_token_evidence
from manifold_unlearn.erase.manifold import ManifoldEraser
from manifold_unlearn.erase.nested import save_nested


@dataclass(frozen=True, eq=False)
class ComposedMap:
    """Gated maps of several concepts; of those whose gate is open, the likeliest edits a row.

    Where all gates are closed a row is returned as it came, to the bit.
    """

    parts: tuple[GatedMap, ...]

    @property
    def evidence(self) -> Evidence:
        """``"sequence"`` if any of the parts gathers evidence, else ``"token"``."""
        return "sequence" if any(p.evidence == "sequence" for p in self.parts) else "token"

    @property
    def evidence_shape(self) -> tuple[int]:
        """Shape of the evidence of one row: one number for each concept."""
        return (len(self.parts),)

    def __call__(self, h: Tensor) -> Tensor:
        """Edited rows ``(..., d)``, in the dtype and on the device of ``h``.

        Raises
        ------
        ValueError
            The evidence is a sequence's: rows alone do not say where a sequence begins.
        """
        require_token_evidence(self.evidence)
        if not self.parts:
            return h
        return self.edit(h, torch.stack([part.log_ratio(h) for part in self.parts], dim=-1))

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the next rows of sequences.

        Parameters
        ----------
        h : Tensor of shape (batch, length, d)
        start : Tensor of shape (batch, n_concepts)
        present : Tensor of shape (batch, length), bool

        Returns
        -------
        rows : Tensor of shape (batch, length, d)
        evidence : Tensor of shape (batch, length, n_concepts)
            After every row, for every concept.
        """
        if not self.parts:
            return h, start[:, None].expand(*present.shape, 0)
        gathered = [
            part.gathered(h, start[:, number], present) for number, part in enumerate(self.parts)
        ]
        evidence = torch.stack(gathered, dim=-1)
        return self.edit(h, evidence, present), evidence

    def openings(self, evidence: Tensor) -> Tensor:
        """How far each gate is open, ``(..., n_concepts)``: of the open ones only the likeliest."""
        each = zip(self.parts, evidence.unbind(-1), strict=True)
        opened = torch.stack([part.opening(values) for part, values in each], dim=-1)
        likeliest = torch.where(opened > 0, evidence, -torch.inf).argmax(-1, keepdim=True)
        chosen = torch.arange(len(self.parts), device=evidence.device) == likeliest
        return torch.where(chosen, opened, 0.0)

    def edit(self, h: Tensor, evidence: Tensor, present: Tensor | None = None) -> Tensor:
        """Rows ``(..., d)`` edited on ``evidence`` ``(..., n_concepts)``."""
        openings = self.openings(evidence)
        if present is not None:
            openings = openings * present[..., None]
        for number, part in enumerate(self.parts):
            h = part.edit(h, openings[..., number])
        return h

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ComposedMap:
        """Return the same map where and as precise as rows of ``dtype`` need it."""
        return ComposedMap(tuple(part.to(device, dtype) for part in self.parts))


class ComposedEraser:
    """Fitted erasers of one site by name of the concept they erase.

    Each keeps its own gate and map, so a concept is added and withdrawn without fitting the others
    again, and after ``including(name, eraser).without(name)`` every row comes out as before, to
    the bit. Where several gates are open, the concept of the largest evidence edits the row.

    Parameters
    ----------
    concepts : mapping of str to ManifoldEraser
        Fitted, all to rows of one width.

    Attributes
    ----------
    concepts : read-only mapping of str to ManifoldEraser
    map_ : ComposedMap
        The same as one frozen map.

    Raises
    ------
    ValueError
        An eraser that is not fitted, of another width than the first, or that fell back to a
        linear one, which has no gate.
    """

    def __init__(self, concepts: Mapping[str, ManifoldEraser]):
        width = None
        for name, eraser in concepts.items():
            fitted = getattr(eraser, "map_", None)
            if not isinstance(fitted, GatedMap):
                state = "not fitted" if fitted is None else "linear (fallback_), without a gate"
                raise ValueError(
                    f"the eraser of {name!r} is {state}; give a fitted ManifoldEraser with a mode."
                )
            width = eraser.n_features_in_ if width is None else width
            if eraser.n_features_in_ != width:
                raise ValueError(
                    f"the eraser of {name!r} is of width {eraser.n_features_in_}, the first of "
                    f"width {width}; compose erasers of one site."
                )
        self.concepts: Mapping[str, ManifoldEraser] = MappingProxyType(dict(concepts))
        self.map_ = ComposedMap(tuple(eraser.map_ for eraser in concepts.values()))

    @property
    def evidence(self) -> Evidence:
        """``"sequence"`` if any of the concepts gathers evidence, else ``"token"``."""
        return self.map_.evidence

    @property
    def evidence_shape(self) -> tuple[int]:
        """Shape of the evidence of one row."""
        return self.map_.evidence_shape

    def including(self, name: str, eraser: ManifoldEraser) -> ComposedEraser:
        """Return a new composition, with one concept more.

        Raises
        ------
        ValueError
            ``name`` is there already.
        """
        if name in self.concepts:
            raise ValueError(f"{name!r} is composed already; withdraw it first by without().")
        return ComposedEraser({**self.concepts, name: eraser})

    def without(self, name: str) -> ComposedEraser:
        """Return a new composition, with one concept less.

        Raises
        ------
        ValueError
            ``name`` is not there.
        """
        if name not in self.concepts:
            raise ValueError(f"{name!r} is not among the concepts {sorted(self.concepts)}.")
        return ComposedEraser({n: e for n, e in self.concepts.items() if n != name})

    def transform(self, X: Any, sequence: Any = None) -> Any:
        """Erased rows, in the kind, dtype and device of ``X`` (n_samples, n_features).

        ``sequence`` (n_samples,) int says which text a row is of; see
        :meth:`ManifoldEraser.transform`.
        """
        rows = as_rows(X)
        if not self.concepts:
            return restore(rows, X)
        return restore(self.map_.edit(rows, self._evidence(rows, sequence)), X)

    def gate(self, X: Any, sequence: Any = None) -> Any:
        """How far the gates are open at each row, (n_samples, n_concepts), in [0, 1].

        Of each row at most one number is positive: that of the concept that edits it.
        """
        rows = as_rows(X)
        if not self.concepts:
            return restore(rows.new_zeros(len(rows), 0), X)
        return restore(self.map_.openings(self._evidence(rows, sequence)), X)

    def _evidence(self, rows: Tensor, sequence: Any) -> Tensor:
        gates = [eraser.gate_ for eraser in self.concepts.values()]
        return torch.stack([g.gathered_evidence(rows, sequence) for g in gates if g], dim=-1)

    def __call__(self, h: Tensor) -> Tensor:
        """Erase hidden states ``(..., n_features)``; what :func:`intervene` calls."""
        return self.map_(h)

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the next rows of sequences; see :meth:`ComposedMap.step`."""
        return self.map_.step(h, start, present)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ComposedMap:
        """Return the frozen map, ready for hidden states of this device and dtype."""
        return self.map_.to(device, dtype)

    def save(self, directory: str | Path) -> None:
        """Write all concepts to a directory that :meth:`load` reads."""
        parts = {f"concept_{n}": eraser for n, eraser in enumerate(self.concepts.values())}
        save_nested(directory, "ComposedEraser", {}, {"concepts": list(self.concepts)}, parts)

    @classmethod
    def load(cls, directory: str | Path) -> ComposedEraser:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        _, config, _ = artifact.load(directory, kind="ComposedEraser")
        found = [
            ManifoldEraser.load(Path(directory) / f"concept_{n}")
            for n in range(len(config["concepts"]))
        ]
        return cls(dict(zip(config["concepts"], found, strict=True)))
