"""What a diffusion map may be asked for, and what is said of data that strain it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from manifold_unlearn.manifold.ground import check_metric
from manifold_unlearn.manifold.neighbors import check_method


def check_parameters(estimator: Any) -> None:
    """Raise ``ValueError`` for a parameter out of range, naming it, its value and the mend."""
    check_method(estimator.neighbors)
    check_metric(estimator.metric)
    if estimator.backend not in ("torch", "pydiffmap"):
        raise ValueError(f"backend={estimator.backend!r} is not known. Use 'torch' or 'pydiffmap'.")
    if estimator.backend == "pydiffmap" and estimator.variable_bandwidth:
        raise ValueError(
            "variable_bandwidth=True is not available with backend='pydiffmap'. "
            "Use backend='torch'."
        )
    if estimator.n_components < 1:
        raise ValueError(f"n_components={estimator.n_components} must be at least 1.")
    if estimator.n_neighbors < 1:
        raise ValueError(f"n_neighbors={estimator.n_neighbors} must be at least 1.")
    bandwidth = estimator.bandwidth
    if isinstance(bandwidth, str):
        if bandwidth != "bgh":
            raise ValueError(
                f"bandwidth={bandwidth!r} is not known. Use 'bgh' or a positive number."
            )
    elif not (np.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth={bandwidth} must be positive and finite, or 'bgh'.")
    if estimator.n_landmarks is not None and estimator.n_landmarks < 3:
        raise ValueError(f"n_landmarks={estimator.n_landmarks} must be at least 3, or None.")
    if estimator.diffusion_time < 0:
        raise ValueError(f"diffusion_time={estimator.diffusion_time} must not be negative.")


def checked_target(target: Any, n_samples: int, estimator: Any) -> np.ndarray:
    """The target density ``(n_samples,)``, float64, of largest value 1.

    Raises
    ------
    ValueError
        Another length, an entry that is not positive and finite, or parameters it cannot go with.
    """
    values = torch.as_tensor(target).detach().cpu().double().numpy()
    if values.shape != (n_samples,):
        raise ValueError(f"target has shape {values.shape}; expected ({n_samples},).")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("target must be positive and finite at every row.")
    if estimator.alpha != 1 or estimator.variable_bandwidth:
        raise ValueError(
            f"target needs alpha=1 and variable_bandwidth=False; got alpha={estimator.alpha}, "
            f"variable_bandwidth={estimator.variable_bandwidth}."
        )
    return values / values.max()


def clamped_neighbors(n_neighbors: int, n_samples: int) -> int:
    """``n_neighbors``, or with a warning as many as there are other samples."""
    if n_neighbors <= n_samples - 1:
        return n_neighbors
    warnings.warn(
        f"n_neighbors={n_neighbors} is more than the {n_samples - 1} other samples; "
        f"{n_samples - 1} are used. Lower n_neighbors or add data.",
        UserWarning,
        stacklevel=4,
    )
    return n_samples - 1


def warn_of_parts(component: np.ndarray, n_components: int) -> None:
    """Warn when the graph falls into parts, with their sizes and what may join them."""
    sizes = np.bincount(component)
    if len(sizes) > 1:
        warnings.warn(
            f"the graph falls into {len(sizes)} parts (the largest hold "
            f"{', '.join(map(str, sizes[:5]))} rows): the eigenvalue 1 is repeated and the "
            f"first {min(len(sizes) - 1, n_components)} coordinates tell the parts apart. "
            "Raise n_neighbors or bandwidth, try variable_bandwidth=True, or fit the parts "
            "(component_) one by one.",
            UserWarning,
            stacklevel=4,
        )
