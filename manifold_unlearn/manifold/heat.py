"""Geodesic distances from the flow of heat on a point cloud."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
import torch
from torch import Tensor

from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.manifold.graph_geodesics import Graph

_SOURCES = 64  # solved at a time
_RIDGE = 1e-9  # of the metric of a node's edges


class HeatFlow:
    """Two factorizations, after which a source costs two solves.

    Heat that flows for a short time from a source has level sets at equal distance from it
    (Varadhan). Its logarithm has the right directions: they are normalized, and the function whose
    increments along the edges agree with them best is the distance. Operators are those of the
    neighbor graph: stiffness with Gaussian weights, mass such that the second moment of the edges
    is that of the Laplacian, gradients by weighted least squares in the tangent planes. The scheme
    is Crane's; logarithm, gradients and edge-wise increments are chosen for scattered points.

    Parameters
    ----------
    graph : Graph
        Connected; lengths along the manifold.
    points : Tensor of shape (n, d)
    bases : Tensor of shape (n, d, k)
        Orthonormal tangent bases.

    References
    ----------
    Crane, Weischedel and Wardetzky (2013), Geodesics in heat, ACM Trans. Graph. 32.
    Sharp and Crane (2020), A Laplacian for nonmanifold triangle meshes, Comput. Graph. Forum 39.
    """

    def __init__(self, graph: Graph, points: Tensor, bases: Tensor) -> None:
        edges = graph.tocoo()
        n, k = graph.shape[0], bases.shape[2]
        start, end, length = edges.row, edges.col, edges.data
        reach = np.sqrt(np.bincount(start, length**2, n) / np.bincount(start, minlength=n))
        weights = np.exp(-(length**2) / (reach[start] * reach[end])) + 1e-12
        mass = np.bincount(start, weights * length**2, n) / (2 * k)
        adjacency = scipy.sparse.csr_matrix((weights, (start, end)), shape=(n, n))
        stiffness = scipy.sparse.csgraph.laplacian(adjacency).tocsc()
        time = float(np.median(length)) ** 2
        self._graph, self._rate, self._length = graph, time**0.5, length
        self._start, self._end, self._dimension = start, end, k
        self._diffuse = _factor(scipy.sparse.diags(mass) + time * stiffness)
        self._integrate = _factor(stiffness + scipy.sparse.diags(1e-12 * stiffness.diagonal()))
        chord = (points[end] - points[start]).double()
        steps = (bases[start].mT @ chord[:, :, None])[:, :, 0].cpu().numpy()
        norm = np.linalg.norm(steps, axis=1)
        self._leaves = norm < length / 2  # edges off the planes, as those that join parts
        steps *= (length / np.maximum(norm, 1e-300))[:, None]
        steps[self._leaves] = 0
        self._gradient, self._along = self._derivatives(steps, weights)
        flow = scipy.sparse.csr_matrix((weights / 2, (start, np.arange(len(start)))))
        back = scipy.sparse.csr_matrix((weights / 2, (end, np.arange(len(start)))))
        self._divergence = back - flow

    def _derivatives(self, steps: np.ndarray, weights: np.ndarray) -> tuple[Graph, Graph]:
        """Gradients (n * k, n), and the rise along each edge from the gradient at its start."""
        start, end, k = self._start, self._end, self._dimension
        n = self._graph.shape[0]
        metric = np.zeros((n, k, k))
        np.add.at(metric, start, weights[:, None, None] * steps[:, :, None] * steps[:, None])
        ridge = _RIDGE * np.trace(metric, axis1=1, axis2=2) + 1e-300
        metric += ridge[:, None, None] * np.eye(k)
        row = np.linalg.solve(metric[start], (weights[:, None] * steps)[:, :, None])[:, :, 0]
        at = (start[:, None].astype(np.int64) * k + np.arange(k)).ravel()
        ends = np.r_[at, at], np.r_[np.repeat(end, k), np.repeat(start, k)]
        entries = np.r_[row.ravel(), -row.ravel()]
        gradient = scipy.sparse.csr_matrix((entries, ends), shape=(n * k, n))
        edge = np.repeat(np.arange(len(start)), k)
        return gradient, scipy.sparse.csr_matrix(
            (steps.ravel(), (edge, at)), shape=(len(start), n * k)
        )

    def distances_from(self, sources: np.ndarray) -> Tensor:
        """Distances (n_sources, n), float32, from nodes; to neighbors those of the edges."""
        n = self._graph.shape[0]
        out = torch.empty(len(sources), n, dtype=torch.float32)
        for block in row_blocks(len(sources), _SOURCES):
            out[block] = torch.from_numpy(self._solve(sources[block])).float()
        return out

    def _solve(self, sources: np.ndarray) -> np.ndarray:
        columns = np.arange(len(sources))
        impulse = np.zeros((self._graph.shape[0], len(sources)))
        impulse[sources, columns] = 1.0
        heat = np.maximum(self._diffuse.solve(impulse), 1e-300)
        height = -self._rate * np.log(heat / heat[sources, columns])
        slope = self._gradient @ height
        norm = np.linalg.norm(slope.reshape(-1, self._dimension, len(sources)), axis=1)
        slope /= np.repeat(np.maximum(norm, 1e-300), self._dimension, axis=0)
        rise = self._along @ slope
        leaves = self._leaves
        between = height[self._end[leaves]] - height[self._start[leaves]]
        rise[leaves] = np.sign(between) * self._length[leaves, None]
        found = self._integrate.solve(self._divergence @ rise)
        found = np.maximum(found - found[sources, columns], 0).T
        for row, source in enumerate(sources):
            own = slice(self._graph.indptr[source], self._graph.indptr[source + 1])
            found[row, self._graph.indices[own]] = self._graph.data[own]
        found[columns, sources] = 0
        return found


def _factor(matrix: Graph) -> scipy.sparse.linalg.SuperLU:
    return scipy.sparse.linalg.splu(
        matrix.tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
