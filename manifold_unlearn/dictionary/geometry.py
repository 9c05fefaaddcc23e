"""Shape of a dictionary: duplicates, coherence, and clusters of latents that make one feature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from manifold_unlearn.arrays import Device, as_rows, generator, row_blocks
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode, decode_sparse
from manifold_unlearn.dictionary.coding import as_code, checked_latents

Method = Literal["spectral", "agglomerative", "components"]
_BLOCK = 2048
_MOST_DENSE = 8192  # latents whose affinities are held all at once


@dataclass(frozen=True, eq=False)
class Coherence:
    """How near decoder directions are to each other; latents without a direction are left out.

    Attributes
    ----------
    latents : array of shape (n,), int64
        Those with a decoder row of nonzero length.
    nearest : array of shape (n,), int64
        The latent of largest cosine to each.
    cosine : array of shape (n,), float64
        That cosine.
    largest : float
        Largest |cosine| of two latents.
    mean_square : float
        Mean squared cosine of two latents; ``1 / d`` of random directions.
    random_cosine : array of shape (n,), float64
        Nearest cosines, sorted, of as many random directions.
    """

    latents: np.ndarray
    nearest: np.ndarray
    cosine: np.ndarray
    largest: float
    mean_square: float
    random_cosine: np.ndarray

    def duplicates(self, threshold: float = 0.9) -> np.ndarray:
        """Latents whose nearest is at least so near: int64."""
        return self.latents[self.cosine >= threshold]


class Correlated(NamedTuple):
    """Latents most correlated with each, by activation; all arrays (n_latents, n_neighbors)."""

    latents: np.ndarray
    """int64; -1 where fewer than so many ever fire together with it"""
    correlation: np.ndarray
    """float64: Pearson's; 0 beside -1"""
    cosine: np.ndarray
    """float64: of the columns of activations"""


