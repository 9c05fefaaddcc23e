"""Landmarks of two classes, and what each says of them once labels have diffused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import generator, row_blocks
from manifold_unlearn.erase.densities import gaussian
from manifold_unlearn.erase.folds import Rows
from manifold_unlearn.manifold.distances import squared_distance_block, squared_norms
from manifold_unlearn.manifold.landmarks import choose_landmarks

_BLOCK = 2**22  # entries of one block of distances
SHARED = -1
"""Line of a landmark that rows of several folds are equal to: left out with none of them."""


class Landmarks(NamedTuple):
    """Distinct rows of both classes.

    Attributes
    ----------
    values : Tensor of shape (n_landmarks, d)
    forget : Tensor of shape (n_landmarks,), bool
    line : Tensor of shape (n_landmarks,), int64
        Of the rows that they are, see :class:`Rows`; ``SHARED`` where these are of several.
    """

    values: Tensor
    forget: Tensor
    line: Tensor

    @property
    def scale(self) -> Tensor:
        """What each counts, so that both classes count as much as the smaller has landmarks."""
        n_forget = int(self.forget.sum())
        n_retain = len(self.forget) - n_forget
        least = min(n_forget, n_retain)
        return torch.where(self.forget, least / n_forget, least / n_retain).to(self.values)


def choose(rows: Rows, n_landmarks: int, random_state: Any = None) -> Landmarks:
    """Draw distinct rows of both classes, half each unless one has fewer.

    At random rather than farthest points, which would be outliers of both classes and leave the
    rows in between without.
    """
    seed = generator(0 if random_state is None else random_state).initial_seed()
    sides = [_distinct(rows, forget) for forget in (True, False)]
    n_forget, n_retain = (len(values) for values, _ in sides)
    n_forget = min(n_forget, max(n_landmarks // 2, n_landmarks - n_retain))
    wanted = (n_forget, min(n_retain, n_landmarks - n_forget))
    parts = []
    for forget, n, (values, line) in zip((True, False), wanted, sides, strict=True):
        at = choose_landmarks(values, n, seed)
        parts.append((values[at], torch.full_like(at, forget, dtype=torch.bool), line[at]))
    return Landmarks(*(torch.cat(both) for both in zip(*parts, strict=True)))


def _distinct(rows: Rows, forget: bool) -> tuple[Tensor, Tensor]:
    """Distinct rows of a class, and the line of each or ``SHARED``."""
    side = rows.forget == forget
    line = rows.line[side]
    values, copy_of = torch.unique(rows.values[side], dim=0, return_inverse=True)
    blank = line.new_zeros(len(values))
    least = blank.scatter_reduce(0, copy_of, line, "amin", include_self=False)
    most = blank.scatter_reduce(0, copy_of, line, "amax", include_self=False)
    return values, torch.where(least == most, least, SHARED)


def diffused(rows: Rows, marks: Landmarks, bandwidths: Sequence[float], steps: int) -> list[Tensor]:
    """Labels of the landmarks for each bandwidth, as they are without each line of rows.

    A step of the Markov matrix replaces a label by the mean over what is near. The first goes from
    the landmarks to all rows, both classes of equal mass: the share of the forget density at each
    landmark. Further ones go from landmark to landmark.

    Parameters
    ----------
    rows : Rows
    marks : Landmarks
    bandwidths : sequence of float
    steps : int
        0: the classes themselves, counted so that both have equal mass.

    Returns
    -------
    list of Tensor of shape (n_lines + 1, n_landmarks, 2)
        What a landmark counts for forget and for retain; the last line is that of all rows. For 0
        steps that alone.
    """
    if steps == 0:
        both = torch.stack([marks.forget, ~marks.forget], dim=1) * marks.scale[:, None]
        return [both[None]] * len(bandwidths)
    n_lines = rows.n_lines
    sums = rows.values.new_zeros(len(bandwidths), len(marks.values), n_lines)
    belongs = torch.nn.functional.one_hot(rows.line, n_lines).to(sums)
    for part, apart in distance_blocks(rows.values, marks.values):
        for total, bandwidth in zip(sums, bandwidths, strict=True):
            total.addmm_(gaussian(apart, bandwidth).T, belongs[part])
    counts = belongs.sum(0)
    labels = [_shares(part, counts, rows.n_forget_lines) for part in sums]
    if steps > 1:
        between = squared_distances(marks.values, marks.values)
        labels = [
            _further(part, gaussian(between, bandwidth), marks.line, steps - 1)
            for part, bandwidth in zip(labels, bandwidths, strict=True)
        ]
    return [torch.stack([part.T, 1 - part.T], dim=2) for part in labels]


def _shares(sums: Tensor, counts: Tensor, n_forget: int) -> Tensor:
    """Forget share of the density ``(n_landmarks, n_lines + 1)`` without each line, and with all.

    ``sums`` (n_landmarks, n_lines) of the kernel over the ``counts`` rows of each line, of which
    the first ``n_forget`` are forget.
    """
    density = []
    for side in (slice(None, n_forget), slice(n_forget, None)):
        whole, n = sums[:, side].sum(1, keepdim=True), counts[side].sum()
        without = torch.zeros_like(sums)
        without[:, side] = sums[:, side]
        fewer = torch.zeros_like(counts)
        fewer[side] = counts[side]
        parts = (whole - without).clamp_min(0) / (n - fewer)
        density.append(torch.cat([parts, whole / n], dim=1))
    both = density[0] + density[1]
    return torch.where(both > 0, density[0] / both.clamp_min(torch.finfo(both.dtype).tiny), 0.5)


def _further(labels: Tensor, kernel: Tensor, line: Tensor, steps: int) -> Tensor:
    """``labels`` (n_landmarks, n_lines + 1) after more steps, from landmark to landmark."""
    lines = torch.arange(labels.shape[1], device=line.device)
    kept = (line[:, None] != lines).to(kernel)
    degrees = (kernel @ kept).clamp_min(torch.finfo(kernel.dtype).tiny)
    for _ in range(steps):
        labels = (kernel @ (labels * kept) / degrees).clamp(0, 1)
    return labels


def distance_blocks(X: Tensor, Y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of parts of the rows ``X`` to all rows ``Y``, with which part it is."""
    for part in row_blocks(len(X), max(1, _BLOCK // len(Y))):
        yield part, squared_distances(X[part], Y)


def squared_distances(X: Tensor, Y: Tensor) -> Tensor:
    """``(len(X), len(Y))``, by one matrix product; center the rows first."""
    return squared_distance_block(X, Y, squared_norms(X), squared_norms(Y)).clamp_min_(0)


def typical_distance(marks: Landmarks, n_neighbors: int) -> float:
    """Median squared distance of landmarks to their neighbor of that rank; positive.

    Raises
    ------
    ValueError
        All landmarks coincide.
    """
    rows = marks.values.double()
    between = squared_distances(rows, rows).fill_diagonal_(0)
    typical = float(between.kthvalue(n_neighbors + 1, dim=1).values.median())
    if typical > 0:
        return typical
    positive = between[between > 0]
    if not len(positive):
        raise ValueError(
            "the rows of both classes coincide, so nothing tells forget from retain. Give rows "
            "that differ."
        )
    return float(positive.median())
