"""Rows dealt into folds: each is scored by fits that its own fold had no part in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import generator

N_FOLDS = 32
"""Parts into which the units of a class are dealt, at most."""


class Rows(NamedTuple):
    """Rows to fit on.

    Attributes
    ----------
    values : Tensor of shape (n_rows, d)
    line : Tensor of shape (n_rows,), int64
        Rows of one line are left out together; the forget lines come first.
    n_forget_lines, n_lines : int
    """

    values: Tensor
    line: Tensor
    n_forget_lines: int
    n_lines: int

    @property
    def forget(self) -> Tensor:
        """``(n_rows,)``, bool."""
        return self.line < self.n_forget_lines


def deal(unit: Tensor, random_state: Any = None) -> Tensor:
    """Fold of each row ``(n_rows,)``, the same for all rows of one ``unit`` (n_rows,)."""
    labels, place = torch.unique(unit, return_inverse=True)
    draw = generator(0 if random_state is None else random_state)
    dealt = torch.randperm(len(labels), generator=draw) % min(N_FOLDS, len(labels))
    return dealt.to(unit.device)[place]