@dataclass(frozen=True, eq=False)
class LatentClusters:
    """Groups of latents that are near by their directions or fire together.

    Attributes
    ----------
    latents : array of shape (n,), int64
        Latents that were clustered.
    label : array of shape (n,), int64
        Cluster of each, numbered by size, the largest 0; -1 for one that is alone.
    members : tuple of arrays of int64
        Latents of each cluster.
    dimension : array of shape (n_clusters,), float64
        Effective dimension of each cluster's unit decoder rows: ``(sum s)**2 / sum s**2`` of
        their squared singular values ``s``.
    random_dimension : array of shape (n_clusters,), float64
        Mean of the same for as many latents drawn at random.
    affinity : array of shape (n_clusters,), float64
        Mean affinity of two members.
    """

    latents: np.ndarray
    label: np.ndarray
    members: tuple[np.ndarray, ...]
    dimension: np.ndarray
    random_dimension: np.ndarray
    affinity: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """All attributes, as plain numbers and lists."""
        plain = {k: v.tolist() for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return plain | {"members": [one.tolist() for one in self.members]}


def decoder_coherence(decoder: Any, *, device: Device = "auto", random_state: Any = 0) -> Coherence:
    """Nearest neighbor of every decoder direction, and how coherent all are.

    Parameters
    ----------
    decoder : array or Tensor of shape (n_latents, d)
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0

    Raises
    ------
    ValueError
        Fewer than two latents with a direction, NaN or infinity.
    """
    kept, units = _units(decoder, None, device)
    nearest, cosine, largest, square = _nearest(units)
    n, d = units.shape
    draw = torch.randn(n, d, dtype=units.dtype, generator=generator(random_state)).to(units)
    _, by_chance, _, _ = _nearest(draw / draw.norm(dim=1, keepdim=True))
    return Coherence(
        latents=kept.cpu().numpy(),
        nearest=kept[nearest].cpu().numpy(),
        cosine=cosine.double().cpu().numpy(),
        largest=largest,
        mean_square=square / (n * (n - 1)),
        random_cosine=by_chance.double().sort().values.cpu().numpy(),
    )


def duplicated_latents(
    decoder: Any, *, threshold: float = 0.9, device: Device = "auto"
) -> list[list[int]]:
    """Groups of latents linked by decoder cosines of at least ``threshold``, the largest first.

    Parameters
    ----------
    decoder : array or Tensor of shape (n_latents, d)
    threshold : float, default=0.9
        Above 0, at most 1. Two latents of a group may be less near, through others.
    device : str or torch.device, default="auto"

    Raises
    ------
    ValueError
        A threshold out of range, or as :func:`decoder_coherence`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1.")
    kept, units = _units(decoder, None, device)
    links = []
    for part in row_blocks(len(units), _BLOCK):
        near = (units[part] @ units.T >= threshold - 1e-6).nonzero()
        near[:, 0] += part.start
        links.append(near)
    pairs = torch.cat(links).cpu().numpy()
    label = _components(pairs, len(units))
    ids = kept.cpu().numpy()
    groups = [ids[label == one].tolist() for one in np.flatnonzero(np.bincount(label) > 1)]
    return sorted(groups, key=lambda group: (-len(group), group))


def co_activation(code: Any) -> csr_array:
    """How often two latents fire together: their rows in common over their rows in all (Jaccard).

    Parameters
    ----------
    code : SparseCode, or array or Tensor of shape (n, n_latents)

    Returns
    -------
    scipy.sparse.csr_array of shape (n_latents, n_latents)
        1 on the diagonal of latents that fire; only pairs that meet are stored.
    """
    fires = _matrix(code, binary=True)
    together = (fires.T @ fires).tocoo()
    count = np.asarray(fires.sum(axis=0)).ravel()
    row, column = together.coords
    union = count[row] + count[column] - together.data
    return csr_array((together.data / union, (row, column)), shape=together.shape)


def correlated_latents(code: Any, n_neighbors: int = 3) -> Correlated:
    """The latents most correlated with each, over the rows of a code.

    Parameters
    ----------
    code : SparseCode, or array or Tensor of shape (n, n_latents)
    n_neighbors : int, default=3
    """
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors} must be at least 1.")
    values = _matrix(code, binary=False)
    n, m = values.shape
    mean = np.asarray(values.sum(axis=0)).ravel() / n
    square = np.asarray(values.multiply(values).sum(axis=0)).ravel() / n
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    product = (values.T @ values).tocoo()
    row, column = product.coords
    apart = (row != column) & (deviation[row] > 0) & (deviation[column] > 0)
    row, column, data = row[apart], column[apart], product.data[apart] / n
    pearson = (data - mean[row] * mean[column]) / (deviation[row] * deviation[column])
    order = np.lexsort((column, -pearson, row))
    row, column, pearson, data = (part[order] for part in (row, column, pearson, data))
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < n_neighbors
    row, column, rank = row[kept], column[kept], rank[kept]
    found = Correlated(
        np.full((m, n_neighbors), -1), np.zeros((m, n_neighbors)), np.zeros((m, n_neighbors))
    )
    found.latents[row, rank] = column
    found.correlation[row, rank] = pearson[kept]
    found.cosine[row, rank] = data[kept] / np.sqrt(square[row] * square[column])
    return found


def latent_clusters(
    decoder: Any,
    code: Any = None,
    *,
    method: Method = "spectral",
    n_clusters: int | None = None,
    threshold: float | None = None,
    latents: Sequence[int] | None = None,
    n_neighbors: int | None = None,
    device: Device = "auto",
    random_state: int = 0,
) -> LatentClusters:
    """Clusters of latents, each a candidate for one feature of several dimensions.

    The affinity of two latents is the cosine of their decoder rows, or 0 if negative; with a
    ``code`` it is the Jaccard index of the rows on which they fire.

    Parameters
    ----------
    decoder : array or Tensor of shape (n_latents, d)
    code : SparseCode, or array or Tensor of shape (n, n_latents), optional
    method : {"spectral", "agglomerative", "components"}, default="spectral"
        Spectral clustering into ``n_clusters``; average linkage, cut at ``n_clusters`` or where
        the affinity falls below ``threshold``; connected parts of the graph of affinities of at
        least ``threshold``.
    n_clusters : int, optional
    threshold : float, optional
        In (0, 1). Default: 0.5, where it is used.
    latents : sequence of int, optional
        Cluster these alone. Default: all that have a direction (and fire, with a ``code``).
    n_neighbors : int, optional
        Keep the affinities of so many nearest, either way. Default: all.
    device : str or torch.device, default="auto"
    random_state : int, default=0

    Returns
    -------
    LatentClusters

    Raises
    ------
    ValueError
        An unknown method, clusters out of range, fewer than 3 latents, more than 8,192 for a
        method that holds all affinities.

    References
    ----------
    Engels, Michaud, Liao, Gurnee and Tegmark (2024), Not all language model features are linear,
    arXiv:2405.14860 (clusters of dictionary elements by cosine, judged by their reconstructions).
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not one of {get_args(Method)}.")
    cut = 0.5 if threshold is None else threshold
    if not 0 < cut < 1:
        raise ValueError(f"threshold={threshold} must lie between 0 and 1.")
    kept, units = _units(decoder, latents, device)
    fired = None
    if code is not None:
        fired = as_code(code)
        if fired.n_latents != len(as_rows(decoder, name="decoder")):
            raise ValueError(
                f"the code has {fired.n_latents} latents, the decoder another number; give both "
                "of one dictionary."
            )
        alive = fired.fires.to(kept.device)[kept]
        kept, units = kept[alive], units[alive]
    n = len(kept)
    if n < 3:
        raise ValueError(f"{n} latents with a direction that fire cannot be clustered; 3 can.")
    if n > _MOST_DENSE:
        raise ValueError(
            f"{n} latents are too many to hold all affinities; choose at most {_MOST_DENSE} with "
            "latents, such as the most important."
        )
    if n_clusters is not None and not 1 <= n_clusters <= n:
        raise ValueError(f"n_clusters={n_clusters} must lie between 1 and the {n} latents.")
    if method == "spectral" and n_clusters is None:
        raise ValueError("method='spectral' needs n_clusters; or use method='agglomerative'.")
    if fired is None:
        affinity = (units @ units.T).clamp(0, 1).double().cpu().numpy()
    else:
        ids = kept.cpu().numpy()
        affinity = co_activation(fired)[ids][:, ids].toarray()
    np.fill_diagonal(affinity, 1.0)
    affinity = (affinity + affinity.T) / 2
    if n_neighbors is not None:
        affinity = _sparsified(affinity, n_neighbors)
    label = _clustered(affinity, method, n_clusters, cut, random_state)
    return _described(kept.cpu().numpy(), label, units, affinity, random_state)


def cluster_reconstruction(
    coder: SparseCoder, code: SparseCode, members: Sequence[int] | np.ndarray | Tensor
) -> tuple[Tensor, Tensor]:
    """What a cluster of latents alone writes, on the rows where one of them fires.

    Parameters
    ----------
    coder : SparseCoder
    code : SparseCode
        Of all latents, such as ``code_rows(coder, X)``.
    members : sequence of int

    Returns
    -------
    rows : Tensor of shape (n_active,), int64
        Rows where the cluster fires.
    written : Tensor of shape (n_active, d_out)
        Without bias: the points whose irreducibility is in question.

    Raises
    ------
    ValueError
        The cluster never fires, or latents out of range.
    """
    chosen = checked_latents(members, code.n_latents)
    mine = torch.zeros(code.n_latents, dtype=torch.bool, device=code.latent.device)
    mine[chosen.to(mine.device)] = True
    kept = mine[code.latent] & (code.value != 0)
    rows, at = code.row[kept].unique(return_inverse=True)
    if len(rows) == 0:
        raise ValueError(f"none of the {len(chosen)} latents fires on the {code.n_rows} rows.")
    part = SparseCode(at, code.latent[kept], code.value[kept], len(rows), code.n_latents)
    with torch.no_grad():
        return rows, decode_sparse(part, coder.decoder)


def _units(decoder: Any, latents: Sequence[int] | None, device: Device) -> tuple[Tensor, Tensor]:
    """Latents with a direction, and their unit directions."""
    rows = as_rows(decoder, device=device, name="decoder")
    kept = torch.arange(len(rows), device=rows.device)
    if latents is not None:
        kept = checked_latents(latents, len(rows)).to(rows.device)
    length = rows[kept].norm(dim=1)
    there = length > 0
    if int(there.sum()) < 2:
        raise ValueError(f"{int(there.sum())} latents have a decoder row of nonzero length.")
    return kept[there], rows[kept[there]] / length[there, None]


def _nearest(units: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Nearest of each, its cosine; the largest |cosine|, the sum of all squared cosines."""
    found, cosine, largest, square = [], [], 0.0, 0.0
    for part in row_blocks(len(units), _BLOCK):
        near = units[part] @ units.T
        own = torch.arange(len(near), device=units.device)
        near[own, own + part.start] = 0
        largest = max(largest, float(near.abs().amax()))
        square += float(near.double().square().sum())
        near[own, own + part.start] = -math.inf
        best = near.max(dim=1)
        found.append(best.indices)
        cosine.append(best.values)
    return torch.cat(found), torch.cat(cosine), min(largest, 1.0), square


def _components(pairs: np.ndarray, n: int) -> np.ndarray:
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    return np.asarray(connected_components(links, directed=False)[1])


def _matrix(code: Any, *, binary: bool) -> csr_array:
    fired = as_code(code)
    value = fired.value.detach().double().cpu().numpy()
    data = np.ones(len(value)) if binary else value
    at = (fired.row.cpu().numpy(), fired.latent.cpu().numpy())
    return csr_array((data, at), shape=(fired.n_rows, fired.n_latents))


def _sparsified(affinity: np.ndarray, n_neighbors: int) -> np.ndarray:
    if not 1 <= n_neighbors < len(affinity):
        raise ValueError(f"n_neighbors={n_neighbors} must lie between 1 and {len(affinity) - 1}.")
    least = np.partition(affinity, -n_neighbors - 1, axis=1)[:, -n_neighbors - 1, None]
    near = affinity >= least
    return np.where(near | near.T, affinity, 0.0)


def _clustered(
    affinity: np.ndarray, method: Method, n_clusters: int | None, cut: float, random_state: int
) -> np.ndarray:
    if method == "components":
        return _components(np.argwhere(affinity >= cut), len(affinity))
    if method == "agglomerative":
        from sklearn.cluster import AgglomerativeClustering

        bound = None if n_clusters else 1 - cut
        joined = AgglomerativeClustering(
            n_clusters, metric="precomputed", linkage="average", distance_threshold=bound
        )
        return np.asarray(joined.fit_predict(1 - affinity))
    from sklearn.cluster import SpectralClustering

    split = SpectralClustering(
        n_clusters, affinity="precomputed", assign_labels="cluster_qr", random_state=random_state
    )
    with warnings.catch_warnings():  # parts that do not touch are clusters, which is no fault
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return np.asarray(split.fit_predict(affinity))


def _described(
    latents: np.ndarray, label: np.ndarray, units: Tensor, affinity: np.ndarray, random_state: int
) -> LatentClusters:
    names, size = np.unique(label, return_counts=True)
    order = names[np.argsort(-size, kind="stable")]
    order = order[np.sort(-size, kind="stable") <= -2]
    renamed = np.full(len(label), -1)
    random = np.random.default_rng(random_state)
    members, dimension, by_chance, mean = [], [], [], []
    for new, old in enumerate(order):
        mine = np.flatnonzero(label == old)
        renamed[mine] = new
        members.append(latents[mine])
        dimension.append(_effective_dimension(units[torch.from_numpy(mine)]))
        draws = [random.choice(len(latents), len(mine), replace=False) for _ in range(10)]
        by_chance.append(np.mean([_effective_dimension(units[torch.from_numpy(d)]) for d in draws]))
        inner = affinity[np.ix_(mine, mine)]
        mean.append((inner.sum() - len(mine)) / (len(mine) * (len(mine) - 1)))
    return LatentClusters(
        latents=latents,
        label=renamed,
        members=tuple(members),
        dimension=np.array(dimension),
        random_dimension=np.array(by_chance),
        affinity=np.array(mean),
    )


def _effective_dimension(units: Tensor) -> float:
    power = torch.linalg.svdvals(units.double()).square()
    return float(power.sum() ** 2 / power.square().sum())
