"""Linear erasure of a model: sites, rows and weights of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from manifold_unlearn.activations.capture import SINK_RATIO, Activations, capture
from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.erase.subspace import SubspaceEraser
from manifold_unlearn.intervene.bake import is_bakeable
from manifold_unlearn.intervene.edit import Edit
from manifold_unlearn.intervene.maps import DenseAffineMap

FitTokens = Literal["query", "answer"]


@dataclass(frozen=True)
class SubspaceRecipe:
    """What to erase with, and where; the defaults are what ``experiments/erase_sweep.py`` chose.

    All sites are fitted on the unedited model. (Fitted one after the other, each on what the edits
    before it leave, they forget several times less: docs/research/linear_erasure.md.)
    """

    parts: tuple[str, ...] = ("attn", "mlp")
    """Parts of a block whose output is edited: ``attn``, ``mlp``, ``mlp.hidden``, or ``""`` for
    the stream behind the block."""
    first: float = 8 / 30
    """First edited block, as a share of the depth."""
    last: float = 28 / 30
    """End of the edited blocks (exclusive), as a share of the depth."""
    method: str = "contrastive"
    rank: int = 1
    tokens: FitTokens = "query"
    """Rows of a question to tell apart: ``query`` is the token that predicts the answer's first,
    ``answer`` all that predict one of the answer's. Plain texts always give all their rows."""
    context_share: float = 0.5
    """Weight of the other prompt tokens of the retain questions, together, as a share of the
    weight of those that are told apart."""
    text_share: float = 0.5
    """Weight of the tokens of the plain texts to retain, together, likewise."""

    def sites(self, model: Any) -> list[str]:
        """Sites in a model, in the order in which they are computed."""
        n = len(find_decoder(model).blocks)
        blocks = range(round(self.first * n), max(round(self.first * n) + 1, round(self.last * n)))
        return [f"layers.{i}.{part}".rstrip(".") for i in blocks for part in self.parts]


def fit_edit(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Item],
    retain: Sequence[Item],
    recipe: SubspaceRecipe,
    *,
    bakeable: bool = False,
) -> Edit:
    """Fit one eraser a site on the rows of both sets.

    With ``bakeable`` the edit is what :func:`bake` can take: a site without an exact weight edit is
    an error, and where the architecture has no room for a bias the erasers are fitted without.
    """
    sites = recipe.sites(model)
    affine = not bakeable or _has_room_for_biases(model, sites)
    items = [*forget, *retain]
    acts = capture(model, tokenizer, [item.captured for item in items], sites)
    return fit_maps(acts, items, len(forget), recipe, sites, affine=affine)


def fit_maps(
    acts: Activations,
    items: Sequence[Item],
    n_forget: int,
    recipe: SubspaceRecipe,
    sites: Sequence[str],
    *,
    affine: bool = True,
) -> Edit:
    """Fit one eraser a site on captured rows; the arguments are those of :func:`fit_weights`."""
    weight = fit_weights(acts, items, n_forget, recipe)
    chosen = weight > 0
    y = (acts.text_index < n_forget).long()
    maps = {}
    for site in sites:
        rows = acts[site]
        norms = torch.linalg.vector_norm(rows.float(), dim=1)
        sinks = rows[norms > SINK_RATIO * norms.median()]
        eraser = SubspaceEraser(recipe.method, recipe.rank, affine=affine)  # type: ignore[arg-type]
        eraser.fit(rows[chosen], y[chosen], weight[chosen], fixed=sinks)
        maps[site] = eraser.map_
    return Edit(maps)


def _has_room_for_biases(model: Any, sites: Sequence[str]) -> bool:
    refused = [site for site in sites if not is_bakeable(model, site)]
    if refused:
        raise ValueError(
            f"sites {refused} have no exact weight edit; use parts 'attn', 'mlp' or 'mlp.hidden', "
            "or leave the edit in hooks (bake=False)."
        )
    probe = _unit_bias(model)
    return all(is_bakeable(model, site, probe) for site in sites)


def _unit_bias(model: Any) -> DenseAffineMap:
    width = model.get_input_embeddings().weight.shape[1]
    return DenseAffineMap(torch.eye(width), torch.ones(width))


def fit_weights(
    acts: Activations, items: Sequence[Item], n_forget: int, recipe: SubspaceRecipe
) -> Tensor:
    """Weight of every captured row in the fit; 0 leaves it out.

    Parameters
    ----------
    acts : Activations
        Every token of the items' texts (``tokens="all"``), the forget items first.
    items : sequence of Item
        ``weight`` multiplies that of the item's rows.
    n_forget : int
    recipe : SubspaceRecipe

    Returns
    -------
    Tensor of shape (n_tokens,), float64
        Sinks, special tokens, and the first token of each text (a sink at some depth in every
        model that has no beginning-of-sequence token) weigh 0.
    """
    if recipe.tokens not in get_args(FitTokens):
        raise ValueError(
            f"tokens={recipe.tokens!r} is not one of {', '.join(get_args(FitTokens))}."
        )
    asked = torch.tensor([bool(item.answer) for item in items])[acts.text_index]
    usable = ~(acts.sink | acts.special | (acts.position == 0))
    before_answer = torch.cat([acts.answer[1:], acts.answer.new_zeros(1)])
    told_apart = before_answer & (~acts.answer if recipe.tokens == "query" else True)
    retained = acts.text_index >= n_forget
    weight = torch.tensor([item.weight for item in items], dtype=torch.float64)[acts.text_index]
    weight[~usable] = 0
    weight[asked & ~told_apart] = 0
    mass = float(weight[asked & retained].sum())
    if mass > 0:
        context = asked & retained & usable & ~told_apart & ~acts.answer
        for rows, share in (
            (context, recipe.context_share),
            (retained & ~asked, recipe.text_share),
        ):
            weight[rows & usable] = share * mass / max(1, int((rows & usable).sum()))
    return weight
