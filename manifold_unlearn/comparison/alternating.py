"""Alternating diffusion: what two views of the same rows have in common, without what each adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import generator, row_blocks
from manifold_unlearn.manifold.distances import center_of, squared_distance_block

_BALANCE_TOL = 1e-12
_BALANCE_STEPS = 1000
_ITERATIONS = 200
_RITZ_TOL = 1e-11
_SPARE = 10  # vectors iterated beyond those wanted
_LEAST_SCALE = 1e-3  # of the median: the kernel's scale where rows coincide
_BLOCK = 1024


class Common(NamedTuple):
    """Common coordinates of two views.

    Attributes
    ----------
    first, second : Tensor of shape (n_samples, n_components), float64
        Singular functions as the first and as the second view sees them, mean square 1.
    correlations : Tensor of shape (n_components,)
        Singular values, descending, in [0, 1]: the correlation of both after the kernels' blur.
    of_first, of_second : View
        What places new rows of either view.
    """

    first: Tensor
    second: Tensor
    correlations: Tensor
    of_first: View
    of_second: View


class View(NamedTuple):
    """Kernel of one view's rows, and the functions it averages to place a row.

    ``points`` (n, d) less ``center`` (1, d), their kernel's ``scale`` (n,) and balancing ``weight``
    (n,), ``harmonics`` (n, n_components), and ``n_neighbors``, int64.
    """

    points: Tensor
    center: Tensor
    scale: Tensor
    weight: Tensor
    harmonics: Tensor
    n_neighbors: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        """Common coordinates of rows of this view; those of fitted rows are their own."""
        result = X.new_empty(len(X), self.harmonics.shape[1])
        squared = self.points.square().sum(1)
        for part in row_blocks(len(X), _BLOCK):
            rows = X[part] - self.center
            distances = squared_distance_block(rows, self.points, rows.square().sum(1), squared)
            distances.clamp_min_(0)
            scale = _scales(distances, int(self.n_neighbors), self.scale.median())
            exponent = -distances / (scale[:, None] * self.scale) + self.weight.log()
            result[part] = torch.softmax(exponent, dim=1) @ self.harmonics
        return result


class Blend(NamedTuple):
    """Mean of the ``values`` at the nearest ``points``, the near ones weighing more."""

    points: Tensor
    values: Tensor
    n_neighbors: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        """Images of the rows."""
        result = X.new_empty(len(X), self.values.shape[1])
        squared = self.points.square().sum(1)
        k = int(self.n_neighbors)
        for part in row_blocks(len(X), _BLOCK):
            rows = X[part]
            block = squared_distance_block(rows, self.points, rows.square().sum(1), squared)
            near = block.clamp_min_(0).topk(k, dim=1, largest=False)
            reach = near.values[:, -1:].clamp_min(torch.finfo(block.dtype).tiny)
            weight = torch.exp(-2 * near.values / reach)
            weight = weight / weight.sum(1, keepdim=True)
            result[part] = (weight[:, None, :] @ self.values[near.indices])[:, 0]
        return result


def common_coordinates(
    A: Tensor, B: Tensor, n_components: int, n_neighbors: int, random_state: Any = 0
) -> Common:
    """Singular functions of one diffusion step in either view, one after the other.

    The Gaussian kernels have the scale of each row's ``n_neighbors``-th neighbor and are balanced
    to row and column sums of 1. A step in view A keeps what A sees and forgets what only B sees;
    the step in B after it forgets what only A sees. Functions that survive both are of the common
    variable. Dense: memory ``O(n_samples**2)``.

    Parameters
    ----------
    A, B : Tensor of shape (n_samples, d_A) and (n_samples, d_B), float64
    n_components, n_neighbors : int
    random_state : int or generator
        Starts the iteration.

    References
    ----------
    Lederman and Talmon (2018), Learning the geometry of common latent variables using
    alternating-diffusion, Appl. Comput. Harmon. Anal. 44.
    Michaeli, Wang and Livescu (2016), Nonparametric canonical correlation analysis, ICML (the
    singular functions of such a product).
    Marshall and Coifman (2019), Manifold learning with bi-stochastic kernels, IMA J. Appl. Math.
    84.
    """
    n = len(A)
    (first, P), (second, Q) = (_balanced(X, n_neighbors) for X in (A, B))
    u, correlations, v = _leading_pairs(P, Q, n_components, random_state)
    root = n**0.5
    u, v = u * root, v * root
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    u, v = u * sign, v * sign
    kept = correlations.clamp_min(torch.finfo(u.dtype).eps)
    return Common(
        u,
        v,
        correlations,
        first._replace(harmonics=Q @ v / kept),
        second._replace(harmonics=P @ u / kept),
    )


def _scales(distances: Tensor, n_neighbors: int, typical: Tensor | None) -> Tensor:
    """Distance to the ``n_neighbors``-th other row, the row itself being among them."""
    kth = distances.kthvalue(n_neighbors + 1, dim=1).values.sqrt()
    least = kth[kth > 0].median() if typical is None and bool((kth > 0).any()) else typical
    return kth if least is None else kth.clamp_min(_LEAST_SCALE * float(least))


def _balanced(X: Tensor, n_neighbors: int) -> tuple[View, Tensor]:
    """The view without its harmonics, and its doubly stochastic kernel."""
    center = center_of(X)
    points = X - center
    squared = points.square().sum(1)
    distances = squared_distance_block(points, points, squared, squared).clamp_min_(0)
    distances.fill_diagonal_(0)
    scale = _scales(distances, n_neighbors, None)
    if not bool((scale > 0).all()):
        scale = distances.max().sqrt().expand(len(X)).clone()
    kernel = torch.exp(distances.div_(-scale[:, None] * scale))
    weight = kernel.sum(1).rsqrt()
    for _ in range(_BALANCE_STEPS):
        sums = kernel @ weight
        if float((weight * sums - 1).abs().max()) <= _BALANCE_TOL:
            break
        weight = (weight / sums).sqrt()
    kernel *= weight[:, None] * weight
    view = View(points, center, scale, weight, points[:, :0], torch.tensor(n_neighbors))
    return view, kernel


def _leading_pairs(
    P: Tensor, Q: Tensor, count: int, random_state: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples of ``P @ Q`` after the constant one, by block iteration."""
    n = len(P)
    width = min(count + _SPARE, n - 1)
    start = torch.randn(n, width, generator=generator(random_state), dtype=P.dtype).to(P.device)
    v = torch.linalg.qr(start - start.mean(0)).Q
    before = torch.zeros(width, dtype=P.dtype, device=P.device)
    for _ in range(_ITERATIONS):
        u = P @ (Q @ v)
        u = torch.linalg.qr(u - u.mean(0)).Q
        w = Q @ (P @ u)
        v, triangle = torch.linalg.qr(w - w.mean(0))
        left, values, right = torch.linalg.svd(triangle.T)
        if float((values - before).abs()[:count].max()) <= _RITZ_TOL:
            break
        before = values
    # (P Q)' u = v triangle, so u left and v right' are the triples
    return (u @ left)[:, :count], values[:count].clamp(0, 1), (v @ right.T)[:, :count]
