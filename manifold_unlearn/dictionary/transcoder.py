"""Transcoders: what a module writes, made of few latents read from what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manifold_unlearn.dictionary.coder import Normalization, SparseCoder
from manifold_unlearn.dictionary.nonlinearity import Nonlinearity


class Transcoder(SparseCoder):
    """The output of a module from its input, through a sparse code.

    Parameters
    ----------
    d_in, d_sae : int
    d_out : int, optional
        Default: ``d_in``.
    nonlinearity : Nonlinearity or mapping, default={"name": "topk", "k": 32}
    skip : bool, default=False
        A linear way around, ``W_skip`` (d_in, d_out).
    normalization, rank_by_norm, deep, random_state
        As :class:`~manifold_unlearn.dictionary.coder.SparseCoder`.

    References
    ----------
    Dunefsky et al. (2024), Transcoders find interpretable LLM feature circuits.
    Paulo et al. (2025), Transcoders beat sparse autoencoders for interpretability (the skip).
    """

    kind = "Transcoder"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        nonlinearity: Nonlinearity | Mapping[str, Any] | None = None,
        *,
        skip: bool = False,
        normalization: Normalization = "none",
        rank_by_norm: bool = False,
        deep: int = 0,
        random_state: int | None = None,
    ) -> None:
        super().__init__(
            d_in,
            d_sae,
            d_in if d_out is None else d_out,
            nonlinearity,
            normalization=normalization,
            rank_by_norm=rank_by_norm,
            deep=deep,
            skip=skip,
            random_state=random_state,
        )

    def config(self) -> dict[str, Any]:
        """What makes the same dictionary again, tensors apart; JSON."""
        return {k: v for k, v in super().config().items() if k != "centered"}
