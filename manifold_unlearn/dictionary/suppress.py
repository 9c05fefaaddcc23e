"""Clamped latents written into the weights: the model itself stops to activate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.tokens import Text
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.intervene.least_squares import BakeResult, least_squares_bake
from manifold_unlearn.intervene.targets import hooked_targets, token_rows


@dataclass(frozen=True, eq=False)
class Suppression:
    """A model whose weights suppress latents, and how far that came.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        An edited copy, without hooks.
    bake : BakeResult
    activation : dict of str to tuple of two floats
        By site: mean activation of the chosen latents over the tokens of the forget texts, before
        and after.
    left : float
        Sum of those after over the sum of those before; 0 is none left.
    """

    model: Any
    bake: BakeResult
    activation: dict[str, tuple[float, float]]

    @property
    def left(self) -> float:
        """Share of the activation that is left."""
        before, after = (sum(pair[i] for pair in self.activation.values()) for i in (0, 1))
        return after / before


def suppress_features(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Text],
    retain: Sequence[Text],
    clamps: Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    ridge: float = 1.0,
    n_passes: int = 1,
    **bake: Any,
) -> Suppression:
    """Model without hooks whose states are those that the clamps give, in closed form.

    The states of the forget texts under the clamps are the targets of
    :func:`~manifold_unlearn.intervene.least_squares.least_squares_bake`, which writes them into
    the output matrices of the MLPs while the keys of ``retain`` are held.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Never touched.
    tokenizer : transformers.PreTrainedTokenizerBase
    forget, retain : sequence of str or (prompt, answer)
    clamps : mapping of str to FeatureClamp or FeatureEraser
        By site, residual streams ``"layers.i"`` as :func:`intervene` takes them.
    layers : sequence of int, optional
        Blocks whose MLP is edited. Default: those of the sites and all behind them where the
        clamps change the states.
    ridge, n_passes, **bake
        As :func:`~manifold_unlearn.intervene.least_squares.least_squares_bake`.

    Returns
    -------
    Suppression

    Raises
    ------
    ValueError
        No clamps, a map that is none, the clamps change no token, or as the bake.

    References
    ----------
    Ashuach et al. (2025), CRISP: persistent concept unlearning via sparse autoencoders, arXiv
    2508.13650, for suppressing latents in the weights; there by LoRA fine-tuning, see
    :class:`manifold_unlearn.finetune.FeatureSuppression`.
    """
    parts = {site: clamp_of(site, given) for site, given in clamps.items()}
    if not parts:
        raise ValueError("clamps is empty; give at least one site with its clamp.")
    targets = hooked_targets(model, tokenizer, forget, parts)
    held = token_rows(model, tokenizer, retain)
    found = least_squares_bake(
        model, targets, held, layers=layers, ridge=ridge, n_passes=n_passes, **bake
    )
    before = mean_activation(model, tokenizer, forget, parts)
    after = mean_activation(found.model, tokenizer, forget, parts)
    return Suppression(found.model, found, {s: (before[s], after[s]) for s in parts})


def clamp_of(site: str, given: Any) -> FeatureClamp:
    """The clamp itself, or that of a fitted eraser."""
    clamp = given if isinstance(given, FeatureClamp) else getattr(given, "map_", None)
    if not isinstance(clamp, FeatureClamp):
        raise ValueError(
            f"the map at {site!r} is a {type(given).__name__}; give a FeatureClamp or a fitted "
            "FeatureEraser."
        )
    return clamp


@torch.no_grad()
def mean_activation(
    model: Any, tokenizer: Any, texts: Sequence[Text], clamps: Mapping[str, FeatureClamp]
) -> dict[str, float]:
    """Mean size of the clamps' latents over all tokens of texts but sinks, by site."""
    rows = capture(model, tokenizer, texts, list(clamps))
    counted = torch.as_tensor(np.asarray(~(rows.sink | rows.special | (rows.position == 0))))
    found: dict[str, float] = {}
    for site, clamp in clamps.items():
        at: Tensor = rows[site][counted].to(clamp.coder.device)
        found[site] = float(clamp.activations(at).abs().mean())
    return found
