"""The one place where numpy meets torch: conversion, dtype, device, finiteness, row blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import (
    check_array,
    check_consistent_length,
    column_or_1d,
    validate_data,
)
from torch import Tensor

Array: TypeAlias = "np.ndarray[Any, Any] | Tensor"
"""``(n_samples, n_features)`` or ``(n_samples,)``; numpy or torch, any float dtype."""

Device: TypeAlias = "str | torch.device | Literal['auto']"


def resolve_device(device: Device, like: object = None) -> torch.device:
    """Device to compute on: the one named; for ``"auto"`` that of ``like``, a GPU, or the CPU."""
    if device != "auto":
        return torch.device(device)
    if isinstance(like, Tensor):
        return like.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype to accumulate in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_finite(values: Tensor, name: str) -> None:
    """Raise ``ValueError`` naming the first row of ``values`` that holds NaN or infinity."""
    if values.numel() == 0 or torch.isfinite(values.sum(dtype=torch.float32)):
        return
    finite = torch.isfinite(values).reshape(values.shape[0], -1).all(dim=1)
    if bool(finite.all()):  # the sum overflowed, no entry did
        return
    row = int((~finite).nonzero()[0, 0])
    mend = (
        "float16 overflows above 65504: use bfloat16 or float32."
        if values.dtype == torch.float16
        else "Remove or repair such rows; nothing is imputed."
    )
    raise ValueError(
        f"{name} contains NaN or infinity: {int((~finite).sum())} of {values.shape[0]} rows, "
        f"the first is row {row}. {mend}"
    )


def as_rows(X: Any, *, device: Device = "auto", name: str = "X", min_samples: int = 1) -> Tensor:
    """Checked ``(n_samples, n_features)`` tensor of ``X`` in its working dtype.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
        Any real dtype. Half precision is widened to float32, integers to float64.
    device : str or torch.device, default="auto"
        Where the result lives; see :func:`resolve_device`.
    name : str
        What error messages call the array.
    min_samples : int
        Least number of rows.

    Returns
    -------
    Tensor of shape (n_samples, n_features), float32 or float64

    Raises
    ------
    ValueError
        Not two-dimensional, empty, complex, or not finite (names the first such row).
    """
    if not isinstance(X, Tensor):
        X = check_array(
            X,
            dtype=[np.float64, np.float32, np.float16],
            ensure_all_finite=False,
            ensure_min_samples=min_samples,
            input_name=name,
        )
        X = torch.from_numpy(np.require(X, requirements=["C", "W"]))
    _check_tensor(X, name, min_samples)
    place = resolve_device(device, X)
    return X.detach().to(place, working_dtype(X.dtype))


def _check_tensor(X: Tensor, name: str, min_samples: int) -> None:
    if X.is_complex():
        raise ValueError(f"Complex data not supported: {name} has dtype {X.dtype}.")
    if X.ndim != 2:
        raise ValueError(
            f"Expected 2D array for {name}, got shape {tuple(X.shape)}. Reshape your data to "
            "(n_samples, n_features)."
        )
    if X.shape[0] < min_samples or X.shape[1] < 1:
        raise ValueError(
            f"{name} has shape {tuple(X.shape)}: at least {min_samples} sample(s) and "
            "1 feature(s) are needed."
        )
    require_finite(X, name)


def validate(
    estimator: BaseEstimator, X: Any, *, reset: bool, device: Device = "auto", min_samples: int = 1
) -> Tensor:
    """:func:`as_rows` for an estimator: also records (``reset``) or checks ``n_features_in_``."""
    rows = as_rows(X, device=device, min_samples=min_samples)
    validate_data(estimator, X, reset=reset, skip_check_array=True)
    return rows


def forget_mask(y: Any, n_samples: int) -> Tensor:
    """Boolean ``(n_samples,)``: ``y == 1`` is forget, every other label is retain.

    Raises
    ------
    ValueError
        ``y`` is missing, of another length than the data, or leaves a side empty.
    """
    if y is None:
        raise ValueError(
            "requires y to be passed, but the target y is None: y == 1 marks the rows to forget, "
            "or with the concept."
        )
    labels = (
        y.detach().cpu()
        if isinstance(y, Tensor)
        else torch.from_numpy(np.asarray(column_or_1d(y, warn=True) == 1))
    )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    check_consistent_length(np.empty(n_samples), np.empty(len(labels)))
    forget = labels == 1
    n_forget = int(forget.sum())
    if n_forget in (0, n_samples):
        side = "forget" if n_forget == 0 else "retain"
        raise ValueError(
            f"the {side} set is empty: {n_forget} of {n_samples} labels equal 1. "
            "Label rows to forget, or with the concept, 1 and the others 0; both are needed (one "
            "class is not enough)."
        )
    return forget


class LabeledMixin:
    """Estimator whose ``fit`` needs labels ``y``; before ``BaseEstimator`` among the bases."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.target_tags.required = True
        return tags


