"""Do the points lie on a curved manifold? Tests against Gaussian, linear and mixture nulls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.csgraph import connected_components, dijkstra, laplacian
from sklearn.mixture import GaussianMixture
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, generator
from manifold_unlearn.manifold.dimension import DimensionMethod, estimate_dimension
from manifold_unlearn.manifold.search import exact_neighbors

Verdict: TypeAlias = Literal["manifold", "linear", "clusters", "no structure"]
Null: TypeAlias = Callable[[np.random.Generator], np.ndarray]

_LEAST = 40
_METHODS: tuple[DimensionMethod, ...] = ("two_nn", "bgh")  # noise lifts the first
_GRAPH_NEIGHBORS = 10
_MARGIN = 0.8  # of a null's median misfit: less than a fifth better is no curvature worth the name
_FLAT = 0.1  # part of the variance beyond the chart that Gaussians tiling a manifold may have
_EXPLAINED = 0.9  # of the variance, by as many directions as the dimension: linear
_MIXED = 8  # leading directions in which a mixture is fitted
_MOST_CLUSTERS = 6
_LARGEST_CHART = 12


@dataclass(frozen=True)
class ManifoldReport:
    """What :func:`check_manifold` found.

    Attributes
    ----------
    is_manifold : bool
        Whether the verdict is ``"manifold"``: low-dimensional and curved.
    verdict : {"manifold", "linear", "clusters", "no structure"}
    reason : str
        The verdict in a sentence.
    dimension, dimension_error : float
        Intrinsic dimension and its standard error: of a manifold the smaller of TwoNN,
        corrected, and the kernel's plateau, which noise lifts less; else TwoNN.
    linear_dimension : float
        Participation ratio of the covariance, ``trace**2 / trace of the square``.
    chart_dimension : int
        Of the local charts and of the global principal subspace they are compared with.
    local_misfit, global_misfit : float
        Median squared distance of a row to the chart of its neighbors, itself left out, and to the
        principal subspace; parts of the total variance.
    misfit_ratio : float
        The statistic: ``local_misfit / global_misfit``.
    p_gaussian, p_linear : float
        Probability of so small a ratio under a Gaussian of equal covariance; under independent
        principal components with the data's own marginals.
    p_mixture : float or None
        The same under a mixture of up to 6 Gaussians; tested only where both others reject.
    n_clusters : int or None
        Gaussians in that mixture.
    distortion : float
        Median ratio of graph distance to Euclidean distance.
    spectral_gap : float
        Least positive eigenvalue of the normalized graph Laplacian, of the largest part.
    n_parts : int
        Connected parts of the neighbor graph.
    n_samples : int
        Rows that were tested.
    level : float
    """

    is_manifold: bool
    verdict: Verdict
    reason: str
    dimension: float
    dimension_error: float
    linear_dimension: float
    chart_dimension: int
    local_misfit: float
    global_misfit: float
    misfit_ratio: float
    p_gaussian: float
    p_linear: float
    p_mixture: float | None
    n_clusters: int | None
    distortion: float
    spectral_gap: float
    n_parts: int
    n_samples: int
    level: float

    def __str__(self) -> str:
        mixture = "not tested" if self.p_mixture is None else f"{self.p_mixture:.3g}"
        return (
            f"{self.verdict}: {self.reason}\n"
            f"dimension {self.dimension:.2f} +- {self.dimension_error:.2f}, "
            f"linear dimension {self.linear_dimension:.2f}, {self.n_samples} rows, "
            f"{self.n_parts} part(s)\n"
            f"misfit of charts of dimension {self.chart_dimension}: local {self.local_misfit:.3g}, "
            f"global {self.global_misfit:.3g} of the variance\n"
            f"p: Gaussian {self.p_gaussian:.3g}, linear {self.p_linear:.3g}, mixture {mixture}\n"
            f"geodesic over Euclidean distance {self.distortion:.2f}, "
            f"spectral gap {self.spectral_gap:.3g}"
        )


class _Misfit(NamedTuple):
    ratio: float
    local: float
    whole: float


def check_manifold(
    X: Array,
    *,
    n_null: int = 39,
    level: float = 0.05,
    max_samples: int = 600,
    device: Device = "auto",
    random_state: Any = 0,
) -> ManifoldReport:
    """Whether the rows lie on a low-dimensional curved manifold.

    Each row's distance to the affine chart of its neighbors (principal directions, as many as the
    intrinsic dimension, the row itself left out) is compared with its distance to the principal
    subspace of equal dimension. Curved data have a small ratio; but any local fit is a little
    tighter, so the ratio is judged by Monte Carlo draws, ``p = (1 + #as small) / (1 + n_null)``,
    from (a) a Gaussian of equal covariance, (b) the principal components, each permuted over the
    rows: a linear subspace of equal covariance and marginals; and, if both reject, (c) a mixture of
    up to 6 Gaussians chosen by BIC, since clusters too are tighter locally; flat Gaussians in one
    connected piece are charts of a manifold and do not speak against it. The verdict is
    ``"manifold"`` if (a) and (b) reject at ``level`` and the ratio is below 0.8 times the median
    of both, and (c) rejects or tiles.
    Else ``"clusters"`` if only the mixture explains the data, ``"linear"`` if the principal
    subspace, of at most three quarters of the directions, holds 90 % of the variance,
    ``"no structure"`` otherwise. A union of separated curved manifolds is a manifold of several
    parts (``n_parts``).

    Cost: about ``3 * n_null`` batches of ``max_samples`` small eigenproblems, seconds.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
        At least 40 distinct rows.
    n_null : int, default=39
        Draws from each null, at least ``1 / level - 1``.
    level : float, default=0.05
    max_samples : int, default=600
        Rows tested, drawn at random from more; the dimension is of up to 3 times as many.
    device : str or torch.device, default="auto"
    random_state : int, RandomState or None, default=0

    Returns
    -------
    ManifoldReport

    Raises
    ------
    ValueError
        Fewer than 40 distinct rows, not finite, or an option out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")
    if n_null + 1 < 1 / level - 1e-9:
        raise ValueError(
            f"n_null={n_null} draws cannot reject at level={level}: at least "
            f"{int(np.ceil(1 / level - 1e-9)) - 1} are needed."
        )
    if max_samples < _LEAST:
        raise ValueError(f"max_samples={max_samples} must be at least {_LEAST}.")
    random = np.random.default_rng(generator(random_state).initial_seed())
    rows = torch.unique(as_rows(X, device=device, min_samples=2), dim=0).double()
    if len(rows) < _LEAST:
        raise ValueError(
            f"X has {len(rows)} distinct rows; at least {_LEAST} are needed to tell a "
            "manifold from chance. Add data."
        )
    order = torch.from_numpy(random.permutation(len(rows))).to(rows.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # neighbors of few rows are clamped
        some = rows[order[: 3 * max_samples]]
        nearest, plateau = (estimate_dimension(some, method) for method in _METHODS)
    estimated = min(nearest, plateau, key=lambda estimate: estimate.value)
    scores = _principal_scores(rows[order[:max_samples]])
    variances = scores.var(0)
    linear = float(variances.sum() ** 2 / (variances**2).sum())
    rank = scores.shape[1]
    k = int(np.clip(round(estimated.value), 1, max(1, min(rank - 1, _LARGEST_CHART))))
    n_parts, distortion, gap = _graph(scores)
    explained = float(variances[:k].sum() / variances.sum())
    place = rows.device
    if rank == 1:
        observed, p_gaussian, p_linear = _Misfit(1.0, 0.0, 0.0), 1.0, 1.0
    else:
        observed = _misfit(scores, k, place)
        p_gaussian, low = _p_value(observed, _gaussian(scores), k, n_null, random, place)
        p_linear, also_low = _p_value(observed, _permuted(scores), k, n_null, random, place)
    p_mixture, n_clusters = None, None
    curved = rank > 1 and max(p_gaussian, p_linear) <= level and low and also_low
    clusters = False
    if curved:
        null, n_clusters, flat = _mixture(scores, k, random)
        p_mixture, _ = _p_value(observed, null, k, n_null, random, place)
        tiles = flat and n_parts == 1
        clusters = p_mixture > level and not tiles
        curved = not clusters
    if not curved:
        estimated = nearest
    verdict, reason = _judge(curved, clusters, explained, k, rank, observed, n_clusters)
    return ManifoldReport(
        verdict == "manifold", verdict, reason, estimated.value, estimated.standard_error, linear,
        k, observed.local, observed.whole, observed.ratio, p_gaussian, p_linear, p_mixture,
        n_clusters, distortion, gap, n_parts, len(scores), level,
    )  # fmt: skip


def _judge(
    curved: bool,
    clusters: bool,
    explained: float,
    k: int,
    rank: int,
    misfit: _Misfit,
    n_clusters: int | None,
) -> tuple[Verdict, str]:
    if curved:
        return "manifold", (
            f"charts of dimension {k} fit the rows {1 / max(misfit.ratio, 1e-12):.3g} times closer "
            "than the linear subspace, and no Gaussian, linear or clustered data do so."
        )
    if clusters:
        return "clusters", f"a mixture of {n_clusters} Gaussians fits locally as well as the data."
    if explained >= _EXPLAINED and 4 * k <= 3 * rank:
        return "linear", f"{k} principal directions hold {explained:.1%} of the variance, uncurved."
    return "no structure", (
        f"local charts of dimension {k} fit no closer than in a Gaussian of equal covariance, "
        f"and {k} principal directions hold only {explained:.1%} of the variance."
    )


def _principal_scores(rows: Tensor) -> np.ndarray:
    """Coordinates along the principal directions, those of rounding left out."""
    # one far row would rule the covariance: rows beyond 30 times the median distance stay out
    center = rows.median(0).values
    distance = (rows - center).norm(dim=1)
    kept = rows[distance <= 30 * distance.median().clamp_min(1e-300)]
    kept = kept if len(kept) >= _LEAST else rows
    U, S, _ = torch.linalg.svd(kept - kept.mean(0), full_matrices=False)
    rank = max(1, int((S / S[0].clamp_min(1e-300)).gt(1e-9).sum()))
    return (U[:, :rank] * (S[:rank] / S[0])).cpu().numpy() * len(kept) ** 0.5


def _misfit(scores: np.ndarray, k: int, device: torch.device) -> _Misfit:
    """Median squared distance of rows to local charts, and to the principal subspace."""
    X = torch.from_numpy(np.ascontiguousarray(scores)).to(device)
    X = X - X.mean(0)
    n_near = min(len(X) - 1, 3 * k + 4)
    _, indices = exact_neighbors(X, None, n_near)
    near = X[indices]
    center = near.mean(1, keepdim=True)
    near = near - center
    offset = (X[:, None] - center)[:, 0]
    if X.shape[1] > n_near:
        values, vectors = torch.linalg.eigh(near @ near.mT)
        at = (near @ offset[:, :, None])[:, :, 0]
        along = (vectors.mT @ at[:, :, None])[:, -k:, 0]
        inside = (along**2 / values[:, -k:].clamp_min(1e-300)).sum(1)
    else:
        _, vectors = torch.linalg.eigh(near.mT @ near)
        inside = ((vectors.mT @ offset[:, :, None])[:, -k:, 0] ** 2).sum(1)
    total = float((X**2).sum(1).mean())
    local = float(((offset**2).sum(1) - inside).clamp_min(0).median()) / total
    _, directions = torch.linalg.eigh(X.mT @ X)
    rest = X @ directions[:, : X.shape[1] - k]
    whole = float((rest**2).sum(1).median()) / total
    return _Misfit(local / max(whole, 1e-300), local, whole)


def _p_value(
    observed: _Misfit,
    null: Null,
    k: int,
    n_null: int,
    random: np.random.Generator,
    device: torch.device,
) -> tuple[float, bool]:
    """Monte Carlo p, and whether the ratio is below the margin of the null's median."""
    drawn = np.array([_misfit(null(random), k, device).ratio for _ in range(n_null)])
    p = (1 + int((drawn <= observed.ratio).sum())) / (1 + n_null)
    return p, bool(observed.ratio < _MARGIN * np.median(drawn))


def _gaussian(scores: np.ndarray) -> Null:
    scale = scores.std(0)
    return lambda random: random.standard_normal(scores.shape) * scale


def _permuted(scores: np.ndarray) -> Null:
    return lambda random: random.permuted(scores, axis=0)


def _mixture(scores: np.ndarray, k: int, random: np.random.Generator) -> tuple[Null, int, bool]:
    """Mixture of Gaussians in the leading directions; the rest are Gaussian.

    Also how many Gaussians, and whether they are flat: of little variance beyond their first ``k``
    directions beside that of all rows.
    """
    head = scores[:, :_MIXED]
    n_most = min(_MOST_CLUSTERS, len(head) // (4 * head.shape[1]))
    seed = int(random.integers(2**31 - 1))
    fits = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unconverged fit is still a null
        for n in range(1, max(1, n_most) + 1):
            ridge = 1e-6 * float(head.var(0).sum())
            made = GaussianMixture(n, random_state=seed, reg_covar=ridge)
            fits.append(made.fit(head))
    best = min(fits, key=lambda fit: fit.bic(head))
    roots = np.linalg.cholesky(best.covariances_)
    scale = scores[:, _MIXED:].std(0)

    def draw(random: np.random.Generator) -> np.ndarray:
        which = random.choice(len(best.weights_), len(scores), p=best.weights_)
        normal = random.standard_normal(head.shape)
        drawn = best.means_[which] + (roots[which] @ normal[:, :, None])[:, :, 0]
        rest = random.standard_normal((len(scores), len(scale))) * scale
        return np.concatenate([drawn, rest], axis=1)

    spectra = np.linalg.eigvalsh(best.covariances_)[:, : max(0, head.shape[1] - k)]
    beyond = np.linalg.eigvalsh(np.cov(head.T).reshape(head.shape[1], -1))
    flat = best.weights_ @ spectra.sum(1) <= _FLAT * beyond[: max(0, head.shape[1] - k)].sum()
    return draw, len(best.weights_), bool(flat)


def _graph(scores: np.ndarray) -> tuple[int, float, float]:
    """Number of parts, median distortion, spectral gap of the neighbor graph."""
    n_samples = len(scores)
    k = min(_GRAPH_NEIGHBORS, n_samples - 1)
    squared, indices = exact_neighbors(torch.from_numpy(np.ascontiguousarray(scores)), None, k)
    rows = np.repeat(np.arange(n_samples), k)
    lengths = squared.sqrt().numpy().reshape(-1)
    graph = scipy.sparse.csr_matrix(
        (lengths, (rows, indices.numpy().reshape(-1))), (n_samples,) * 2
    )
    graph = graph.maximum(graph.T).tocsr()
    n_parts, labels = connected_components(graph, directed=False)
    part = np.flatnonzero(labels == np.bincount(labels).argmax())
    inside = graph[part][:, part]
    sources = part[:: max(1, len(part) // 100)]
    along = dijkstra(graph, directed=False, indices=sources)[:, part]
    straight = np.linalg.norm(scores[sources][:, None] - scores[part][None], axis=-1)
    apart = straight > 0
    distortion = float(np.median(along[apart] / straight[apart]))
    adjacency = (inside > 0).astype(float)
    values = np.linalg.eigvalsh(laplacian(adjacency, normed=True).toarray())
    return int(n_parts), distortion, float(values[1]) if len(values) > 1 else 0.0
