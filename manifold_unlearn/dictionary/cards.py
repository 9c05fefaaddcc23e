"""All that is known of a latent on one card, for dashboards and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.coding import checked_latents, select_latents
from manifold_unlearn.dictionary.contexts import Context, FeatureContexts
from manifold_unlearn.dictionary.effects import LogitEffects
from manifold_unlearn.dictionary.geometry import correlated_latents
from manifold_unlearn.dictionary.labels import NOTHING, LatentLabel

_NEIGHBORS = 3


@dataclass(frozen=True)
class Quantile:
    """Contexts of a range of strengths."""

    low: float
    high: float
    share: float
    """Of the tokens on which the latent fires."""
    contexts: tuple[Context, ...]


@dataclass(frozen=True, eq=False)
class FeatureCard:
    """What is known of one latent; empty where it was not asked."""

    latent: int
    label: str
    """Empty if there is none."""
    figures: dict[str, float]
    """Further numbers by name, such as the F1 of the label."""
    count: int
    n_tokens: int
    n_texts: int
    act_max: float
    mean: float
    histogram: np.ndarray
    """int64 (n_bins,): of strengths where it fires, in equal bins from 0 to ``upper``."""
    upper: float
    strongest: tuple[Context, ...]
    quantiles: tuple[Quantile, ...]
    """Strong ones first."""
    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]
    logit_histogram: np.ndarray
    """int64 (n_bins,), or empty."""
    logit_edges: np.ndarray
    neurons: tuple[tuple[int, float, float], ...]
    """Largest entries of the decoder row: index, value, share of the row's L1 norm."""
    correlated: tuple[tuple[int, float, float], ...]
    """Latents that fire alike: number, Pearson's correlation, cosine."""

    @property
    def frequency(self) -> float:
        """Share of the tokens on which it fires."""
        return self.count / self.n_tokens


def feature_cards(
    contexts: FeatureContexts,
    *,
    latents: Sequence[int] | None = None,
    effects: LogitEffects | None = None,
    labels: Sequence[LatentLabel] | Mapping[int, str] = (),
    figures: Mapping[str, Any] | None = None,
    decoder: Tensor | None = None,
    code: SparseCode | None = None,
    n_top: int = 10,
    n_quantiles: int = 5,
    n_per_quantile: int = 4,
) -> list[FeatureCard]:
    """Cards of latents.

    Parameters
    ----------
    contexts : FeatureContexts
    latents : sequence of int, optional
        Default: all in ``contexts``, in their order.
    effects : LogitEffects, optional
        Of these latents at least.
    labels : sequence of LatentLabel, or mapping of latent to str, optional
        Precision, recall, F1 and control of the first kind become figures.
    figures : mapping of str to array of shape (d_sae,), optional
        Such as ``{"log-odds": importance.log_odds}``, by the latent's number.
    decoder : Tensor of shape (d_sae, d), optional
        For the neurons that a latent is aligned with.
    code : SparseCode, optional
        Of all latents of the dictionary, for those that fire alike.
    n_top, n_quantiles, n_per_quantile : int
        Contexts of a card.

    Raises
    ------
    ValueError
        A latent that contexts or effects lack, or that figures, decoder or code are too short for.
    """
    wanted = contexts.latents.tolist() if latents is None else [int(one) for one in latents]
    said: dict[int, str] = dict(labels) if isinstance(labels, Mapping) else {}
    measured = {} if isinstance(labels, Mapping) else {one.latent: one for one in labels}
    near = _alike(code, wanted)
    cards = []
    for latent in wanted:
        row = contexts.index(latent)
        numbers = {name: _entry(name, values, latent) for name, values in (figures or {}).items()}
        if label := measured.get(latent):
            said[latent] = "" if label.text == NOTHING else label.text
            numbers |= {
                "F1": label.f1,
                "control": label.control,
                "precision": label.precision,
                "recall": label.recall,
            }
        parts = contexts.by_quantile(latent, n_quantiles, n_per_quantile)
        at = None if effects is None else effects.index(latent)
        cards.append(
            FeatureCard(
                latent=latent,
                label=said.get(latent, ""),
                figures=numbers,
                count=int(contexts.count[row]),
                n_tokens=contexts.n_tokens,
                n_texts=contexts.n_texts,
                act_max=float(contexts.act_max[row]),
                mean=float(contexts.mean[row]),
                histogram=contexts.histogram[row],
                upper=float(contexts.upper[row]),
                strongest=tuple(contexts.strongest(latent, n_top)),
                quantiles=tuple(
                    Quantile(low, high, 1 / len(parts), tuple(some)) for low, high, some in parts
                ),
                raised=() if effects is None else tuple(effects.raised(latent)),
                lowered=() if effects is None else tuple(effects.lowered(latent)),
                logit_histogram=np.zeros(0, int) if at is None else effects.histogram[at],  # type: ignore[union-attr]
                logit_edges=np.zeros(0) if at is None else effects.edges[at],  # type: ignore[union-attr]
                neurons=() if decoder is None else _neurons(decoder, latent),
                correlated=near.get(latent, ()),
            )
        )
    return cards


def _entry(name: str, values: Any, latent: int) -> float:
    if not 0 <= latent < len(values):
        raise ValueError(
            f"figure {name!r} has {len(values)} values, none for latent {latent}; give one for "
            "every latent of the dictionary."
        )
    return float(values[latent])


def _neurons(decoder: Tensor, latent: int) -> tuple[tuple[int, float, float], ...]:
    row = decoder[checked_latents([latent], len(decoder))[0]].detach().float()
    top = row.topk(min(_NEIGHBORS, len(row)))
    share = (top.values.abs() / row.abs().sum().clamp_min(1e-30)).tolist()
    return tuple(zip(top.indices.tolist(), top.values.tolist(), share, strict=True))


def _alike(
    code: SparseCode | None, wanted: Sequence[int]
) -> dict[int, tuple[tuple[int, float, float], ...]]:
    """Of each latent wanted those of the dictionary that fire alike."""
    if code is None:
        return {}
    checked_latents(list(dict.fromkeys(wanted)), code.n_latents)
    live = torch.unique(torch.cat([code.latent.cpu(), torch.tensor(list(wanted))]))
    found = correlated_latents(select_latents(code, live), _NEIGHBORS)
    place = {int(latent): i for i, latent in enumerate(live.tolist())}
    near = {}
    for latent in wanted:
        i = place[latent]
        there = np.flatnonzero(found.latents[i] >= 0)
        near[latent] = tuple(
            (
                int(live[found.latents[i, k]]),
                float(found.correlation[i, k]),
                float(found.cosine[i, k]),
            )
            for k in there
        )
    return near
