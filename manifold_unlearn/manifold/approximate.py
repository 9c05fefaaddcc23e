"""Approximate nearest neighbors through libraries: pynndescent and faiss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import generator
from manifold_unlearn.manifold.search import exact_neighbors

Search = Callable[[Tensor, "Tensor | None", int, Any], Tensor]
"""``(A, B, k, random_state) -> (len(A), k)`` indices into ``B``, or into ``A`` where it is None."""

_TRAINED = 256  # rows per inverted list that faiss learns the lists from
_PROBED = 16  # inverted lists searched for each row


def by_descent(A: Tensor, B: Tensor | None, k: int, random_state: Any) -> Tensor:
    """Neighbor descent (Dong, Moses and Li 2011) by pynndescent; the first call compiles.

    Raises
    ------
    ImportError
        pynndescent is not installed.
    """
    try:
        from pynndescent import NNDescent
    except ImportError as error:
        raise ImportError(
            "neighbors='pynndescent' needs pynndescent: pip install manifold-unlearn[approximate], "
            "or neighbors='exact'."
        ) from error
    searched = (A if B is None else B).float().cpu().numpy()
    seed = generator(random_state if random_state is not None else 0).initial_seed() % 2**31
    index = NNDescent(searched, n_neighbors=max(k, 15), random_state=seed)
    if B is None:
        found = index.neighbor_graph[0][:, :k]
    else:
        found = index.query(A.float().cpu().numpy(), k=k)[0]
    return _completed(A, B, k, found)


def by_lists(A: Tensor, B: Tensor | None, k: int, random_state: Any) -> Tensor:  # noqa: ARG001
    """Inverted lists by faiss, on the GPU of ``A`` where faiss can: 16 of ``4 sqrt(n)`` searched.

    Raises
    ------
    ImportError
        faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "neighbors='faiss' needs faiss: pip install manifold-unlearn[approximate], "
            "or neighbors='exact'."
        ) from error
    searched = np.ascontiguousarray((A if B is None else B).float().cpu().numpy())
    asking = searched if B is None else np.ascontiguousarray(A.float().cpu().numpy())
    n_searched, n_features = searched.shape
    n_lists = max(1, min(int(4 * n_searched**0.5), n_searched // 39))
    index: Any = faiss.index_factory(n_features, f"IVF{n_lists},Flat")
    index.cp.seed, index.cp.verbose = 0, False
    if A.is_cuda and hasattr(faiss, "StandardGpuResources"):
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), A.device.index or 0, index)
    step = max(1, n_searched // (_TRAINED * n_lists))
    index.train(searched[::step])
    index.add(searched)
    index.nprobe = _PROBED
    return _completed(A, B, k, index.search(asking, k)[1])


def _completed(A: Tensor, B: Tensor | None, k: int, found: np.ndarray) -> Tensor:
    """``found`` as a tensor; rows that lack some of their neighbors are searched exactly."""
    indices = torch.from_numpy(np.ascontiguousarray(found)).to(A.device, torch.int64)
    short = (indices < 0).any(1).nonzero()[:, 0]
    if len(short):
        indices[short] = exact_neighbors(A[short], A if B is None else B, k)[1]
    return indices


SEARCHES: dict[str, Search] = {"pynndescent": by_descent, "faiss": by_lists}
