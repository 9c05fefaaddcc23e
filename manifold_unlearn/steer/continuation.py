"""Sequences under an edit that differs from row to row, led on token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.activations.prefill import branch
from manifold_unlearn.arrays import working_dtype
from manifold_unlearn.steer.paths import How, ManifoldPath


class WaypointEdit:
    """Map of a site that moves chosen rows to the waypoint of their sequence.

    At rest until :meth:`aim` says which waypoint each sequence is at and which tokens are moved.

    Parameters
    ----------
    path : ManifoldPath
    how : {"replace", "add", "coordinates"}
        See :meth:`ManifoldPath.lead`.
    """

    def __init__(self, path: ManifoldPath, how: How):
        self.n_features_in_ = path.points.shape[1]
        self.path, self.how = path, how
        self.waypoint: Tensor | None = None
        self.where: Tensor | None = None

    def aim(self, waypoint: Tensor | None, where: Tensor | None) -> None:
        """Say what the next pass is.

        Parameters
        ----------
        waypoint : Tensor of shape (n_rows,), int64, or None
        where : Tensor of shape (n_rows, length), bool, or None
            Tokens to move; None moves none.
        """
        self.waypoint, self.where = waypoint, where

    def __call__(self, h: Tensor) -> Tensor:
        """Moved rows, ``(n_rows, length, d)`` as given; the others to the bit as they were."""
        if self.where is None or self.waypoint is None:
            return h
        if h.shape[:-1] != self.where.shape:
            raise ValueError(
                f"the site carries rows {tuple(h.shape)}; a path needs (batch, length, d) with "
                f"(batch, length) = {tuple(self.where.shape)}. Choose a site of the decoder."
            )
        if self.path.points.device != h.device:
            self.path = self.path.to(h.device)
        aim = self.path.points[self.waypoint.to(h.device)][:, None]
        led = self.path.lead(h.to(working_dtype(h.dtype)), aim, self.how)
        return torch.where(self.where.to(h.device)[..., None], led.to(h.dtype), h)


@dataclass(frozen=True)
class Rows:
    """Sequences so far, one a waypoint and prompt, and what they say comes next."""

    waypoint: Tensor
    """int64 (n_rows,)"""
    ids: Tensor
    """int64 (n_rows, length), padded on the left"""
    present: Tensor
    """int64 (n_rows, length): 0 in the padding"""
    where: Tensor
    """bool (n_rows, length): the tokens that are moved"""
    cache: Any
    """Of all tokens so far; None where every pass reads the sequences from their beginning."""
    logits: Tensor
    """(n_rows, n_kept, vocabulary) behind the last tokens"""


def go_on(
    model: Any,
    edits: Sequence[WaypointEdit],
    rows: Rows,
    ids: Tensor,
    present: Tensor,
    where: Tensor,
    *,
    n_kept: int,
) -> Rows:
    """Rows with more tokens; the rows given may be led on again, to something else.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With the edits in it.
    edits : sequence of WaypointEdit
    rows : Rows
    ids, present, where : Tensor of shape (n_rows, n_more)
    n_kept : int
        Tokens, from the last, behind which the logits are wanted.
    """
    n_more = ids.shape[1]
    ids = torch.cat([rows.ids, ids], dim=1)
    present = torch.cat([rows.present, present], dim=1)
    where = torch.cat([rows.where, where], dim=1)
    positions = (present.cumsum(1) - 1).clamp(min=0)
    cache = None if rows.cache is None else branch(rows.cache)
    read = slice(None) if cache is None else slice(-n_more, None)
    past = {} if cache is None else {"past_key_values": cache}
    for edit in edits:
        edit.aim(rows.waypoint, where[:, read])
    out = model(
        input_ids=ids[:, read],
        attention_mask=present,
        position_ids=positions[:, read],
        use_cache=cache is not None,
        logits_to_keep=n_kept,
        **past,
    )
    return Rows(rows.waypoint, ids, present, where, cache, out.logits)


def greedy(
    model: Any,
    edits: Sequence[WaypointEdit],
    rows: Rows,
    *,
    max_new_tokens: int,
    moved: bool,
    ends: Tensor,
    context: int | None,
) -> list[Tensor]:
    """Likeliest continuation of each row, token by token.

    Parameters
    ----------
    max_new_tokens : int
    moved : bool
        Whether what is generated is moved to the waypoint too.
    ends : Tensor of shape (n,), int64
        Tokens after which nothing follows.
    context : int, optional
        Longest sequence that the model reads.

    Returns
    -------
    list of Tensor
        For each row the ids generated, int64, the end included.
    """
    said: list[Tensor] = []
    counted: list[Tensor] = []
    over = torch.zeros_like(rows.waypoint, dtype=torch.bool)
    while len(said) < max_new_tokens:
        following = rows.logits[:, -1].argmax(-1)
        said.append(following)
        counted.append(~over)
        over = over | torch.isin(following, ends)
        if context is not None:
            over = over | (rows.present.sum(1) >= context)
        if len(said) == max_new_tokens or bool(over.all()):
            break
        following = torch.where(over, rows.ids[:, -1], following)[:, None]
        where = torch.full_like(following, moved, dtype=torch.bool)
        present = (~over)[:, None].long()
        rows = go_on(model, edits, rows, following, present, where, n_kept=1)
    ids, kept = torch.stack(said, dim=1), torch.stack(counted, dim=1)
    return [row[mask] for row, mask in zip(ids, kept, strict=True)]
