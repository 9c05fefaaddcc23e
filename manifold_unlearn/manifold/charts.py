"""Local quadratic charts of a point cloud, and the surface of their fixed points."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.neighbors import nearest_neighbors

_BLOCK = 2**22  # entries of one gathered block of neighbors
_SEARCHES = 4  # times that the neighbors of a moving foot are looked up
_STEPS = 40
_TOLERANCE = 1e-9  # of the chart's radius
_STRAIGHT = 1e-6  # slope left over a tangent plane
_OFF_CENTER = 2.0  # deviations from the neighbors' mean up to which a chart is trusted
_SLACK = 1e-3
_REMOTE = 3.0  # extents of a row's neighbors beyond which the nearest stands in for it
_FOCAL = 0.2  # least eigenvalue of 1 - <II, x - p> for a Newton step
_RIDGE = 1e-9


class Charts(NamedTuple):
    """Second-order contact of a fitted surface at the feet of some rows, float64.

    Near ``feet`` the surface is ``feet + bases @ u + second(u, u) / 2``.

    Attributes
    ----------
    feet : Tensor of shape (n, d)
    bases : Tensor of shape (n, d, k)
        Orthonormal columns.
    second : Tensor of shape (n, k, k, d) or (0, k, k, d)
        Second fundamental form; orthogonal to ``bases``. Zero for charts of order 1; no rows
        unless asked for.
    noise : Tensor of shape (n,)
        Estimated squared length of a neighbor's residual.
    variance : Tensor of shape (n,)
        Estimated squared error of the foot that the residuals cause.
    spread : Tensor of shape (n, k, k, k, k) or (0, k, k, k, k)
        Covariance of the entries of ``second``, summed over the ambient coordinates; likewise.
    settled : Tensor of shape (n,), bool
        Whether the iteration reached a fixed point.
    """

    feet: Tensor
    bases: Tensor
    second: Tensor
    noise: Tensor
    variance: Tensor
    spread: Tensor
    settled: Tensor


class _Local(NamedTuple):
    """Neighbors of a block of rows in few coordinates about a base point.

    ``points`` (b, m, s), ``norms`` (b, m) their squared lengths. The orthonormal axes are
    ``offsets.mT @ mixing`` of the ambient offsets (b, m, d); mixing is None where s is d.
    """

    base: Tensor
    points: Tensor
    norms: Tensor
    offsets: Tensor
    mixing: Tensor | None

    def drop(self, ambient: Tensor) -> Tensor:
        """Local coordinates (b, s) of points of the ambient space."""
        offset = ambient - self.base
        if self.mixing is None:
            return offset
        return _apply(self.mixing.mT, _apply(self.offsets, offset))

    def raise_vectors(self, vectors: Tensor) -> Tensor:
        """Ambient vectors (b, ..., d) of local ones (b, ..., s)."""
        if self.mixing is None:
            return vectors
        flat = vectors.reshape(len(vectors), -1, vectors.shape[-1])
        return (flat @ self.mixing.mT @ self.offsets).reshape(*vectors.shape[:-1], -1)


class _Fit(NamedTuple):
    """Weighted regression of the neighbors on their tangential coordinates about a point."""

    value: Tensor  # (b, s) normal offset of the surface
    slope: Tensor  # (b, k, s)
    second: Tensor  # (b, k, k, s)
    center: Tensor  # (b, k) weighted mean of the tangential coordinates
    covariance: Tensor  # (b, k, k)
    radius: Tensor  # (b,)
    # without errors asked for, empty
    noise: Tensor  # (b,)
    variance: Tensor  # (b,)
    spread: Tensor  # (b, k, k, k, k)


def n_coefficients(dimension: int, order: int) -> int:
    """Coefficients of a polynomial of ``order`` 1 or 2 in ``dimension`` variables."""
    return 1 + dimension + (dimension * (dimension + 1) // 2 if order == 2 else 0)


def chart_order(dimension: int, n_neighbors: int) -> int:
    """2 where the neighbors are 1.5 times the coefficients of a quadratic, else 1."""
    return 2 if n_neighbors >= 1.5 * n_coefficients(dimension, 2) else 1


def surface_charts(
    X: Tensor,
    landmarks: Tensor,
    *,
    dimension: int,
    n_neighbors: int,
    order: int,
    curved: bool = False,
    n_steps: int = _STEPS,
) -> Charts:
    """Feet of the rows of ``X`` on the surface that ``landmarks`` sample, and the charts there.

    At a point p the nearest landmarks are regressed on their coordinates along a k-plane through
    p, with weights ``(1 - r**2 / R**2)**2`` that vanish at the first landmark left out. The
    surface is the set of points where the value of the fit is p and its slope is zero, as in
    moving least squares (Levin 2004; Sober and Levin 2020). The iteration moves p to the fit,
    turns the plane to its slope, and steps along it to the foot of the perpendicular, until all
    three rest. Since the surface depends on p alone, feet are their own feet.

    Parameters
    ----------
    X : Tensor of shape (n, d)
    landmarks : Tensor of shape (n_landmarks, d)
        Distinct, or no more than ``n_neighbors`` of them equal.
    dimension : int
        Of the surface, k.
    n_neighbors : int
        With positive weight, at most ``n_landmarks - 1``.
    order : int
        Of the polynomials, 1 or 2.
    curved : bool
        Whether the second fundamental form is wanted: n * k * k * d numbers.
    n_steps : int
        Most steps between two searches for neighbors; fewer give rough feet.
    """
    n_samples, n_features = X.shape
    k, n_curved = dimension, n_samples if curved else 0
    feet = X.double().clone()
    charts = Charts(
        feet,
        feet.new_zeros(n_samples, n_features, k),
        feet.new_zeros(n_curved, k, k, n_features),
        feet.new_zeros(n_samples),
        feet.new_zeros(n_samples),
        feet.new_zeros(n_curved, k, k, k, k),
        torch.zeros(n_samples, dtype=torch.bool, device=X.device),
    )
    n_candidates = min(len(landmarks), n_neighbors + max(16, n_neighbors // 2))
    whole = n_candidates == len(landmarks)
    left = torch.arange(n_samples, device=X.device)
    for _ in range(_SEARCHES):
        found = nearest_neighbors(charts.feet[left].to(landmarks), n_candidates, landmarks).indices
        inside = torch.ones(len(left), dtype=torch.bool, device=X.device)
        for part in row_blocks(len(left), max(1, _BLOCK // (n_candidates * n_features))):
            rows = left[part]
            inside[part] = _settle(
                charts, rows, X, landmarks[found[part]], n_neighbors, order, n_steps
            )
        if whole:
            break
        left = left[~inside]
        if len(left) == 0:
            break
    return charts


def _settle(
    charts: Charts,
    rows: Tensor,
    X: Tensor,
    candidates: Tensor,
    n_neighbors: int,
    order: int,
    n_steps: int,
) -> Tensor:
    """Iterate ``rows`` to rest among their candidates; whether these hold their neighbors."""
    k = charts.bases.shape[2]
    start, nearest = charts.feet[rows], candidates[:, 0].double()
    extent = (candidates[:, -1].double() - nearest).norm(dim=1)
    remote = (start - nearest).norm(dim=1) > _REMOTE * extent
    start = torch.where(remote[:, None], nearest, start)
    local = _localize(candidates.double())
    query, point = local.drop(X[rows].double()), local.drop(start)
    begin = point.clone()
    squared = _squared_distances(local.points @ begin[:, :, None], local.norms, begin)
    reach = squared.amax(1).sqrt()
    basis = _principal(local.points, squared, n_neighbors, k)
    settled = torch.zeros(len(rows), dtype=torch.bool, device=X.device)
    active, points, norms = torch.arange(len(rows), device=X.device), local.points, local.norms
    for count in range(n_steps):
        at, plane = point[active], basis[active]
        fit = _regress(points, norms, at, plane, n_neighbors, order)
        step = _step_to_foot(fit, query[active] - at, plane)
        if count >= _STEPS // 4:  # it goes round in circles: half steps may not
            step = step / 2
        bend = (fit.slope.mT - plane).abs().amax((1, 2))
        point[active], basis[active] = at + step, torch.linalg.qr(fit.slope.mT).Q
        rest = (step.norm(dim=1) <= _TOLERANCE * fit.radius) & (bend <= _STRAIGHT)
        settled[active] = rest
        if bool(rest.all()):
            break
        if 2 * int(rest.sum()) >= len(rest):  # gathering the rest anew costs a pass
            active, points, norms = active[~rest], points[~rest], norms[~rest]
    fit = _regress(local.points, local.norms, point, basis, n_neighbors, order, errors=True)
    charts.feet[rows] = local.base + local.raise_vectors(point)
    charts.bases[rows] = local.raise_vectors(basis.mT).mT
    charts.noise[rows], charts.variance[rows] = fit.noise, fit.variance
    if len(charts.second):
        normal = fit.second - (fit.second @ basis[:, None]) @ basis[:, None].mT
        charts.second[rows], charts.spread[rows] = local.raise_vectors(normal), fit.spread
    charts.settled[rows] = settled
    return fit.radius + (point - begin).norm(dim=1) <= reach * (1 + 1e-12)


def _localize(candidates: Tensor) -> _Local:
    """Coordinates in the span of the candidates where these are few, else the ambient ones."""
    base = candidates.mean(1)
    offsets = candidates - base[:, None]
    if 2 * candidates.shape[1] > candidates.shape[2] or candidates.shape[1] > 128:
        return _Local(base, offsets, offsets.square().sum(2), offsets, None)
    values, vectors = torch.linalg.eigh(offsets @ offsets.mT)
    kept = values > 1e-12 * values[:, -1:].clamp_min(1e-300)
    lengths = torch.where(kept, values.clamp_min(1e-300).sqrt(), 0.0)
    inverse = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
    points = vectors * lengths[:, None]
    return _Local(base, points, points.square().sum(2), offsets, vectors * inverse[:, None])


def _squared_distances(products: Tensor, norms: Tensor, at: Tensor) -> Tensor:
    """(b, m) of points, given their products (b, m, 1) with ``at``."""
    squared = norms - 2 * products[:, :, 0] + at.square().sum(1, keepdim=True)
    return squared.clamp_min(0)


def _weights(squared: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
    """Weights (b, m) that vanish at the first point beyond the neighbors, and that radius."""
    if n_neighbors < squared.shape[1]:
        limit = squared.kthvalue(n_neighbors + 1, dim=1, keepdim=True).values
    else:
        limit = squared.amax(1, keepdim=True) * (1 + 2 / n_neighbors)
    limit = (limit * (1 + 1e-9)).clamp_min(1e-300)  # equal distances to all leave equal weights
    weights = (1 - squared / limit).clamp_min(0)
    return (weights / weights.amax(1, keepdim=True)).square(), limit[:, 0].sqrt()


def _principal(points: Tensor, squared: Tensor, n_neighbors: int, k: int) -> Tensor:
    """Leading ``k`` weighted principal directions (b, s, k)."""
    weights, _ = _weights(squared, n_neighbors)
    weights = weights / weights.sum(1, keepdim=True)
    centered = points - (weights[:, None] @ points)
    scaled = centered * weights.sqrt()[:, :, None]
    if min(scaled.shape[1:]) > 64:
        return _by_iteration(scaled, k)
    if scaled.shape[1] < scaled.shape[2]:
        values, vectors = torch.linalg.eigh(scaled @ scaled.mT)
        return _orthonormal(scaled.mT @ vectors[:, :, -k:].flip(2))
    return torch.linalg.eigh(scaled.mT @ scaled).eigenvectors[:, :, -k:].flip(2)


def _by_iteration(scaled: Tensor, k: int) -> Tensor:
    """Leading right singular vectors by subspace iteration from a fixed start."""
    width = min(k + 8, *scaled.shape[1:])
    grid = torch.arange(scaled.shape[2] * width, dtype=scaled.dtype, device=scaled.device)
    basis = torch.cos(grid * math.sqrt(2) * grid.remainder(977)).reshape(1, -1, width)
    for _ in range(12):
        basis = torch.linalg.qr(scaled.mT @ (scaled @ basis)).Q
    image = scaled @ basis
    return basis @ torch.linalg.eigh(image.mT @ image).eigenvectors[:, :, -k:].flip(2)


def _orthonormal(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors).Q


def _design(u: Tensor, order: int) -> Tensor:
    """Monomials (b, m, q): 1, u_a, and u_a u_b (half of it where a = b)."""
    parts = [torch.ones_like(u[..., :1]), u]
    if order == 2:
        a, b = torch.triu_indices(u.shape[-1], u.shape[-1], device=u.device)
        parts.append(u[..., a] * u[..., b] * torch.where(a == b, 0.5, 1.0))
    return torch.cat(parts, dim=-1)


def _regress(
    points: Tensor,
    norms: Tensor,
    at: Tensor,
    basis: Tensor,
    n_neighbors: int,
    order: int,
    *,
    errors: bool = False,
) -> _Fit:
    k = basis.shape[2]
    products = points @ torch.cat([at[:, :, None], basis], 2)
    squared = _squared_distances(products, norms, at)
    weights, radius = _weights(squared, n_neighbors)
    total = weights.sum(1)
    u = products[:, :, 1:] - (at[:, None] @ basis)
    center = (weights[:, None] @ u)[:, 0] / total[:, None]
    centered = u - center[:, None]
    covariance = (centered * weights[:, :, None]).mT @ centered / total[:, None, None]
    unit = (u.square().sum(2) * weights).sum(1).div(total * k).sqrt().clamp_min(1e-150)
    design = _design(u / unit[:, None, None], order)
    weighted = design * weights[:, :, None]
    gram = weighted.mT @ design
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * torch.maximum(diagonal, 1e-3 * total[:, None])
    ridge[:, 0] = 1e-14 * total
    factor = torch.linalg.cholesky(gram + torch.diag_embed(ridge))
    moments = weighted.mT @ points - weighted.sum(1)[:, :, None] * at[:, None]
    solution = torch.cholesky_solve(moments, factor)
    slope = solution[:, 1 : 1 + k] / unit[:, None, None]
    value = solution[:, 0] - (basis @ (basis.mT @ solution[:, 0, :, None]))[:, :, 0]
    a, b = torch.triu_indices(k, k, device=points.device)
    second = solution.new_zeros(len(points), k, k, points.shape[2])
    if order == 2:
        second[:, a, b] = second[:, b, a] = solution[:, 1 + k :] / unit[:, None, None] ** 2
    noise = variance = spread = solution.new_zeros(0)
    if errors:
        explained = (solution * (2 * moments - gram @ solution)).sum((1, 2))
        unexplained = ((squared * weights).sum(1) - explained).clamp_min(0)
        inverse = torch.cholesky_inverse(factor)
        covariances = inverse @ (weighted.mT @ weighted) @ inverse
        lost = ((weighted @ inverse) * weighted).sum((1, 2))
        noise = unexplained / (total - lost).clamp_min(1e-9 * total)
        variance = covariances[:, 0, 0] * noise
        spread = solution.new_zeros(len(points), k, k, k, k)
        if order == 2:
            position = torch.zeros(k, k, dtype=torch.int64, device=points.device)
            position[a, b] = position[b, a] = torch.arange(len(a), device=points.device)
            flat = position.reshape(-1) + 1 + k
            quadratic = covariances * (noise / unit**4)[:, None, None]
            spread = quadratic[:, flat][:, :, flat].reshape(spread.shape)
    return _Fit(value, slope, second, center, covariance, radius, noise, variance, spread)


def _step_to_foot(fit: _Fit, offset: Tensor, basis: Tensor) -> Tensor:
    """Step (b, s) to the surface and along it to the foot of the perpendicular from the query."""
    along = _apply(basis.mT, offset)
    bending = torch.einsum("bijs,bs->bij", fit.second, offset - fit.value)
    bending = (bending + bending.mT) / 2
    identity = torch.eye(basis.shape[2], dtype=basis.dtype, device=basis.device)
    values, vectors = torch.linalg.eigh(identity - bending)
    # beyond the focal point the perpendicular has no nearest foot: go the plain way
    values = torch.where(values < _FOCAL, 1.0, values)
    along = _apply(vectors, _apply(vectors.mT, along) / values)
    # charts end where their neighbors do
    scale, axes = torch.linalg.eigh(fit.covariance)
    deviations = scale.clamp_min(1e-300).sqrt()
    relative = _apply(axes.mT, along - fit.center) / deviations
    # what rests at an end may stay: a foot there is its own foot
    resting = along.norm(dim=1, keepdim=True) <= _SLACK * fit.radius[:, None]
    limit = torch.where(resting, _OFF_CENTER * (1 + _SLACK), _OFF_CENTER)
    far = (relative.norm(dim=1, keepdim=True) / limit).clamp_min(1)
    along = fit.center + _apply(axes, relative / far * deviations)
    curved = torch.einsum("bijs,bi,bj->bs", fit.second, along, along) / 2
    return fit.value + _apply(fit.slope.mT, along) + curved


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[:, :, None])[:, :, 0]
