"""A few latents of a dictionary: their activations without the dense code of all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.nonlinearity import (
    BatchTopK,
    Choosing,
    Gated,
    JumpReLU,
    ReLU,
)


def checked_latents(latents: Any, coder: SparseCoder) -> Tensor:
    """Numbers of latents (m,), int64, on the device of the dictionary.

    Raises
    ------
    ValueError
        None, not whole numbers, one that the dictionary does not have, or one named twice.
    """
    given = latents if isinstance(latents, Tensor | Sequence) else list(latents)
    found = torch.as_tensor(given)
    if found.ndim != 1 or len(found) == 0 or found.is_floating_point() or found.is_complex():
        raise ValueError(
            f"latents of shape {tuple(found.shape)} and dtype {found.dtype} must be a list of at "
            "least one whole number."
        )
    found = found.to(coder.device, torch.int64)
    outside = found[(found < 0) | (found >= coder.d_sae)]
    if len(outside):
        raise ValueError(
            f"latent {int(outside[0])} does not exist; the dictionary has 0 to {coder.d_sae - 1}."
        )
    if len(found.unique()) != len(found):
        raise ValueError("latents name one latent twice; name each once.")
    return found


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
        found = columns(coder.code(rows), latents)
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


def columns(code: SparseCode, latents: Tensor) -> Tensor:
    """Dense columns (n_rows, m) of a sparse code, with gradients to its values."""
    place = torch.full((code.n_latents,), -1, device=code.latent.device)
    place[latents] = torch.arange(len(latents), device=place.device)
    at = place[code.latent]
    kept = at >= 0
    made = code.value.new_zeros(code.n_rows * len(latents))
    flat = code.row[kept] * len(latents) + at[kept]
    return made.index_add(0, flat, code.value[kept]).reshape(code.n_rows, len(latents))
