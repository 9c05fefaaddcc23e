"""Diffusion maps: coordinates of a manifold that do not depend on how densely it was sampled."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import Array, Device, as_rows, generator, restore, row_blocks, validate
from manifold_unlearn.manifold.kernels import (
    FAR_CUTOFF,
    Bandwidth,
    KernelGraph,
    bandwidth_function,
    density_normalized,
    fit_support,
    kernel_graph,
    pair_histogram,
    scaled_block,
    support_radius,
    tune_bandwidth,
    two_sided,
)
from manifold_unlearn.manifold.lift import lift
from manifold_unlearn.manifold.neighbors import (
    NeighborMethod,
    center_of,
    check_method,
    nearest_neighbors,
)
from manifold_unlearn.manifold.spectral import markov_eigenpairs

_CHEAP = 1e10  # multiplications up to which distances are double precision, else single
_NEAR = 8  # neighbors that the variable bandwidth is made from
_LEAST_EIGENVALUE = 1e-8  # below, an eigenfunction is rounding


class _Operator(NamedTuple):
    """Everything of a fitted kernel that the spectrum and the extension need."""

    graph: KernelGraph
    tuned: Bandwidth
    scale: Tensor | None
    alpha: float


class DiffusionMap(TransformerMixin, BaseEstimator):
    """Eigenfunctions of the Laplace-Beltrami operator, estimated from points.

    The kernel ``exp(-|x - y|**2 / (4 * eps * rho(x) * rho(y)))`` on a neighbor graph is divided by
    the densities to the power ``alpha``, its rows are normalized, and the leading eigenvectors of
    the Markov matrix are the coordinates (Coifman and Lafon 2006).
    Two laws hold: ``transform`` of the fitted rows returns ``embedding_``, and neither
    rotation nor translation nor scale nor order of the data changes the coordinates.

    Parameters
    ----------
    n_components : int, default=2
        Coordinates, the constant one not counted.
    n_neighbors : int, default=64
        Sets the resolution: the automatic bandwidth gives all but the sparsest rows a kernel sum
        of ``n_neighbors / 4``. The graph holds as many neighbors as the kernel then reaches, on
        average at most 16 times this (with a warning beyond). Too few: noisy coordinates. Too
        many: parts that nearly touch are joined.
    bandwidth : "bgh" or float, default="bgh"
        ``eps``, in squared units of the data; ``"bgh"`` finds it, see
        :func:`~manifold_unlearn.manifold.kernels.tune_bandwidth`.
    alpha : float, default=1.0
        1: Laplace-Beltrami, whatever the density; 1/2: Fokker-Planck; 0: graph Laplacian.
    variable_bandwidth : bool, default=False
        Whether ``rho`` follows the density (else 1): for tails that one bandwidth leaves isolated.
    diffusion_time : float, default=0
        Columns are scaled by ``eigenvalues_**diffusion_time``; 0: eigenfunctions of unit variance.
    neighbors : {"auto", "exact"}, default="auto"
        Neighbor search; both are exact.
    n_landmarks : int or None, default=None
        Fit on so many rows only and place the rest by Nyström extension. The rows are the farthest
        points, or a random subset when ``random_state`` is given.
    backend : {"torch", "pydiffmap"}, default="torch"
        ``"pydiffmap"``: kernel, bandwidth and normalization of that package.
    device : str or torch.device, default="auto"
        Where to compute: the device of a tensor given, else a GPU, else the CPU.
    random_state : int, RandomState or None, default=None
        Draws the landmarks; nothing else is random.

    Attributes
    ----------
    embedding_ : array of shape (n_samples, n_components)
    eigenvalues_ : array of shape (n_components,)
        Of the Markov matrix, without the trivial 1, descending.
    generator_eigenvalues_ : array of shape (n_components,)
        ``-log(eigenvalues_) / bandwidth_``: for ``alpha=1`` the eigenvalues of minus the
        Laplace-Beltrami operator, in inverse squared units of the data, ascending.
    bandwidth_ : float
    intrinsic_dimension_ : float
    density_ : array of shape (n_landmarks,)
        Kernel density estimate at the rows fitted, per unit of ``intrinsic_dimension_`` volume.
    component_ : array of shape (n_landmarks,), int
        Connected component of each row fitted, the largest is 0.
    n_components_connected_ : int
        Connected components of the graph, the multiplicity of the eigenvalue 1.
    landmark_indices_ : array of shape (n_landmarks,), int
        The rows fitted; all of them without ``n_landmarks``.
    n_features_in_ : int

    References
    ----------
    Coifman and Lafon (2006), Diffusion maps, Appl. Comput. Harmon. Anal. 21.
    Berry and Harlim (2016), Variable bandwidth diffusion kernels, Appl. Comput. Harmon. Anal. 40.

    Examples
    --------
    >>> from manifold_unlearn.manifold import DiffusionMap, samples
    >>> circle = samples.circle(500, n_features=8, random_state=0)
    >>> model = DiffusionMap(n_components=4).fit(circle.points)
    >>> ratios = model.generator_eigenvalues_ / model.generator_eigenvalues_[0]
    >>> [round(float(r)) for r in ratios]
    [1, 1, 4, 4]
    """

    embedding_: Any
    eigenvalues_: Any
    generator_eigenvalues_: Any
    density_: Any
    component_: Any
    landmark_indices_: Any
    landmarks_: Any
    bandwidth_: float
    intrinsic_dimension_: float
    n_components_connected_: int
    n_features_in_: int

    def __init__(
        self,
        n_components: int = 2,
        *,
        n_neighbors: int = 64,
        bandwidth: float | Literal["bgh"] = "bgh",
        alpha: float = 1.0,
        variable_bandwidth: bool = False,
        diffusion_time: float = 0,
        neighbors: NeighborMethod = "auto",
        n_landmarks: int | None = None,
        backend: Literal["torch", "pydiffmap"] = "torch",
        device: Device = "auto",
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.n_neighbors = n_neighbors
        self.bandwidth = bandwidth
        self.alpha = alpha
        self.variable_bandwidth = variable_bandwidth
        self.diffusion_time = diffusion_time
        self.neighbors = neighbors
        self.n_landmarks = n_landmarks
        self.backend = backend
        self.device = device
        self.random_state = random_state

    def fit(self, X: Array, y: Any = None) -> Self:  # noqa: ARG002
        """Fit the coordinates of the rows of ``X``.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : ignored

        Raises
        ------
        ValueError
            A parameter out of range, too few rows, rows that are all equal or not finite.

        Warns
        -----
        UserWarning
            ``n_neighbors`` is clamped, the graph truncates the kernel, or it falls into parts.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, device=self.device)
        at = self._choose_landmarks(rows)
        landmarks = rows[at]
        n_samples = len(landmarks)
        if n_samples < self.n_components + 2:
            raise ValueError(
                f"n_components={self.n_components} needs at least {self.n_components + 2} samples; "
                f"got n_samples={n_samples}. Lower n_components or add data."
            )
        n_neighbors = self._clamped_neighbors(n_samples)
        cheap = n_samples**2 * landmarks.shape[1] <= _CHEAP
        landmarks = landmarks.double() if cheap else landmarks.float()
        center = center_of(landmarks)
        centered = landmarks - center
        make = self._pydiffmap_operator if self.backend == "pydiffmap" else self._operator
        operator = make(centered, n_neighbors)
        self._solve(operator, n_samples, landmarks.device)
        self.bandwidth_ = operator.tuned.bandwidth
        self.intrinsic_dimension_ = operator.tuned.intrinsic_dimension
        self._keep(X, at, landmarks, center, operator, n_neighbors)
        if len(at) < len(rows):
            full = self._extend(rows)
            full[at] = torch.as_tensor(self._vectors(), dtype=full.dtype, device=full.device)
        else:
            full = torch.as_tensor(self._vectors(), device=rows.device)
        self.embedding_ = restore(full * self._time_scale(full), X)
        return self

    def fit_transform(self, X: Array, y: Any = None) -> Any:
        """Fit, and return ``embedding_``."""
        return self.fit(X, y).embedding_

    def transform(self, X: Array) -> Any:
        """Coordinates of new rows by Nyström extension.

        The rows' kernel to the fitted ones is normalized as in the fit, applied to the
        eigenfunctions and divided by their eigenvalues, so that fitted rows return ``embedding_``.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)

        Returns
        -------
        array or Tensor of shape (n_samples, n_components)

        Warns
        -----
        UserWarning
            Rows lie beyond the kernel's reach: they are placed by their nearest neighbors.
        """
        check_is_fitted(self)
        rows = validate(self, X, reset=False, device=self.device)
        extended = self._extend(rows)
        return restore(extended * self._time_scale(extended), X)

    def inverse_transform(self, X: Array) -> Any:
        """Points of the data space with coordinates ``X``, by geometric harmonics.

        The embedding must determine the point: enough components, see
        :func:`~manifold_unlearn.manifold.lift.lift`.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_components)

        Returns
        -------
        array or Tensor of shape (n_samples, n_features)

        Raises
        ------
        ValueError
            Another number of columns than ``n_components``.

        Warns
        -----
        UserWarning
            Coordinates lie far from all fitted ones: answered by a local linear fit.
        """
        check_is_fitted(self)
        queries = as_rows(X, device=self.device)
        if queries.shape[1] != len(self.eigenvalues_):
            raise ValueError(
                f"X has {queries.shape[1]} columns, the embedding has {len(self.eigenvalues_)}. "
                "Give coordinates as transform returns them."
            )
        points = self._tensor(self._vectors(), queries.device)
        values = self._tensor(self.landmarks_, queries.device)
        queries = queries.double() / self._time_scale(points)
        lifted = lift(points, values, queries, n_neighbors=self.n_neighbors_)
        if bool(lifted.far.any()):
            warnings.warn(
                f"{int(lifted.far.sum())} of {len(queries)} rows lie far from all fitted "
                "coordinates and are answered by a local linear fit. Fit on data that cover them.",
                UserWarning,
                stacklevel=2,
            )
        return restore(lifted.values, X)

    def diffusion_distances(
        self, X: Array | None = None, Y: Array | None = None, time: float = 1.0
    ) -> Any:
        """Diffusion distances, truncated to the fitted components.

        ``sqrt(sum_j eigenvalue_j**(2 * time) * (psi_j(x) - psi_j(y))**2)`` with eigenfunctions of
        mean square 1 under the stationary distribution (Coifman and Lafon 2006).

        Parameters
        ----------
        X, Y : array or Tensor of shape (n_samples, n_features), optional
            Rows of data; default ``X``: the rows fitted, default ``Y``: ``X``.
        time : float, default=1.0
            Steps of the Markov chain.

        Returns
        -------
        array or Tensor of shape (n_X, n_Y)
        """
        check_is_fitted(self)
        like = self.embedding_ if X is None else X
        first = self._spectral_coordinates(X, time)
        second = first if Y is None else self._spectral_coordinates(Y, time).to(first.device)
        return restore(
            torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist"), like
        )

    def save(self, directory: str | Path) -> None:
        """Write parameters and fit to ``directory`` (safetensors and JSON)."""
        check_is_fitted(self)
        artifact.save_estimator(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The estimator that :meth:`save` wrote to ``directory``."""
        return cast(Self, artifact.load_estimator(cls, directory))

    # fitting

    def _check_parameters(self) -> None:
        check_method(self.neighbors)
        if self.backend not in ("torch", "pydiffmap"):
            raise ValueError(f"backend={self.backend!r} is not known. Use 'torch' or 'pydiffmap'.")
        if self.n_components < 1:
            raise ValueError(f"n_components={self.n_components} must be at least 1.")
        if self.n_neighbors < 1:
            raise ValueError(f"n_neighbors={self.n_neighbors} must be at least 1.")
        if isinstance(self.bandwidth, str):
            if self.bandwidth != "bgh":
                raise ValueError(
                    f"bandwidth={self.bandwidth!r} is not known. Use 'bgh' or a positive number."
                )
        elif not (np.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(f"bandwidth={self.bandwidth} must be positive and finite, or 'bgh'.")
        if self.n_landmarks is not None and self.n_landmarks < 3:
            raise ValueError(f"n_landmarks={self.n_landmarks} must be at least 3, or None.")
        if self.diffusion_time < 0:
            raise ValueError(f"diffusion_time={self.diffusion_time} must not be negative.")

    def _clamped_neighbors(self, n_samples: int) -> int:
        if self.n_neighbors <= n_samples - 1:
            return self.n_neighbors
        warnings.warn(
            f"n_neighbors={self.n_neighbors} is more than the {n_samples - 1} other samples; "
            f"{n_samples - 1} are used. Lower n_neighbors or add data.",
            UserWarning,
            stacklevel=3,
        )
        return n_samples - 1

    def _choose_landmarks(self, rows: Tensor) -> Tensor:
        n_samples = len(rows)
        if self.n_landmarks is None or self.n_landmarks >= n_samples:
            return torch.arange(n_samples, device=rows.device)
        if self.random_state is not None:
            order = torch.randperm(n_samples, generator=generator(self.random_state))
            return order[: self.n_landmarks].sort().values.to(rows.device)
        return farthest_points(rows, self.n_landmarks)

    def _operator(self, centered: Tensor, n_neighbors: int) -> _Operator:
        given = None if isinstance(self.bandwidth, str) else float(self.bandwidth)
        histogram = pair_histogram(centered)
        tuned = tune_bandwidth(histogram, n_neighbors=n_neighbors, bandwidth=given)
        scale, alpha = None, self.alpha
        if self.variable_bandwidth:
            dimension = tuned.intrinsic_dimension
            near = nearest_neighbors(centered, min(_NEAR, len(centered) - 1)).squared_distances
            near = torch.nn.functional.pad(near, (1, 0))  # a row is its own nearest neighbor
            scale, self.typical_scale_ = self._bandwidth_function(near, dimension)
            histogram = pair_histogram(centered, scale)
            tuned = tune_bandwidth(histogram, n_neighbors=n_neighbors, bandwidth=given)
            tuned = tuned._replace(intrinsic_dimension=dimension)
            # the drift that alpha leaves with rho = q**beta, beta = -1 / (d + 2), is that of
            # alpha + 1/2 without: 2 - 2 alpha + (d + 2) beta (Berry and Harlim 2016)
            alpha = self.alpha - 0.5
        tuned = fit_support(histogram, tuned, n_samples=len(centered), n_neighbors=n_neighbors)
        graph = kernel_graph(centered, tuned, n_neighbors=n_neighbors, scale=scale)
        return _Operator(graph, tuned, scale, alpha)

    def _bandwidth_function(
        self, squared_distances: Tensor, dimension: float, typical: float | None = None
    ) -> tuple[Tensor, float]:
        """``rho`` in units of its typical value, within 1/30 to 30; and that value."""
        rho = bandwidth_function(squared_distances, dimension)
        if typical is None:
            positive = rho[rho > 0]
            typical = float(positive.median()) if len(positive) else 1.0
        return (rho / typical).clamp(1 / 30, 30), typical

    def _pydiffmap_operator(self, centered: Tensor, n_neighbors: int) -> _Operator:
        try:
            from pydiffmap.diffusion_map import DiffusionMap as PyDiffusionMap
        except ImportError as error:
            raise ImportError(
                "backend='pydiffmap' needs pydiffmap: pip install pydiffmap, or backend='torch'."
            ) from error
        if self.variable_bandwidth:
            raise ValueError(
                "variable_bandwidth=True is not available with backend='pydiffmap'. "
                "Use backend='torch'."
            )
        # its grid of bandwidths is 2**-40 to 2**40: a power of 2 brings any data there
        unit = 2.0 ** round(float(torch.log2(centered.square().sum(1).median().sqrt())))
        epsilon = self.bandwidth if isinstance(self.bandwidth, str) else self.bandwidth / unit**2
        model = PyDiffusionMap.from_sklearn(
            alpha=self.alpha, k=n_neighbors, epsilon=epsilon, n_evecs=self.n_components
        )
        model.construct_Lmat((centered / unit).cpu().numpy())
        kernel = model.local_kernel
        reach = kernel.neigh.kneighbors(kernel.data)[0][:, -1]  # its k counts the row itself
        support = torch.from_numpy((reach * unit) ** 2).to(centered) * (1 + 1e-6)
        dimension = kernel.d
        if dimension is None:
            histogram = pair_histogram(centered)
            dimension = tune_bandwidth(histogram, n_neighbors=n_neighbors).intrinsic_dimension
        bandwidth = float(model.epsilon_fitted) * unit**2
        tuned = Bandwidth(bandwidth, float(dimension), (bandwidth, bandwidth), 0.0, 0.0)
        matrix = scipy.sparse.csr_matrix(model.kernel_matrix)
        return _Operator(KernelGraph(matrix, support), tuned, None, self.alpha)

    def _solve(self, operator: _Operator, n_samples: int, device: torch.device) -> None:
        """Set the spectrum, in float64 numpy, and what depends on it alone."""
        tuned = operator.tuned
        rho = None if operator.scale is None else operator.scale.double().cpu().numpy()
        normalized, q = density_normalized(
            operator.graph.matrix, operator.alpha, rho, tuned.intrinsic_dimension
        )
        degrees = np.asarray(normalized.sum(axis=1)).ravel()
        # the generator is (P - 1) / (eps rho^2); its lazy chain 1 + tau (P - 1) / rho^2 is Markov
        squared = np.ones(n_samples) if rho is None else rho**2
        tau = squared.min()
        factor = np.sqrt(tau / (degrees * squared))
        symmetric = two_sided(normalized, factor, factor)
        if rho is not None:
            symmetric.setdiag(symmetric.diagonal() + 1 - tau / squared)
        root = np.sqrt(degrees * squared)
        pairs = markov_eigenpairs(symmetric, root / root.max(), self.n_components, device)
        self.eigenfunctions_ = pairs.eigenvectors
        rates = (1 - pairs.eigenvalues) / tau  # of the generator times eps
        eigenvalues = pairs.eigenvalues if rho is None else np.exp(-rates)
        eigenvalues = np.minimum(eigenvalues, 1.0)
        usable = int((1 - rates >= _LEAST_EIGENVALUE).sum())
        if usable < self.n_components:
            raise ValueError(
                f"n_components={self.n_components} is more than the data carry: {usable} "
                f"eigenvalues stand out of rounding at bandwidth={tuned.bandwidth:.4g}. "
                "Lower n_components or the bandwidth, or add distinct data."
            )
        self.eigenvalues_ = eigenvalues
        self.generator_eigenvalues_ = np.maximum(-np.log(eigenvalues), 0.0) / tuned.bandwidth
        self.rates_ = rates
        self.kernel_sums_ = q
        volume = np.log(n_samples) + tuned.intrinsic_dimension / 2 * np.log(
            4 * np.pi * tuned.bandwidth
        )
        self.density_ = np.exp(np.clip(np.log(q) - volume, -700, 700))
        stationary = root**2 / (root**2).sum()
        mean = stationary @ self.eigenfunctions_
        self.stationary_deviation_ = np.sqrt(stationary @ (self.eigenfunctions_ - mean) ** 2)
        self.component_ = pairs.component
        self.n_components_connected_ = int(pairs.component.max()) + 1
        if self.n_components_connected_ > 1:
            sizes = np.bincount(pairs.component)
            warnings.warn(
                f"the graph falls into {len(sizes)} parts (the largest hold "
                f"{', '.join(map(str, sizes[:5]))} rows): the eigenvalue 1 is repeated and the "
                f"first {min(len(sizes) - 1, self.n_components)} coordinates tell the parts apart. "
                "Raise n_neighbors or bandwidth, try variable_bandwidth=True, or fit the parts "
                "(component_) one by one.",
                UserWarning,
                stacklevel=3,
            )

    def _keep(
        self,
        X: Array,
        at: Tensor,
        landmarks: Tensor,
        center: Tensor,
        operator: _Operator,
        n_neighbors: int,
    ) -> None:
        """Set what the extension needs, and give arrays the kind of ``X``."""
        self.landmark_indices_, self.landmarks_, self.center_ = at, landmarks, center
        self.squared_support_ = operator.graph.squared_support
        self.scale_, self.alpha_ = operator.scale, float(operator.alpha)
        self.cutoff_, self.n_neighbors_ = operator.tuned.cutoff, n_neighbors
        self.far_cutoff_ = FAR_CUTOFF if self.backend == "torch" else 1e30
        for name, value in vars(self).items():
            if not name.endswith("_") or not isinstance(value, np.ndarray | Tensor):
                continue
            if isinstance(X, Tensor):
                setattr(self, name, torch.as_tensor(value, device=X.device).contiguous())
            else:
                value = value.cpu().numpy() if isinstance(value, Tensor) else value
                setattr(self, name, np.ascontiguousarray(value))

    # extension

    def _tensor(self, values: Any, device: torch.device) -> Tensor:
        return torch.as_tensor(values, device=device)

    def _vectors(self) -> Any:
        return self.eigenfunctions_

    def _time_scale(self, like: Tensor) -> Tensor:
        eigenvalues = torch.as_tensor(self.eigenvalues_, dtype=torch.float64, device=like.device)
        return eigenvalues**self.diffusion_time

    def _spectral_coordinates(self, X: Array | None, time: float) -> Tensor:
        """Eigenfunctions of unit stationary variance times their eigenvalues to the ``time``."""
        if X is None and self.n_landmarks is None:
            functions = torch.as_tensor(self._vectors())
        elif X is None:
            functions = torch.as_tensor(self.embedding_).double()
            functions = functions / self._time_scale(functions)
        else:
            functions = self._extend(validate(self, X, reset=False, device=self.device))
        deviation = self._tensor(self.stationary_deviation_, functions.device)
        eigenvalues = self._tensor(self.eigenvalues_, functions.device)
        return functions * (eigenvalues**time / deviation)

    def _extend(self, rows: Tensor) -> Tensor:
        """Eigenfunctions at ``rows``, float64."""
        device = rows.device
        landmarks, center, support, functions, q, rates = (
            self._tensor(value, device)
            for value in (
                self.landmarks_,
                self.center_,
                self.squared_support_,
                self.eigenfunctions_,
                self.kernel_sums_,
                self.rates_,
            )
        )
        scale = None if self.scale_ is None else self._tensor(self.scale_, device)
        landmarks = landmarks - center
        squared = landmarks.square().sum(1)
        width = 4 * self.bandwidth_
        weighted = q**-self.alpha_
        result = torch.empty(len(rows), functions.shape[1], dtype=torch.float64, device=device)
        n_far = 0
        for part in row_blocks(len(rows), max(1, 2**22 // len(landmarks))):
            queries = rows[part].to(landmarks.dtype) - center
            block = scaled_block(queries, landmarks, queries.square().sum(1), squared)
            own = torch.ones(len(queries), dtype=block.dtype, device=device)
            if scale is not None:
                k = min(_NEAR + 1, len(landmarks))
                near = block.topk(k, dim=1, largest=False, sorted=False).values
                own, _ = self._bandwidth_function(
                    near, self.intrinsic_dimension_, self.typical_scale_
                )
                block = block / (own[:, None] * scale[None, :])
            nearest = block.amin(1, keepdim=True)
            reach = support_radius(
                block, self.n_neighbors_, width * self.cutoff_, width * self.far_cutoff_
            )
            n_far += int((nearest > width * self.far_cutoff_).sum())
            keep = block <= torch.maximum(reach[:, None], support[None, :])
            keep |= block <= nearest + width * self.cutoff_
            kernel = torch.where(keep, torch.exp((nearest - block).double() / width), 0.0)
            kernel *= weighted
            kernel /= kernel.sum(1, keepdim=True)
            shrink = 1 - rates * own[:, None].double() ** 2
            shrink = torch.where(shrink.abs() < _LEAST_EIGENVALUE, _LEAST_EIGENVALUE, shrink)
            result[part] = kernel @ functions / shrink
        if n_far:
            warnings.warn(
                f"{n_far} of {len(rows)} rows lie beyond the kernel's reach and are placed by "
                "their nearest neighbors. Fit on data that cover them.",
                UserWarning,
                stacklevel=3,
            )
        return result


def farthest_points(X: Tensor, n_points: int) -> Tensor:
    """Indices, ascending, of rows each farthest from those before; the first is the most central.

    Deterministic; ``O(n_samples * n_features)`` a point.
    """
    X = X - center_of(X)
    squared = X.square().sum(1)
    chosen = torch.empty(n_points, dtype=torch.int64, device=X.device)
    reach = torch.full((len(X),), float("inf"), dtype=X.dtype, device=X.device)
    at = squared.argmin()
    for position in range(n_points):
        chosen[position] = at
        reach = torch.minimum(reach, squared - 2 * (X @ X[at]) + squared[at])
        reach[at] = -1.0
        at = reach.argmax()
    return chosen.sort().values
