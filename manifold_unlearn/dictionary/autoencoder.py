"""Sparse autoencoders: rows of one site, made again of few latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifold_unlearn.dictionary.coder import Normalization, SparseCoder
from manifold_unlearn.dictionary.nonlinearity import Nonlinearity


class SparseAutoencoder(SparseCoder):
    """Rows of a site as sums of few decoder directions.

    Parameters
    ----------
    d_in, d_sae : int
    nonlinearity : Nonlinearity or mapping, default={"name": "topk", "k": 32}
        ReLU, Gated, JumpReLU, TopK, BatchTopK, ... or ``{"name": "batch_topk", "k": 32}``.
    centered : bool, default=True
        Subtract ``b_dec`` from the input.
    normalization, rank_by_norm, deep, random_state
        As :class:`~manifold_unlearn.dictionary.coder.SparseCoder`.

    Examples
    --------
    >>> import torch
    >>> from manifold_unlearn.dictionary import SparseAutoencoder
    >>> sae = SparseAutoencoder(16, 64, {"name": "topk", "k": 4}, random_state=0)
    >>> sae.encode(torch.ones(2, 16)).count_nonzero(dim=1) <= 4
    tensor([True, True])
    """

    kind = "SparseAutoencoder"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        nonlinearity: Nonlinearity | Mapping[str, Any] | None = None,
        *,
        centered: bool = True,
        normalization: Normalization = "none",
        rank_by_norm: bool = False,
        deep: int = 0,
        random_state: int | None = None,
    ) -> None:
        super().__init__(
            d_in,
            d_sae,
            d_in,
            nonlinearity,
            centered=centered,
            normalization=normalization,
            rank_by_norm=rank_by_norm,
            deep=deep,
            random_state=random_state,
        )

    def config(self) -> dict[str, Any]:
        """What makes the same dictionary again, tensors apart; JSON."""
        return {k: v for k, v in super().config().items() if k not in ("d_out", "skip")}
