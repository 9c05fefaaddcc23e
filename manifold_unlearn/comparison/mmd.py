"""Maximum mean discrepancy of two samples, in blocks, with its permutation test."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, generator, row_blocks
from manifold_unlearn.manifold.distances import center_of, squared_distance_block

__all__ = ["MMD", "all_equal", "median_squared_distance", "mmd", "two_clouds"]

_CHEAP = 1e10  # multiplications up to which distances are double precision, else single
_EQUAL_ROWS = 4096
_MEDIAN_ROWS = 1000  # rows whose distances the median is taken of
_SCALES = (4.0, 2.0, 1.0, 0.5, 0.25)  # of the median bandwidth; each the half of the one before


class MMD(NamedTuple):
    """A maximum mean discrepancy and what chance gives.

    Attributes
    ----------
    squared : float
        Estimate of the squared MMD. The unbiased ones fall below 0 for equal distributions.
    p_value : float or None
        Of the hypothesis that both samples have one distribution; None without permutations.
    floor : float or None
        What ``squared`` exceeds in 5 % of the cases where they have.
    bandwidth : float
        ``eps`` of the kernel ``exp(-r**2 / (4 * eps))``, squared units of the data; of the middle
        one of several.
    """

    squared: float
    p_value: float | None
    floor: float | None
    bandwidth: float

    @property
    def distance(self) -> float:
        """Root of ``squared``; 0 where that is negative."""
        return math.sqrt(max(self.squared, 0.0))


def two_clouds(
    A: Array, B: Array, device: Device = "auto", min_samples: int = 1, same_space: bool = True
) -> tuple[Tensor, Tensor]:
    """Checked tensors of one dtype and device.

    Raises
    ------
    ValueError
        As :func:`~manifold_unlearn.arrays.as_rows`; or another number of features when they must
        lie in one space.
    """
    X = as_rows(A, device=device, name="A", min_samples=min_samples)
    Y = as_rows(B, device=X.device, name="B", min_samples=min_samples)
    if same_space and X.shape[1] != Y.shape[1]:
        raise ValueError(
            f"A has {X.shape[1]} features, B has {Y.shape[1]}: they lie in different spaces. "
            "Give both the same columns, or compare with cka, mutual_knn or gromov_wasserstein."
        )
    dtype = torch.promote_types(X.dtype, Y.dtype)
    return X.to(dtype), Y.to(dtype)


def all_equal(X: Tensor) -> bool:
    """Whether all rows are one; mostly known from the first block."""
    blocks = row_blocks(len(X), _EQUAL_ROWS)
    return all(bool((X[part] == X[:1]).all()) for part in blocks)


def median_squared_distance(X: Tensor, random_state: Any = 0) -> float:
    """Median squared distance of distinct pairs among at most 1,000 random rows of ``X``.

    Where more than half of the pairs coincide: the median of the others.

    Raises
    ------
    ValueError
        All rows are equal.
    """
    if len(X) > _MEDIAN_ROWS:
        chosen = torch.randperm(len(X), generator=generator(random_state))[:_MEDIAN_ROWS]
        part = X[chosen.to(X.device)].double()
    else:
        part = X.double()
    squared = torch.nn.functional.pdist(part).square()
    if len(squared) == 0 or float(squared.max()) == 0:
        span = (X - X[:1]).double().square().sum(1)
        if len(X) == 0 or float(span.max()) == 0:
            raise ValueError(
                f"all {len(X)} samples are equal: there is no distance to set a bandwidth by. "
                "Give data with distinct rows, or a bandwidth."
            )
        return float(span[span > 0].median())
    median = float(squared.median())
    return median if median > 0 else float(squared[squared > 0].median())


def mmd(
    A: Array,
    B: Array,
    *,
    bandwidth: float | Literal["median", "multiscale"] = "median",
    estimator: Literal["unbiased", "biased", "linear"] = "unbiased",
    n_permutations: int = 200,
    block: int = 1024,
    device: Device = "auto",
    random_state: Any = 0,
) -> MMD:
    """Squared maximum mean discrepancy of two samples under a Gaussian kernel.

    ``E k(a, a') + E k(b, b') - 2 E k(a, b)``: 0 exactly when both distributions are one. The test
    permutes the labels of the pooled rows; it holds its level whatever the distribution. Kernel
    blocks are made once and serve all permutations, so memory is
    ``O(block**2 + n * n_permutations)``.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_A, n_features) and (n_B, n_features)
    bandwidth : float, "median" or "multiscale", default="median"
        ``eps`` of ``exp(-r**2 / (4 * eps))``, squared units of the data. ``"median"``: the kernel
        is ``1 / e`` at the median pooled distance. ``"multiscale"``: the mean of five kernels, a
        quarter to four times that bandwidth, for differences finer or coarser than the data.
    estimator : {"unbiased", "biased", "linear"}, default="unbiased"
        ``"biased"``: of the plug-in distributions, never negative. ``"linear"``: the mean over
        disjoint pairs of rows in a random order, ``O(n)`` and much less sensitive; its p-value is
        by the normal limit.
    n_permutations : int, default=200
        0: no test. The least p-value is ``1 / (n_permutations + 1)``.
    block : int
        Rows of a block of the kernel; the answer does not depend on it.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Draws permutations, the rows of the median, and pairs of the linear estimator.

    Raises
    ------
    ValueError
        Fewer than 2 rows (4 for ``"linear"``), unequal features, all rows equal, or a parameter
        out of range.

    References
    ----------
    Gretton, Borgwardt, Rasch, Schölkopf and Smola (2012), A kernel two-sample test, JMLR 13,
    lemma 6 (unbiased and linear estimators, permutation test).
    """
    if estimator not in ("unbiased", "biased", "linear"):
        raise ValueError(
            f"estimator={estimator!r} is not known. Use 'unbiased', 'biased' or 'linear'."
        )
    if n_permutations < 0:
        raise ValueError(f"n_permutations={n_permutations} must not be negative.")
    X, Y = two_clouds(A, B, device, min_samples=4 if estimator == "linear" else 2)
    pooled = torch.cat([X, Y])
    widths = _bandwidths(pooled, bandwidth, random_state)
    middle = widths[len(widths) // 2]
    if estimator == "linear":
        return _linear(X, Y, widths, middle, n_permutations > 0, random_state)
    cheap = len(pooled) ** 2 * pooled.shape[1] <= _CHEAP
    pooled = pooled - center_of(pooled)
    pooled = pooled.double() if cheap else pooled.float()
    labels = _labels(len(X), len(pooled), n_permutations, pooled, random_state)
    values = _quadratic(pooled, labels, len(X), widths, block, estimator == "biased")
    observed = float(values[0])
    if n_permutations == 0:
        return MMD(observed, None, None, middle)
    null = values[1:]
    slack = 1e-6 * float(null.abs().max())  # rounding: an equal partition is no smaller
    p_value = (1 + int((null >= observed - slack).sum())) / (1 + n_permutations)
    return MMD(observed, p_value, float(torch.quantile(null, 0.95)), middle)


def _bandwidths(pooled: Tensor, bandwidth: float | str, random_state: Any) -> tuple[float, ...]:
    if isinstance(bandwidth, str):
        if bandwidth not in ("median", "multiscale"):
            raise ValueError(
                f"bandwidth={bandwidth!r} is not known. Use 'median', 'multiscale' or a number."
            )
        unit = median_squared_distance(pooled, random_state) / 4
        scales = _SCALES if bandwidth == "multiscale" else (1.0,)
        return tuple(unit * scale for scale in scales)
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth={bandwidth} must be positive and finite.")
    return (float(bandwidth),)


def _kernel(squared: Tensor, widths: tuple[float, ...]) -> Tensor:
    """Mean of Gaussian kernels, each bandwidth half the one before; overwrites ``squared``."""
    values = squared.clamp_min_(0).mul_(-1 / (4 * widths[0])).exp_()
    total = values
    for _ in widths[1:]:
        values = values.square()
        total = total + values
    return total / len(widths) if len(widths) > 1 else total


def _labels(
    n_first: int, n_all: int, n_permutations: int, like: Tensor, random_state: Any
) -> Tensor:
    """``(n_all, 1 + n_permutations)`` of 1 for the first sample; column 0 is the data's own."""
    labels = torch.zeros(n_all, 1 + n_permutations, dtype=like.dtype)
    labels[:n_first, 0] = 1
    draw = generator(random_state)
    for column in range(1, 1 + n_permutations):
        labels[torch.randperm(n_all, generator=draw)[:n_first], column] = 1
    return labels.to(like.device)


