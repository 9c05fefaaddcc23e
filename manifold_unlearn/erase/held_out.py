"""Density ratios, fitted so that every row has a score that its own fold had no part in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.erase.densities import (
    KernelRatio,
    LinearRatio,
    gaussian,
    inverse,
    ratio_of,
)
from manifold_unlearn.erase.folds import Rows
from manifold_unlearn.erase.landmark_labels import (
    Landmarks,
    choose,
    diffused,
    distance_blocks,
    typical_distance,
)
from manifold_unlearn.erase.moments import Moments, oas_shrinkage, shrink
from manifold_unlearn.manifold.distances import center_of, squared_norms

_WIDTHS = tuple(2.0**-k for k in range(7))  # of the typical squared distance to a neighbor
_BACKGROUNDS = (1.0, 0.1, 0.01, 0.001)


class Scored(NamedTuple):
    """A ratio fitted on all rows, and the held-out log ratio of each, ``(n_rows,)``."""

    ratio: KernelRatio | LinearRatio
    held_out: Tensor


def fit_linear(rows: Rows) -> Scored:
    """Linear discriminant with equal class masses and a shrunk covariance."""
    lines = [Moments.of(rows.values[rows.line == k]) for k in range(rows.n_lines)]
    forget, retain = lines[: rows.n_forget_lines], lines[rows.n_forget_lines :]
    held_out = rows.values.new_empty(len(rows.values))
    for k in range(rows.n_lines):
        asked = rows.line == k
        sides = [[part for part in side if part is not lines[k]] for side in (forget, retain)]
        held_out[asked] = _discriminant(*sides)(rows.values[asked])
    return Scored(_discriminant(forget, retain), held_out)


def _discriminant(forget: list[Moments], retain: list[Moments]) -> LinearRatio:
    f, r = reduce(Moments.merge, forget), reduce(Moments.merge, retain)
    covariance = (f.covariance + r.covariance) / 2
    spread = shrink(covariance, oas_shrinkage(covariance, f.count + r.count))
    return LinearRatio((f.mean + r.mean) / 2, torch.linalg.solve(spread, f.mean - r.mean))


def fit_kernel(
    rows: Rows,
    *,
    n_landmarks: int,
    n_neighbors: int,
    diffusion_time: int,
    nearest: bool,
    quality: Callable[[Tensor], Any],
    random_state: Any = None,
) -> Scored:
    """Kernel ratio over landmarks, of the bandwidth and background that score best.

    A row's held-out score has no row of its own line in the kernel sums, nor in the diffusion of
    the labels.

    Parameters
    ----------
    rows : Rows
    n_landmarks : int
        Of both classes together.
    n_neighbors : int
        The bandwidths tried are fractions of the typical squared distance to this neighbor. With
        ``nearest``, how many landmarks a row's sums are made of.
    diffusion_time : int
        Steps of the Markov matrix that the labels take; none with ``nearest``.
    nearest : bool
        Inverse squared distances to the nearest landmarks in place of a Gaussian over all.
    quality : callable
        Says of held-out scores ``(n_rows,)`` how good they are, by anything that compares.
    random_state : int, RandomState or None
        Draws the landmarks; None draws the same every time.

    Raises
    ------
    ValueError
        All rows are equal.

    Warns
    -----
    UserWarning
        ``n_neighbors`` is clamped.
    """
    center = center_of(rows.values)
    rows = rows._replace(values=rows.values - center)
    marks = choose(rows, n_landmarks, random_state)
    if n_neighbors > (others := len(marks.values) - 1):
        warnings.warn(
            f"n_neighbors={n_neighbors} is above the other landmarks, {others}, and is clamped.",
            UserWarning,
            stacklevel=4,
        )
        n_neighbors = others
    typical = typical_distance(marks, n_neighbors)
    widths = [typical * width for width in _WIDTHS]
    labels = diffused(rows, marks, widths, 0 if nearest else diffusion_time)
    scores = _held_out_scores(rows, marks, labels, widths, n_neighbors if nearest else 0)
    k, b = max(np.ndindex(scores.shape[:2]), key=lambda at: quality(scores[at]))
    ratio = KernelRatio(
        center[0],
        marks.values,
        squared_norms(marks.values),
        labels[k][-1].contiguous(),
        widths[k],
        _BACKGROUNDS[b],
        n_neighbors if nearest else 0,
    )
    return Scored(ratio, scores[k, b])


def _held_out_scores(
    rows: Rows, marks: Landmarks, labels: list[Tensor], widths: list[float], n_nearest: int
) -> Tensor:
    """Log ratios ``(n_widths, n_backgrounds, n_rows)``, each without the row's own line."""
    scores = rows.values.new_empty(len(widths), len(_BACKGROUNDS), len(rows.values))
    for part, apart in distance_blocks(rows.values, marks.values):
        line = rows.line[part]
        apart.masked_fill_(line[:, None] == marks.line, math.inf)
        for k, width in enumerate(widths):
            masses = _masses(apart, labels[k], line, width, n_nearest)
            for b, background in enumerate(_BACKGROUNDS):
                scores[k, b, part] = ratio_of(masses, background)
    return scores


def _masses(apart: Tensor, labels: Tensor, line: Tensor, width: float, n_nearest: int) -> Tensor:
    """Kernel sums of both classes ``(n_rows, 2)``; each row with the labels without its line."""
    if n_nearest:
        near, at = apart.topk(n_nearest, dim=1, largest=False)
        return (inverse(near, width)[..., None] * labels[-1][at]).sum(1)
    kernel = gaussian(apart, width)
    if len(labels) == 1:
        return kernel @ labels[-1]
    forget = (kernel * labels[..., 0][line]).sum(1)
    return torch.stack([forget, (kernel.sum(1) - forget).clamp_min(0)], dim=1)
