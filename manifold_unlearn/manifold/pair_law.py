"""The law of all pair distances, and the dimension at zero scale that it gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.distances import (
    rounding_error,
    squared_distance_block,
    squared_norms,
)

_SAMPLED_PAIRS = 2**22
_PER_OCTAVE = 16
_OCTAVES = 100
_WIDEST = 0.9  # quantile of the pairs
_LEAST_PAIRS = 2  # a row, in the narrowest window
_AGREE = 2.0  # standard errors
_BETTER = 4.0  # log-likelihood ratio, in effective pairs, that a third parameter must bring
_BENDS = np.array([-6.0, -3.0, -1.5, -0.75, -0.35, 0.0, 0.2, 0.4, 0.6, 0.75, 0.87, 0.95, 0.99])


class PairCounts(NamedTuple):
    """Squared distances from sampled rows to all rows, in bins of 1 / 16 octave.

    ``counts`` (n_sampled, n_bins) without pairs that coincide, ``values`` (n_bins,) the bins'
    middles, ``n_samples`` the rows there are.
    """

    counts: np.ndarray
    values: np.ndarray
    n_samples: int


class PairLaw(NamedTuple):
    """Dimension at zero scale, its standard error, and the part of the pairs it was read from."""

    dimension: float
    standard_error: float
    fraction: float


def pair_counts(X: Tensor) -> PairCounts:
    """Histogram of squared distances of up to 4 million pairs (at least 256 rows to all).

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
        Centered, float64 or float32.
    """
    n_samples = len(X)
    n_sampled = min(n_samples, max(256, _SAMPLED_PAIRS // n_samples))
    mean = X.mean(0)
    by_place = (squared_norms(X) - 2 * (X @ mean)).argsort(stable=True)
    sampled = by_place[torch.arange(n_sampled, device=X.device) * n_samples // n_sampled]
    norms = squared_norms(X)
    error = rounding_error(norms)
    top = np.log2(4 * float(norms.max()))
    n_bins = _OCTAVES * _PER_OCTAVE
    counts = torch.zeros(n_sampled, n_bins + 1, dtype=torch.int64, device=X.device)
    for part in row_blocks(n_sampled, max(1, 2**20 // n_samples)):
        rows = sampled[part]
        block = squared_distance_block(X[rows], X, norms[rows], norms)
        block.masked_fill_(block <= error[rows, None] + error[None, :], 0)
        block[torch.arange(len(rows), device=X.device), rows] = 0
        bins = ((block.log2() - (top - _OCTAVES)) * _PER_OCTAVE).clamp_(-1, n_bins - 1).long() + 1
        bins += torch.arange(len(rows), device=X.device)[:, None] * (n_bins + 1)
        counted = torch.bincount(bins.reshape(-1), minlength=len(rows) * (n_bins + 1))
        counts[part] = counted.reshape(len(rows), -1)
    kept = counts[:, 1:]
    filled = (kept.sum(0) > 0).nonzero()[:, 0]
    low, high = int(filled[0]), int(filled[-1]) + 1
    middles = top - _OCTAVES + (np.arange(low, high) + 0.5) / _PER_OCTAVE
    return PairCounts(kept[:, low:high].cpu().numpy().astype(float), 2.0**middles, n_samples)


def dimension_of_pairs(pairs: PairCounts, nearest: tuple[float, float]) -> PairLaw | None:
    """Dimension at zero scale, from the widest range of distances that agrees with all narrower.

    The number of pairs at squared distance ``s`` grows as ``s**(d / 2 - 1)`` only at zero scale:
    curvature and changes of density bend it. The law ``s**(d / 2 - 1) * (1 - e * s)**(b / e)``
    bends with it, and is exact for spheres (Beta), Gaussians (``e = 0``, Gamma) and, nearly, heavy
    tails (``e < 0``). It is fitted by maximum likelihood to the pairs below a distance; ``e`` only
    where the likelihood asks for it.
    The standard error is that of a U-statistic: pairs that share a row are dependent.

    Parameters
    ----------
    pairs : PairCounts
    nearest : tuple of two floats
        Dimension by TwoNN and its standard error.

    Parameters
    ----------
    pairs : PairCounts
    nearest : tuple of two floats
        Dimension by TwoNN and its standard error.

    Returns
    -------
    PairLaw or None
        None: too few pairs, or they do not tell the parameters apart.
    """
    total = pairs.counts.sum(0)
    cumulated = np.cumsum(total)
    least = _LEAST_PAIRS * len(pairs.counts)
    windows: list[tuple[PairLaw, PairLaw]] = []
    stops = {0}
    wanted = _WIDEST * cumulated[-1]
    while wanted >= max(least, 200):
        stop = int(np.searchsorted(cumulated, wanted)) + 1
        wanted /= 2
        if stop < 12 or stop in stops:
            break
        stops.add(stop)
        if (found := _fit_window(pairs, stop)) is not None:
            windows.append(found)
    # the fewer pairs, the larger the error: where it comes out smaller, the fit is at an edge
    errors = [free.standard_error for _, free in windows]
    for i in range(1, len(errors)):
        errors[i] = max(errors[i], 2**0.5 * errors[i - 1])
    for i, (simple, free) in enumerate(windows):
        narrower = zip(windows[i + 1 :], errors[i + 1 :], strict=True)
        size = free.dimension * pairs.n_samples ** (-2 / max(free.dimension, 0.1))
        allowed = _AGREE * np.hypot(nearest[1], size)
        if abs(free.dimension - nearest[0]) > allowed:
            continue
        if all(abs(free.dimension - w[1].dimension) <= _AGREE * e for w, e in narrower):
            return simple
    return None


def _fit_window(pairs: PairCounts, stop: int) -> tuple[PairLaw, PairLaw] | None:
    """The law with as many parameters as the likelihood asks for, and with all."""
    counts = pairs.counts[:, :stop]
    total = counts.sum(0)
    n_pairs = total.sum()
    observed = total / n_pairs
    x = pairs.values[:stop] / pairs.values[stop - 1]
    reach = x[-1] * 2 ** (0.5 / _PER_OCTAVE)
    likelihood = np.array([_fit_bend(x, observed, bend / reach)[0] for bend in _BENDS])
    if not np.isfinite(likelihood).any():
        return None
    bend = _refined(x, observed, int(np.argmax(likelihood)), reach)
    free = _law(pairs, counts, x, observed, bend / reach, True)
    distinct = n_pairs / (1 + len(counts) / pairs.n_samples)
    flat = likelihood[_BENDS == 0][0]
    if free is None or (likelihood.max() - flat) * distinct >= _BETTER:
        return None if free is None else (free, free)
    simple = _law(pairs, counts, x, observed, 0.0, False)
    return (free if simple is None else simple), free


def _law(
    pairs: PairCounts,
    counts: np.ndarray,
    x: np.ndarray,
    observed: np.ndarray,
    bend: float,
    bend_is_fitted: bool,
) -> PairLaw | None:
    _, theta, features, model = _fit_bend(x, observed, bend)
    if bend_is_fitted:
        features = np.c_[features, _by_bend(x, bend, theta[1])]
    centered = features - model @ features
    information = centered.T @ (centered * model[:, None])
    if bend_is_fitted and np.linalg.cond(information) > 1e14:
        information, centered = information[:2, :2], centered[:, :2]  # no curve to bend
    if np.linalg.cond(information) > 1e14:
        return None
    influence = centered @ np.linalg.inv(information)[:, 0] * 2  # of a pair, on the dimension
    error = _standard_error(counts, influence, pairs.n_samples)
    return PairLaw(float(2 * theta[0]), error, float(counts.sum() / pairs.counts.sum()))


def _feature(x: np.ndarray, bend: float) -> np.ndarray:
    return -x if abs(bend) < 1e-6 else np.log1p(-bend * x) / bend


def _by_bend(x: np.ndarray, bend: float, slope: float) -> np.ndarray:
    step = 1e-4
    return slope * (_feature(x, bend) - _feature(x, bend - step)) / step


def _fit_bend(
    x: np.ndarray, observed: np.ndarray, bend: float
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihood a pair, (d / 2, b), features and model probabilities, by Newton."""
    features = np.stack([np.log(x), _feature(x, bend)], axis=1)
    aim = observed @ features
    theta = np.array([max(-1 / min(aim[0], -1e-9), 0.05), 0.0])

    def of(theta: np.ndarray) -> tuple[float, np.ndarray]:
        logs = features @ theta  # bins of equal width in log s: the Jacobian adds 1 to the power
        shift = logs.max()
        mass = np.exp(logs - shift)
        return float(aim @ theta - shift - np.log(mass.sum())), mass / mass.sum()

    value, model = of(theta)
    for _ in range(50):
        centered = features - model @ features
        hessian = centered.T @ (centered * model[:, None])
        if np.linalg.cond(hessian) > 1e12:
            return -np.inf, theta, features, model
        step = np.linalg.solve(hessian, aim - model @ features)
        for _ in range(30):
            new, changed = of(theta + step)
            if new >= value:
                break
            step = step / 2
        else:
            break
        done = new - value < 1e-13
        theta, value, model = theta + step, new, changed
        if done:
            break
    return value, theta, features, model


def _refined(x: np.ndarray, observed: np.ndarray, best: int, reach: float) -> float:
    """Most likely bend between the neighbors of the best on the grid."""
    low, high = _BENDS[max(best - 1, 0)], _BENDS[min(best + 1, len(_BENDS) - 1)]
    golden = (5**0.5 - 1) / 2
    for _ in range(8):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if _fit_bend(x, observed, a / reach)[0] < _fit_bend(x, observed, b / reach)[0]:
            low = a
        else:
            high = b
    return float((low + high) / 2)


def _standard_error(counts: np.ndarray, influence: np.ndarray, n_samples: int) -> float:
    n_sampled = len(counts)
    n_pairs = counts.sum()
    of_pairs = float(counts.sum(0) @ influence**2)
    by_row = counts @ influence
    # variance of a row's part, what its pairs scatter by chance taken off
    per_row = max(0.0, float((by_row**2).sum()) - of_pairs) / n_sampled / n_samples**2
    rest = n_samples - n_sampled
    shared = per_row * (n_sampled * (n_samples + n_sampled) ** 2 + rest * n_sampled**2)
    return float(np.sqrt(shared + of_pairs * (1 + n_sampled / n_samples)) / n_pairs)