def _quadratic(
    pooled: Tensor,
    labels: Tensor,
    n_first: int,
    widths: tuple[float, ...],
    block: int,
    biased: bool,
) -> Tensor:
    """Squared MMD of every column of ``labels``, float64, from one pass over the kernel."""
    n_all = len(pooled)
    n_second = n_all - n_first
    squared = pooled.square().sum(1)
    sums = torch.zeros(n_all, dtype=torch.float64, device=pooled.device)  # without the diagonal
    within = torch.zeros(labels.shape[1], dtype=torch.float64, device=pooled.device)
    for rows in row_blocks(n_all, block):
        for shifted in row_blocks(n_all - rows.start, block):
            columns = slice(shifted.start + rows.start, shifted.stop + rows.start)
            kernel = squared_distance_block(
                pooled[rows], pooled[columns], squared[rows], squared[columns]
            )
            kernel = _kernel(kernel, widths)
            if rows.start == columns.start:
                kernel.fill_diagonal_(0)
            sums[rows] += kernel.sum(1, dtype=torch.float64)
            weight = 1.0
            if rows.start != columns.start:
                sums[columns] += kernel.sum(0, dtype=torch.float64)
                weight = 2.0
            product = (kernel @ labels[columns]).double()
            within += weight * (product * labels[rows]).sum(0)
    all_first = (sums[:, None] * labels).sum(0)  # from the first sample to all
    across = all_first - within
    within_second = sums.sum() - 2 * all_first + within
    if biased:
        return (
            (within + n_first) / n_first**2
            + (within_second + n_second) / n_second**2
            - 2 * across / (n_first * n_second)
        )
    return (
        within / (n_first * (n_first - 1))
        + within_second / (n_second * (n_second - 1))
        - 2 * across / (n_first * n_second)
    )


def _linear(
    X: Tensor, Y: Tensor, widths: tuple[float, ...], middle: float, test: bool, random_state: Any
) -> MMD:
    draw = generator(random_state)
    half = min(len(X), len(Y)) // 2
    A = X[torch.randperm(len(X), generator=draw)[: 2 * half].to(X.device)].double()
    B = Y[torch.randperm(len(Y), generator=draw)[: 2 * half].to(X.device)].double()
    a, b = (A[:half], A[half:]), (B[:half], B[half:])

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return _kernel((first - second).square().sum(1), widths)

    terms = kernel(*a) + kernel(*b) - kernel(a[0], b[1]) - kernel(a[1], b[0])
    mean, spread = float(terms.mean()), float(terms.std()) / math.sqrt(half)
    if not test:
        return MMD(mean, None, None, middle)
    score = mean / spread if spread > 0 else (math.inf if mean > 0 else 0.0)
    return MMD(mean, 0.5 * math.erfc(score / math.sqrt(2)), 1.645 * spread, middle)
