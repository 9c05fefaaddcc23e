"""The Markov operator of points: its kernel, ours or pydiffmap's, and its spectrum."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from manifold_unlearn.manifold.bandwidth import (
    Bandwidth,
    fit_support,
    pair_histogram,
    tune_bandwidth,
)
from manifold_unlearn.manifold.kernels import (
    NEAR,
    KernelGraph,
    density_normalized,
    kernel_graph,
    relative_bandwidth_function,
    two_sided,
)
from manifold_unlearn.manifold.knn_graph import approximate_graph
from manifold_unlearn.manifold.neighbors import NeighborMethod, choose_method
from manifold_unlearn.manifold.search import exact_neighbors
from manifold_unlearn.manifold.spectral import markov_eigenpairs

LEAST_EIGENVALUE = 1e-8
"""Below, an eigenfunction is rounding."""


class KernelOperator(NamedTuple):
    """A kernel between all fitted rows, and how it is to be normalized.

    Attributes
    ----------
    graph : KernelGraph
    tuned : Bandwidth
    alpha : float
        Power of the densities that the kernel is divided by.
    scale : Tensor of shape (n_samples,) or None
        Variable bandwidth ``rho``; None where it is 1.
    typical_scale : float
        Of which ``scale`` is a multiple.
    recall : float
        Of the neighbors; 1 for an exact search.
    """

    graph: KernelGraph
    tuned: Bandwidth
    alpha: float
    scale: Tensor | None = None
    typical_scale: float = 1.0
    recall: float = 1.0


class Spectrum(NamedTuple):
    """Eigenpairs of a Markov operator and what its normalization found, float64.

    Attributes
    ----------
    eigenvalues : array of shape (n_components,)
        Of the Markov operator, without the trivial 1, descending.
    generator_eigenvalues : array of shape (n_components,)
        ``-log(eigenvalues) / bandwidth``.
    rates : array of shape (n_components,)
        Eigenvalues of minus the generator, times the bandwidth.
    eigenfunctions : array of shape (n_samples, n_components)
        Of unit variance.
    stationary_deviation : array of shape (n_components,)
        Standard deviation of the eigenfunctions under the stationary distribution.
    weights : array of shape (n_samples,)
        What the kernel is multiplied by, on both sides, before its rows are normalized.
    density : array of shape (n_samples,)
        Kernel density estimate.
    component : array of shape (n_samples,), int
        Connected component of each row, the largest is 0.
    """

    eigenvalues: np.ndarray
    generator_eigenvalues: np.ndarray
    rates: np.ndarray
    eigenfunctions: np.ndarray
    stationary_deviation: np.ndarray
    weights: np.ndarray
    density: np.ndarray
    component: np.ndarray


def gaussian_operator(
    X: Tensor,
    *,
    n_neighbors: int,
    bandwidth: float | None = None,
    alpha: float = 1.0,
    variable_bandwidth: bool = False,
    neighbors: NeighborMethod = "exact",
    random_state: Any = None,
) -> KernelOperator:
    """Gaussian kernel of centered rows ``X``; for None the bandwidth is found.

    The rows stand as :func:`~manifold_unlearn.manifold.partition.leaf_order` puts them.

    Raises
    ------
    ValueError
        ``variable_bandwidth`` with an approximate search of neighbors.

    Warns
    -----
    UserWarning
        The graph truncates the kernel.
    """
    if neighbors == "auto":
        neighbors = choose_method(len(X), len(X), X.shape[1], X.device)
    histogram = pair_histogram(X)
    tuned = tune_bandwidth(histogram, n_neighbors=n_neighbors, bandwidth=bandwidth)
    scale, typical = None, 1.0
    if neighbors != "exact":
        if variable_bandwidth:
            raise ValueError(
                f"variable_bandwidth=True needs neighbors='exact', got {neighbors!r}: its "
                "distances are scaled. Use neighbors='exact', or landmarks for many rows."
            )
        found = approximate_graph(
            X,
            histogram,
            tuned,
            n_neighbors=n_neighbors,
            neighbors=neighbors,
            random_state=random_state,
        )
        return KernelOperator(found.graph, found.tuned, alpha, recall=found.recall)
    if variable_bandwidth:
        dimension = tuned.intrinsic_dimension
        near, _ = exact_neighbors(X, None, min(NEAR, len(X) - 1))
        near = torch.nn.functional.pad(near, (1, 0))  # a row is its own nearest neighbor
        scale, typical = relative_bandwidth_function(near, dimension)
        histogram = pair_histogram(X, scale)
        tuned = tune_bandwidth(histogram, n_neighbors=n_neighbors, bandwidth=bandwidth)
        tuned = tuned._replace(intrinsic_dimension=dimension)
        # the drift that alpha leaves with rho = q**beta, beta = -1 / (d + 2), is that of
        # alpha + 1/2 without: 2 - 2 alpha + (d + 2) beta (Berry and Harlim 2016)
        alpha = alpha - 0.5
    tuned = fit_support(histogram, tuned, n_samples=len(X), n_neighbors=n_neighbors)
    graph = kernel_graph(X, tuned, n_neighbors=n_neighbors, scale=scale, in_order=True)
    return KernelOperator(graph, tuned, alpha, scale, typical)


def pydiffmap_operator(
    X: Tensor, *, n_neighbors: int, bandwidth: float | None, alpha: float
) -> KernelOperator:
    """Kernel of centered rows ``X`` as pydiffmap makes it; for None by its own bandwidth.

    Raises
    ------
    ImportError
        pydiffmap is not installed.
    """
    try:
        from pydiffmap.diffusion_map import DiffusionMap as PyDiffusionMap
    except ImportError as error:
        raise ImportError(
            "backend='pydiffmap' needs pydiffmap: pip install pydiffmap, or backend='torch'."
        ) from error
    # its grid of bandwidths is 2**-40 to 2**40: a power of 2 brings any data there
    unit = 2.0 ** round(float(torch.log2(X.square().sum(1).median().sqrt())))
    epsilon = "bgh" if bandwidth is None else bandwidth / unit**2
    model = PyDiffusionMap.from_sklearn(alpha=alpha, k=n_neighbors, epsilon=epsilon)
    model.construct_Lmat((X / unit).cpu().numpy())
    kernel = model.local_kernel
    reach = kernel.neigh.kneighbors(kernel.data)[0][:, -1]  # its k counts the row itself
    support = torch.from_numpy((reach * unit) ** 2).to(X) * (1 + 1e-6)
    dimension = kernel.d
    if dimension is None:
        dimension = tune_bandwidth(pair_histogram(X), n_neighbors=n_neighbors).intrinsic_dimension
    found = float(model.epsilon_fitted) * unit**2
    tuned = Bandwidth(found, float(dimension), (found, found), 0.0, 0.0)
    matrix = scipy.sparse.csr_matrix(model.kernel_matrix)
    return KernelOperator(KernelGraph(matrix, support), tuned, alpha)


def spectrum(
    operator: KernelOperator,
    n_components: int,
    *,
    target: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """The leading eigenpairs of the Markov operator that the kernel normalizes to.

    ``target`` (n_samples,): density that takes the place of the sampling density.

    Raises
    ------
    ValueError
        Fewer than ``n_components`` eigenvalues stand out of rounding.
    """
    tuned = operator.tuned
    rho = None if operator.scale is None else operator.scale.double().cpu().numpy()
    normalized, weights, q = density_normalized(
        operator.graph.matrix, operator.alpha, rho, tuned.intrinsic_dimension, target
    )
    degrees = np.asarray(normalized.sum(axis=1)).ravel()
    # the generator is (P - 1) / (eps rho^2); its lazy chain 1 + tau (P - 1) / rho^2 is Markov
    squared = np.ones(len(q)) if rho is None else rho**2
    tau = squared.min()
    factor = np.sqrt(tau / (degrees * squared))
    symmetric = two_sided(normalized, factor, factor)
    if rho is not None:
        symmetric.setdiag(symmetric.diagonal() + 1 - tau / squared)
    root = np.sqrt(degrees * squared)
    pairs = markov_eigenpairs(symmetric, root / root.max(), n_components, device)
    rates = (1 - pairs.eigenvalues) / tau
    usable = int((1 - rates >= LEAST_EIGENVALUE).sum())
    if usable < n_components:
        raise ValueError(
            f"n_components={n_components} is more than the data carry: {usable} "
            f"eigenvalues stand out of rounding at bandwidth={tuned.bandwidth:.4g}. "
            "Lower n_components or the bandwidth, or add distinct data."
        )
    eigenvalues = np.minimum(pairs.eigenvalues if rho is None else np.exp(-rates), 1.0)
    volume = np.log(len(q)) + tuned.intrinsic_dimension / 2 * np.log(4 * np.pi * tuned.bandwidth)
    stationary = root**2 / (root**2).sum()
    mean = stationary @ pairs.eigenvectors
    return Spectrum(
        eigenvalues,
        generator_eigenvalues=np.maximum(-np.log(eigenvalues), 0.0) / tuned.bandwidth,
        rates=rates,
        eigenfunctions=pairs.eigenvectors,
        stationary_deviation=np.sqrt(stationary @ (pairs.eigenvectors - mean) ** 2),
        weights=weights,
        density=np.exp(np.clip(np.log(q) - volume, -700, 700)),
        component=pairs.component,
    )
