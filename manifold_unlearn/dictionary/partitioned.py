"""Rules of rank for each part of a dictionary: shared and exclusive latents do not compete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from manifold_unlearn.dictionary.nonlinearity import BatchTopK, Choosing


class PartitionedBatchTopK(Choosing):
    """A BatchTopK of its own, with its own k and threshold, for each run of latents.

    For crosscoders with exclusive latents: few of them win against shared ones in one common
    ranking, for shared latents explain two streams at once.

    Parameters
    ----------
    k : sequence of int
        Latents a row, on average, of each part.
    sizes : sequence of int
        Latents of each part in order; together all.
    decay : float, default=0.999
        As :class:`~manifold_unlearn.dictionary.nonlinearity.BatchTopK`.

    References
    ----------
    In the sense of the separate budgets of Kassem et al. (2026), Delta-Crosscoder
    (arXiv 2603.04426).
    """

    name = "batch_topk_parts"

    def __init__(self, k: Sequence[int], sizes: Sequence[int], decay: float = 0.999) -> None:
        super().__init__()
        if len(k) != len(sizes) or len(k) == 0:
            raise ValueError(f"k={tuple(k)} and sizes={tuple(sizes)} need one number a part.")
        self.sizes, self.decay = tuple(int(size) for size in sizes), float(decay)
        self.k = tuple(int(one) for one in k)
        self.parts = torch.nn.ModuleList(BatchTopK(one, decay) for one in self.k)

    def choice(self, pre: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows and latents to keep, rows ascending."""
        if pre.shape[1] != sum(self.sizes):
            raise ValueError(f"sizes={self.sizes} add up to {sum(self.sizes)} of {pre.shape[1]}.")
        rows, latents, first = [], [], 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            own = slice(first, first + size)
            row, latent = cast(BatchTopK, part).choice(
                pre[:, own], None if scale is None else scale[own]
            )
            rows.append(row)
            latents.append(latent + first)
            first += size
        row, latent = torch.cat(rows), torch.cat(latents)
        order = row.sort(stable=True).indices
        return row[order], latent[order]

    def config(self) -> dict[str, Any]:
        """Name, k, sizes and decay."""
        return {"name": self.name, "k": list(self.k), "sizes": list(self.sizes),
                "decay": self.decay}  # fmt: skip
