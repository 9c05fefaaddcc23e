"""Linear alignments: rigid maps by Procrustes, affine ones by canonical correlations."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_RANK = 1e-10  # variance, relative to the largest, below which a direction is rounding


class Affine(NamedTuple):
    """``X @ matrix + offset``."""

    matrix: Tensor
    offset: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        """Images of the rows."""
        return X @ self.matrix + self.offset


class Fit(NamedTuple):
    """Part of the targets' variance explained, and root mean square distance to them."""

    score: float
    residual: float


def fit_of(images: Tensor, targets: Tensor) -> Fit:
    """How well ``images`` are the ``targets``."""
    squared = float((images - targets).square().sum())
    total = float((targets - targets.mean(0)).square().sum())
    score = 1 - squared / total if total > 0 else float(squared == 0)
    return Fit(score, math.sqrt(squared / len(targets)))


class Rigid(NamedTuple):
    """A scaled rotation, its inverse where it has one, and its ``scale``."""

    forward: Affine
    backward: Affine | None
    scale: float


def rigid(X: Tensor, Y: Tensor, coupling: Tensor | None, scale: bool, reflection: bool) -> Rigid:
    """Weighted Procrustes: of paired rows, or of all pairs under the coupling's mass."""
    if coupling is None:
        mean_X, mean_Y = X.mean(0), Y.mean(0)
        C_X, C_Y = X - mean_X, Y - mean_Y
        cross, spread = C_X.T @ C_Y, float(C_X.square().sum())
    else:
        mass_X, mass_Y = coupling.sum(1), coupling.sum(0)
        mean_X, mean_Y = mass_X @ X, mass_Y @ Y
        C_X, C_Y = X - mean_X, Y - mean_Y
        cross = C_X.T @ (coupling @ C_Y)
        spread = float(mass_X @ C_X.square().sum(1))
    U, values, V = torch.linalg.svd(cross, full_matrices=False)
    if not reflection and U.shape[0] == V.shape[1] and float(torch.linalg.det(U @ V)) < 0:
        V = torch.cat([V[:-1], -V[-1:]])
        values = torch.cat([values[:-1], -values[-1:]])
    rotation = U @ V
    factor = max(float(values.sum()) / spread, torch.finfo(X.dtype).tiny) if scale else 1.0
    forward = Affine(factor * rotation, mean_Y - factor * (mean_X @ rotation))
    backward = None
    if X.shape[1] <= Y.shape[1]:
        inverse = (rotation.T / factor).contiguous()
        backward = Affine(inverse, mean_X - mean_Y @ inverse)
    return Rigid(forward, backward, factor)


class Canonical(NamedTuple):
    """Canonical correlations of two sides.

    ``correlations`` (n_components,), descending; ``forward`` and ``backward`` predict either side
    from the other, ``into_A`` and ``into_B`` give the canonical coordinates.
    """

    correlations: Tensor
    forward: Affine
    backward: Affine
    into_A: Affine
    into_B: Affine


def canonical(
    X: Tensor, Y: Tensor, n_components: int | None, regularization: float | Literal["auto"]
) -> Canonical:
    """Regularized canonical correlations of paired rows, float64.

    ``regularization`` times the mean variance is added to every variance of a side. ``"auto"``:
    for each side what predicts the other best by ridge regression, judged by generalized
    cross-validation. Coordinates have variance 1 on the rows and correlations are those of the
    rows, whatever is added; with all coordinates the predictions are the ridge regressions.

    Raises
    ------
    ValueError
        ``n_components`` above the directions there are, or ``regularization`` out of range.

    References
    ----------
    Golub, Heath and Wahba (1979), Generalized cross-validation as a method for choosing a good
    ridge parameter, Technometrics 21.
    """
    if regularization != "auto" and (
        isinstance(regularization, str) or not 0 <= regularization < math.inf
    ):
        raise ValueError(
            f"regularization={regularization!r} must be finite and not negative, or 'auto'."
        )
    a, b = _whitened(X, Y, regularization), _whitened(Y, X, regularization)
    U, values, V = torch.linalg.svd(a.scores.T @ b.scores / len(X), full_matrices=False)
    available = len(values)
    count = available if n_components is None else n_components
    if count > available:
        raise ValueError(
            f"n_components={count} is more than the {available} directions in which both sides "
            "vary. Lower n_components."
        )
    U, values, V = U[:, :count], values[:count], V[:count].T
    z_a, z_b = a.scores @ U, b.scores @ V
    sd_a, sd_b = z_a.square().mean(0).sqrt(), z_b.square().mean(0).sqrt()
    correlations = ((z_a * z_b).mean(0) / (sd_a * sd_b)).clamp(-1, 1)
    order = correlations.argsort(descending=True)
    into_A = a.whiten @ (U / sd_a)[:, order]
    into_B = b.whiten @ (V / sd_b)[:, order]
    return Canonical(
        correlations[order],
        _predictor(a, b, U, values, V),
        _predictor(b, a, V, values, U),
        Affine(into_A, -a.mean @ into_A),
        Affine(into_B, -b.mean @ into_B),
    )


def _predictor(a: _Whitened, b: _Whitened, U: Tensor, values: Tensor, V: Tensor) -> Affine:
    matrix = a.whiten @ (U * values) @ V.T @ b.color
    return Affine(matrix, b.mean - a.mean @ matrix)


class _Whitened(NamedTuple):
    """A side in the directions it varies in; ``scores`` (n, r) have variance 1 with the ridge."""

    mean: Tensor
    whiten: Tensor
    color: Tensor
    scores: Tensor


def _whitened(X: Tensor, Y: Tensor, regularization: float | str) -> _Whitened:
    n, d = X.shape
    mean = X.mean(0)
    left, values, right = torch.linalg.svd(X - mean, full_matrices=False)
    variances = values.square() / n
    rank = int((variances > _RANK * variances[0]).sum())
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    variances = variances[:rank]
    level = float(variances.sum()) / d
    if isinstance(regularization, str):
        ridge = level * _best_ridge(left, variances / level, Y - Y.mean(0))
    else:
        ridge = level * float(regularization)
    root = (variances + ridge).sqrt()
    return _Whitened(mean, right.T / root, root[:, None] * right, left * (values / root))


def _best_ridge(left: Tensor, variances: Tensor, Y: Tensor) -> float:
    """The ridge of least generalized cross-validation error, in units of the variances."""
    n, rank = left.shape
    explained = (left.T @ Y).square().sum(1)
    total = float(Y.square().sum())
    beyond = max(total - float(explained.sum()), 0.0) if rank < n - 1 else 0.0
    least = -8.0 if rank < n - 1 else -5.0  # without rows to spare less is rounding
    grid = torch.logspace(least, 3, 56, dtype=left.dtype, device=left.device)
    kept = variances / (variances + grid[:, None])  # (n_grid, rank)
    residual = ((1 - kept).square() @ explained + beyond) / n
    freedom = 1 - (kept.sum(1) + 1) / n
    return float(grid[(residual / freedom.square()).argmin()])
