"""Sparse codes of many rows, and parts of codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import require_finite, row_blocks
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode

_BLOCK = 4096


@torch.no_grad()
def code_rows(
    coder: SparseCoder,
    X: Any,
    *,
    latents: Sequence[int] | Tensor | None = None,
    block: int = _BLOCK,
) -> SparseCode:
    """Sparse code of all rows, a block at a time, by the rule of evaluation.

    Parameters
    ----------
    coder : SparseCoder
        Put in evaluation mode meanwhile: a batch rule would make a row depend on its block.
    X : array or Tensor of shape (n, d_in), or (n, n_streams, d_stream) for a crosscoder
    latents : sequence of int, optional
        Keep these alone; they become the latents ``0, 1, ...`` of the code, in this order.
    block : int, default=4096
        Rows at once: ``block * d_sae`` values are the most that is held besides the code.

    Returns
    -------
    SparseCode
        Without zeros, on the device of the coder.

    Raises
    ------
    ValueError
        NaN or infinity, rows of another width, a latent that there is not, no row.
    """
    rows = torch.as_tensor(X)
    if len(rows) == 0:
        raise ValueError("X has no rows; give at least one.")
    require_finite(rows, "X")
    found = []
    with evaluating(coder):
        for part in row_blocks(len(rows), block):
            code = coder.code(rows[part].to(coder.device, coder.dtype))
            found.append(without_zeros(code) if latents is None else select_latents(code, latents))
    return join_codes(found)


def without_zeros(code: SparseCode) -> SparseCode:
    """The entries that are not zero."""
    fires = code.value != 0
    return SparseCode(
        code.row[fires], code.latent[fires], code.value[fires], code.n_rows, code.n_latents
    )


def select_latents(code: SparseCode, latents: Sequence[int] | Tensor) -> SparseCode:
    """Code of the given latents alone, numbered in their order; zeros are left out.

    Values keep their gradients.

    Raises
    ------
    ValueError
        No latent, one twice, or one that there is not.
    """
    chosen = checked_latents(latents, code.n_latents).to(code.latent.device)
    place = torch.full((code.n_latents,), -1, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    latent = place[code.latent]
    kept = (latent >= 0) & (code.value != 0)
    return SparseCode(code.row[kept], latent[kept], code.value[kept], code.n_rows, len(chosen))


def select_rows(code: SparseCode, kept: Tensor) -> SparseCode:
    """Code of the rows where ``kept`` (n_rows,) is true, numbered anew."""
    if kept.shape != (code.n_rows,) or kept.dtype != torch.bool:
        raise ValueError(
            f"kept has shape {tuple(kept.shape)} and dtype {kept.dtype}; expected ({code.n_rows},) "
            "of bool."
        )
    kept = kept.to(code.row.device)
    place, inside = kept.cumsum(0) - 1, kept[code.row]
    return SparseCode(
        place[code.row[inside]],
        code.latent[inside],
        code.value[inside],
        int(kept.sum()),
        code.n_latents,
    )


def join_codes(codes: Iterable[SparseCode]) -> SparseCode:
    """Codes of blocks of rows as one, in their order.

    Raises
    ------
    ValueError
        No code, or codes of different numbers of latents.
    """
    parts = list(codes)
    sizes = {part.n_latents for part in parts}
    if len(sizes) != 1:
        raise ValueError(f"codes of {sorted(sizes)} latents cannot be joined; give codes of one.")
    row, first = [], 0
    for part in parts:
        row.append(part.row + first)
        first += part.n_rows
    latent = torch.cat([part.latent for part in parts])
    value = torch.cat([part.value for part in parts])
    return SparseCode(torch.cat(row), latent, value, first, parts[0].n_latents)


def as_code(values: Any) -> SparseCode:
    """A code as it is; activations (n_rows, n_latents), array or Tensor, as one.

    Raises
    ------
    ValueError
        Not two-dimensional, or NaN or infinity.
    """
    if isinstance(values, SparseCode):
        require_finite(values.value, "the values of the code")
        return without_zeros(values)
    dense = torch.as_tensor(values)
    if dense.ndim != 2:
        raise ValueError(f"activations have shape {tuple(dense.shape)}; expected (n, n_latents).")
    require_finite(dense, "activations")
    return SparseCode.of(dense)


def checked_latents(latents: Any, n_latents: int) -> Tensor:
    """Numbers of latents (m,), int64.

    Raises
    ------
    ValueError
        None, not whole numbers, one that the dictionary does not have, or one named twice.
    """
    given = latents if isinstance(latents, Tensor | np.ndarray | Sequence) else list(latents)
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"latents={latents!r} is not a list of whole numbers.") from None
    if found.ndim != 1 or len(found) == 0 or found.is_floating_point() or found.is_complex():
        raise ValueError(
            f"latents of shape {tuple(found.shape)} and dtype {found.dtype} must be a list of at "
            "least one whole number."
        )
    found = found.to(torch.int64)
    outside = found[(found < 0) | (found >= n_latents)]
    if len(outside):
        raise ValueError(f"latent {int(outside[0])} is not among the {n_latents} there are.")
    if len(found.unique()) != len(found):
        raise ValueError("latents name one of them twice; name each once.")
    return found
