"""How much of each latent of a crosscoder is present in each stream, in closed form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import require_finite
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.crosscoder import Crosscoder


@dataclass(frozen=True, eq=False)
class LatentScaling:
    """Presence of every latent in every stream of a crosscoder.

    With activations ``f`` and the direction ``d`` that the latent has in its target stream, the
    coefficients are ``beta = argmin sum |beta f d - y|^2`` over the rows, in closed form
    ``sum f (d . y) / (|d|^2 sum f^2)``. For the error, ``y`` is what is left of a stream without
    the other latents: its reconstruction error plus the latent's own part. For the reconstruction,
    ``y`` is all that the latents write there, this one included.

    Attributes
    ----------
    error, reconstruction : Tensor of shape (d_sae, n_streams), float64
        ``beta``; 0 for latents that never fire.
    relative_norm : Tensor of shape (d_sae, n_streams), float64
        Length of the latent's decoder in a stream over that in its longest stream.
    target : Tensor of shape (d_sae,), int64
        Stream whose direction is looked for: where the decoder is longest, or the one asked for.
    fires : Tensor of shape (d_sae,), float64
        Share of the rows.

    References
    ----------
    Minder et al. (2025), Overcoming sparsity artifacts in crosscoders to interpret chat-tuning,
    arXiv 2504.02922.
    """

    error: Tensor
    reconstruction: Tensor
    relative_norm: Tensor
    target: Tensor
    fires: Tensor

    @property
    def nu_error(self) -> Tensor:
        """``beta`` of the error over that of the target stream, (d_sae, n_streams)."""
        return self._relative(self.error)

    @property
    def nu_reconstruction(self) -> Tensor:
        """``beta`` of the reconstruction over that of the target stream, (d_sae, n_streams)."""
        return self._relative(self.reconstruction)

    def _relative(self, beta: Tensor) -> Tensor:
        of_target = beta.gather(1, self.target[:, None])
        return torch.where(of_target != 0, beta / of_target, 0.0)

    def delta_norm(self, base: int = 0, changed: int = 1) -> Tensor:
        """``((|d_changed| - |d_base|) / max + 1) / 2`` (d_sae,): 0 base only, 1 changed only."""
        a, b = self.relative_norm[:, base], self.relative_norm[:, changed]
        largest = torch.maximum(a, b)
        return torch.where(largest > 0, ((b - a) / largest + 1) / 2, 0.5)

    def absent(self, *, max_error: float = 0.2, max_reconstruction: float = 0.5) -> Tensor:
        """Boolean (d_sae, n_streams): the latent fires, and the stream does not have it.

        Neither what is left over (``nu_error``) nor what other latents write
        (``nu_reconstruction``) holds as much of it as the bounds.
        """
        small = (self.nu_error.abs() < max_error) & (
            self.nu_reconstruction.abs() < max_reconstruction
        )
        return small & (self.fires > 0)[:, None]

    def exclusive(self, *, max_error: float = 0.2, max_reconstruction: float = 0.5) -> Tensor:
        """Boolean (d_sae,): the latent is absent from every stream but its target."""
        others = self._others()
        gone = self.absent(max_error=max_error, max_reconstruction=max_reconstruction)
        return (gone | ~others).all(1) & (self.fires > 0)

    def shrunk(self, *, max_norm: float = 0.1, max_error: float = 0.2) -> Tensor:
        """Boolean (d_sae, n_streams): complete shrinkage, an artifact of training.

        The decoder of the stream is short, so that the latent looks exclusive; but the stream has
        it, in what is left unexplained.
        """
        return self._looks_absent(max_norm) & (self.nu_error.abs() >= max_error)

    def decoupled(self, *, max_norm: float = 0.1, max_reconstruction: float = 0.5) -> Tensor:
        """Boolean (d_sae, n_streams): latent decoupling, an artifact of training.

        The decoder of the stream is short, so that the latent looks exclusive; but other latents
        write the same into the stream, at the same rows.
        """
        return self._looks_absent(max_norm) & (self.nu_reconstruction.abs() >= max_reconstruction)

    def _looks_absent(self, max_norm: float) -> Tensor:
        short = self.relative_norm < max_norm
        return short & self._others() & (self.fires > 0)[:, None]

    def _others(self) -> Tensor:
        streams = torch.arange(self.error.shape[1], device=self.target.device)
        return streams != self.target[:, None]


@torch.no_grad()
def measure_latent_scaling(
    crosscoder: Crosscoder, batches: Iterable[Tensor], *, target: int | None = None
) -> LatentScaling:
    """Presence of every latent in every stream, over batches that are seen once.

    Parameters
    ----------
    crosscoder : Crosscoder
        Never changed.
    batches : iterable of Tensor (n, n_streams, d_stream)
        The rows of a token in all streams.
    target : int, optional
        Stream whose direction every latent is looked for by. Default: for each latent the one in
        which its decoder is longest.

    Returns
    -------
    LatentScaling

    Raises
    ------
    ValueError
        No batch, rows of another shape or not finite, a stream that does not exist.
    """
    n_streams = crosscoder.n_streams
    if target is not None and not 0 <= target < n_streams:
        raise ValueError(f"target={target} is no stream; there are 0 to {n_streams - 1}.")
    decoder = crosscoder.W_dec.detach().double()
    norms = decoder.norm(dim=2)
    if target is None:
        of = norms.argmax(1)
    else:
        of = torch.full((crosscoder.d_sae,), target, device=decoder.device)
    direction = decoder[torch.arange(crosscoder.d_sae, device=decoder.device), of]
    squares = decoder.new_zeros(crosscoder.d_sae)
    counts = torch.zeros_like(squares)
    left, written = torch.zeros_like(decoder), torch.zeros_like(decoder)
    bias = crosscoder.b_dec.double().unflatten(0, (n_streams, -1))
    n_rows = 0
    with evaluating(crosscoder):
        for batch in batches:
            rows = batch.to(crosscoder.device)
            require_finite(rows, "the batch")
            code = crosscoder.code(rows)
            value = code.value.double()
            made = crosscoder.decode(code).double()
            left += summed_by_latent(code, rows.double() - made)
            written += summed_by_latent(code, made - bias)
            squares.index_add_(0, code.latent, value.square())
            counts.index_add_(0, code.latent, (value != 0).double())
            n_rows += len(rows)
    if n_rows == 0:
        raise ValueError("no rows; give at least one batch.")
    along = direction[:, None]
    own = (decoder * along).sum(2) * squares[:, None]
    scale = (direction.square().sum(1) * squares)[:, None]
    longest = norms.amax(1, keepdim=True)
    return LatentScaling(
        error=torch.where(scale > 0, ((left * along).sum(2) + own) / scale, 0.0),
        reconstruction=torch.where(scale > 0, (written * along).sum(2) / scale, 0.0),
        relative_norm=torch.where(longest > 0, norms / longest, 0.0),
        target=of,
        fires=counts / n_rows,
    )


def summed_by_latent(code: SparseCode, rows: Tensor) -> Tensor:
    """``sum f row`` of every latent over the rows (n, ...): (n_latents, ...), float64."""
    flat = rows.double().flatten(1)
    at = torch.stack([code.latent, code.row])
    weights = torch.sparse_coo_tensor(
        at, code.value.double(), (code.n_latents, len(rows)), check_invariants=False
    )
    return (weights @ flat).reshape(code.n_latents, *rows.shape[1:])
