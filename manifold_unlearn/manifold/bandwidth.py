"""Bandwidth of a kernel from the data's own pair distances, and the support that it needs."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, row_blocks
from manifold_unlearn.manifold.distances import (
    center_of,
    rounding_error,
    squared_distance_block,
    squared_norms,
)

CUTOFF = 7.0
"""Least support: pairs with ``r**2 / (4 * bandwidth)`` up to here are kept (weight 9e-4)."""

FAR_CUTOFF = 18.4
"""Widest support, weight 1e-8: two rows farther apart are not connected."""

_CLEAR = 20.0  # times the bound on rounding that distances in single precision must exceed
_SAMPLED_PAIRS = 2**22
_BIN_BITS = 4  # of the mantissa: 16 bins an octave
_GRID_PER_OCTAVE = 4
_OCTAVES = 90  # of squared distances told apart, below the largest
_FLAT = 1.08  # a plateau's largest over smallest dimension, the sampling error apart
_ALIKE = 1.15  # and how far the third cumulant may vary along a plateau of the variance
_LEVEL = 0.04  # how far its ends may leave its median, the sampling error apart
_MARGIN = 2.0  # bandwidths are kept so far below the plateau's end, where other sheets come near
_NOISY = 0.1  # squared noise, over 4 * bandwidth, from which it is taken off the distances
_TRUSTED = 2000.0  # effective pairs from which the variance of the exponent is trusted
_TRUSTED_THIRD = 8000.0  # and its third cumulant
_LEAST_PLATEAU = 1.5  # octaves; anything shorter is no plateau
_LOST_MASS = 1e-3  # part of the kernel's mass that may lie beyond the support
_WIDENING = 16  # the graph is widened up to this many times n_neighbors per row, on average
_DENSE_ENTRIES = 2**24  # and always up to this many entries
_LEAST_PAIRS = 100.0  # below, a slope is chance


class PairHistogram(NamedTuple):
    """Squared distances from sampled rows to all rows, in logarithmic bins.

    ``counts`` (n_sampled, n_bins) leaves out pairs that coincide up to rounding; ``values``
    (n_bins,) are the bins' squared distances.
    """

    counts: np.ndarray
    values: np.ndarray


class Bandwidth(NamedTuple):
    """A kernel's scale, and what the data say about it.

    Attributes
    ----------
    bandwidth : float
        ``eps`` in ``exp(-r**2 / (4 * eps))``, squared units of the data.
    intrinsic_dimension : float
        Twice the height of the plateau; without one, twice the largest height.
    plateau : tuple of two floats
        Bandwidths between which the dimension is constant; equal when there is no plateau.
    squared_noise : float
        Mean squared distance that noise adds to a pair, squared units of the data.
    cutoff : float
        ``r**2 / (4 * eps)`` at which the support ends.
    offset : float
        Taken off squared distances, down to 0, before the kernel: the noise of both rows, which
        every pair has but a row and itself (El Karoui and Wu 2016); 0 where it is slight.
    """

    bandwidth: float
    intrinsic_dimension: float
    plateau: tuple[float, float]
    squared_noise: float
    cutoff: float
    offset: float = 0.0


def pair_histogram(X: Tensor, scale: Tensor | None = None) -> PairHistogram:
    """Histogram of squared distances, from up to 4 million pairs or 256 rows.

    The rows sampled are spread evenly over the order of their distances from the mean, so that
    the sample follows the data through permutation and rotation.

    Parameters
    ----------
    X : Tensor of shape (n_samples, n_features)
        Centered.
    scale : Tensor of shape (n_samples,), optional
        Squared distances are divided by the product of the two rows' scales.

    Raises
    ------
    ValueError
        All rows are equal.
    """
    n_samples = len(X)
    squared = squared_norms(X)
    mean = X.mean(0)  # the same whatever the order of the rows
    n_sampled = min(n_samples, max(256, _SAMPLED_PAIRS // n_samples))
    step = torch.arange(n_sampled, device=X.device) * n_samples // n_sampled
    sampled = (squared - 2 * (X @ mean)).argsort(stable=True)[step]
    unit = float(squared.max()) or 1.0
    X, squared = X / unit**0.5, squared / unit
    if X.dtype == torch.float32 and not _resolved(X, squared, sampled[:: max(1, n_sampled // 64)]):
        X = X.double()
        squared = squared_norms(X)
    error = rounding_error(squared)
    n_bins = (_OCTAVES + 14) << _BIN_BITS
    first_bin = (127 - _OCTAVES) << _BIN_BITS
    counts = torch.zeros(n_sampled, n_bins, dtype=torch.int64, device=X.device)
    for part in row_blocks(n_sampled, max(1, 2**20 // n_samples)):
        rows = sampled[part]
        block = squared_distance_block(X[rows], X, squared[rows], squared)
        block.masked_fill_(block <= error[rows, None] + error[None, :], 0)
        block[torch.arange(len(rows), device=X.device), rows] = 0
        if scale is not None:
            block /= scale[rows, None] * scale[None, :]
        # exponent and leading bits of a float are its logarithm, in steps of 1 / 16 octave or so
        bins = (block.float().view(torch.int32) >> (23 - _BIN_BITS)) - first_bin
        bins = bins.clamp_(0, n_bins - 1)  # coinciding rows, the row itself too, fall into bin 0
        bins += torch.arange(len(rows), device=X.device, dtype=torch.int32)[:, None] * n_bins
        counted = torch.bincount(bins.reshape(-1), minlength=n_bins * len(rows))
        counts[part] = counted.reshape(len(rows), n_bins)
    counts[:, 0] = 0
    filled = (counts.sum(0) > 0).nonzero()[:, 0]
    if len(filled) == 0:
        raise ValueError(
            f"all {n_samples} samples are equal: there is no geometry to learn. "
            "Give data with distinct rows."
        )
    low, high = int(filled[0]), int(filled[-1]) + 1
    words = (np.arange(low, high + 1) + first_bin).astype(np.int32) << (23 - _BIN_BITS)
    edges = words.astype(np.int32).view(np.float32).astype(np.float64) * unit
    return PairHistogram(
        counts[:, low:high].cpu().numpy().astype(np.float64), (edges[1:] + edges[:-1]) / 2
    )


def _resolved(X: Tensor, squared: Tensor, rows: Tensor) -> bool:
    """Whether distances from ``rows`` to all others stand well above rounding."""
    block = squared_distance_block(X[rows], X, squared[rows], squared)
    block[torch.arange(len(rows), device=X.device), rows] = float("inf")
    error = rounding_error(squared)
    return bool((block > _CLEAR * (error[rows, None] + error)).all())


class Slopes(NamedTuple):
    """What the kernel sums say at each bandwidth, arrays of shape (n_bandwidths,).

    Attributes
    ----------
    bandwidths : array
        A grid of four an octave, squared units of the data.
    mean : array
        ``d log S / d log eps``, the kernel-weighted mean of ``u = r**2 / (4 * eps)``.
    variance : array
        The kernel-weighted variance of ``u``.
    effective : array
        Number of pairs that the kernel's weights amount to.
    """

    bandwidths: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    effective: np.ndarray


def bandwidth_slopes(histogram: PairHistogram) -> Slopes:
    """Slope of the logarithmic kernel sum, and its like without noise, over all bandwidths."""
    total, values = histogram.counts.sum(0), histogram.values
    octaves = np.log2(values[-1] / values[0]) + 9
    grid = values[0] / 256 * 2.0 ** (np.arange(int(octaves * _GRID_PER_OCTAVE)) / _GRID_PER_OCTAVE)
    u = values[:, None] / (4 * grid[None, :])
    weights = np.exp(-u)
    mass = total @ weights + 1e-300
    mean = total @ (weights * u) / mass
    variance = total @ (weights * u**2) / mass - mean**2
    return Slopes(grid, mean, variance, mass**2 / (total @ weights**2 + 1e-300))


def tune_bandwidth(
    histogram: PairHistogram, *, n_neighbors: int, bandwidth: float | None = None
) -> Bandwidth:
    """Bandwidth on the plateau of the dimension, wide enough for the sparsest twentieth of rows.

    With ``S(eps) = mean exp(-u)``, ``u = r**2 / (4 * eps)``, the slope ``d log S / d log eps`` is
    the kernel-weighted mean of ``u``, half the dimension (Berry, Giannakis and Harlim 2015).
    Noise adds a constant to all squared distances and so lifts the mean, but not the *variance*
    of ``u``, which is half the dimension too: u is Gamma distributed. The plateau is therefore
    sought in the variance, and the difference of the two is the noise. Strong noise spreads
    squared distances as well: where the variance has no plateau, or one along which half the
    third cumulant is another number and that has a plateau of its own below, the third cumulant is
    searched, which a normal spread does not change. Of the plateau the bandwidth is taken at which
    the kernel sum of all but the sparsest 5 % of rows reaches ``n_neighbors / 4`` (on a curve times
    sqrt 2; less below 160 samples), what noise takes off not counted; but none in the plateau's
    last octave, where other parts of the manifold come near.

    Parameters
    ----------
    histogram : PairHistogram
    n_neighbors : int
    bandwidth : float, optional
        Given: only the dimension, the noise and the support are estimated.

    Returns
    -------
    Bandwidth
        Scales with the square of the data; the grid is made from the data's own distances.
    """
    counts, values = histogram
    n_sampled, total = len(counts), counts.sum(0)
    n_samples = int(np.round(counts.sum(1).max())) + 1
    curve = bandwidth_slopes(histogram)
    grid, mean, variance, effective = curve.bandwidths, curve.mean, curve.variance, curve.effective
    u = values[:, None] / (4 * grid[None, :])
    weights = np.exp(-u)
    trusted = effective >= min(_TRUSTED, total.sum() / 20)
    error = n_samples**-0.5
    first, last = _longest_plateau(np.where(trusted, variance, np.nan), error)
    half, long = variance, _LEAST_PLATEAU * _GRID_PER_OCTAVE
    third = total @ (weights * u**3) / (total @ weights + 1e-300) - 3 * mean * variance - mean**3
    third = np.where(effective >= _TRUSTED_THIRD, third / 2, np.nan)
    other = _longest_plateau(third, error)
    apart = other[1] < first and other[1] - other[0] >= long
    if last - first < long or (apart and not _alike(third[first : last + 1], error)):
        half, (first, last) = third, other
    found = last - first >= _LEAST_PLATEAU * _GRID_PER_OCTAVE
    height = float(np.median(half[first : last + 1]) if found else variance[trusted].max())
    noise = float(np.median((4 * grid * (mean - variance))[first : last + 1])) if found else 0.0
    noise, offset = max(0.0, noise), 0.0
    if bandwidth is None:
        degrees = counts @ np.exp(-np.maximum(values[:, None] - noise, 0) / (4 * grid))
        # a density estimate from m neighbors has variance 2**(-d / 2) / m: alike for a curve
        spread = 2 ** max(0.0, 1 - height)
        wanted = min(spread * n_neighbors / 4, 1 + n_samples / 10, (n_samples - 1) / 2)
        bandwidth = _scale_of_degree(grid, np.quantile(degrees, 0.05, axis=0), wanted)
        if found:
            least = _scale_of_degree(grid, np.median(degrees, axis=0), wanted / 4)
            bandwidth = min(bandwidth, grid[last] / _MARGIN)
            bandwidth = max(bandwidth, grid[first])
            bandwidth = max(bandwidth, least)
        if noise > _NOISY * 4 * bandwidth:
            offset = noise
    weighted = total * np.exp(-np.maximum(values - offset, 0) / (4 * bandwidth))
    beyond = weighted.sum() - np.cumsum(weighted)
    inside = int(np.searchsorted(-beyond, -_LOST_MASS * (weighted.sum() + n_sampled)))
    cutoff, shift = values[min(inside, len(values) - 1)] / (4 * bandwidth), offset / (4 * bandwidth)
    return Bandwidth(
        float(bandwidth),
        2 * height,
        (float(grid[first]), float(grid[last])) if found else (float(bandwidth),) * 2,
        noise,
        float(np.clip(cutoff, CUTOFF + shift, FAR_CUTOFF + shift)),
        offset,
    )


def _alike(values: np.ndarray, error: float) -> bool:
    """Whether the values along a plateau are nearly one."""
    return bool(np.isfinite(values).all() and values.max() <= (_ALIKE + 2 * error) * values.min())


def _longest_plateau(values: np.ndarray, error: float) -> tuple[int, int]:
    """First and last index of the longest run whose largest is near its smallest.

    Ends that leave the run's median are taken off; ``error`` is the relative sampling error.
    """
    flat, level = _FLAT + 2 * error, _LEVEL + error / 2
    best = (0, 0)
    start = 0
    usable = np.isfinite(values) & (values > 0.05)
    for stop in range(len(values)):
        if not usable[stop]:
            start = stop + 1
            continue
        while values[start : stop + 1].max() > flat * values[start : stop + 1].min():
            start += 1
        if stop - start >= best[1] - best[0]:
            best = (start, stop)
    first, last = best
    if first == last:
        return best
    middle = np.median(values[first : last + 1])
    while last > first and abs(values[last] / middle - 1) > level:
        last -= 1
    while last > first and abs(values[first] / middle - 1) > level:
        first += 1
    return first, last


def _scale_of_degree(grid: np.ndarray, degrees: np.ndarray, wanted: float) -> float:
    """Bandwidth at which ``degrees`` (increasing along ``grid``) reach ``wanted``."""
    logs = np.log(degrees + 1e-300)
    return float(np.exp(np.interp(np.log(wanted), logs, np.log(grid))))


def fit_support(
    histogram: PairHistogram, tuned: Bandwidth, *, n_samples: int, n_neighbors: int
) -> Bandwidth:
    """``tuned`` with the cutoff that the graph's limit allows.

    The support holds all but 0.1 % of the kernel's mass. A row has as many neighbors as that
    takes, on average at most ``16 * n_neighbors`` or 4096**2 / n_samples.

    Warns
    -----
    UserWarning
        The limit truncates the kernel; names the ``n_neighbors`` that would do.
    """
    average = np.cumsum(histogram.counts.sum(0)) / len(histogram.counts)
    limit = max(_WIDENING * n_neighbors, _DENSE_ENTRIES // n_samples)
    squared_radius = 4 * tuned.bandwidth * tuned.cutoff
    needed = float(np.interp(squared_radius, histogram.values, average))
    if needed <= limit:
        return tuned
    allowed = float(np.interp(limit, average, histogram.values))
    excess = np.maximum(histogram.values - tuned.offset, 0)
    mass = histogram.counts.sum(0) * np.exp(-excess / (4 * tuned.bandwidth))
    lost = mass[histogram.values > allowed].sum() / (mass.sum() + len(histogram.counts))
    enough = int(np.ceil(needed / _WIDENING))
    warnings.warn(
        f"the graph truncates the kernel: bandwidth={tuned.bandwidth:.4g} reaches {needed:.0f} "
        f"neighbors per row, the limit is {limit}; {lost:.1%} of the kernel's mass is lost. "
        f"n_neighbors={enough} would do, or a smaller bandwidth.",
        UserWarning,
        stacklevel=4,
    )
    return tuned._replace(cutoff=max(allowed / (4 * tuned.bandwidth), 1e-3))


class BandwidthCurve(NamedTuple):
    """Slopes over bandwidths and the bandwidth chosen, for ``report.bandwidth_curve``.

    Attributes
    ----------
    bandwidths : array of shape (n_bandwidths,)
        Squared units of the data.
    slope : array of shape (n_bandwidths,)
        ``d log S / d log eps``: half the dimension on a plateau, lifted by noise.
    variance : array of shape (n_bandwidths,)
        Half the dimension on a plateau too; noise does not lift it.
    tuned : Bandwidth
        ``bandwidth``, ``plateau``, ``intrinsic_dimension`` and the noise found.
    """

    bandwidths: np.ndarray
    slope: np.ndarray
    variance: np.ndarray
    tuned: Bandwidth


def bandwidth_curve(X: Array, *, n_neighbors: int = 64, device: Device = "auto") -> BandwidthCurve:
    """How the kernel sums of the rows grow with the bandwidth (Berry, Giannakis and Harlim 2015).

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
    n_neighbors : int
        As in :class:`~manifold_unlearn.manifold.diffusion.DiffusionMap`.
    device : str or torch.device

    Raises
    ------
    ValueError
        Fewer than 4 rows, rows that are all equal or not finite.
    """
    rows = as_rows(X, device=device, min_samples=4)
    histogram = pair_histogram(rows - center_of(rows))
    tuned = tune_bandwidth(histogram, n_neighbors=min(n_neighbors, len(rows) - 1))
    slopes = bandwidth_slopes(histogram)
    kept = slopes.effective >= min(_LEAST_PAIRS, histogram.counts.sum() / 20)
    grid, mean, variance = (part[kept] for part in slopes[:3])
    return BandwidthCurve(grid, mean, variance, tuned)
