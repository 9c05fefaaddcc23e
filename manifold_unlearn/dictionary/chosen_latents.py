"""A few latents of a dictionary: their activations without the dense code of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.coding import select_latents
from manifold_unlearn.dictionary.nonlinearity import (
    BatchTopK,
    Choosing,
    Gated,
    JumpReLU,
    ReLU,
)


def latent_activations(coder: SparseCoder, x: Tensor, latents: Tensor) -> Tensor:
    """Columns of ``coder.encode(x)``, with gradients.

    Where a latent fires by itself (ReLU, JumpReLU, gated, a threshold) the others are not looked
    at. Rules of rank compare the pre-activations of all, but no dense code is made of them. A
    BatchTopK dictionary counts by its threshold, also while it is in training mode.

    Parameters
    ----------
    coder : SparseCoder
    x : Tensor of shape (..., d_in)
    latents : Tensor of shape (m,), int64

    Returns
    -------
    Tensor of shape (..., m)
        In the dtype of the dictionary.
    """
    rows = x.reshape(-1, x.shape[-1])
    shape = coder.nonlinearity
    if isinstance(shape, Choosing) and not isinstance(shape, BatchTopK):
        found = select_latents(coder.code(rows), latents).dense()
    else:
        read = coder.read(coder.scaled(rows).rows)
        pre = read @ coder.encoder[latents].mT + coder.b_enc[latents]
        found = _alone(coder, pre, latents)
    return found.reshape(*x.shape[:-1], len(latents))


def _alone(coder: SparseCoder, pre: Tensor, latents: Tensor) -> Tensor:
    shape = coder.nonlinearity
    if isinstance(shape, ReLU):
        return pre.relu()
    if isinstance(shape, JumpReLU):
        return torch.where(pre > shape.threshold[latents], pre, 0.0)
    if isinstance(shape, Gated):
        gain, shift = shape.log_gain[latents].exp(), shape.magnitude_bias[latents]
        return torch.where(pre + shape.gate_bias[latents] > 0, (pre * gain + shift).relu(), 0.0)
    if isinstance(shape, BatchTopK):
        scale = coder.ranking()
        ranked = pre if scale is None else pre * scale[latents]
        return torch.where(ranked > shape.threshold.clamp(min=0), pre.relu(), 0.0)
    raise ValueError(
        f"no rule for the nonlinearity {type(shape).__name__}; use one of make_nonlinearity."
    )
