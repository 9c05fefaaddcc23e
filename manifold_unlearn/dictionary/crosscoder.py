"""Crosscoders: several streams of rows, from layers or from models, through one sparse code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from manifold_unlearn.dictionary.coder import Code, SparseCoder
from manifold_unlearn.dictionary.nonlinearity import Nonlinearity

SHARED = -1
"""Owner of a latent that all streams share."""


class Crosscoder(SparseCoder):
    """One sparse code of the same token in several streams: layers of a model, or models.

    ``f = nonlinearity(sum_s x_s W_enc[s] + b_enc)``, ``y_s = f W_dec[:, s] + b_dec[s]``. Rules of
    rank compare ``f * sum_s norm(W_dec[:, s])``.

    Parameters
    ----------
    n_streams, d_stream, d_sae : int
    nonlinearity : Nonlinearity or mapping, default={"name": "batch_topk", "k": 32}
    exclusive : sequence of int, optional
        How many latents belong to each stream alone: they neither read nor write the others. The
        last ``sum(exclusive)`` latents, stream by stream. Default: none.
    rank_by_norm : bool, default=True
    random_state : int, optional

    Attributes
    ----------
    W_enc : Tensor of shape (n_streams, d_stream, d_sae)
    W_dec : Tensor of shape (d_sae, n_streams, d_stream)
    b_dec : Tensor of shape (n_streams * d_stream,)
    owner : Tensor of shape (d_sae,), int64
        ``SHARED`` (-1), or the stream that a latent belongs to.

    References
    ----------
    Lindsey et al. (2024), Sparse crosscoders for cross-layer features and model diffing.
    Minder et al. (2025), Robustly identifying concepts introduced during chat fine-tuning using
    crosscoders (BatchTopK against the artifacts of L1).
    """

    kind = "Crosscoder"
    owner: Tensor

    def __init__(
        self,
        n_streams: int,
        d_stream: int,
        d_sae: int,
        nonlinearity: Nonlinearity | Mapping[str, Any] | None = None,
        *,
        exclusive: Sequence[int] = (),
        rank_by_norm: bool = True,
        random_state: int | None = None,
    ) -> None:
        if n_streams < 1:
            raise ValueError(f"n_streams={n_streams} must be at least 1.")
        if exclusive and (len(exclusive) != n_streams or min(exclusive) < 0):
            raise ValueError(f"exclusive={tuple(exclusive)} needs a count for {n_streams} streams.")
        if sum(exclusive) > d_sae:
            raise ValueError(f"exclusive={tuple(exclusive)} are more than d_sae={d_sae} latents.")
        width = n_streams * d_stream
        super().__init__(
            width,
            d_sae,
            width,
            nonlinearity or {"name": "batch_topk", "k": 32},
            rank_by_norm=rank_by_norm,
            random_state=random_state,
        )
        self.n_streams, self.d_stream = n_streams, d_stream
        self.exclusive = tuple(int(count) for count in exclusive)
        owner = torch.full((d_sae,), SHARED)
        first = d_sae - sum(self.exclusive)
        for stream, count in enumerate(self.exclusive):
            owner[first : first + count] = stream
            first += count
        self.register_buffer("owner", owner)
        self.constrain()

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 - the field's name
        """(n_streams, d_stream, d_sae)."""
        return self.encoder.mT.unflatten(0, (self.n_streams, self.d_stream))

    @property
    def W_dec(self) -> Tensor:  # noqa: N802 - the field's name
        """(d_sae, n_streams, d_stream)."""
        return self.decoder.unflatten(1, (self.n_streams, self.d_stream))

    def stream_norms(self) -> Tensor:
        """Length of each latent's decoder in each stream, (d_sae, n_streams)."""
        return self.W_dec.norm(dim=2)

    def ranking(self) -> Tensor | None:
        """Sum of the decoder's lengths over the streams, (d_sae,)."""
        return self.stream_norms().detach().sum(1) if self.rank_by_norm else None

    @torch.no_grad()
    def constrain(self) -> None:
        """Exclusive latents neither read nor write the streams of others."""
        if not self.exclusive:
            return
        streams = torch.arange(self.n_streams, device=self.owner.device)
        own = self.owner[:, None]
        foreign = (own != SHARED) & (own != streams)
        for weight in (self.encoder, self.decoder):
            weight.unflatten(1, (self.n_streams, self.d_stream)).masked_fill_(foreign[..., None], 0)

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., d_sae) of rows (..., n_streams, d_stream)."""
        return super().encode(self._joined(x))

    def pre_activations(self, x: Tensor) -> Tensor:
        """Of rows (..., n_streams, d_stream), or with both axes joined: (..., d_sae)."""
        return super().pre_activations(self._joined(x))

    def decode(self, code: Code, x: Tensor | None = None) -> Tensor:
        """Outputs (..., n_streams, d_stream) of codes."""
        return self._apart(super().decode(code, None if x is None else self._joined(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., n_streams, d_stream) of rows of that shape."""
        return self._apart(super().forward(self._joined(x)))

    def code(self, x: Tensor) -> Any:
        """Sparse code of rows (n, n_streams, d_stream)."""
        return super().code(self._joined(x))

    def _joined(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.d_in and self.n_streams > 1:
            return x
        if x.shape[-2:] != (self.n_streams, self.d_stream):
            raise ValueError(
                f"rows have shape {tuple(x.shape)}; the crosscoder reads (..., {self.n_streams}, "
                f"{self.d_stream})."
            )
        return x.flatten(-2)

    def _apart(self, out: Tensor) -> Tensor:
        return out.unflatten(-1, (self.n_streams, self.d_stream))

    @torch.no_grad()
    def fold_scale(self, scale_in: float | Tensor, scale_out: float | Tensor | None = None) -> Self:
        """As of every dictionary, with a factor for each stream: numbers, or (n_streams,).

        Where a rule of rank compares by norm, the norms of the scaled decoder move into the
        codes first and ``rank_by_norm`` ends: the norms of the unscaled one would rank otherwise.
        Codes are then in units of what they write in the scaled streams, with the same choice.
        """
        like = self.encoder
        into = torch.as_tensor(scale_in, dtype=like.dtype, device=like.device)
        out = into if scale_out is None else torch.as_tensor(scale_out).to(into)
        if bool((into <= 0).any()) or bool((out <= 0).any()):
            raise ValueError(f"scale_in={scale_in}, scale_out={scale_out} must be positive.")
        if (norms := self.ranking()) is not None and self.nonlinearity.chooses:
            norms = torch.where(norms > 0, norms, 1.0)
            self.encoder.mul_(norms[:, None])
            self.b_enc.mul_(norms)
            self.decoder.div_(norms[:, None])
            self.rank_by_norm = False
        wide_in, wide_out = (
            scale.expand(self.n_streams).repeat_interleave(self.d_stream) for scale in (into, out)
        )
        self.encoder.mul_(wide_in)
        self.decoder.div_(wide_out)
        self.b_dec.div_(wide_out)
        if self.b_in is not None:
            self.b_in.div_(wide_in)
        return self

    def config(self) -> dict[str, Any]:
        """What makes the same dictionary again, tensors apart; JSON."""
        return {
            "n_streams": self.n_streams,
            "d_stream": self.d_stream,
            "d_sae": self.d_sae,
            "nonlinearity": self.nonlinearity.config(),
            "exclusive": list(self.exclusive),
            "rank_by_norm": self.rank_by_norm,
        }
