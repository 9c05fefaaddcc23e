"""What a model was changed about, read from how its first states on unrelated text differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.activations.tokens import Text
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.intervene.maps import AffineMap

_SPECIAL = 4  # room for tokens that a tokenizer puts before a text


class ReadToken(NamedTuple):
    """A token of the vocabulary and its probability."""

    token: str
    probability: float


@dataclass(frozen=True, eq=False)
class ActivationDifference:
    """Mean difference of two models' states at the first tokens of texts.

    Attributes
    ----------
    site : str
    difference : Tensor of shape (n_positions, d), float32
        Mean of the changed model's states less those of the other, by position.
    length : Tensor of shape (n_positions,), float32
        Mean length of the changed model's states.
    n_texts : Tensor of shape (n_positions,), int64
        Texts that are so long.

    References
    ----------
    Minder et al. (2025), Narrow finetuning leaves clearly readable traces in activation
    differences, arXiv 2510.13900.
    """

    site: str
    difference: Tensor
    length: Tensor
    n_texts: Tensor

    @property
    def relative(self) -> Tensor:
        """Length of the difference over that of the states, (n_positions,)."""
        return self.difference.norm(dim=1) / self.length

    @torch.no_grad()
    def lens(self, model: Any, tokenizer: Any, *, k: int = 10) -> list[list[ReadToken]]:
        """The ``k`` tokens that the difference of each position says most, by the logit lens.

        The difference goes through the final norm and the unembedding of ``model``.
        """
        weight = next(model.parameters())
        with evaluating(model):
            states = self.difference.to(weight.device, weight.dtype)[None]
            logits = model.get_output_embeddings()(find_decoder(model).final_norm(states))[0]
        top = logits.float().softmax(-1).topk(k, dim=-1)
        return [
            [
                ReadToken(tokenizer.decode([token]), probability)
                for token, probability in zip(ids, values, strict=True)
            ]
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def steering(self, position: int, strength: float = 1.0) -> AffineMap:
        """Map that adds the difference, as long as the states are times ``strength``.

        Raises
        ------
        ValueError
            No such position, or no difference there.
        """
        if not 0 <= position < len(self.difference):
            raise ValueError(
                f"position={position} was not read; there are 0 to {len(self.difference) - 1}."
            )
        size = float(self.difference[position].norm())
        if size == 0:
            raise ValueError(f"the models do not differ at position {position}; choose another.")
        step = self.difference[position] * (strength * float(self.length[position]) / size)
        return AffineMap(torch.zeros_like(step)[:, None], step[:, None], torch.ones(1))

    @torch.no_grad()
    def steered(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        position: int,
        strength: float = 1.0,
        *,
        max_new_tokens: int = 24,
    ) -> list[str]:
        """What ``model`` writes after each prompt, greedily, with the difference added."""
        weight, written = next(model.parameters()), []
        with intervene(model, {self.site: self.steering(position, strength)}), evaluating(model):
            for prompt in prompts:
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(weight.device)
                made = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                )
                written.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
        return written


@torch.no_grad()
def activation_difference(
    base: Any,
    changed: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    site: str,
    *,
    n_positions: int = 5,
) -> ActivationDifference:
    """Difference of two models' states at the first tokens of texts about anything.

    Parameters
    ----------
    base, changed : transformers.PreTrainedModel
        Of one tokenizer; such as the model never told, and the one that was told and unlearned.
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str
        Unrelated to what the models differ in; the more the better.
    site : str
    n_positions : int, default=5
        Tokens from the first on; tokens that the tokenizer puts there do not count.

    Raises
    ------
    ValueError
        ``n_positions`` below 1, or no text so long; states of different widths.
    """
    if n_positions < 1:
        raise ValueError(f"n_positions={n_positions} must be at least 1.")
    length = n_positions + _SPECIAL
    before, after = (
        capture(model, tokenizer, texts, site, max_length=length) for model in (base, changed)
    )
    if before[site].shape != after[site].shape:
        raise ValueError(
            f"the states at {site!r} have widths {before[site].shape[1]} and "
            f"{after[site].shape[1]}; compare models of one shape."
        )
    own = ~before.special
    text, position = before.text_index[own], before.position[own]
    n_texts = int(before.text_index.max()) + 1
    first = torch.full((n_texts,), length).scatter_reduce(0, text, position, "amin")
    place = position - first[text]
    kept = place < n_positions
    counts = torch.bincount(place[kept], minlength=n_positions)
    if bool((counts == 0).any()):
        raise ValueError(
            f"no text has {n_positions} tokens; the longest has {int((counts > 0).sum())}. Lower "
            "n_positions, or give longer texts."
        )
    now = after[site][own][kept].float().cpu()
    moved = now - before[site][own][kept].float().cpu()
    at = place[kept]
    sums = torch.zeros(n_positions, now.shape[1]).index_add(0, at, moved)
    lengths = torch.zeros(n_positions).index_add(0, at, now.norm(dim=1))
    return ActivationDifference(site, sums / counts[:, None], lengths / counts, counts)
