"""Published estimators of the intrinsic dimension from the distances to the nearest neighbors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betaln
from torch import Tensor

from manifold_unlearn.arrays import row_blocks

_LARGEST = 1e5  # dimension searched


class Estimate(NamedTuple):
    """Dimension, its standard error, and the rows' own estimates ``(n_samples,)``."""

    value: float
    standard_error: float
    local: np.ndarray


def gride(squared: np.ndarray, order: int, n_near: int) -> Estimate:
    """Maximum likelihood from ratios of distances to neighbor ``2 * order`` and ``order``.

    ``mu = r_(2 n) / r_n`` has density ``d (mu**d - 1)**(n - 1) / (B(n, n) mu**(2 n d - d + 1))``
    with ``n = order`` (Denti, Doimo, Laio and Mira 2022, eq. 2.6); ``order=1`` is TwoNN (Facco et
    al. 2017), whose estimate ``(N - 1) / sum(log mu)`` is unbiased. The standard error is from the
    observed information, times the square root of how often a distance is used for both of its
    ends beyond the first neighbor.

    Parameters
    ----------
    squared : array of shape (n_samples, n_neighbors)
        Squared distances, ascending; at least ``2 * order`` columns.
    order : int
    n_near : int
        The local estimate of a row is :func:`levina_bickel`'s over so many neighbors.
    """
    logs = (np.log(squared[:, 2 * order - 1]) - np.log(squared[:, order - 1])) / 2
    _require_spread(logs)
    n_samples = len(logs)
    near = levina_bickel(squared[:, :n_near]).local
    if order == 1:
        value = (n_samples - 1) / logs.sum()
        return Estimate(float(value), float(value / np.sqrt(n_samples)), near)
    positive = logs[logs > 0]

    def slope(d: float) -> float:
        rising = (order - 1) * (positive / -np.expm1(-d * positive)).sum()
        return n_samples / d + rising - (2 * order - 1) * logs.sum()

    low, high = 1e-6, 1.0
    while slope(high) > 0 and high < _LARGEST:
        high *= 2
    value = brentq(slope, low, high)
    powers = np.exp(-value * positive)
    curvature = n_samples / value**2
    curvature += (order - 1) * (positive**2 * powers / np.expm1(-value * positive) ** 2).sum()
    return Estimate(float(value), float(np.sqrt(_shared(order) / curvature)), near)


def gride_log_likelihood(ratios: np.ndarray, order: int, dimension: float) -> float:
    """Log-likelihood of the ratios ``mu > 1`` at ``dimension``; see :func:`gride`."""
    logs = np.log(ratios)
    terms = np.log(dimension) + (order - 1) * np.log(np.expm1(dimension * logs))
    terms -= ((2 * order - 1) * dimension + 1) * logs
    return float(terms.sum() - len(logs) * betaln(order, order))


def levina_bickel(squared: np.ndarray) -> Estimate:
    """Maximum likelihood from all neighbors (Levina and Bickel 2005), pooled over rows.

    A row's estimate is ``(k - 2) / sum_j log(r_k / r_j)``, unbiased; rows are pooled by the mean of
    inverses (MacKay and Ghahramani 2005): ``(N (k - 1) - 1) / sum_ij log(r_ik / r_ij)``.

    Parameters
    ----------
    squared : array of shape (n_samples, n_neighbors)
        Squared distances, ascending; at least 3 columns.
    """
    n_samples, k = squared.shape
    logs = (np.log(squared[:, -1:]) - np.log(squared[:, :-1])).sum(1) / 2
    _require_spread(logs)
    value = (n_samples * (k - 1) - 1) / logs.sum()
    error = value * np.sqrt(_shared(k) / (n_samples * (k - 1)))
    least = logs[logs > 0].min()
    return Estimate(float(value), float(error), (k - 2) / np.maximum(logs, least))


def takens(values: np.ndarray, counts: np.ndarray, fraction: float) -> Estimate:
    """Correlation dimension: ``-1 / mean(log(r / r_max))`` over the pairs nearer than ``r_max``.

    Takens' (1985) maximum likelihood form of the slope of Grassberger and Procaccia (1983).

    Parameters
    ----------
    values, counts : array of shape (n_bins,) and (n_sampled, n_bins)
        Squared distances and how many pairs of a row have them.
    fraction : float
        Of the pairs, in (0, 1]; decides ``r_max``.
    """
    cumulated = np.cumsum(counts.sum(0))
    stop = int(np.searchsorted(cumulated, fraction * cumulated[-1])) + 1
    edge = np.sqrt(values[stop - 1] * values[min(stop, len(values) - 1)])
    logs = np.log(edge / values[:stop]) / 2
    inside = counts[:, :stop]
    n_pairs, total = inside.sum(), float((inside @ logs).sum())
    value = n_pairs / total
    by_row = inside @ logs - inside.sum(1) / value  # jackknife over rows, both ends of a pair
    error = value**2 / n_pairs * np.sqrt(2 * float((by_row**2).sum()))
    local = inside.sum(1) / np.maximum(inside @ logs, total / n_pairs / 10)
    return Estimate(float(value), float(error), local)


def local_spectra(X: Tensor, indices: Tensor) -> np.ndarray:
    """Eigenvalues ``(n_rows, r)`` of the covariance of each row's neighborhood, descending."""
    n_rows, k = indices.shape
    blocks = []
    for part in row_blocks(n_rows, max(1, 2**24 // (k * max(X.shape[1], k)))):
        near = X[indices[part]].double()
        near -= near.mean(1, keepdim=True)
        wide = X.shape[1] > k
        gram = near @ near.mT if wide else near.mT @ near
        blocks.append(torch.linalg.eigvalsh(gram / (k - 1)).flip(1)[:, : k - 1])
    return torch.cat(blocks).clamp_min_(0).cpu().numpy()


def largest_gap(spectra: np.ndarray) -> Estimate:
    """Where the eigenvalues of local covariances fall most: local PCA (Fukunaga and Olsen 1971).

    Of the spectra's mean, each scaled to unit trace, the dimension is the ``j`` with the largest
    ``lambda_j / lambda_(j + 1)``; directions below 1 % of the variance count as one level, so that
    the rank of exact data is not taken for it. White noise lifts all alike.
    The standard error is that of the mean of the rows' own dimensions, at least 0.
    """
    scaled = spectra / np.maximum(spectra.sum(1, keepdims=True), 1e-300)
    local = _gap(scaled).astype(float)
    value = float(_gap(scaled.mean(0)[None])[0])
    return Estimate(value, float(local.std() / np.sqrt(len(local))), local)


def _gap(scaled: np.ndarray) -> np.ndarray:
    floor = 0.01
    padded = np.concatenate([scaled, np.zeros((len(scaled), 1))], axis=1) + floor
    usable = scaled.shape[1] if scaled.shape[1] < 4 else (3 * scaled.shape[1] + 3) // 4
    return 1 + np.argmax(padded[:, :usable] / padded[:, 1 : usable + 1], axis=1)


def _shared(k: int) -> float:
    """Variance over that of independent rows: beyond the first, neighbors are mostly mutual."""
    return 2 - 1 / k


def _require_spread(logs: np.ndarray) -> None:
    if not float(logs.sum()) > 0:
        raise ValueError(
            f"the nearest neighbors of all {len(logs)} distinct samples are equally far: a lattice "
            "has no ratio of distances to estimate a dimension from. Use method='correlation' or "
            "'local_pca', or add data."
        )
