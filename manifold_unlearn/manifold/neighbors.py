"""The k nearest neighbors: exact on any device, or approximate through a library."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, restore
from manifold_unlearn.manifold import approximate
from manifold_unlearn.manifold.distances import exact_squared_distances
from manifold_unlearn.manifold.search import exact_neighbors, without_own

NeighborMethod: TypeAlias = Literal["auto", "exact", "half", "pynndescent", "faiss"]

_AFFORDABLE = 1e13  # multiplications up to which "auto" searches exactly on the CPU: minutes
_RECALLED = 200  # rows searched exactly to estimate the recall


class Neighbors(NamedTuple):
    """The k nearest rows of each row, nearest first.

    ``squared_distances`` (n_samples, k), in squared units of the data; ``indices`` (n_samples, k),
    int64, into the rows searched. Equal distances are ordered by index.
    """

    squared_distances: Any
    indices: Any


class ApproximateNeighbors(NamedTuple):
    """:class:`Neighbors` and the ``method`` that found them, with an estimate of its ``recall``.

    The recall is the part of the k nearest that were found, over 200 rows searched exactly; 1.0
    for an exact search.
    """

    neighbors: Neighbors
    method: str
    recall: float


def check_method(neighbors: str) -> None:
    """Raise ``ValueError`` unless ``neighbors`` names a search that exists."""
    known = get_args(NeighborMethod)
    if neighbors not in known:
        raise ValueError(
            f"neighbors={neighbors!r} is not known. Use one of {', '.join(map(repr, known))}."
        )


def choose_method(
    n_samples: int, n_searched: int, n_features: int, device: torch.device
) -> NeighborMethod:
    """The search that ``"auto"`` stands for.

    Exact on a GPU, and on the CPU up to 1e13 multiplications; beyond, pynndescent, else faiss,
    if installed.
    """
    if device.type != "cpu" or float(n_samples) * n_searched * n_features <= _AFFORDABLE:
        return "exact"
    if importlib.util.find_spec("pynndescent"):
        return "pynndescent"
    return "faiss" if importlib.util.find_spec("faiss") else "exact"


def nearest_neighbors(
    X: Array,
    k: int,
    Y: Array | None = None,
    *,
    neighbors: NeighborMethod = "auto",
    block_columns: int = 16384,
    rows_per_leaf: int | None = None,
    device: Device = "auto",
    random_state: Any = None,
) -> Neighbors:
    """The k nearest neighbors of the rows of ``X`` among the rows of ``Y``.

    The exact search multiplies blocks of rows and keeps a running selection, so memory is
    ``O(n * k + block)``; rows sorted into boxes too far away are left out. Wherever rounding could
    change the order of two neighbors, or a squared distance by 1e-5 of itself, distances are
    computed from differences: duplicates are at exactly 0.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
        Any float dtype; half precision is accumulated in float32.
    k : int
        Neighbors of each row.
    Y : array or Tensor of shape (n_searched, n_features), optional
        Rows to search. Default: ``X`` itself, each row's own entry left out.
    neighbors : {"auto", "exact", "half", "pynndescent", "faiss"}, default="auto"
        ``"exact"``; ``"half"``: products in bfloat16, twice the candidates ranked exactly, for a
        GPU; ``"pynndescent"``: neighbor descent on the CPU (Dong, Moses and Li 2011); ``"faiss"``:
        inverted lists; ``"auto"``: see :func:`choose_method`. What an approximate search misses:
        see :func:`approximate_neighbors`.
    block_columns, rows_per_leaf : int
        Sizes of the blocks of the exact search. The answer does not depend on them.
    device : str or torch.device, default="auto"
        Where to compute: for ``"auto"`` the device of a tensor ``X``, else a GPU, else the CPU.
    random_state : int, RandomState or None
        Of the approximate searches.

    Returns
    -------
    Neighbors
        ``squared_distances`` and ``indices`` of shape (n_samples, k), of the kind of ``X``.

    Raises
    ------
    ValueError
        ``k`` is below 1 or above the rows there are, the features differ in number, an entry is
        not finite, or ``neighbors`` is not known.
    ImportError
        The library named is not installed.
    """
    A, B = _checked(X, k, Y, neighbors, device)
    found, _ = _search(A, B, k, neighbors, block_columns, rows_per_leaf, random_state)
    return Neighbors(restore(found.squared_distances, X), restore(found.indices, X))


def approximate_neighbors(
    X: Array,
    k: int,
    Y: Array | None = None,
    *,
    neighbors: NeighborMethod = "auto",
    device: Device = "auto",
    random_state: Any = None,
) -> ApproximateNeighbors:
    """:func:`nearest_neighbors`, and how many of the nearest the search found.

    Parameters
    ----------
    X, k, Y, neighbors, device, random_state
        As :func:`nearest_neighbors`.

    Returns
    -------
    ApproximateNeighbors
    """
    A, B = _checked(X, k, Y, neighbors, device)
    found, method = _search(A, B, k, neighbors, 16384, None, random_state)
    recall = 1.0 if method == "exact" else estimated_recall(A, B, found)
    kind = Neighbors(restore(found.squared_distances, X), restore(found.indices, X))
    return ApproximateNeighbors(kind, method, recall)


def estimated_recall(A: Tensor, B: Tensor | None, found: Neighbors) -> float:
    """Part of the nearest neighbors that ``found`` holds, over at most 200 rows of ``A``."""
    k = found.indices.shape[1]
    rows = torch.arange(0, len(A), -(-len(A) // _RECALLED), device=A.device)
    exact, at = exact_neighbors(A[rows], A if B is None else B, k + (B is None))
    if B is None:
        exact = exact[without_own(at, rows)].reshape(-1, k)
    reach = exact[:, -1:] * (1 + 1e-5)
    return float((found.squared_distances[rows] <= reach).double().mean())


def _checked(
    X: Array, k: int, Y: Array | None, neighbors: str, device: Device
) -> tuple[Tensor, Tensor | None]:
    check_method(neighbors)
    A = as_rows(X, device=device)
    B = None if Y is None else as_rows(Y, device=A.device, name="Y").to(A.dtype)
    if B is not None and B.shape[1] != A.shape[1]:
        raise ValueError(
            f"Y has {B.shape[1]} features, X has {A.shape[1]}. Give both the same columns."
        )
    available = len(A) - 1 if B is None else len(B)
    if not 1 <= k <= available:
        raise ValueError(
            f"k={k} must lie between 1 and {available}, the rows there are to search. "
            "Lower k or add data."
        )
    return A, B


def _search(
    A: Tensor,
    B: Tensor | None,
    k: int,
    neighbors: str,
    block_columns: int,
    rows_per_leaf: int | None,
    random_state: Any,
) -> tuple[Neighbors, str]:
    n_searched = len(A) if B is None else len(B)
    method = neighbors
    if method == "auto":
        method = choose_method(len(A), n_searched, A.shape[1], A.device)
    if method in ("exact", "half"):
        first_pass = torch.bfloat16 if method == "half" else None
        found = exact_neighbors(
            A,
            B,
            k,
            first_pass=first_pass,
            block_columns=block_columns,
            rows_per_leaf=rows_per_leaf,
        )
        return Neighbors(*found), method
    indices = approximate.SEARCHES[method](A, B, k + (B is None), random_state)
    if B is None:
        own = torch.arange(len(A), device=A.device)
        indices = indices[without_own(indices, own)].reshape(-1, k)
    return _ranked(A, A if B is None else B, indices), method


def _ranked(A: Tensor, B: Tensor, indices: Tensor) -> Neighbors:
    """Neighbors by their distances from differences, then by index."""
    indices = indices.sort(dim=1).values
    n_samples, k = indices.shape
    rows = torch.arange(n_samples, device=A.device).repeat_interleave(k)
    exact = exact_squared_distances(A, B, rows, indices.reshape(-1)).reshape(n_samples, k)
    distances, order = exact.sort(dim=1, stable=True)
    return Neighbors(distances, indices.gather(1, order))
