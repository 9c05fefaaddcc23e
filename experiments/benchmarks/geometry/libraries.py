"""What each library does for one task, with the same settings: one function a library and task.

Runs in that library's own Python: numpy is all that is imported outside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Distances = Callable[[np.ndarray, np.ndarray], np.ndarray]


class NotOfferedError(Exception):
    """The library has no such function, or not on this device."""


@dataclass(frozen=True)
class Job:
    """Settings common to all libraries; those of other tasks keep their defaults."""

    method: str
    device: str
    n_neighbors: int = 64
    n_components: int = 2
    n_landmarks: int | None = None


@dataclass(frozen=True)
class Embedding:
    """Coordinates without the constant one, and what comes with them."""

    coordinates: np.ndarray
    rates: np.ndarray | None = None
    """Eigenvalues of the generator up to a factor"""
    transform: Callable[[np.ndarray], Any] | None = None


def rates_of(markov_eigenvalues: np.ndarray) -> np.ndarray:
    return -np.log(np.clip(markov_eigenvalues, 1e-300, None))


# neighbors: X (n, d) float32 -> indices (n, job.n_neighbors) without the row itself


def without_self(indices: np.ndarray) -> np.ndarray:
    """Of ``(n, k + 1)`` the k others, nearest first."""
    own = indices == np.arange(len(indices))[:, None]
    own[~own.any(1), -1] = True  # the row itself was not found: the farthest goes
    return indices[~own].reshape(len(indices), -1)


def neighbors_ours(X: np.ndarray, job: Job) -> Any:
    from manifold_unlearn.manifold import nearest_neighbors

    return nearest_neighbors(X, job.n_neighbors, neighbors=job.method, device=job.device).indices


def neighbors_scikit_learn(X: np.ndarray, job: Job) -> Any:
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=job.n_neighbors, algorithm="brute").fit(X)
    return found.kneighbors(return_distance=False)


def neighbors_faiss(X: np.ndarray, job: Job) -> Any:
    import faiss

    index = faiss.IndexFlatL2(X.shape[1])
    if job.device == "cuda":
        if not hasattr(faiss, "StandardGpuResources"):
            raise NotOfferedError("this build of faiss has no GPU")
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(X)
    return without_self(index.search(X, job.n_neighbors + 1)[1])


def neighbors_pynndescent(X: np.ndarray, job: Job) -> Any:
    from pynndescent import NNDescent

    index = NNDescent(X, n_neighbors=job.n_neighbors + 1, random_state=0, n_jobs=1)
    return without_self(index.neighbor_graph[0])


def neighbors_torchdr(X: np.ndarray, job: Job) -> Any:
    import torch
    from torchdr import pairwise_distances

    rows = torch.as_tensor(X, device=job.device)
    found = pairwise_distances(
        rows, k=job.n_neighbors, exclude_diag=True, return_indices=True, device=job.device
    )
    return found[1]


# diffusion maps: X (n, d) -> Embedding, alpha = 1 where the library has it


def diffusion_ours(X: np.ndarray, job: Job) -> Embedding:
    from manifold_unlearn.manifold import DiffusionMap

    fitted = DiffusionMap(job.n_components, n_neighbors=job.n_neighbors, device=job.device).fit(X)
    return Embedding(fitted.embedding_, fitted.generator_eigenvalues_, fitted.transform)


def diffusion_plain(X: np.ndarray, job: Job) -> Embedding:
    """Exact neighbors, one bandwidth from their distances, ARPACK: the least that must be done."""
    import scipy.sparse
    import scipy.sparse.linalg
    import torch

    rows = torch.as_tensor(X, dtype=torch.float32)
    squared = rows.square().sum(1)
    parts = []
    for start in range(0, len(rows), 2048):
        block = torch.addmm(squared[None, :], rows[start : start + 2048], rows.T, alpha=-2)
        block += squared[start : start + 2048, None]
        parts.append(block.topk(job.n_neighbors + 1, largest=False))
    distances = torch.cat([part.values for part in parts]).clamp_min_(0).double().numpy()
    columns = torch.cat([part.indices for part in parts]).numpy()
    width = float(np.median(distances[:, -1])) / 4
    weights = np.exp(-distances / width)
    indptr = np.arange(0, columns.size + 1, job.n_neighbors + 1)
    size = (len(rows), len(rows))
    kernel = scipy.sparse.csr_matrix((weights.ravel(), columns.ravel(), indptr), size)
    kernel = kernel.maximum(kernel.T)
    density = 1 / np.asarray(kernel.sum(1)).ravel()
    kernel = scipy.sparse.diags(density) @ kernel @ scipy.sparse.diags(density)
    root = 1 / np.sqrt(np.asarray(kernel.sum(1)).ravel())
    symmetric = scipy.sparse.diags(root) @ kernel @ scipy.sparse.diags(root)
    values, vectors = scipy.sparse.linalg.eigsh(symmetric.tocsr(), job.n_components + 1, which="LA")
    order = np.argsort(-values)[1:]
    return Embedding(vectors[:, order] * root[:, None], rates_of(values[order]))


def diffusion_pydiffmap(X: np.ndarray, job: Job) -> Embedding:
    from pydiffmap.diffusion_map import DiffusionMap

    fitted = DiffusionMap.from_sklearn(
        alpha=1.0, k=job.n_neighbors, epsilon="bgh", n_evecs=job.n_components
    ).fit(X)
    return Embedding(fitted.dmap, -fitted.evals, fitted.transform)


def diffusion_datafold(X: np.ndarray, job: Job) -> Embedding:
    import datafold.pcfold as pfold
    from datafold.dynfold import DiffusionMaps

    cloud = pfold.PCManifold(X)
    k = {} if job.method == "default" else {"k": job.n_neighbors}  # of its cut-off; default 25
    cloud.optimize_parameters(random_state=0, **k)
    distance = {"cut_off": cloud.cut_off}
    fitted = DiffusionMaps(
        pfold.GaussianKernel(epsilon=cloud.kernel.epsilon, distance=distance),
        n_eigenpairs=job.n_components + 1,
    ).fit(X)

    def transform(new: np.ndarray) -> np.ndarray:
        return np.asarray(fitted.transform(new))[:, 1:]

    vectors, values = np.asarray(fitted.eigenvectors_), np.asarray(fitted.eigenvalues_)
    return Embedding(vectors[:, 1:], rates_of(values[1:]), transform)


def diffusion_scikit_learn(X: np.ndarray, job: Job) -> Embedding:
    from sklearn.manifold import SpectralEmbedding

    model = SpectralEmbedding(job.n_components, n_neighbors=job.n_neighbors, random_state=0)
    return Embedding(model.fit_transform(X))


def diffusion_graphtools(X: np.ndarray, job: Job) -> Embedding:
    import graphtools
    import scipy.sparse.linalg

    graph = graphtools.Graph(
        X, knn=job.n_neighbors, decay=None, anisotropy=1, n_jobs=1, random_state=0
    )
    values, vectors = scipy.sparse.linalg.eigsh(
        graph.diff_aff, job.n_components + 1, which="LA", v0=np.ones(len(X))
    )
    order = np.argsort(-values)[1:]
    root = np.sqrt(np.asarray(graph.K.sum(1)).ravel())
    coordinates = vectors[:, order] / root[:, None]

    def transform(new: np.ndarray) -> np.ndarray:
        return graph.interpolate(coordinates, Y=new)

    return Embedding(coordinates, rates_of(values[order]), transform)


def diffusion_scanpy(X: np.ndarray, job: Job) -> Embedding:
    import anndata
    import scanpy

    table = anndata.AnnData(X)
    scanpy.pp.neighbors(table, n_neighbors=job.n_neighbors, use_rep="X", method="gauss")
    scanpy.tl.diffmap(table, n_comps=job.n_components + 1)
    values = np.asarray(table.uns["diffmap_evals"])
    return Embedding(np.asarray(table.obsm["X_diffmap"])[:, 1:], rates_of(values[1:]))


# geodesics: X (n, d) -> distances between rows


def geodesics_ours(X: np.ndarray, job: Job) -> Distances:
    from manifold_unlearn.manifold.geodesic import GeodesicMap

    options = {} if job.method == "default" else {"method": job.method}
    fitted = GeodesicMap(
        2, n_neighbors=job.n_neighbors, n_landmarks=job.n_landmarks, device=job.device, **options
    ).fit(X)
    if job.n_landmarks is None:  # all pairs, as Isomap computes them
        return lambda first, second: fitted.geodesic_distances()[np.ix_(first, second)]
    return lambda first, second: fitted.geodesic_distances(X[first], X[second])


def geodesics_scikit_learn(X: np.ndarray, job: Job) -> Distances:
    from sklearn.manifold import Isomap

    fitted = Isomap(n_neighbors=job.n_neighbors, n_components=2).fit(X)
    return lambda first, second: fitted.dist_matrix_[np.ix_(first, second)]


def geodesics_plain(X: np.ndarray, job: Job) -> Distances:
    """Shortest paths from landmarks alone, as scipy and scikit-learn give them."""
    from scipy.sparse.csgraph import dijkstra
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(X, job.n_neighbors, mode="distance")
    landmarks = np.random.default_rng(0).choice(len(X), job.n_landmarks or len(X), replace=False)
    from_landmarks = dijkstra(graph, directed=False, indices=landmarks)

    def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Through the landmark for which the sum of the two ways is least."""
        return np.stack([
            (from_landmarks[:, row, None] + from_landmarks[:, second]).min(0) for row in first
        ])  # fmt: skip

    return distances


# dimension: X (n, d) -> dimension


def dimension_ours(X: np.ndarray, job: Job) -> float:
    from manifold_unlearn.manifold.dimension import intrinsic_dimension

    options = {} if job.method == "default" else {"method": job.method}
    return float(intrinsic_dimension(X, device=job.device, **options))


def dimension_skdim(X: np.ndarray, job: Job) -> float:
    import skdim.id

    made = {"two_nn": skdim.id.TwoNN, "mle": skdim.id.MLE}[job.method]()
    return float(made.fit(X).dimension_)


def dimension_dadapy(X: np.ndarray, job: Job) -> float:
    from dadapy import IdEstimation

    cloud = IdEstimation(coordinates=X, verbose=False, n_jobs=1)
    if job.method == "two_nn":
        return float(cloud.compute_id_2NN()[0])
    return float(cloud.return_id_scaling_gride(range_max=64)[0][-1])
