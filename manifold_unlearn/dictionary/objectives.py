"""What a dictionary is trained to make small: one formula a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.dictionary.codes import SparseCode, decode_sparse, encode_selected
from manifold_unlearn.dictionary.nonlinearity import JumpReLU


def fraction_of_variance_unexplained(target: Tensor, output: Tensor) -> Tensor:
    """``sum |y - output|^2 / sum |y - mean(y)|^2``, mean over the streams; free of scale.

    Parameters
    ----------
    target, output : Tensor of shape (n, d) or (n, n_streams, d)
        With streams, each is measured by its own variance, so that none outweighs another.

    Returns
    -------
    Tensor
        Scalar; 0 is perfect, 1 as good as the mean.

    References
    ----------
    Gao et al. (2024), Scaling and evaluating sparse autoencoders (normalized MSE).
    """
    error = (target - output).square().sum(-1).sum(0)
    return (error / _variance(target)).mean()


def _variance(target: Tensor) -> Tensor:
    """Sum of squares about the mean over rows, a number a stream; never 0."""
    centered = target.detach() - target.detach().mean(0)
    return centered.square().sum(-1).sum(0).clamp(min=torch.finfo(target.dtype).tiny)


def decoder_norms(decoder: Tensor) -> Tensor:
    """Length of each latent's decoder, (d_sae,).

    Parameters
    ----------
    decoder : Tensor of shape (d_sae, d_out) or (d_sae, n_streams, d_stream)
        With streams: the sum of the lengths in each.

    References
    ----------
    Lindsey et al. (2024), Sparse crosscoders for cross-layer features and model diffing: the sum
    over the streams, not the length of all at once, is what lets a latent leave a stream.
    """
    norms = decoder.norm(dim=-1)
    return norms if norms.ndim == 1 else norms.sum(-1)


def l1_penalty(activation: Tensor, norms: Tensor) -> Tensor:
    """``sum_i f_i norm(W_dec[i])``, mean over the rows.

    Parameters
    ----------
    activation : Tensor of shape (n, d_sae)
        Not negative.
    norms : Tensor of shape (d_sae,)
        See :func:`decoder_norms`.

    References
    ----------
    Conerly et al. (2024), Update on how we train SAEs (Circuits Updates, April 2024).
    """
    return (activation.sum(0) * norms).sum() / len(activation)


def l0_penalty(pre: Tensor, shape: JumpReLU, target: float | None = None) -> Tensor:
    """Number of latents that fire, mean over the rows, with a gradient to the thresholds.

    Parameters
    ----------
    pre : Tensor of shape (n, d_sae)
        Pre-activations.
    shape : JumpReLU
        Its step has the straight-through gradient.
    target : float, optional
        Answer ``(L0 / target - 1)^2`` instead.

    References
    ----------
    Rajamanoharan et al. (2024), Jumping ahead: improving reconstruction fidelity with JumpReLU
    sparse autoencoders; the quadratic form is from its appendix on fixing the sparsity.
    """
    l0 = shape.step(pre).sum() / len(pre)
    return l0 if target is None else (l0 / target - 1) ** 2


def tanh_penalty(activation: Tensor, norms: Tensor, steepness: float = 4.0) -> Tensor:
    """``sum_i tanh(steepness * f_i * norm(W_dec[i]))``, mean over the rows: a soft count.

    References
    ----------
    Ameisen et al. (2025), Circuit tracing: revealing computational graphs in language models
    (the penalty of cross-layer transcoders).
    """
    return torch.tanh(steepness * activation * norms).sum() / len(activation)


def gated_auxiliary(
    target: Tensor, gate: Tensor, decoder: Tensor, b_dec: Tensor, skip: Tensor | None = None
) -> Tensor:
    """Unexplained variance where the gates alone rebuild, through a frozen decoder.

    Trains the gates to detect; the decoder gets no gradient from it.

    Parameters
    ----------
    target : Tensor of shape (n, d_out)
    gate : Tensor of shape (n, d_sae)
        ``relu`` of the gates' pre-activations.
    decoder, b_dec : Tensor of shape (d_sae, d_out), (d_out,)
    skip : Tensor of shape (n, d_out), optional
        What a linear way around adds.

    References
    ----------
    Rajamanoharan et al. (2024), Improving dictionary learning with gated sparse autoencoders.
    """
    rebuilt = gate @ decoder.detach() + b_dec.detach()
    rebuilt = rebuilt if skip is None else rebuilt + skip.detach()
    return fraction_of_variance_unexplained(target, rebuilt)


class Dead(NamedTuple):
    """Latents of which nothing has been seen for long, as an encoder and a decoder of their own.

    Attributes
    ----------
    encoder, b_enc, decoder : Tensor of shape (n_dead, d_in), (n_dead,), (n_dead, d_out)
    """

    encoder: Tensor
    b_enc: Tensor
    decoder: Tensor


def auxiliary_of_dead(error: Tensor, read: Tensor, dead: Dead, k: int) -> Tensor:
    """Unexplained part of the error when the ``k`` dead latents that fire most rebuild it.

    ``scale * sum |e - z W_dec|^2 / sum |e - mean(e)|^2`` with ``z`` the rows' k largest dead
    pre-activations, if positive, and ``scale = min(n_dead / k, 1)``. The error carries no gradient.

    Parameters
    ----------
    error : Tensor of shape (n, d_out)
        ``y - output``.
    read : Tensor of shape (n, d_in)
        Rows as the encoder's product takes them.
    dead : Dead
    k : int

    References
    ----------
    Gao et al. (2024), Scaling and evaluating sparse autoencoders (AuxK).
    """
    error, n_dead = error.detach(), len(dead.encoder)
    if n_dead == 0:
        return error.new_zeros(())
    kept = min(k, n_dead)

    def largest(pre: Tensor) -> tuple[Tensor, Tensor]:
        latent = pre.topk(kept, dim=1, sorted=False).indices
        row = torch.arange(len(pre), device=pre.device).repeat_interleave(kept)
        return row, latent.flatten()

    raw = encode_selected(read, dead.encoder, dead.b_enc, largest)
    code = SparseCode(raw.row, raw.latent, raw.value.relu(), raw.n_rows, raw.n_latents)
    rebuilt = decode_sparse(code, dead.decoder)
    return min(n_dead / k, 1.0) * fraction_of_variance_unexplained(error, rebuilt)


def prefix_losses(
    target: Tensor, code: SparseCode, decoder: Tensor, b_dec: Tensor, group_sizes: Sequence[int]
) -> Tensor:
    """Sum over groups of the unexplained variance when only the latents up to its end rebuild.

    The first latents must do alone, so they stay general; later ones refine.

    Parameters
    ----------
    target : Tensor of shape (n, d_out)
    code : SparseCode
    decoder, b_dec : Tensor of shape (d_sae, d_out), (d_out,)
    group_sizes : sequence of int
        Latents of each group, ``sum`` being ``d_sae``.

    References
    ----------
    Bussmann et al. (2025), Learning multi-level features with Matryoshka sparse autoencoders.
    """
    rebuilt, first = b_dec.expand_as(target), 0
    total = target.new_zeros(())
    for size in group_sizes:
        inside = (code.latent >= first) & (code.latent < first + size)
        group = SparseCode(
            code.row[inside],
            code.latent[inside],
            code.value[inside],
            code.n_rows,
            code.n_latents,
        )
        rebuilt = rebuilt + decode_sparse(group, decoder)
        total = total + fraction_of_variance_unexplained(target, rebuilt)
        first += size
    return total


def delta_loss(target: Tensor, code: SparseCode, decoder: Tensor, exclusive: Tensor) -> Tensor:
    """Unexplained variance of the difference of two streams, rebuilt by exclusive latents alone.

    ``y = x[:, 1] - x[:, 0]``, rebuilt as ``sum over exclusive i of f_i (W_dec[i, 1] -
    W_dec[i, 0])``, both taken from their mean over the rows, so that biases do not matter.

    Parameters
    ----------
    target : Tensor of shape (n, 2, d)
    code : SparseCode
    decoder : Tensor of shape (d_sae, 2, d)
    exclusive : Tensor of shape (d_sae,), bool
        Latents that may explain the difference.

    References
    ----------
    In the sense of Kassem et al. (2026), Delta-Crosscoder (arXiv 2603.04426), a loss that gives
    weight to directions that change between models; the form here is our own.
    """
    if target.ndim != 3 or target.shape[1] != 2:
        raise ValueError(f"delta_loss needs two streams; got rows of shape {tuple(target.shape)}.")
    own = exclusive[code.latent]
    mine = SparseCode(code.row[own], code.latent[own], code.value[own], code.n_rows, code.n_latents)
    change = target[:, 1] - target[:, 0]
    rebuilt = decode_sparse(mine, decoder[:, 1] - decoder[:, 0])
    return fraction_of_variance_unexplained(change - change.mean(0), rebuilt - rebuilt.mean(0))
