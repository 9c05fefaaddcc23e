"""Sparse codes: only the latents that fire, and the products that need no others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Latents that fire, row by row: a sparse matrix ``(n_rows, n_latents)``.

    Attributes
    ----------
    row, latent : Tensor of shape (nnz,), int64
        ``row`` ascends.
    value : Tensor of shape (nnz,)
        May hold zeros, where a row has fewer latents to choose than it may have.
    n_rows, n_latents : int
    """

    row: Tensor
    latent: Tensor
    value: Tensor
    n_rows: int
    n_latents: int

    @classmethod
    def of(cls, dense: Tensor) -> SparseCode:
        """Entries of ``dense`` (n_rows, n_latents) that are not zero."""
        row, latent = dense.nonzero(as_tuple=True)
        return cls(row, latent, dense[row, latent], *dense.shape)

    def dense(self) -> Tensor:
        """As a matrix (n_rows, n_latents), zero where nothing fires."""
        found = self.value.new_zeros(self.n_rows * self.n_latents)
        at = self.row * self.n_latents + self.latent
        return found.index_add(0, at, self.value).reshape(self.n_rows, self.n_latents)

    @property
    def fires(self) -> Tensor:
        """Boolean (n_latents,): whether a latent is positive or negative in some row."""
        fired = torch.zeros(self.n_latents, dtype=torch.bool, device=self.latent.device)
        fired[self.latent[self.value != 0]] = True
        return fired

    @property
    def l0(self) -> Tensor:
        """Scalar: latents that are not zero, mean over the rows."""
        return (self.value != 0).sum() / max(self.n_rows, 1)


Select = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From values (n, d_sae) to the rows and latents to keep, rows ascending."""


def encode_selected(x: Tensor, weight: Tensor, bias: Tensor, select: Select) -> SparseCode:
    """Pre-activations at the latents chosen; gradients pass through those alone.

    The backward pass sums over the chosen entries: ``nnz * d`` instead of ``n * d_sae * d``
    multiplications for each of the gradients.

    Parameters
    ----------
    x : Tensor of shape (n, d_in)
    weight : Tensor of shape (d_sae, d_in)
    bias : Tensor of shape (d_sae,)
    select : callable
        Sees all pre-activations ``x weight' + bias``, outside of autograd.
    """
    value, row, latent = _Encode.apply(x, weight, bias, select)
    return SparseCode(row, latent, value, len(x), len(weight))


def decode_sparse(code: SparseCode, weight: Tensor) -> Tensor:
    """Product of a code and ``weight`` (n_latents, d): (n_rows, d), in ``nnz * d`` steps."""
    found: Tensor = _Decode.apply(code.value, weight, code.row, code.latent, code.n_rows)
    return found


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, select: Select
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre = torch.addmm(bias, x, weight.mT)
        row, latent = select(pre)
        value = pre[row, latent]
        ctx.save_for_backward(x, weight, row, latent)
        ctx.mark_non_differentiable(row, latent)
        return value, row, latent

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, row, latent = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        to_x = _sum_of_rows(weight, latent, row, grad, len(x)) if need_x else None
        to_weight = _gathered(x, row, latent, grad, len(weight)) if need_weight else None
        to_bias = grad.new_zeros(len(weight)).index_add_(0, latent, grad) if need_bias else None
        return to_x, to_weight, to_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor, row: Tensor, latent: Tensor, n_rows: int
    ) -> Tensor:
        ctx.save_for_backward(value, weight, row, latent)
        return _sum_of_rows(weight, latent, row, value, n_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, weight, row, latent = ctx.saved_tensors
        to_value = to_weight = None
        if ctx.needs_input_grad[0]:
            to_value = _pair_products(grad, weight, row, latent)
        if ctx.needs_input_grad[1]:
            to_weight = _gathered(grad, row, latent, value, len(weight))
        return to_value, to_weight, None, None, None


def _sum_of_rows(
    table: Tensor, picked: Tensor, group: Tensor, scale: Tensor, n_groups: int
) -> Tensor:
    """``out[g] = sum of scale * table[picked]`` over the entries of group g; groups ascend."""
    starts = torch.searchsorted(group, torch.arange(n_groups, device=group.device))
    return functional.embedding_bag(
        picked, table, starts, mode="sum", per_sample_weights=scale.to(table.dtype)
    )


def _gathered(rows: Tensor, row: Tensor, latent: Tensor, scale: Tensor, n_latents: int) -> Tensor:
    """``out[l] = sum of scale * rows[row]`` over the entries of latent l."""
    ordered, order = latent.sort(stable=True)
    return _sum_of_rows(rows, row[order], ordered, scale[order], n_latents)


def _pair_products(rows: Tensor, weight: Tensor, row: Tensor, latent: Tensor) -> Tensor:
    """``rows[row] . weight[latent]`` of every entry, without the pairs in memory.

    What autograd computes for the weights of the samples of ``embedding_bag``.
    """
    starts = torch.searchsorted(row, torch.arange(len(rows), device=row.device))
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.to(weight.dtype), weight.detach(), latent, starts, row, 0
    )
    return found
