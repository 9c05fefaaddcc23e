"""Similarity of two representations of the same rows: CKA, mutual neighbors, Procrustes, RSA."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from scipy.stats import chi2, rankdata
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, generator, row_blocks
from manifold_unlearn.comparison.mmd import all_equal, median_squared_distance, two_clouds
from manifold_unlearn.manifold.distances import center_of, squared_distance_block
from manifold_unlearn.manifold.neighbors import nearest_neighbors

__all__ = [
    "Similarity",
    "cka",
    "mutual_knn",
    "paired_clouds",
    "procrustes_distance",
    "representational_similarity",
]

_ROUNDING = 1e-12  # relative spread below which a side is constant


class Similarity(NamedTuple):
    """A similarity of paired rows and what unrelated pairs give.

    Attributes
    ----------
    value : float
        1 for representations that are alike.
    floor : float
        What pairing the rows at random exceeds in about 5 % of the cases.
    p_value : float
        Of the hypothesis that the rows of the two sides are unrelated.
    """

    value: float
    floor: float
    p_value: float


def paired_clouds(
    A: Array, B: Array, device: Device = "auto", min_samples: int = 4
) -> tuple[Tensor, Tensor]:
    """Checked tensors with as many rows, of one dtype and device, neither side constant.

    Raises
    ------
    ValueError
        Another number of rows, too few, or a side whose rows are all equal.
    """
    X, Y = two_clouds(A, B, device, min_samples=1, same_space=False)
    if len(X) != len(Y):
        raise ValueError(
            f"A has {len(X)} rows, B has {len(Y)}: row i of A must belong to row i of B. "
            "Select matching rows, or use a measure that needs no pairs."
        )
    if len(X) < min_samples:
        raise ValueError(
            f"A and B have {len(X)} rows; at least {min_samples} are needed. Add rows."
        )
    for name, side in (("A", X), ("B", Y)):
        if all_equal(side):
            raise ValueError(
                f"all {len(side)} rows of {name} are equal: nothing varies that could be "
                "compared. Give data with distinct rows."
            )
    return X, Y


# centered kernel alignment


def cka(
    A: Array,
    B: Array,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    estimator: Literal["unbiased", "biased"] = "unbiased",
    relative_bandwidth: float = 1.0,
    block: int = 1024,
    device: Device = "auto",
    random_state: Any = 0,
) -> Similarity:
    """Centered kernel alignment of two representations of the same rows.

    ``HSIC(A, B) / sqrt(HSIC(A, A) HSIC(B, B))``. Neither rotation nor isotropic scale nor
    translation of either side changes it. The biased estimator tends to 1 for unrelated data of
    more dimensions than rows; the unbiased one is about 0 there. Nothing of size ``n**2`` is held.

    The unbiased value is a cosine between matrices without row sums, and a random pairing turns
    one of them within an irreducible representation of the permutations of dimension
    ``n (n - 3) / 2``. So over all pairings its mean is 0 and its variance exactly
    ``2 / (n (n - 3))``: the floor is two such deviations, and the p-value follows from the most
    skewed limit, a chi-squared distribution of one degree of freedom.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_samples, d_A) and (n_samples, d_B)
        Row i of either belongs to the same sample.
    kernel : {"linear", "rbf"}, default="linear"
        ``"rbf"``: ``exp(-r**2 / (4 * eps))``.
    estimator : {"unbiased", "biased"}, default="unbiased"
        Floor and p-value of the biased one are those of the unbiased one, the floor shifted by
        their difference.
    relative_bandwidth : float, default=1.0
        ``4 * eps`` of either side in units of its median squared distance.
    block : int
        Rows of a block; the answer does not depend on it.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Draws the rows of the median.

    Raises
    ------
    ValueError
        Fewer than 4 rows, unequal numbers of rows, a constant side, or a parameter out of range.

    References
    ----------
    Kornblith, Norouzi, Lee and Hinton (2019), Similarity of neural network representations
    revisited, ICML.
    Song, Smola, Gretton, Bedo and Borgwardt (2012), Feature selection via dependence maximization,
    JMLR 13 (the unbiased HSIC).
    Nguyen, Raghu and Kornblith (2021), Do wide and deep networks learn the same things?, ICLR.
    Székely and Rizzo (2014), Partial distance correlation with methods for dissimilarities, Ann.
    Stat. 42 (the space of such matrices).
    """
    if kernel not in ("linear", "rbf"):
        raise ValueError(f"kernel={kernel!r} is not known. Use 'linear' or 'rbf'.")
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator={estimator!r} is not known. Use 'unbiased' or 'biased'.")
    if not 0 < relative_bandwidth < math.inf:
        raise ValueError(f"relative_bandwidth={relative_bandwidth} must be positive and finite.")
    X, Y = paired_clouds(A, B, device)
    n = len(X)
    if kernel == "linear":
        wide = max(X.shape[1], Y.shape[1]) > n
        X, Y = _unit_scale(X), _unit_scale(Y)
        products = _linear_gram(X, Y, block) if wide else _linear_features(X, Y)
    else:
        products = _rbf_products(X, Y, relative_bandwidth, block, random_state)
    unbiased = _alignment(products, n, biased=False)
    sd = math.sqrt(2 / (n * (n - 3)))
    p_value = float(chi2.sf(max(1 + math.sqrt(2) * unbiased / sd, 0.0), 1))
    if estimator == "unbiased":
        return Similarity(unbiased, min(2 * sd, 1.0), p_value)
    biased = _alignment(products, n, biased=True)
    return Similarity(biased, min(2 * sd + max(biased - unbiased, 0.0), 1.0), p_value)


class _Moments(NamedTuple):
    """Of a kernel pair without their diagonals: ``sum K L``, row sums, and the diagonals."""

    inner: dict[str, float]
    sums: dict[str, Tensor]
    diagonals: dict[str, Tensor]


def _unit_scale(X: Tensor) -> Tensor:
    X = (X - center_of(X)).double()
    X = X - X.mean(0)
    return X / X.square().sum(1).mean().sqrt()


def _moments(X: Tensor, Y: Tensor, inner: dict[str, Tensor]) -> _Moments:
    diagonals = {"A": X.square().sum(1), "B": Y.square().sum(1)}
    off = {
        pair: float(value - (diagonals[pair[0]] * diagonals[pair[1]]).sum())
        for pair, value in inner.items()
    }
    sums = {name: Z @ Z.sum(0) - diagonals[name] for name, Z in (("A", X), ("B", Y))}
    return _Moments(off, sums, diagonals)


def _linear_features(X: Tensor, Y: Tensor) -> _Moments:
    inner = {"AB": (X.T @ Y), "AA": (X.T @ X), "BB": (Y.T @ Y)}
    return _moments(X, Y, {pair: value.square().sum() for pair, value in inner.items()})


def _linear_gram(X: Tensor, Y: Tensor, block: int) -> _Moments:
    inner = {pair: X.new_zeros(()) for pair in ("AB", "AA", "BB")}
    for rows in row_blocks(len(X), block):
        K, L = X[rows] @ X.T, Y[rows] @ Y.T
        inner["AB"] += (K * L).sum()
        inner["AA"] += K.square().sum()
        inner["BB"] += L.square().sum()
    return _moments(X, Y, inner)


def _rbf_products(
    X: Tensor, Y: Tensor, relative_bandwidth: float, block: int, random_state: Any
) -> _Moments:
    sides = []
    for side in (X, Y):
        width = relative_bandwidth * median_squared_distance(side, random_state)
        centered = (side - center_of(side)) / width**0.5
        sides.append((centered, centered.square().sum(1)))
    n = len(X)
    inner = {
        pair: torch.zeros((), dtype=torch.float64, device=X.device) for pair in ("AB", "AA", "BB")
    }
    sums = {name: torch.zeros(n, dtype=torch.float64, device=X.device) for name in "AB"}
    for rows in row_blocks(n, block):
        for shifted in row_blocks(n - rows.start, block):
            columns = slice(shifted.start + rows.start, shifted.stop + rows.start)
            diagonal = rows.start == columns.start
            K, L = (
                squared_distance_block(Z[rows], Z[columns], squared[rows], squared[columns])
                .clamp_min_(0)
                .neg_()
                .exp_()
                for Z, squared in sides
            )
            if diagonal:
                K.fill_diagonal_(0)
                L.fill_diagonal_(0)
            weight = 1 if diagonal else 2
            inner["AB"] += weight * (K * L).sum(dtype=torch.float64)
            inner["AA"] += weight * K.square().sum(dtype=torch.float64)
            inner["BB"] += weight * L.square().sum(dtype=torch.float64)
            for name, kernel in (("A", K), ("B", L)):
                sums[name][rows] += kernel.sum(1, dtype=torch.float64)
                if not diagonal:
                    sums[name][columns] += kernel.sum(0, dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64, device=X.device)
    return _Moments(
        {pair: float(value) for pair, value in inner.items()}, sums, {"A": ones, "B": ones}
    )


def _alignment(moments: _Moments, n: int, *, biased: bool) -> float:
    def hsic(pair: str) -> float:
        first, second = pair[0], pair[1]
        k, ell = moments.sums[first], moments.sums[second]
        inner = moments.inner[pair]
        if biased:
            p, q = moments.diagonals[first], moments.diagonals[second]
            k, ell = k + p, ell + q
            inner += float(p @ q)
            return inner - 2 / n * float(k @ ell) + float(k.sum() * ell.sum()) / n**2
        return (
            inner + float(k.sum() * ell.sum()) / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(k @ ell)
        )

    own = hsic("AA"), hsic("BB")
    for name, value, pair in zip("AB", own, ("AA", "BB"), strict=True):
        size = moments.inner[pair] + float(moments.diagonals[name].square().sum())
        if value <= _ROUNDING * size:
            raise ValueError(
                f"the kernel of {name} does not vary between pairs of rows (HSIC {value:.2g}): "
                "its rows are equal, or all equally far apart. Give data with more distinct rows."
            )
    return max(-1.0, min(1.0, hsic("AB") / math.sqrt(own[0] * own[1])))


# neighbors


def mutual_knn(
    A: Array,
    B: Array,
    *,
    n_neighbors: int = 10,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    n_permutations: int = 200,
    device: Device = "auto",
    random_state: Any = 0,
) -> Similarity:
    """Mean share of a row's nearest neighbors that are so in both representations.

    A random pairing shares ``n_neighbors / (n_samples - 1)`` of them on average.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_samples, d_A) and (n_samples, d_B)
    n_neighbors : int, default=10
    metric : {"euclidean", "cosine"}, default="euclidean"
        ``"cosine"`` is that of the source: rows are scaled to length 1.
    n_permutations : int, default=200
        Random pairings that floor and p-value are made from, at least 1.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Draws the pairings.

    Raises
    ------
    ValueError
        Unequal numbers of rows, ``n_neighbors`` not below ``n_samples``, a constant side, or a row
        of length 0 under the cosine metric.

    References
    ----------
    Huh, Cheung, Wang and Isola (2024), The platonic representation hypothesis, ICML.
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric={metric!r} is not known. Use 'euclidean' or 'cosine'.")
    if n_permutations < 1:
        raise ValueError(f"n_permutations={n_permutations} must be at least 1.")
    X, Y = paired_clouds(A, B, device)
    n = len(X)
    if not 1 <= n_neighbors < n:
        raise ValueError(
            f"n_neighbors={n_neighbors} must lie between 1 and {n - 1}, one less than the rows. "
            "Lower n_neighbors or add rows."
        )
    if metric == "cosine":
        X, Y = (_unit_rows(side, name) for side, name in ((X, "A"), (Y, "B")))
    lists = [nearest_neighbors(side, n_neighbors, neighbors="exact").indices for side in (X, Y)]
    edges = torch.arange(n, device=X.device)[:, None] * n + lists[1]
    known = edges.reshape(-1).sort().values
    rows, columns = torch.arange(n, device=X.device)[:, None], lists[0]

    def shared(place: Tensor) -> int:
        wanted = (place[rows] * n + place[columns]).reshape(-1)
        at = torch.searchsorted(known, wanted).clamp_max(len(known) - 1)
        return int((known[at] == wanted).sum())

    observed = shared(torch.arange(n, device=X.device))
    draw = generator(random_state)
    null = torch.tensor(
        [shared(torch.randperm(n, generator=draw).to(X.device)) for _ in range(n_permutations)],
        dtype=torch.float64,
    )
    p_value = (1 + int((null >= observed).sum())) / (1 + n_permutations)
    floor = float(torch.quantile(null, 0.95)) / (n * n_neighbors)
    return Similarity(observed / (n * n_neighbors), floor, p_value)


