"""Diffusion maps: coordinates of a manifold that do not depend on how densely it was sampled."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import Array, Device, as_rows, restore, validate
from manifold_unlearn.manifold.distances import center_of
from manifold_unlearn.manifold.kernels import FAR_CUTOFF
from manifold_unlearn.manifold.landmarks import choose_landmarks, farthest_points
from manifold_unlearn.manifold.lift import lift
from manifold_unlearn.manifold.markov import (
    KernelOperator,
    Spectrum,
    gaussian_operator,
    pydiffmap_operator,
    spectrum,
)
from manifold_unlearn.manifold.neighbors import NeighborMethod, check_method
from manifold_unlearn.manifold.nystrom import FittedOperator, extend
from manifold_unlearn.manifold.partition import leaf_order

__all__ = ["DiffusionMap", "farthest_points"]

_BY_LANDMARK = {
    "landmark_indices_",
    "landmarks_",
    "squared_support_",
    "scale_",
    "eigenfunctions_",
    "kernel_sums_",
    "density_",
    "component_",
}
_CHEAP = 1e10  # multiplications up to which distances are double precision, else single


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
        at = choose_landmarks(rows, self.n_landmarks, self.random_state)
        at = at[leaf_order(rows[at])]
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
        centered = landmarks - center_of(landmarks)
        bandwidth = None if isinstance(self.bandwidth, str) else float(self.bandwidth)
        if self.backend == "pydiffmap":
            operator = pydiffmap_operator(
                centered, n_neighbors=n_neighbors, bandwidth=bandwidth, alpha=self.alpha
            )
        else:
            operator = gaussian_operator(
                centered,
                n_neighbors=n_neighbors,
                bandwidth=bandwidth,
                alpha=self.alpha,
                variable_bandwidth=self.variable_bandwidth,
            )
        found = spectrum(operator, self.n_components, landmarks.device)
        self._warn_of_parts(found.component)
        self._keep(X, at, landmarks, operator, found, n_neighbors)
        full = torch.as_tensor(self.eigenfunctions_, device=rows.device)
        if len(at) < len(rows):
            eigenfunctions, full = full, self._extend(rows)
            full[torch.as_tensor(self.landmark_indices_, device=rows.device)] = eigenfunctions
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
        points = torch.as_tensor(self.eigenfunctions_, device=queries.device)
        values = torch.as_tensor(self.landmarks_, device=queries.device)
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
        if self.backend == "pydiffmap" and self.variable_bandwidth:
            raise ValueError(
                "variable_bandwidth=True is not available with backend='pydiffmap'. "
                "Use backend='torch'."
            )
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

    def _warn_of_parts(self, component: np.ndarray) -> None:
        sizes = np.bincount(component)
        if len(sizes) > 1:
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
        operator: KernelOperator,
        found: Spectrum,
        n_neighbors: int,
    ) -> None:
        """Set the fitted attributes but ``embedding_``; arrays become of the kind of ``X``."""
        self.landmark_indices_, self.landmarks_ = at, landmarks
        self.squared_support_ = operator.graph.squared_support
        self.alpha_, self.scale_ = float(operator.alpha), operator.scale
        if operator.scale is not None:
            self.typical_scale_ = operator.typical_scale
        self.bandwidth_ = operator.tuned.bandwidth
        self.intrinsic_dimension_ = operator.tuned.intrinsic_dimension
        self.cutoff_, self.n_neighbors_ = operator.tuned.cutoff, n_neighbors
        self.offset_ = operator.tuned.offset
        reach = FAR_CUTOFF + self.offset_ / (4 * self.bandwidth_)
        self.far_cutoff_ = reach if self.backend == "torch" else 1e30
        self.n_components_connected_ = int(found.component.max()) + 1
        for name, values in found._asdict().items():
            setattr(self, f"{name}_", values)
        back = at.argsort()
        for name, value in vars(self).items():
            if not name.endswith("_") or not isinstance(value, np.ndarray | Tensor):
                continue
            if name in _BY_LANDMARK:
                value = value[back if isinstance(value, Tensor) else back.cpu().numpy()]
            if isinstance(X, Tensor):
                setattr(self, name, torch.as_tensor(value, device=X.device).contiguous())
            else:
                value = value.cpu().numpy() if isinstance(value, Tensor) else value
                setattr(self, name, np.ascontiguousarray(value))

    # extension

    def _time_scale(self, like: Tensor) -> Tensor:
        eigenvalues = torch.as_tensor(self.eigenvalues_, dtype=torch.float64, device=like.device)
        return eigenvalues**self.diffusion_time

    def _spectral_coordinates(self, X: Array | None, time: float) -> Tensor:
        """Eigenfunctions of unit stationary variance times their eigenvalues to the ``time``."""
        if X is None and self.n_landmarks is None:
            functions = torch.as_tensor(self.eigenfunctions_)
        elif X is None:
            functions = torch.as_tensor(self.embedding_).double()
            functions = functions / self._time_scale(functions)
        else:
            functions = self._extend(validate(self, X, reset=False, device=self.device))
        deviation = torch.as_tensor(self.stationary_deviation_, device=functions.device)
        eigenvalues = torch.as_tensor(self.eigenvalues_, device=functions.device)
        return functions * (eigenvalues**time / deviation)

    def _extend(self, rows: Tensor) -> Tensor:
        """Eigenfunctions at ``rows``, float64."""

        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(values, device=rows.device)

        variable = self.scale_ is not None
        fitted = FittedOperator(
            landmarks=tensor(self.landmarks_),
            squared_support=tensor(self.squared_support_),
            kernel_sums=tensor(self.kernel_sums_),
            eigenfunctions=tensor(self.eigenfunctions_),
            rates=tensor(self.rates_),
            scale=tensor(self.scale_) if variable else None,
            typical_scale=self.typical_scale_ if variable else 1.0,
            intrinsic_dimension=self.intrinsic_dimension_,
            bandwidth=self.bandwidth_,
            offset=self.offset_,
            alpha=self.alpha_,
            cutoff=self.cutoff_,
            far_cutoff=self.far_cutoff_,
            n_neighbors=self.n_neighbors_,
        )
        extended = extend(rows, fitted)
        if extended.n_far:
            warnings.warn(
                f"{extended.n_far} of {len(rows)} rows lie beyond the kernel's reach and are "
                "placed by their nearest neighbors. Fit on data that cover them.",
                UserWarning,
                stacklevel=3,
            )
        return extended.eigenfunctions
