"""Riemannian metrics: pushed forward by an embedding, pulled back by a differentiable map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, restore, row_blocks
from manifold_unlearn.manifold.markov import gaussian_operator
from manifold_unlearn.manifold.neighbors import nearest_neighbors

_BLOCK = 4096  # rows whose derivatives are taken at once
_RANK = 1e-12  # of the largest eigenvalue, below which a direction of the cometric is rounding


class EmbeddingMetric(NamedTuple):
    """The metric of the data at each row, as a form on vectors of the embedding space.

    Attributes
    ----------
    metric : array or Tensor of shape (n_samples, s, s)
        ``sqrt(v @ metric @ v)`` is the length, in units of the data, of the tangent vector whose
        image in the embedding is ``v``. Of rank k.
    cometric : array or Tensor of shape (n_samples, s, s)
        Its pseudo-inverse before the rank is cut: products of the coordinates' gradients.
    volume : array or Tensor of shape (n_samples,)
        Volume of the data per volume of the embedding.
    """

    metric: Any
    cometric: Any
    volume: Any


def pushforward_metric(
    X: Array,
    embedding: Array,
    *,
    intrinsic_dimension: int,
    n_neighbors: int = 64,
    bandwidth: float | None = None,
    device: Device = "auto",
) -> EmbeddingMetric:
    """Metric of the data carried to an embedding, whatever method made it.

    With the Laplace-Beltrami operator L of the data, the cometric of coordinates f is
    ``h_ij = (L(f_i f_j) - f_i L f_j - f_j L f_i) / 2`` and the metric its pseudo-inverse of rank
    k (Perraul-Joncas and Meila 2013). L is ``(P - 1) / bandwidth`` with the Markov matrix P of a
    diffusion map with ``alpha=1`` whose rows take no account of themselves.
    Law: lengths, areas and angles measured with it are those of the data; linear maps of
    the embedding do not change them.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
        The data.
    embedding : array or Tensor of shape (n_samples, s)
        Coordinates of the same rows, smooth on the manifold.
    intrinsic_dimension : int
        Dimension k of the manifold, at most s.
    n_neighbors : int, default=64
        Resolution of the operator, as in :class:`~manifold_unlearn.manifold.DiffusionMap`.
    bandwidth : float, optional
        Of its kernel, squared units of the data; default: found from the data.
    device : str or torch.device, default="auto"

    Returns
    -------
    EmbeddingMetric
        Of the kind of ``embedding``.

    Raises
    ------
    ValueError
        Other rows in ``embedding`` than in ``X``, or a dimension out of range.

    References
    ----------
    Perraul-Joncas and Meila (2013), Non-linear dimensionality reduction: Riemannian metric
    estimation and the problem of geometric discovery, arXiv:1305.7255.

    Examples
    --------
    >>> import numpy as np
    >>> from manifold_unlearn.manifold import samples
    >>> circle = samples.circle(1000, n_features=8, radius=3.0, random_state=0)
    >>> angle = circle.intrinsic_coordinates[:, 0]
    >>> oval = np.stack([5 * np.cos(angle), np.sin(angle)], axis=1)
    >>> found = pushforward_metric(circle.points, oval, intrinsic_dimension=1)
    >>> order = np.argsort(angle)
    >>> edges = np.stack([order, np.roll(order, 1)], axis=1)
    >>> round(float(simplex_volumes(oval, found.metric, edges).sum() / (2 * np.pi)), 1)
    3.0
    """
    rows = as_rows(X, device=device, min_samples=4)
    f = as_rows(embedding, device=rows.device, name="embedding").double()
    k = intrinsic_dimension
    if len(f) != len(rows):
        raise ValueError(
            f"embedding has {len(f)} rows, X has {len(rows)}. Give the coordinates of X's rows."
        )
    if not 1 <= k <= f.shape[1]:
        raise ValueError(
            f"intrinsic_dimension={k} must lie between 1 and {f.shape[1]}, the columns of the "
            "embedding."
        )
    markov, width = _markov(rows, min(n_neighbors, len(rows) - 1), bandwidth)
    centered = f - f.mean(0)
    unit = centered.square().mean(0).sqrt().clamp_min(1e-300)
    g = (centered / unit).cpu().numpy()
    s = g.shape[1]
    a, b = np.triu_indices(s)
    functions = np.concatenate([g, g[:, a] * g[:, b]], axis=1)
    images = (markov @ functions - functions) / width
    pairs = (images[:, s:] - g[:, a] * images[:, b] - g[:, b] * images[:, a]) / 2
    pairs = markov @ pairs  # a row's few neighbors scatter it: paths would follow its dips
    cometric = np.empty((len(g), s, s))
    cometric[:, a, b] = cometric[:, b, a] = pairs
    h = torch.from_numpy(cometric).to(f.device) * (unit[:, None] * unit[None, :])
    values, vectors = torch.linalg.eigh(h)
    values, vectors = values[:, -k:], vectors[:, :, -k:]
    floor = (_RANK * values[:, -1:].abs()).clamp_min(1e-300)
    values = torch.maximum(values, floor)
    metric = (vectors / values[:, None]) @ vectors.mT
    volume = values.log().sum(1).mul(-0.5).exp()
    return EmbeddingMetric(*(restore(value, embedding) for value in (metric, h, volume)))


def _markov(
    rows: Tensor, n_neighbors: int, bandwidth: float | None
) -> tuple[scipy.sparse.csr_matrix, float]:
    """Markov matrix whose generator is the Laplace-Beltrami operator, and its bandwidth."""
    operator = gaussian_operator(
        rows - rows.median(dim=0).values,  # rounding of distances grows with the norm
        n_neighbors=n_neighbors,
        bandwidth=bandwidth,
        alpha=1.0,
        variable_bandwidth=False,
    )
    bandwidth = operator.tuned.bandwidth
    # a row's own weight is no step: of few neighbors' sum it is a large part, and slows the chain
    kernel = scipy.sparse.csr_matrix(operator.graph.matrix)
    others = np.asarray(kernel.sum(axis=1)).ravel() - kernel.diagonal()
    kernel.setdiag(np.where(others > 0, 0.0, 1.0))
    inverse = scipy.sparse.diags(1 / np.asarray(kernel.sum(axis=1)).ravel())
    kernel = inverse @ kernel @ inverse  # alpha = 1
    degrees = np.asarray(kernel.sum(axis=1)).ravel()
    return scipy.sparse.csr_matrix(scipy.sparse.diags(1 / degrees) @ kernel), bandwidth


def simplex_volumes(embedding: Array, metric: Array, simplices: Array) -> Any:
    """Lengths of edges, areas of triangles and so on, measured with a metric.

    The metric on a simplex is the mean of those at its corners.

    Parameters
    ----------
    embedding : array or Tensor of shape (n_samples, s)
    metric : array or Tensor of shape (n_samples, s, s)
        As :func:`pushforward_metric` or :func:`pullback_metric` give it.
    simplices : int array or Tensor of shape (n_simplices, k + 1)
        Corners: rows of the embedding. Consecutive pairs of a path, a Delaunay triangulation of a
        planar embedding, or the convex hull of a round one.

    Returns
    -------
    array or Tensor of shape (n_simplices,)
        In units of the data to the power k.

    Raises
    ------
    ValueError
        Shapes that do not fit, or a corner that is no row.
    """
    points = as_rows(embedding).double()
    n_samples, s = points.shape
    forms = torch.as_tensor(metric, dtype=torch.float64, device=points.device)
    if forms.shape != (n_samples, s, s):
        raise ValueError(f"metric has shape {tuple(forms.shape)}; expected {(n_samples, s, s)}.")
    corners = torch.as_tensor(simplices, device=points.device).long()
    if corners.ndim != 2 or not 2 <= corners.shape[1] <= s + 1:
        raise ValueError(
            f"simplices have shape {tuple(corners.shape)}; expected (n_simplices, k + 1) with "
            f"1 <= k <= {s}."
        )
    if len(corners) and not 0 <= int(corners.min()) <= int(corners.max()) < n_samples:
        raise ValueError(
            f"simplices name rows {int(corners.min())} to {int(corners.max())}; the embedding has "
            f"{n_samples}."
        )
    k = corners.shape[1] - 1
    edges = points[corners[:, 1:]] - points[corners[:, :1]]
    gram = edges @ forms[corners].mean(1) @ edges.mT
    volumes = torch.linalg.det(gram).clamp_min(0).sqrt() / math.factorial(k)
    return restore(volumes, embedding)


def metric_distances(
    embedding: Array, metric: Array, sources: Array, *, n_neighbors: int = 16
) -> Any:
    """Shortest-path distances in an embedding whose edges are measured with a metric.

    Parameters
    ----------
    embedding : array or Tensor of shape (n_samples, s)
    metric : array or Tensor of shape (n_samples, s, s)
    sources : int array or Tensor of shape (n_sources,)
        Rows to measure from.
    n_neighbors : int, default=16
        Of the graph, nearest in the embedding. Paths along its edges are zigzags: some percent
        too long.

    Returns
    -------
    array or Tensor of shape (n_sources, n_samples)
        In units of the data; infinite where no path leads.
    """
    points = as_rows(embedding, min_samples=2).double()
    k = min(n_neighbors, len(points) - 1)
    near = nearest_neighbors(points, k).indices
    first = torch.arange(len(points), device=points.device).repeat_interleave(k)
    edges = torch.stack([first, near.reshape(-1)], 1)
    lengths = simplex_volumes(points, metric, edges)
    rows, columns = edges.cpu().numpy().T
    smallest = 1e-12 * float(lengths.max())  # a stored zero would be no edge
    weights = np.maximum(lengths.cpu().numpy(), max(smallest, 1e-300))
    graph = scipy.sparse.csr_matrix((weights, (rows, columns)), shape=(len(points),) * 2)
    graph = graph.maximum(graph.T)
    found = scipy.sparse.csgraph.dijkstra(graph, directed=False, indices=np.asarray(sources))
    return restore(torch.from_numpy(np.atleast_2d(found)), embedding)


def pullback_metric(
    function: Callable[[Tensor], Tensor], X: Array, *, tangents: Array | None = None
) -> Any:
    """Metric that a differentiable map induces on its inputs, ``J.T @ J`` at each row.

    Parameters
    ----------
    function : callable
        ``(n, d) -> (n, m)`` on tensors, each row by itself: a decoder, a piece of a network. With
        float64 inputs its parameters must be float64 too.
    X : array or Tensor of shape (n_samples, d)
        Where to take the derivative; float dtypes below float32 are widened to it.
    tangents : array or Tensor of shape (n_samples, d, k), optional
        Directions at each row, as :meth:`TangentBundle.tangent_bases` gives them; default: the
        coordinate axes.

    Returns
    -------
    array or Tensor of shape (n_samples, k, k)
        Symmetric, positive semi-definite; k is d without ``tangents``. By k forward derivatives,
        or by m backward ones where that is less.

    Raises
    ------
    ValueError
        ``function`` does not return one row per row, or ``tangents`` do not fit.
    """
    rows = as_rows(X)
    n_samples, d = rows.shape
    directions = None
    if tangents is not None:
        directions = torch.as_tensor(tangents, dtype=rows.dtype, device=rows.device)
        if directions.ndim != 3 or directions.shape[:2] != (n_samples, d):
            raise ValueError(
                f"tangents have shape {tuple(directions.shape)}; expected ({n_samples}, {d}, k)."
            )
    width = d if directions is None else directions.shape[2]
    result = rows.new_empty(n_samples, width, width)
    for part in row_blocks(n_samples, _BLOCK):
        along = None if directions is None else directions[part]
        result[part] = _pulled_back(function, rows[part], along)
    return restore(result, X)


def _pulled_back(
    function: Callable[[Tensor], Tensor], rows: Tensor, along: Tensor | None
) -> Tensor:
    derived = torch.func.vjp(function, rows)
    output, backward = derived[0], derived[1]
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(rows):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"function returned {shape} for {len(rows)} rows; expected ({len(rows)}, m)."
        )
    width = rows.shape[1] if along is None else along.shape[2]
    if output.shape[1] < width:
        axes = torch.eye(output.shape[1], dtype=output.dtype, device=output.device)
        axes = axes[:, None].expand(-1, len(rows), -1)
        J = torch.func.vmap(lambda axis: backward(axis)[0])(axes).movedim(0, 1)
        J = J if along is None else J @ along
        return J.mT @ J
    if along is None:
        axes = torch.eye(width, dtype=rows.dtype, device=rows.device)
        axes = axes[:, None].expand(-1, len(rows), -1)
    else:
        axes = along.movedim(2, 0)
    columns = torch.func.vmap(lambda axis: torch.func.jvp(function, (rows,), (axis,))[1])(axes)
    return torch.einsum("anm,bnm->nab", columns, columns)