def _unit_rows(X: Tensor, name: str) -> Tensor:
    length = X.norm(dim=1, keepdim=True)
    if bool((length == 0).any()):
        row = int((length[:, 0] == 0).nonzero()[0, 0])
        raise ValueError(
            f"row {row} of {name} has length 0 and no direction. Remove it, or use "
            "metric='euclidean'."
        )
    return X / length


# shape


def procrustes_distance(A: Array, B: Array, *, device: Device = "auto") -> float:
    """Distance of the shapes of paired rows, after the best translation, scale and rotation.

    ``min over orthogonal Q of |A - B Q|`` with both centered and scaled to Frobenius norm 1, from
    0 (one is a rotated, scaled, translated copy of the other; reflections count as rotations) to
    ``sqrt(2)``. The smaller space is padded with zeros. A metric on shapes.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_samples, d_A) and (n_samples, d_B)
    device : str or torch.device, default="auto"

    Raises
    ------
    ValueError
        Unequal numbers of rows, fewer than 2, or a constant side.

    References
    ----------
    Williams, Kunz, Kornblith and Linderman (2021), Generalized shape metrics on neural
    representations, NeurIPS.
    """
    X, Y = paired_clouds(A, B, device, min_samples=2)
    X, Y = (_unit_scale(side) / math.sqrt(len(side)) for side in (X, Y))
    if max(X.shape[1], Y.shape[1]) > len(X):  # n coordinates say as much
        X, Y = (_few_columns(side) for side in (X, Y))
    U, _, V = torch.linalg.svd(X.T @ Y, full_matrices=False)
    # X U and Y V are matched; what the smaller space has no room for stays as it is
    matched = (X @ U - Y @ V.T).square().sum()
    for Z, basis in ((X, U), (Y, V.T)):
        if Z.shape[1] > basis.shape[1]:
            matched = matched + (Z - Z @ basis @ basis.T).square().sum()
    return math.sqrt(min(float(matched), 2.0))


