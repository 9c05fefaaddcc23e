"""Features in the JSON that Neuronpedia reads, and in that of attribution graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manifold_unlearn import artifact
from manifold_unlearn.dictionary.cards import FeatureCard
from manifold_unlearn.dictionary.contexts import Context

_TOP = {"bin_min": -1.0, "bin_contains": -1.0}
"""How the strongest contexts are marked."""


def neuronpedia_feature(card: FeatureCard, *, dataset: str = "") -> dict[str, Any]:
    """A feature with the fields of Neuronpedia's dashboards.

    Parameters
    ----------
    card : FeatureCard
    dataset : str
        Name of the corpus.

    Returns
    -------
    dict
        Plain numbers, texts and lists: ``feature_index``; ``neuron_alignment_*``,
        ``correlated_neurons_*`` (empty: neurons are not looked at) and ``correlated_features_*``;
        ``neg_str`` and ``pos_str`` with values; ``frac_nonzero``; ``freq_hist_data_bar_*`` and
        ``logits_hist_data_bar_*``, values being the middles of the bars; ``activations``, of which
        the strongest have ``bin_min`` and ``bin_contains`` of -1.

    References
    ----------
    SAEDashboard (github.com/jbloomAus/SAEDashboard), which writes these fields.
    """
    neurons, alike = (list(zip(*rows, strict=True)) for rows in (card.neurons, card.correlated))
    shown: list[dict[str, Any]] = [
        _activation(context, _TOP | {"bin_max": card.act_max}) for context in card.strongest
    ]
    for part in card.quantiles:
        bounds = {"bin_min": part.low, "bin_max": part.high, "bin_contains": part.share}
        shown += [_activation(context, bounds) for context in part.contexts]
    edges = np.linspace(0, card.upper, len(card.histogram) + 1)
    return {
        "feature_index": card.latent,
        "neuron_alignment_indices": list(neurons[0]) if neurons else [],
        "neuron_alignment_values": list(neurons[1]) if neurons else [],
        "neuron_alignment_l1": list(neurons[2]) if neurons else [],
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": list(alike[0]) if alike else [],
        "correlated_features_pearson": list(alike[1]) if alike else [],
        "correlated_features_l1": list(alike[2]) if alike else [],
        "neg_str": [token for token, _ in card.lowered],
        "neg_values": [value for _, value in card.lowered],
        "pos_str": [token for token, _ in card.raised],
        "pos_values": [value for _, value in card.raised],
        "frac_nonzero": card.frequency,
        "freq_hist_data_bar_values": _middles(edges),
        "freq_hist_data_bar_heights": [float(count) for count in card.histogram],
        "logits_hist_data_bar_values": _middles(card.logit_edges),
        "logits_hist_data_bar_heights": [float(count) for count in card.logit_histogram],
        "n_prompts_total": card.n_texts,
        "n_tokens_in_prompt": max((len(one["tokens"]) for one in shown), default=0),
        "dataset": dataset,
        "decoder_weights_dist": [],
        "activations": shown,
    }


def neuronpedia_batch(
    cards: Sequence[FeatureCard], *, model_id: str, layer: int, sae_set: str, dataset: str = ""
) -> dict[str, Any]:
    """Features of one dictionary as Neuronpedia takes them in: one file.

    Parameters
    ----------
    cards : sequence of FeatureCard
    model_id, sae_set : str
    layer : int
    dataset : str

    Raises
    ------
    ValueError
        No card.
    """
    if not cards:
        raise ValueError("cards is empty; give at least one feature.")
    features = [neuronpedia_feature(card, dataset=dataset) for card in cards]
    return {"model_id": model_id, "layer": layer, "sae_set": sae_set, "features": features}


def attribution_feature(card: FeatureCard, *, transcoder_id: str = "") -> dict[str, Any]:
    """A feature as the front ends of attribution graphs read it.

    Parameters
    ----------
    card : FeatureCard
    transcoder_id : str

    Returns
    -------
    dict
        ``transcoder_id``, ``index``, ``examples_quantiles`` (strongest first, then the quantiles),
        ``top_logits``, ``bottom_logits``, ``act_min``, ``act_max``, ``quantile_values``,
        ``histogram``, ``activation_frequency``; and ``label``.
    """
    named = [("Top activations", card.strongest)]
    named += [(f"{part.low:.3g} to {part.high:.3g}", part.contexts) for part in card.quantiles]
    seen: set[tuple[int, int]] = set()
    return {
        "transcoder_id": transcoder_id,
        "index": card.latent,
        "label": card.label,
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(one, seen) for one in contexts]}
            for name, contexts in named
        ],
        "top_logits": [token for token, _ in card.raised],
        "bottom_logits": [token for token, _ in card.lowered],
        "act_min": min((part.low for part in card.quantiles), default=0.0),
        "act_max": card.act_max,
        "quantile_values": [part.low for part in card.quantiles],
        "histogram": [int(count) for count in card.histogram],
        "activation_frequency": card.frequency,
    }


def save_json(value: Any, path: str | Path) -> None:
    """Write plain lists and numbers to ``path`` atomically; NaN and infinity are an error."""
    artifact.write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False))


def _activation(context: Context, bounds: dict[str, float]) -> dict[str, Any]:
    return bounds | {
        "tokens": list(context.tokens),
        "values": list(context.values),
        "qualifying_token_index": context.at,
    }


def _example(context: Context, seen: set[tuple[int, int]]) -> dict[str, Any]:
    place = (context.text, context.position)
    repeated = place in seen
    seen.add(place)
    return {
        "tokens": list(context.tokens),
        "tokens_acts_list": list(context.values),
        "train_token_ind": context.at,
        "is_repeated_datapoint": repeated,
    }


def _middles(edges: np.ndarray) -> list[float]:
    return [float(value) for value in (edges[1:] + edges[:-1]) / 2]
