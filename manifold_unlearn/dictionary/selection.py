"""Which latents speak of what is to be forgotten: how often each fires there and elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import row_blocks
from manifold_unlearn.dictionary.coder import SparseCoder


@dataclass(frozen=True, eq=False)
class FiringRates:
    """How often each latent fires in forget and in retain rows; all tensors (d_sae,), float64.

    Attributes
    ----------
    forget, retain : Tensor
        Share of the rows in which the latent is not 0.
    activation : Tensor
        Mean activation over the forget rows in which it fires; 0 where it never does.
    n_forget, n_retain : int
        Rows.
    """

    forget: Tensor
    retain: Tensor
    activation: Tensor
    n_forget: int
    n_retain: int

    @property
    def ratio(self) -> Tensor:
        """Forget over retain rate, one retain row added: ``forget / (retain + 1 / n_retain)``."""
        return self.forget / (self.retain + 1 / self.n_retain)


@torch.no_grad()
def firing_rates(
    coder: SparseCoder, rows: Tensor, forget: Tensor, *, block: int = 4096
) -> FiringRates:
    """Rates of every latent, streamed through sparse codes.

    Parameters
    ----------
    coder : SparseCoder
    rows : Tensor of shape (n, d_in)
    forget : Tensor of shape (n,), bool
        Both sides must have a row.
    block : int
        Rows encoded together.
    """
    counts = torch.zeros(2, coder.d_sae, dtype=torch.float64, device=coder.device)
    total = torch.zeros(coder.d_sae, dtype=torch.float64, device=coder.device)
    with evaluating(coder):  # BatchTopK: by its threshold, whatever the block
        for part in row_blocks(len(rows), block):
            code = coder.code(rows[part].to(coder.device))
            on = code.value != 0
            latent = code.latent[on]
            side = forget[part].to(coder.device)[code.row[on]]
            for kind in (0, 1):
                counts[kind] += torch.bincount(latent[side == kind], minlength=coder.d_sae)
            total.index_add_(0, latent[side], code.value[on][side].double())
    n_forget = int(forget.sum())
    n_retain = len(rows) - n_forget
    return FiringRates(
        forget=counts[1] / n_forget,
        retain=counts[0] / n_retain,
        activation=total / counts[1].clamp(min=1),
        n_forget=n_forget,
        n_retain=n_retain,
    )


def choose_latents(
    rates: FiringRates, n_latents: int, *, min_forget_rate: float, max_retain_rate: float
) -> Tensor:
    """Latents of largest :attr:`FiringRates.ratio` among those that pass both bounds.

    Parameters
    ----------
    rates : FiringRates
    n_latents : int
        At most so many.
    min_forget_rate, max_retain_rate : float
        A latent fires in at least this share of the forget rows and in at most that of the retain
        rows.

    Returns
    -------
    Tensor of shape (m,), int64
        Best first; equal ratios in the order of the dictionary.

    Raises
    ------
    ValueError
        No latent passes; says how near the nearest came.
    """
    often = rates.forget >= min_forget_rate
    apart = rates.retain <= max_retain_rate
    passing = (often & apart).nonzero()[:, 0]
    if len(passing) == 0:
        best = float(rates.forget[apart].max()) if bool(apart.any()) else 0.0
        least = float(rates.retain[often].min()) if bool(often.any()) else None
        beside = (
            "none fires so often"
            if least is None
            else f"those {int(often.sum())} fire in at least {least:.4f} of them"
        )
        raise ValueError(
            f"no latent fires in {min_forget_rate} of the {rates.n_forget} forget rows and in at "
            f"most {max_retain_rate} of the {rates.n_retain} retain rows. Of those within the "
            f"second bound the best fires in {best:.4f} of the forget rows; of those within the "
            f"first, on the retain rows, {beside}. Lower min_forget_rate, raise max_retain_rate, "
            "or use a dictionary with more latents."
        )
    order = rates.ratio[passing].argsort(descending=True, stable=True)
    return passing[order[:n_latents]]