def _few_columns(X: Tensor) -> Tensor:
    """``(n, min(n, d))`` coordinates of the rows in an orthonormal basis of their span."""
    if X.shape[1] <= X.shape[0]:
        return X
    return torch.linalg.qr(X.T, mode="r").R.T


def representational_similarity(
    A: Array,
    B: Array,
    *,
    correlation: Literal["spearman", "pearson"] = "spearman",
    max_samples: int = 1000,
    device: Device = "auto",
    random_state: Any = 0,
) -> Similarity:
    """Correlation of the distances between rows in one representation with those in the other.

    Over all random pairings its mean is 0 and its variance exactly
    ``f_A f_B / (n - 1) + 2 (1 - f_A) (1 - f_B) / (n (n - 3))`` with ``f`` the part of the variance
    of distances (or ranks) that sums over rows explain, by the argument in :func:`cka`; the floor
    is two such deviations.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_samples, d_A) and (n_samples, d_B)
    correlation : {"spearman", "pearson"}, default="spearman"
    max_samples : int, default=1000
        Random rows used where there are more; memory is ``O(max_samples**2)``.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Draws the rows.

    Raises
    ------
    ValueError
        Unequal numbers of rows, fewer than 4, or rows that are all equal or all equally far apart.

    References
    ----------
    Kriegeskorte, Mur and Bandettini (2008), Representational similarity analysis, Front. Syst.
    Neurosci. 2.
    """
    if correlation not in ("spearman", "pearson"):
        raise ValueError(f"correlation={correlation!r} is not known. Use 'spearman' or 'pearson'.")
    if max_samples < 4:
        raise ValueError(f"max_samples={max_samples} must be at least 4.")
    X, Y = paired_clouds(A, B, device)
    if len(X) > max_samples:
        chosen = torch.randperm(len(X), generator=generator(random_state))[:max_samples]
        X, Y = X[chosen.to(X.device)], Y[chosen.to(X.device)]
    n = len(X)
    pairs, parts = [], []
    for name, side in (("A", X), ("B", Y)):
        distances = torch.nn.functional.pdist(side.double())
        if correlation == "spearman":
            distances = torch.as_tensor(rankdata(distances.cpu().numpy())).to(distances)
        centered = distances - distances.mean()
        size = float(centered.square().sum())
        if size <= _ROUNDING * float(distances.square().sum()):
            raise ValueError(
                f"the rows of {name} are all equally far apart: there is nothing to correlate. "
                "Give other data."
            )
        rows, columns = torch.triu_indices(n, n, 1, device=side.device)
        sums = torch.zeros(n, dtype=torch.float64, device=side.device)
        sums.index_add_(0, rows, centered).index_add_(0, columns, centered)
        parts.append(min(float(sums.square().sum()) / ((n - 2) * size), 1.0))
        pairs.append(centered / size**0.5)
    value = float(pairs[0] @ pairs[1])
    variance = parts[0] * parts[1] / (n - 1)
    variance += 2 * (1 - parts[0]) * (1 - parts[1]) / (n * (n - 3))
    sd = math.sqrt(variance)
    p_value = float(chi2.sf(max(1 + math.sqrt(2) * value / sd, 0.0), 1)) if sd > 0 else 1.0
    return Similarity(value, min(2 * sd, 1.0), p_value)