def row_weights(sample_weight: Any, X: Tensor, forget: Tensor) -> Tensor:
    """Checked weights ``(n_samples,)`` in float64 on the device of ``X``; ones for None.

    Raises
    ------
    ValueError
        Another length than the data, a negative or non-finite weight, or a side without weight.
    """
    if sample_weight is None:
        return torch.ones(X.shape[0], dtype=torch.float64, device=X.device)
    if not isinstance(sample_weight, Tensor):
        sample_weight = np.asarray(sample_weight, dtype=np.float64)
    weight = torch.as_tensor(sample_weight).detach().to(X.device, torch.float64)
    if weight.shape != (X.shape[0],):
        raise ValueError(
            f"sample_weight has shape {tuple(weight.shape)}; expected ({X.shape[0]},)."
        )
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ValueError("sample_weight must be finite and not negative.")
    if not (bool(weight[forget].sum() > 0) and bool(weight[~forget].sum() > 0)):
        raise ValueError(
            "sample_weight leaves the forget or the retain side without weight: all zero there."
        )
    return weight


def restore(result: Tensor, like: Any) -> Any:
    """Give ``result`` the kind of ``like``: a tensor on its device, or a numpy array.

    The float dtype follows ``like`` too, so half precision in gives half precision out.
    """
    if isinstance(like, Tensor):
        dtype = like.dtype if like.dtype.is_floating_point else result.dtype
        return result.to(like.device, dtype if result.dtype.is_floating_point else result.dtype)
    array = result.detach().cpu().numpy()
    kind = getattr(like, "dtype", None)
    if kind in (np.float16, np.float32, np.float64) and np.issubdtype(array.dtype, np.floating):
        return array.astype(kind, copy=False)
    return array


def keep_kind(estimator: Any, like: Any) -> None:
    """Make the fitted arrays (``name_``) of ``estimator`` of the kind of ``like``, at their dtype.

    Tensors on the device of ``like`` when that is a tensor, contiguous numpy arrays otherwise.
    """
    for name, value in vars(estimator).items():
        if not name.endswith("_") or not isinstance(value, np.ndarray | Tensor):
            continue
        if isinstance(like, Tensor):
            kept: Any = torch.as_tensor(value, device=like.device).contiguous()
        else:
            plain = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            kept = np.ascontiguousarray(plain)
        setattr(estimator, name, kept)


def row_blocks(n_rows: int, block: int) -> Iterator[slice]:
    """Slices that cover ``range(n_rows)`` in pieces of at most ``block``."""
    for start in range(0, n_rows, block):
        yield slice(start, min(start + block, n_rows))


def generator(random_state: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """Local generator from an int, a numpy generator, or None for fresh entropy."""
    made = torch.Generator(device=device)
    if random_state is None:
        made.seed()
    elif isinstance(random_state, np.random.RandomState):
        made.manual_seed(int(random_state.randint(2**31 - 1)))
    elif isinstance(random_state, np.random.Generator):
        made.manual_seed(int(random_state.integers(2**31 - 1)))
    else:
        made.manual_seed(int(random_state))
    return made
