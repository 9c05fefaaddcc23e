"""Intrinsic dimension of a point cloud, with its standard error, local values and profile."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, restore
from manifold_unlearn.manifold.bandwidth import PairHistogram, pair_histogram, tune_bandwidth
from manifold_unlearn.manifold.dimension_estimators import (
    Estimate,
    gride,
    largest_gap,
    levina_bickel,
    local_spectra,
    takens,
)
from manifold_unlearn.manifold.distances import center_of
from manifold_unlearn.manifold.pair_law import PairLaw, dimension_of_pairs, pair_counts
from manifold_unlearn.manifold.search import exact_neighbors

DimensionMethod: TypeAlias = Literal["two_nn", "mle", "gride", "local_pca", "correlation", "bgh"]

_DEFAULT_NEIGHBORS = {
    "two_nn": 20, "mle": 20, "gride": 16, "local_pca": 32, "correlation": 20, "bgh": 64,
}  # fmt: skip
_CORRECTED = ("two_nn", "mle", "gride", "correlation")
_NOISY = 0.15  # squared noise, over the squared distance to the second neighbor, that rules
_LEAST = 5
_GROUPS = 10


@dataclass(frozen=True)
class DimensionEstimate:
    """A dimension, how sure it is, and how it varies.

    Attributes
    ----------
    value : float
    standard_error : float
        Of chance alone: what distance and boundary do to ``uncorrected`` is not in it.
    local : array or Tensor of shape (n_samples,)
        Each row's own estimate, uncorrected; for ``correlation`` and ``bgh`` by ``mle``.
    method : str
    n_neighbors : int
    uncorrected : float
        The published estimate, at the scale of its neighbors.
    scale : float
        Median distance to the farthest neighbor that ``uncorrected`` takes in, units of the data.
    pair_fraction : float
        Part of all pairs that the correction was read from; 0 without correction.
    """

    value: float
    standard_error: float
    local: Any
    method: str
    n_neighbors: int
    uncorrected: float
    scale: float
    pair_fraction: float


@dataclass(frozen=True)
class DimensionProfile:
    """Dimension by the scale it is looked at.

    Attributes
    ----------
    n_neighbors : array of shape (n_scales,), int
    scales : array of shape (n_scales,)
        Median distance to that neighbor, units of the data.
    dimensions, standard_errors : array of shape (n_scales,)
    """

    n_neighbors: np.ndarray
    scales: np.ndarray
    dimensions: np.ndarray
    standard_errors: np.ndarray


def intrinsic_dimension(
    X: Array,
    method: DimensionMethod = "two_nn",
    *,
    n_neighbors: int | None = None,
    correction: bool = True,
    device: Device = "auto",
) -> float:
    """Dimension of the manifold on which the rows of ``X`` lie.

    See :func:`estimate_dimension`, which also gives standard error and local values.

    Parameters
    ----------
    X, method, n_neighbors, correction, device
        As :func:`estimate_dimension`.

    Returns
    -------
    float

    Examples
    --------
    >>> from manifold_unlearn.manifold import samples
    >>> from manifold_unlearn.manifold.dimension import intrinsic_dimension
    >>> X = samples.hypersphere(2000, dimension=10, n_features=128, random_state=0).points
    >>> round(intrinsic_dimension(X))
    10
    """
    options = {"n_neighbors": n_neighbors, "correction": correction, "device": device}
    return estimate_dimension(X, method, **options).value  # type: ignore[arg-type]


def estimate_dimension(
    X: Array,
    method: DimensionMethod = "two_nn",
    *,
    n_neighbors: int | None = None,
    correction: bool = True,
    device: Device = "auto",
) -> DimensionEstimate:
    """Dimension, standard error and local dimensions.

    Neighbor ratios read the dimension at the distance of the neighbors, where curvature and changes
    of density already bend the growth of volume: 10 dimensions from 2,000 points come out as 9.3.
    ``correction=True`` replaces the estimate by the dimension at zero scale that the law of all
    pair distances gives, where that agrees with the near neighbors; see
    :func:`~manifold_unlearn.manifold.pair_law.dimension_of_pairs`. Near neighbors read the
    dimension of noise: where the noise that the kernel sum shows is above 15 % of the squared
    distance to the second neighbor, the value is that of ``"bgh"``. ``False``: as published.

    Rows that are equal count once.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
    method : {"two_nn", "mle", "gride", "local_pca", "correlation", "bgh"}, default="two_nn"
        Ratio of the two nearest (Facco et al. 2017); all neighbors (Levina and Bickel 2005); ratio
        of neighbor ``n_neighbors`` to half of it (Denti et al. 2022), for noise; largest gap of
        local spectra, an integer; growth of the number of pairs (Grassberger and Procaccia 1983);
        plateau of the kernel sum (Berry, Giannakis and Harlim 2015), which takes noise off.
    n_neighbors : int, optional
        Neighbors that decide the scale. Default: 20; 16 for gride; 32 for local_pca; 64 for bgh.
        ``two_nn`` uses it for the local values only.
    correction : bool, default=True
        Of two_nn, mle, gride and correlation.
    device : str or torch.device, default="auto"

    Returns
    -------
    DimensionEstimate

    Raises
    ------
    ValueError
        Fewer than 5 distinct rows, a lattice (no two distances differ), an unknown method.

    Warns
    -----
    UserWarning
        ``n_neighbors`` is clamped.
    """
    if method not in get_args(DimensionMethod):
        known = ", ".join(map(repr, get_args(DimensionMethod)))
        raise ValueError(f"method={method!r} is not known. Use one of {known}.")
    rows, inverse = _distinct_rows(X, device)
    k = _checked_neighbors(
        _DEFAULT_NEIGHBORS[method] if n_neighbors is None else n_neighbors, len(rows)
    )
    squared, indices = exact_neighbors(rows, None, k)
    distances = squared.double().clamp_min(1e-300).cpu().numpy()
    pair_fraction = 0.0
    if method == "local_pca":
        found = largest_gap(local_spectra(rows, indices))
        used = k
    elif method == "bgh":
        found, used = _kernel_plateau(pair_histogram(rows), distances, k), k
    elif method == "correlation":
        pairs = pair_counts(rows)
        found = takens(pairs.values, pairs.counts, k / (len(rows) - 1))
        found = found._replace(local=levina_bickel(distances).local)
        used = k
    elif method == "mle":
        found, used = levina_bickel(distances), k
    else:
        order = 1 if method == "two_nn" else max(1, k // 2)
        found, used = gride(distances, order, k), 2 * order
    value, error = found.value, found.standard_error
    if correction and method in _CORRECTED:
        if (above_noise := _above_noise(rows, distances)) is not None:
            value, error = above_noise.value, above_noise.standard_error
        elif (law := _corrected(rows, distances)) is not None:
            value, error, pair_fraction = law.dimension, law.standard_error, law.fraction
    return DimensionEstimate(
        value=value,
        standard_error=error,
        local=restore(torch.as_tensor(found.local)[inverse.cpu()], X),
        method=method,
        n_neighbors=k,
        uncorrected=found.value,
        scale=float(np.sqrt(np.median(distances[:, used - 1]))),
        pair_fraction=pair_fraction,
    )


def dimension_profile(
    X: Array, *, max_neighbors: int | None = None, device: Device = "auto"
) -> DimensionProfile:
    """Dimension at neighborhoods of 2, 4, 8 ... rows, by GRIDE as published.

    Noise raises the dimension at small scales, curvature and boundary change it at large ones: the
    manifold's own is where the profile is level.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
    max_neighbors : int, optional
        Largest neighborhood. Default: a quarter of the rows, at most 512.
    device : str or torch.device, default="auto"

    Returns
    -------
    DimensionProfile

    Raises
    ------
    ValueError
        As :func:`estimate_dimension`.
    """
    rows, _ = _distinct_rows(X, device)
    wanted = min(512, max(4, len(rows) // 4)) if max_neighbors is None else max_neighbors
    k = _checked_neighbors(wanted, len(rows))
    squared = exact_neighbors(rows, None, k)[0].double().clamp_min(1e-300).cpu().numpy()
    orders = [2**i for i in range(20) if 2 ** (i + 1) <= k]
    found = [gride(squared, order, k) for order in orders]
    scales = [float(np.sqrt(np.median(squared[:, 2 * order - 1]))) for order in orders]
    return DimensionProfile(
        2 * np.array(orders),
        np.array(scales),
        np.array([f.value for f in found]),
        np.array([f.standard_error for f in found]),
    )


def _corrected(rows: Tensor, distances: np.ndarray) -> PairLaw | None:
    nearest = gride(distances, 1, distances.shape[1])
    return dimension_of_pairs(pair_counts(rows), (nearest.value, nearest.standard_error))


def _above_noise(rows: Tensor, distances: np.ndarray) -> Estimate | None:
    """The plateau of the kernel sum, where noise makes up the nearest distances."""
    histogram = pair_histogram(rows)
    tuned = tune_bandwidth(histogram, n_neighbors=_DEFAULT_NEIGHBORS["bgh"])
    noisy = tuned.squared_noise > _NOISY * float(np.median(distances[:, 1]))
    if not (noisy and tuned.plateau[1] > tuned.plateau[0]):
        return None
    return _kernel_plateau(histogram, distances, min(_DEFAULT_NEIGHBORS["bgh"], len(rows) - 1))


def _kernel_plateau(histogram: PairHistogram, distances: np.ndarray, k: int) -> Estimate:
    """Twice the plateau's height; error by leaving out every tenth of the rows."""
    value = tune_bandwidth(histogram, n_neighbors=k).intrinsic_dimension
    group = np.arange(len(histogram.counts)) % _GROUPS
    parts = [
        tune_bandwidth(
            histogram._replace(counts=histogram.counts[group != g]), n_neighbors=k
        ).intrinsic_dimension
        for g in range(min(_GROUPS, len(histogram.counts)))
    ]
    spread = np.array(parts) - np.mean(parts)
    # a pair is counted from both of its rows, a row is left out of one side only
    error = 2 * np.sqrt((len(parts) - 1) / len(parts) * (spread**2).sum())
    return Estimate(float(value), float(error), levina_bickel(distances).local)


def _distinct_rows(X: Array, device: Device) -> tuple[Tensor, Tensor]:
    """Centered distinct rows, and which of them each row is."""
    rows = as_rows(X, device=device, min_samples=2)
    distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    if len(distinct) < _LEAST:
        equal = f"all {len(rows)} samples are equal" if len(distinct) == 1 else (
            f"{len(rows)} samples hold only {len(distinct)} distinct rows"
        )  # fmt: skip
        raise ValueError(f"{equal}; at least {_LEAST} distinct rows are needed. Add data.")
    if len(distinct) == len(rows):
        distinct, inverse = rows, torch.arange(len(rows), device=rows.device)
    return distinct - center_of(distinct), inverse


def _checked_neighbors(n_neighbors: int, n_samples: int) -> int:
    if n_neighbors < 4:
        raise ValueError(f"n_neighbors={n_neighbors} must be at least 4.")
    if n_neighbors <= n_samples - 1:
        return n_neighbors
    warnings.warn(
        f"n_neighbors={n_neighbors} is more than the {n_samples - 1} other distinct samples; "
        f"{n_samples - 1} are used. Lower n_neighbors or add data.",
        UserWarning,
        stacklevel=3,
    )
    return n_samples - 1
