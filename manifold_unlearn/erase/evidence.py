"""Evidence gathered along sequences, and the threshold that retain sequences seldom reach."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_unlearn.conformal import ConformalQuantile, conformal_quantile
from manifold_unlearn.sequences import Padded

LEAST_THRESHOLD = 1e-3
"""Nats; no gate opens below, so that it is shut where there is no evidence at all."""

_ROUNDING = 1e-4
"""Over the largest evidence: texts that begin alike share rows, and one of those may set the
threshold, which no rounding of another batch, amplified by a density, may reach."""


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


def gate_threshold(maxima: Tensor, false_positive_rate: float) -> ConformalQuantile:
    """Least threshold, exact in float32, that a new retain sequence seldom reaches.

    It lies above the conformal quantile of the maxima by more than what rounding makes of one of
    them, so that the chance that a further sequence reaches it is at most ``promised_rate``.

    Parameters
    ----------
    maxima : Tensor of shape (n_sequences,)
    false_positive_rate : float
        In (0, 1).
    """
    found = conformal_quantile(maxima, false_positive_rate)
    least = max(found.value + _ROUNDING * float(maxima.abs().max()), LEAST_THRESHOLD)
    above = torch.nextafter(torch.tensor(least, dtype=torch.float32), torch.tensor(math.inf))
    return found._replace(value=float(above))


def separation(positive: Tensor, negative: Tensor) -> float:
    """Chance that a positive value exceeds a negative one, ties half: the area under the ROC."""
    both = torch.cat([negative, positive]).double()
    _, rank, counts = torch.unique(both, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    middle = last - (counts.double() - 1) / 2  # mean rank of ties
    n, m = len(positive), len(negative)
    total = float(middle[rank[m:]].sum())
    return (total - n * (n + 1) / 2) / (n * m)
