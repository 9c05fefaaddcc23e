"""Density ratios, fitted so that every row has a score that its own unit had no part in."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import generator, row_blocks
from manifold_unlearn.erase.densities import (
    KernelRatio,
    LinearRatio,
    gaussian,
    inverse,
    ratio_of,
)
from manifold_unlearn.erase.moments import Moments, oas_shrinkage, shrink
from manifold_unlearn.manifold.distances import (
    center_of,
    squared_distance_block,
    squared_norms,
)
from manifold_unlearn.manifold.landmarks import choose_landmarks

_BLOCK = 2**22  # entries of one block of distances
_WIDTHS = tuple(2.0**-k for k in range(7))  # of the typical squared distance to a neighbor
_BACKGROUNDS = (1.0, 0.1, 0.01)
_N_FOLDS = 10
SHARED = -1
"""Unit of a landmark that rows of several units are equal to: left out with none of them."""


class Rows(NamedTuple):
    """Rows to fit on.

    Attributes
    ----------
    values : Tensor of shape (n_rows, d)
    forget : Tensor of shape (n_rows,), bool
    unit : Tensor of shape (n_rows,), int64
        Rows of one class and unit are left out together; numbered from 0, each class apart.
    weight : Tensor of shape (n_rows,)
        Of a row's held-out score in the choice of the bandwidth; of each class they sum to 1.
    """

    values: Tensor
    forget: Tensor
    unit: Tensor
    weight: Tensor


class Scored(NamedTuple):
    """A ratio fitted on all rows, and the held-out log ratio of each, ``(n_rows,)``."""

    ratio: KernelRatio | LinearRatio
    held_out: Tensor


class Landmarks(NamedTuple):
    """Distinct rows of both classes.

    Attributes
    ----------
    values : Tensor of shape (n_landmarks, d)
    forget : Tensor of shape (n_landmarks,), bool
    unit : Tensor of shape (n_landmarks,), int64
        Of the rows that they are; ``SHARED`` where these are of several units.
    scale : Tensor of shape (n_landmarks,)
        What a landmark counts, so that both classes count as much as the smaller has landmarks.
    """

    values: Tensor
    forget: Tensor
    unit: Tensor
    scale: Tensor


def fit_linear(rows: Rows, random_state: Any = None) -> Scored:
    """Linear discriminant with equal class masses and a shrunk covariance.

    Held-out scores are those of ten fits, each without the units of one tenth.
    """
    draw = generator(0 if random_state is None else random_state)
    fold = torch.empty_like(rows.unit)
    moments = {}
    for forget in (True, False):
        side = rows.forget == forget
        n_units = int(rows.unit[side].max()) + 1
        n_folds = min(_N_FOLDS, n_units)
        dealt = (torch.randperm(n_units, generator=draw) % n_folds).to(fold)
        fold[side] = dealt[rows.unit[side]]
        parts = [Moments.of(rows.values[side & (fold == k)]) for k in range(n_folds)]
        moments[forget] = parts
    held_out = rows.values.new_empty(len(rows.values))
    for k in range(int(fold.max()) + 1):
        asked = fold == k
        held_out[asked] = _discriminant(moments, k).to(asked.device, held_out.dtype)(
            rows.values[asked]
        )
    return Scored(_discriminant(moments, None), held_out)


def _discriminant(moments: dict[bool, list[Moments]], without: int | None) -> LinearRatio:
    merged = {}
    for forget, parts in moments.items():
        kept = [part for k, part in enumerate(parts) if k != without]
        merged[forget] = kept[0]
        for part in kept[1:]:
            merged[forget] = merged[forget].merge(part)
    covariance = (merged[True].covariance + merged[False].covariance) / 2
    spread = shrink(covariance, oas_shrinkage(covariance, sum(m.count for m in merged.values())))
    direction = torch.linalg.solve(spread, merged[True].mean - merged[False].mean)
    return LinearRatio((merged[True].mean + merged[False].mean) / 2, direction)


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
    for forget, n, (values, unit) in zip((True, False), wanted, sides, strict=True):
        at = choose_landmarks(values, n, seed)
        classes = torch.full_like(at, forget, dtype=torch.bool)
        scale = values.new_full((n,), min(wanted) / n)
        parts.append(Landmarks(values[at], classes, unit[at], scale))
    return Landmarks(*(torch.cat(both) for both in zip(*parts, strict=True)))


def _distinct(rows: Rows, forget: bool) -> tuple[Tensor, Tensor]:
    """Distinct rows of a class, and the unit of each or ``SHARED``."""
    side = rows.forget == forget
    unit = rows.unit[side]
    values, copy_of = torch.unique(rows.values[side], dim=0, return_inverse=True)
    blank = unit.new_zeros(len(values))
    least = blank.scatter_reduce(0, copy_of, unit, "amin", include_self=False)
    most = blank.scatter_reduce(0, copy_of, unit, "amax", include_self=False)
    return values, torch.where(least == most, least, SHARED)


def fit_kernel(
    rows: Rows,
    *,
    n_landmarks: int,
    n_neighbors: int,
    diffusion_time: int,
    nearest: bool,
    random_state: Any = None,
) -> Scored:
    """Kernel ratio over landmarks, its bandwidth and background those of least held-out log loss.

    A row's held-out score has no landmark of its own unit in the kernel sums, nor in the diffusion
    of the labels.

    Parameters
    ----------
    rows : Rows
    n_landmarks : int
        Of both classes together.
    n_neighbors : int
        The bandwidths tried are fractions of the typical squared distance to this neighbor. With
        ``nearest``, how many landmarks a row's sums are made of.
    diffusion_time : int
        Steps of the Markov matrix of the landmarks that the labels take.
    nearest : bool
        Inverse squared distances to the nearest landmarks in place of a Gaussian over all.
    random_state : int, RandomState or None
        Draws the landmarks; None draws the same every time.

    Raises
    ------
    ValueError
        All rows are equal.
    """
    center = center_of(rows.values)
    rows = rows._replace(values=rows.values - center)
    marks = choose(rows, n_landmarks, random_state)
    n_neighbors = min(n_neighbors, len(marks.values) - 1)
    between = _squared_distances(marks.values.double(), marks.values.double())
    typical = _typical(between, n_neighbors)
    steps = 0 if nearest else diffusion_time
    graphs = [_diffused(gaussian(between, typical * w), marks, steps) for w in _WIDTHS]
    scores = rows.values.new_empty(len(_WIDTHS), len(_BACKGROUNDS), len(rows.values))
    for part in row_blocks(len(rows.values), max(1, _BLOCK // len(marks.values))):
        apart = _squared_distances(rows.values[part], marks.values)
        key = _keys(rows.unit[part], rows.forget[part])
        apart.masked_fill_(key[:, None] == _keys(marks.unit, marks.forget), math.inf)
        near, at = apart.topk(n_neighbors, dim=1, largest=False) if nearest else (apart, None)
        for k, (width, graph) in enumerate(zip(_WIDTHS, graphs, strict=True)):
            kernel = inverse if nearest else gaussian
            masses = graph.masses(kernel(near, typical * width), key, at)
            for b, background in enumerate(_BACKGROUNDS):
                scores[k, b, part] = ratio_of(masses, background)
    wrong = torch.where(rows.forget, -scores, scores)
    loss = torch.nn.functional.softplus(wrong) @ rows.weight.to(scores)
    k, b = divmod(int(loss.argmin()), len(_BACKGROUNDS))
    ratio = KernelRatio(
        center[0],
        marks.values,
        squared_norms(marks.values),
        graphs[k].weights,
        typical * _WIDTHS[k],
        _BACKGROUNDS[b],
        n_neighbors if nearest else 0,
    )
    return Scored(ratio, scores[k, b])


class _Diffused(NamedTuple):
    """Labels of the landmarks after diffusion, as they are without each unit.

    Attributes
    ----------
    scale : Tensor of shape (n_landmarks,)
    labels : Tensor of shape (n_units + 1, n_landmarks)
        Between 0 and 1, forget; the last line is that without leaving out.
    keys : Tensor of shape (n_units,), int64
        Of the units left out, ascending.
    """

    scale: Tensor
    labels: Tensor
    keys: Tensor

    @property
    def weights(self) -> Tensor:
        """What each landmark counts for forget and for retain, ``(n_landmarks, 2)``."""
        return self.scale[:, None] * torch.stack([self.labels[-1], 1 - self.labels[-1]], dim=1)

    def masses(self, kernel: Tensor, key: Tensor, at: Tensor | None) -> Tensor:
        """Kernel sums of both classes ``(n_rows, 2)`` for rows of units ``key`` (n_rows,).

        ``kernel`` is of all landmarks, or for each row of those numbered ``at``.
        """
        if len(self.labels) == 1:
            if at is None:
                return kernel @ self.weights
            return (kernel[..., None] * self.weights[at]).sum(1)
        line = torch.searchsorted(self.keys, key).clamp_max(len(self.keys) - 1)
        line = torch.where(self.keys[line] == key, line, len(self.keys))
        scaled = kernel * self.scale
        forget = (scaled * self.labels[line]).sum(1)
        return torch.stack([forget, (scaled.sum(1) - forget).clamp_min(0)], dim=1)


def _diffused(kernel: Tensor, marks: Landmarks, steps: int) -> _Diffused:
    """``steps`` of the Markov matrix of ``kernel`` on the landmarks, applied to their classes."""
    like = marks.values
    keys, unit = torch.unique(_keys(marks.unit, marks.forget), return_inverse=True)
    labels = marks.forget.to(kernel)[:, None]
    if steps == 0:
        return _Diffused(marks.scale, labels.T.to(like), keys[:0])
    kernel = kernel * marks.scale.to(kernel)
    kept = torch.ones(len(labels), len(keys) + 1, dtype=kernel.dtype, device=kernel.device)
    kept[torch.arange(len(labels), device=kernel.device), unit] = 0
    kept[:, :-1][:, keys < 0] = 1  # shared: left out with none
    degrees = (kernel @ kept).clamp_min(torch.finfo(kernel.dtype).tiny)
    labels = labels.expand(-1, len(keys) + 1)
    for _ in range(steps):
        labels = (kernel @ (labels * kept) / degrees).clamp(0, 1)
    return _Diffused(marks.scale, labels.T.to(like).contiguous(), keys)


def _keys(unit: Tensor, forget: Tensor) -> Tensor:
    """One number for a class and a unit; negative where the unit is ``SHARED``."""
    return torch.where(unit == SHARED, SHARED, 2 * unit + forget)


def _squared_distances(X: Tensor, Y: Tensor) -> Tensor:
    block = squared_distance_block(X, Y, squared_norms(X), squared_norms(Y))
    return block.clamp_min_(0)


def _typical(between: Tensor, n_neighbors: int) -> float:
    """Median squared distance of landmarks to their neighbor of that rank."""
    ranked = between.kthvalue(n_neighbors + 1, dim=1).values
    typical = float(ranked.median())
    if typical <= 0:
        positive = between[between > 0]
        if not len(positive):
            raise ValueError(
                f"all {len(between)} distinct rows of the two classes coincide: nothing tells "
                "forget from retain. Give rows that differ."
            )
        typical = float(positive.median())
    return typical
