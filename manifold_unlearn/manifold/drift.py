"""Generators with a drift: local kernels."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch

from manifold_unlearn.arrays import Array, Device, as_rows
from manifold_unlearn.manifold.bandwidth import CUTOFF, pair_histogram, tune_bandwidth
from manifold_unlearn.manifold.distances import center_of
from manifold_unlearn.manifold.partition import build_index
from manifold_unlearn.manifold.radius import pairs_within


class DriftOperator(NamedTuple):
    """Generator of a diffusion with drift on points.

    Attributes
    ----------
    generator : csr_matrix of shape (n_samples, n_samples)
        ``f -> laplacian f + drift . gradient f`` on values at the rows; its rows sum to 0. In
        inverse squared units of the data.
    bandwidth : float
    """

    generator: scipy.sparse.csr_matrix
    bandwidth: float

    def eigenpairs(self, n_components: int) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues nearest 0, complex, by decreasing real part, and their eigenvectors.

        Parameters
        ----------
        n_components : int
            At most ``n_samples - 3``.

        Returns
        -------
        eigenvalues : complex array of shape (n_components,)
            The first is 0. Conjugate pairs stand together, positive imaginary part first.
        eigenvectors : complex array of shape (n_samples, n_components)
        """
        size = self.generator.shape[0]
        chain = scipy.sparse.eye_array(size) + self.bandwidth * self.generator
        start = np.random.default_rng(0).standard_normal(size)
        values, vectors = scipy.sparse.linalg.eigs(
            chain, min(n_components + 1, size - 2), which="LR", v0=start
        )
        rates = np.log(values) / self.bandwidth
        order = np.lexsort((-rates.imag, -np.round(rates.real, 9)))[:n_components]
        return rates[order], vectors[:, order]


def drift_operator(
    X: Array,
    drift: Array,
    *,
    n_neighbors: int = 64,
    bandwidth: float | Literal["bgh"] = "bgh",
    device: Device = "auto",
) -> DriftOperator:
    """Generator of ``dx = drift dt + sqrt(2) dW`` on the manifold of the rows.

    The kernel of a row is a Gaussian about where the drift takes it in a time ``bandwidth``,
    ``exp(-|x + eps * drift(x) - y|**2 / (4 * eps))``; it is divided by the sampling density of
    ``y`` and its rows are normalized (local kernels: Berry and Sauer 2016, theorem 4.7). For a
    drift that is the gradient of a density's logarithm, ``DiffusionMap.fit(..., target=density)``
    gives the same with real eigenvalues.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
    drift : array or Tensor of shape (n_samples, n_features)
        In units of the data per unit of time; tangent to the manifold.
    n_neighbors : int
        As in :class:`~manifold_unlearn.manifold.diffusion.DiffusionMap`.
    bandwidth : "bgh" or float
    device : str or torch.device

    Raises
    ------
    ValueError
        The shapes differ, an entry is not finite, all rows are equal, or ``bandwidth`` is not
        positive.
    """
    rows = as_rows(X, device=device, min_samples=4).double()
    field = as_rows(drift, device=rows.device, name="drift").double()
    if field.shape != rows.shape:
        raise ValueError(
            f"drift has shape {tuple(field.shape)}, X has {tuple(rows.shape)}. "
            "Give one vector a row."
        )
    if not isinstance(bandwidth, str) and not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth} must be positive, or 'bgh'.")
    rows = rows - center_of(rows)
    given: Any = None if isinstance(bandwidth, str) else float(bandwidth)
    k = min(n_neighbors, len(rows) - 1)
    tuned = tune_bandwidth(pair_histogram(rows), n_neighbors=k, bandwidth=given)
    width = 4 * tuned.bandwidth
    index = build_index(rows)
    reach = rows.new_full((len(rows),), width * max(CUTOFF, tuned.cutoff))
    none = torch.zeros_like(reach)
    plain = _kernel(pairs_within(rows, index, reach, none), len(rows), width)
    ends = rows + tuned.bandwidth * field
    moved = _kernel(pairs_within(ends, index, reach, none), len(rows), width)
    density = np.asarray(plain.sum(axis=1)).ravel()
    chain = moved @ scipy.sparse.diags_array(1 / density)
    sums = np.asarray(chain.sum(axis=1)).ravel()
    lost = int((sums <= 0).sum())
    if lost:
        raise ValueError(
            f"the drift takes {lost} rows beyond the kernel's reach of all rows: bandwidth="
            f"{tuned.bandwidth:.4g} times the drift is too far. Lower the bandwidth or the drift."
        )
    chain = scipy.sparse.diags_array(1 / sums) @ chain
    generator = (chain - scipy.sparse.eye_array(len(rows))) / tuned.bandwidth
    return DriftOperator(scipy.sparse.csr_matrix(generator), tuned.bandwidth)


def _kernel(pairs: Any, size: int, width: float) -> scipy.sparse.csr_matrix:
    rows, columns, squared = (part.cpu().numpy() for part in pairs)
    return scipy.sparse.csr_matrix((np.exp(-squared / width), (rows, columns)), (size, size))
