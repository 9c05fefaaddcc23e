"""What latents do to the output: their writes through final norm and unembedding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.arrays import require_finite, row_blocks
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.coding import checked_latents
from manifold_unlearn.dictionary.corpus import token_strings

_BLOCK = 256
_AGREES = 1e-3  # of a norm's output with what its gain predicts, relative


@dataclass(frozen=True, eq=False)
class LogitEffects:
    """Direct effect of latents on the logits; arrays have one row a latent.

    Attributes
    ----------
    latents : array of shape (m,), int64
    top_id, bottom_id : arrays of shape (m, n_top), int64
        Tokens raised most and lowered most, the strongest first.
    top_value, bottom_value : arrays of shape (m, n_top), float32
        Logits per unit of activation, less the mean over the vocabulary.
    deviation, skewness, kurtosis : arrays of shape (m,), float64
        Of the effects over the vocabulary; kurtosis is 0 for a Gaussian, large where few tokens
        are singled out.
    histogram : array of shape (m, n_bins), int64
        Of the effects.
    edges : array of shape (m, n_bins + 1), float64
    strings : dict of int to str
        Texts of the tokens.
    """

    latents: np.ndarray
    top_id: np.ndarray
    bottom_id: np.ndarray
    top_value: np.ndarray
    bottom_value: np.ndarray
    deviation: np.ndarray
    skewness: np.ndarray
    kurtosis: np.ndarray
    histogram: np.ndarray
    edges: np.ndarray
    strings: dict[int, str]

    def index(self, latent: int) -> int:
        """Row of a latent; raises ``ValueError`` if it has none."""
        found = np.flatnonzero(self.latents == latent)
        if len(found) == 0:
            raise ValueError(f"latent {latent} has no effects here; it is not among `latents`.")
        return int(found[0])

    def raised(self, latent: int) -> list[tuple[str, float]]:
        """Tokens that the latent raises most, with their effects."""
        row = self.index(latent)
        return self._named(self.top_id[row], self.top_value[row])

    def lowered(self, latent: int) -> list[tuple[str, float]]:
        """Tokens that the latent lowers most, with their effects."""
        row = self.index(latent)
        return self._named(self.bottom_id[row], self.bottom_value[row])

    def _named(self, ids: np.ndarray, values: np.ndarray) -> list[tuple[str, float]]:
        return [(self.strings[int(i)], float(v)) for i, v in zip(ids, values, strict=True)]


@torch.no_grad()
def logit_effects(
    model: nn.Module,
    tokenizer: Any,
    decoder: SparseCoder | Tensor,
    *,
    latents: Sequence[int] | Tensor | None = None,
    n_top: int = 10,
    scale: float = 1.0,
    n_bins: int = 40,
    block: int = _BLOCK,
) -> LogitEffects:
    """Effect of each latent's write on the logits, the final norm's scale held fixed.

    ``(w * gain) W_U' / scale``, less its mean over the vocabulary, for a decoder row ``w``; a norm
    that subtracts the mean is given ``w`` less its mean. What later blocks make of the write, and
    a cap on the logits, are left out.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    decoder : SparseCoder, or Tensor of shape (n_latents, d_model)
        Of a dictionary that writes to the residual stream; of a crosscoder one stream's
        ``W_dec[:, s]``.
    latents : sequence of int, optional
        Default: all.
    n_top : int, default=10
    scale : float, default=1.0
        Root mean square of the states that enter the final norm: with it effects are logits.
        The order of the tokens does not depend on it.
    n_bins : int, default=40
    block : int, default=256
        Latents at once: ``block * n_vocabulary`` values are held.

    Returns
    -------
    LogitEffects

    Raises
    ------
    ValueError
        A model without output embedding or known layout, another width than the model's, a final
        norm that is no gain times a scaled row, NaN or infinity.

    References
    ----------
    nostalgebraist (2020), interpreting GPT: the logit lens.
    Gurnee et al. (2024), Universal neurons in GPT2 language models, section 4 (moments of a
    neuron's effects on the vocabulary).
    """
    if n_top < 1 or n_bins < 1 or not scale > 0 or block < 1:
        raise ValueError(
            f"n_top={n_top}, n_bins={n_bins} and block={block} must be at least 1, "
            f"scale={scale} positive."
        )
    head = _head(model)
    vocabulary = min(head.weight.shape[0], len(tokenizer))
    unembed = head.weight[:vocabulary].detach().float()
    rows = decoder.decoder if isinstance(decoder, SparseCoder) else decoder
    rows = rows.detach().to(unembed.device, torch.float32)
    if rows.ndim != 2 or rows.shape[1] != unembed.shape[1]:
        raise ValueError(
            f"the decoder has shape {tuple(rows.shape)}; expected (n_latents, "
            f"{unembed.shape[1]}), rows in the residual stream. Of a crosscoder give W_dec[:, s]."
        )
    require_finite(rows, "decoder")
    names = torch.arange(len(rows)) if latents is None else checked_latents(latents, len(rows))
    gain, centers = final_gain(model)
    n_top = min(n_top, vocabulary)
    found: dict[str, list[Tensor]] = {}
    for part in row_blocks(len(names), block):
        write = rows[names[part].to(rows.device)]
        write = (write - write.mean(1, keepdim=True) if centers else write) * gain / scale
        effect = write @ unembed.T
        for name, value in _described(effect - effect.mean(1, keepdim=True), n_top, n_bins).items():
            found.setdefault(name, []).append(value.cpu())
    arrays = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    ids = np.unique(np.concatenate([arrays["top_id"].ravel(), arrays["bottom_id"].ravel()]))
    return LogitEffects(
        latents=names.cpu().numpy(), strings=token_strings(tokenizer, ids), **arrays
    )


def _described(effect: Tensor, n_top: int, n_bins: int) -> dict[str, Tensor]:
    top, bottom = effect.topk(n_top, dim=1), effect.topk(n_top, dim=1, largest=False)
    spread = effect.double()
    deviation = spread.square().mean(1).sqrt()
    unit = spread / deviation.clamp_min(1e-300)[:, None]
    low, high = spread.amin(1), spread.amax(1)
    width = (high - low).clamp_min(1e-300)
    place = ((spread - low[:, None]) / width[:, None] * n_bins).long().clamp(max=n_bins - 1)
    counts = torch.zeros(len(effect), n_bins, dtype=torch.int64, device=effect.device)
    return {
        "top_id": top.indices,
        "bottom_id": bottom.indices,
        "top_value": top.values,
        "bottom_value": bottom.values,
        "deviation": deviation,
        "skewness": unit.pow(3).mean(1),
        "kurtosis": torch.where(deviation > 0, unit.pow(4).mean(1) - 3, 0.0),
        "histogram": counts.scatter_add_(1, place, torch.ones_like(place)),
        "edges": low[:, None]
        + width[:, None]
        * torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=effect.device),
    }


@torch.no_grad()
def final_gain(model: nn.Module) -> tuple[Tensor, bool]:
    """What the final norm multiplies each feature with, and whether it subtracts the mean.

    Read off from what the norm answers, so that it does not matter how it stores its weight.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Returns
    -------
    gain : Tensor of shape (d_model,), float32
    centers : bool

    Raises
    ------
    ValueError
        The norm is no gain times a row that is scaled to a root mean square of 1.
    """
    norm = copy.deepcopy(find_decoder(model).final_norm).float()
    d = _head(model).weight.shape[1]
    device = next(model.parameters()).device
    probe = torch.ones(d, device=device)
    probe[::2] = -1
    probe = _unit_rms(probe - probe.mean()) * 1e3  # large: what is added to the variance is not
    up, down = norm(probe), norm(-probe)
    gain, shift = (up - down) / 2 / _unit_rms(probe), (up + down) / 2
    other = torch.linspace(-1, 2, d, device=device).square() * 1e3
    answer = norm(other) - shift
    for centers in (False, True):
        expected = gain * _unit_rms(other - other.mean() if centers else other)
        if float((answer - expected).abs().max()) <= _AGREES * float(answer.abs().max()):
            return gain, centers
    raise ValueError(
        f"the final norm of {type(model).__name__}, a {type(norm).__name__}, is no gain times a "
        "scaled row; its effect on a direction is not known."
    )


def _head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding: no logits to act on.")
    return head


def _unit_rms(row: Tensor) -> Tensor:
    return row / row.square().mean().sqrt()
