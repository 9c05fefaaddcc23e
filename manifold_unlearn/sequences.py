"""Rows of sequences: which text each is of, and where it stands in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def row_labels(labels: Any, n_rows: int, name: str) -> Tensor:
    """Integer label of each row, (n_rows,) int64; each row its own for None.

    Raises
    ------
    ValueError
        Another shape, or no integers; names ``name``.
    """
    if labels is None:
        return torch.arange(n_rows)
    made = labels if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    if made.shape != (n_rows,) or made.is_floating_point() or made.is_complex():
        raise ValueError(
            f"{name} has shape {tuple(made.shape)} and dtype {made.dtype}; expected ({n_rows},) "
            "integers, one a row."
        )
    return made.to(torch.int64)


class Padded(NamedTuple):
    """Where every row stands in a rectangle with one line a sequence.

    Attributes
    ----------
    line, column : Tensor of shape (n_rows,), int64
    labels : Tensor of shape (n_sequences,), int64
        The number of each line's sequence; ascending.
    n_columns : int
    """

    line: Tensor
    column: Tensor
    labels: Tensor
    n_columns: int

    def fill(self, values: Tensor, empty: float) -> Tensor:
        """``values`` (n_rows,) as ``(n_sequences, n_columns)``, ``empty`` where no row stands."""
        made = values.new_full((len(self.labels), self.n_columns), empty)
        made[self.line, self.column] = values
        return made


def padded(sequence: Tensor) -> Padded:
    """Lay out rows by their ``sequence`` (n_rows,); rows of one keep their order."""
    labels, line, counts = torch.unique(sequence, return_inverse=True, return_counts=True)
    order = line.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.empty_like(line)
    column[order] = torch.arange(len(line), device=line.device) - starts[line[order]]
    return Padded(line, column, labels, int(counts.max()) if len(counts) else 0)
