"""The loss of one batch: which objectives a dictionary is trained for, and its codes."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.crosscoder import SHARED, Crosscoder
from manifold_unlearn.dictionary.nonlinearity import Gated, JumpReLU
from manifold_unlearn.dictionary.objectives import (
    Dead,
    auxiliary_of_dead,
    decoder_norms,
    delta_loss,
    fraction_of_variance_unexplained,
    gated_auxiliary,
    l0_penalty,
    l1_penalty,
    prefix_losses,
    tanh_penalty,
)
from manifold_unlearn.dictionary.settings import DictionaryTraining

Dictionary: TypeAlias = "SparseCoder | CrossLayerTranscoder"

SPARSE_ENOUGH = 0.03
"""Up to this share of entries that are not zero, products over those alone are faster."""

PENALTIES = {"relu": "l1", "gated": "l1", "jumprelu": "l0"}
"""Penalty of a nonlinearity that has no rule of rank."""


class Part(NamedTuple):
    """Codes of one encoder: a dictionary has one, a cross-layer transcoder one a layer.

    Attributes
    ----------
    coder : SparseCoder
    rows : Tensor of shape (n, d_in)
    target : Tensor of shape (n, d_out)
        What the encoder's latents write to, in the rows' units.
    code : SparseCode or Tensor of shape (n, d_sae)
    pre, dense : Tensor of shape (n, d_sae), or None
        Pre-activations and activations, where no rule of rank chooses.
    """

    coder: SparseCoder
    rows: Tensor
    target: Tensor
    code: SparseCode | Tensor
    pre: Tensor | None
    dense: Tensor | None

    @property
    def n_fired(self) -> Tensor:
        """Entries that are not zero."""
        values = self.code.value if isinstance(self.code, SparseCode) else self.code
        return values.detach().count_nonzero()

    @property
    def fired(self) -> Tensor:
        """Boolean (d_sae,): fires in some row."""
        return self.code.fires if isinstance(self.code, SparseCode) else (self.code != 0).any(0)

    def relative(self, outputs: Tensor, *, centered: bool = True) -> Tensor:
        """Outputs as the decoder writes them: the normalization of each row taken off."""
        _, mean, deviation = self.coder.scaled(self.rows)
        if mean is not None and centered:
            outputs = outputs - mean
        return outputs if deviation is None else outputs / deviation


class Judged(NamedTuple):
    """Loss, unexplained variance (detached) and codes of a batch."""

    loss: Tensor
    fvu: Tensor
    parts: list[Part]


class Criterion:
    """The loss of a dictionary.

    Parameters
    ----------
    coder : SparseCoder or CrossLayerTranscoder
    config : DictionaryTraining

    Raises
    ------
    ValueError
        Objectives that do not fit the dictionary.
    """

    def __init__(self, coder: Dictionary, config: DictionaryTraining) -> None:
        self.coder, self.config = coder, config
        self.encoders = coder.coders if isinstance(coder, CrossLayerTranscoder) else [coder]
        shape = self.encoders[0].nonlinearity
        wanted = config.sparsity
        self.penalty = PENALTIES.get(shape.name, "none") if wanted == "auto" else str(wanted)
        if self.penalty != "none" and shape.chooses:
            raise ValueError(f"sparsity={wanted!r}: {shape.name} is sparse by rank; use 'none'.")
        if self.penalty == "l0" and not isinstance(shape, JumpReLU):
            raise ValueError(f"sparsity='l0' is for jumprelu, not {shape.name}; use 'l1'.")
        sizes = config.group_sizes
        if sizes and (len(self.encoders) > 1 or sum(sizes) != coder.d_sae):
            raise ValueError(
                f"group_sizes={sizes} add up to {sum(sizes)}; they must be all {coder.d_sae} "
                "latents of a dictionary of one encoder."
            )
        two = isinstance(coder, Crosscoder) and coder.n_streams == 2 and sum(coder.exclusive) > 0
        if config.delta_coefficient and not two:
            raise ValueError(
                f"delta_coefficient={config.delta_coefficient} is for a crosscoder of two streams "
                "with exclusive latents."
            )

    def __call__(self, x: Tensor, y: Tensor, dead: list[Tensor], weight: float) -> Judged:
        """Loss of a batch.

        Parameters
        ----------
        x, y : Tensor of shape (n, d) or (n, n_streams, d)
        dead : list of Tensor
            Latents of each encoder that count as dead, int64.
        weight : float
            Coefficient of the sparsity penalty.
        """
        config = self.config
        half = config.dtype == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            parts = self._coded(x, y)
            out = self.decoded(parts).to(y.dtype)
        fvu = fraction_of_variance_unexplained(y, out)
        loss = self._prefixes(parts[0]) if config.group_sizes else fvu
        if self.penalty != "none" and weight > 0:
            loss = loss + weight * sum(self._penalty(part) for part in parts)
        if isinstance(self.encoders[0].nonlinearity, Gated):
            loss = loss + sum(self._gated(part) for part in parts)
        if config.aux_coefficient and any(len(few) for few in dead):
            errors = [(y - out)[:, i:].flatten(1) for i in range(len(parts))]
            silent = zip(parts, errors, dead, strict=True)
            loss = loss + config.aux_coefficient * sum(self._auxiliary(*one) for one in silent)
        if config.delta_coefficient and isinstance(self.coder, Crosscoder):
            change = delta_loss(
                y, _sparse(parts[0].code), self.coder.W_dec, self.coder.owner != SHARED
            )
            loss = loss + config.delta_coefficient * change
        return Judged(loss, fvu.detach(), parts)

    def _coded(self, x: Tensor, y: Tensor) -> list[Part]:
        if not isinstance(self.coder, CrossLayerTranscoder):
            return [self._part(self.encoders[0], x.flatten(1), y.flatten(1))]
        layers = enumerate(self.encoders)
        return [self._part(coder, x[:, i], y[:, i:].flatten(1)) for i, coder in layers]

    def _part(self, coder: SparseCoder, rows: Tensor, target: Tensor) -> Part:
        if coder.nonlinearity.chooses:
            code = SparseCoder.code(coder, rows)
            code = SparseCode(
                code.row, code.latent, code.value.to(rows.dtype), code.n_rows, code.n_latents
            )
            return Part(coder, rows, target, code, None, None)
        pre = SparseCoder.pre_activations(coder, rows).to(rows.dtype)
        dense = coder.activations(pre)
        return Part(coder, rows, target, _thinned(coder, pre, dense), pre, dense)

    def decoded(self, parts: list[Part]) -> Tensor:
        """Outputs of codes, in the shape of the target rows."""
        if isinstance(self.coder, CrossLayerTranscoder):
            rows = torch.stack([part.rows for part in parts], dim=1)
            return self.coder.decode([part.code for part in parts], rows)
        return self.coder.decode(parts[0].code, parts[0].rows)

    def _penalty(self, part: Part) -> Tensor:
        assert part.pre is not None and part.dense is not None
        shape = part.coder.nonlinearity
        if self.penalty == "l0" and isinstance(shape, JumpReLU):
            return l0_penalty(part.pre, shape, self.config.target_l0)
        norms = decoder_norms(self._by_stream(part.coder))
        if self.penalty == "tanh":
            return tanh_penalty(part.dense, norms)
        seen = shape.gate(part.pre) if isinstance(shape, Gated) else part.dense
        centered = part.relative(part.target)
        centered = (centered - centered.mean(0)).detach()
        return l1_penalty(seen, norms) / centered.square().sum(1).mean().sqrt()

    def _by_stream(self, coder: SparseCoder) -> Tensor:
        if isinstance(self.coder, Crosscoder):
            return self.coder.W_dec
        if isinstance(self.coder, CrossLayerTranscoder):
            return coder.decoder.unflatten(1, (-1, self.coder.d_out))
        return coder.decoder

    def _gated(self, part: Part) -> Tensor:
        assert part.pre is not None
        shape, coder = part.coder.nonlinearity, part.coder
        assert isinstance(shape, Gated)
        skip = None if coder.W_skip is None else coder.scaled(part.rows).rows @ coder.W_skip
        return gated_auxiliary(
            part.relative(part.target), shape.gate(part.pre), coder.decoder, coder.b_dec, skip
        )

    def _prefixes(self, part: Part) -> Tensor:
        target = part.relative(part.target)
        if part.coder.W_skip is not None:
            target = target - part.coder.scaled(part.rows).rows @ part.coder.W_skip
        return prefix_losses(
            target,
            _sparse(part.code),
            part.coder.decoder,
            part.coder.b_dec,
            self.config.group_sizes,
        )

    def _auxiliary(self, part: Part, error: Tensor, few: Tensor) -> Tensor:
        coder = part.coder
        k = self.config.aux_k or max(coder.d_in // 2, 1)
        dead = Dead(coder.encoder[few], coder.b_enc[few], coder.decoder[few])
        read = coder.read(coder.scaled(part.rows).rows)
        return auxiliary_of_dead(part.relative(error, centered=False), read, dead, k)


def _sparse(code: SparseCode | Tensor) -> SparseCode:
    return code if isinstance(code, SparseCode) else SparseCode.of(code)


def _thinned(coder: SparseCoder, pre: Tensor, dense: Tensor) -> SparseCode | Tensor:
    """The same activations as a sparse code, if few are not zero; gradients stay the same."""
    shape = coder.nonlinearity
    wanted = dense.detach() != 0
    if isinstance(shape, JumpReLU):  # its threshold learns from latents just below it, too
        wanted |= (pre - shape.threshold).abs() < shape.bandwidth / 2
    if int(wanted.count_nonzero()) > SPARSE_ENOUGH * wanted.numel():
        return dense
    row, latent = wanted.nonzero(as_tuple=True)
    return SparseCode(row, latent, dense[row, latent], *dense.shape)
