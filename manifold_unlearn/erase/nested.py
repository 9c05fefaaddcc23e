"""Fitted objects that hold fitted objects, on disk: one directory in another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from manifold_unlearn import artifact


class Saved(Protocol):
    """Anything with ``save(directory)``."""

    def save(self, directory: str | Path, /) -> None:
        """Write to a directory."""
        ...


def save_nested(
    directory: str | Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    parts: Mapping[str, Saved],
) -> None:
    """:func:`manifold_unlearn.artifact.save`, with ``parts`` in directories of their names inside.

    Old content is replaced by all of the new or by none of it.

    Raises
    ------
    FileExistsError
        ``directory`` exists and is something else than an artifact.
    """
    directory = Path(directory)
    artifact.refuse_foreign(directory)
    with artifact.replacing(directory) as staged:
        artifact.save(staged, kind, tensors, config)
        for name, part in parts.items():
            part.save(staged / name)
