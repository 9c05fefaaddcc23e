"""Evidence gathered along sequences, and the threshold that retain sequences seldom reach."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_THRESHOLD = 1e-3
"""Nats; no gate opens below, so that it is shut where there is no evidence at all."""


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


def cumulated(log_ratios: Tensor, start: Tensor, present: Tensor) -> Tensor:
    """One-sided cumulative sums ``S_t = max(0, S_{t-1} + l_t)`` along the last axis.

    Parameters
    ----------
    log_ratios : Tensor of shape (batch, length)
        Nats.
    start : Tensor of shape (batch,)
        The sum before the first row, at least 0.
    present : Tensor of shape (batch, length), bool
        False for padding, which adds nothing.

    Returns
    -------
    Tensor of shape (batch, length)
        After every row; cutting the rows in two and starting the second part from the end of the
        first gives the same.

    References
    ----------
    Page (1954), Continuous inspection schemes, Biometrika 41.
    """
    steps = torch.where(present, log_ratios, torch.zeros_like(log_ratios))
    walk = steps.cumsum(-1) + start[:, None]
    return walk - walk.cummin(-1).values.clamp_max(0)


def largest(log_ratios: Tensor, layout: Padded, *, sequential: bool) -> Tensor:
    """The most evidence that each sequence reaches, ``(n_sequences,)``."""
    if not sequential:
        return layout.fill(log_ratios, -math.inf).amax(1)
    steps = layout.fill(log_ratios, 0.0)
    start = steps.new_zeros(len(steps))
    return cumulated(steps, start, torch.ones_like(steps, dtype=torch.bool)).amax(1)


class Threshold(NamedTuple):
    """A conformal threshold.

    Attributes
    ----------
    value : float
        Exact in float32; evidence of at least this opens the gate.
    promised_rate : float
        Chance, at most, that a further exchangeable sequence reaches it.
    n_needed : int
        Sequences that the rate asked for would need.
    """

    value: float
    promised_rate: float
    n_needed: int


def conformal_threshold(maxima: Tensor, false_positive_rate: float) -> Threshold:
    """Least threshold that a new retain sequence reaches with at most the chance asked for.

    The gate opens strictly above the ``ceil((n + 1) * (1 - false_positive_rate))``-th smallest of
    the ``n`` maxima: of ``n + 1`` exchangeable values the last is above it with at most that
    chance. With too few maxima the largest takes its place, and the chance is ``1 / (n + 1)``.

    Parameters
    ----------
    maxima : Tensor of shape (n_sequences,)
    false_positive_rate : float
        In (0, 1).

    References
    ----------
    Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world.
    """
    n = len(maxima)
    rank = math.ceil((n + 1) * (1 - false_positive_rate) - 1e-9)
    at = min(rank, n)
    value = max(float(maxima.double().sort().values[at - 1]), LEAST_THRESHOLD)
    above = torch.tensor(value, dtype=torch.float32)
    while float(above) <= value:
        above = torch.nextafter(above, torch.tensor(math.inf))
    n_needed = math.ceil(1 / false_positive_rate - 1e-9) - 1
    return Threshold(float(above), 1 - at / (n + 1), n_needed)


def separation(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive value exceeds a negative one, ties half: the area under the ROC."""
    both = torch.cat([negative, positive]).double()
    _, rank, counts = torch.unique(both, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    middle = last - (counts.double() - 1) / 2  # mean rank of ties
    n, m = len(positive), len(negative)
    total = float(middle[rank[m:]].sum())
    return (total - n * (n + 1) / 2) / (n * m)
