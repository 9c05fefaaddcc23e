"""What the model of the dictionary still does: its loss, its divergence, its agreement."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn.activations.capture import recording
from manifold_unlearn.activations.models import context_length, evaluating
from manifold_unlearn.activations.tokens import Batch, Encoding, Text, batches, encode
from manifold_unlearn.evaluate.dictionary_splice import (
    Coder,
    LeftAlone,
    ablated,
    sites_written,
    spliced,
)
from manifold_unlearn.evaluate.likelihood import BatchSize
from manifold_unlearn.evaluate.meta import percentiles
from manifold_unlearn.evaluate.results import N_RESAMPLES, Metric


@dataclass(frozen=True, eq=False)
class SpliceFidelity:
    """What is left of a model that runs on its dictionaries; all figures one a text.

    Losses are nats a token, mean over the predicted tokens of a text.
    """

    clean: Metric
    """Loss of the model as it is"""
    spliced: Metric
    """Loss of the model of the dictionaries"""
    zeroed: Metric
    """Loss where zeros stand at the sites that the dictionaries write to"""
    averaged: Metric
    """Loss where each site's mean row stands there: over all tokens but those left alone"""
    divergence: Metric
    """``KL(model || model of the dictionaries)``, nats a token"""
    zeroed_divergence: Metric
    """``KL(model || model with zeros)``"""
    agreement: Metric
    """Share of tokens at which both models have the same likeliest token"""

    @property
    def recovery(self) -> float:
        """``(zeroed - spliced) / (zeroed - clean)`` of the mean losses: 1 is the model, 0 zeros."""
        return float(_recovery(*(_mean(m) for m in self._losses(self.zeroed)))[0])

    @property
    def recovery_interval(self) -> tuple[float, float]:
        """95 % percentile bootstrap over texts, from a fixed seed."""
        return self._interval(self.zeroed)

    @property
    def recovery_over_mean(self) -> float:
        """As :attr:`recovery`, with mean rows in place of zeros."""
        return float(_recovery(*(_mean(m) for m in self._losses(self.averaged)))[0])

    @property
    def recovery_over_mean_interval(self) -> tuple[float, float]:
        """95 % percentile bootstrap over texts, from a fixed seed."""
        return self._interval(self.averaged)

    @property
    def divergence_recovery(self) -> float:
        """``1 - divergence / zeroed_divergence`` of the means; NaN where zeros change nothing."""
        whole = self.zeroed_divergence.mean
        return 1 - self.divergence.mean / whole if whole > 0 else float("nan")

    def to_json(self) -> dict[str, Any]:
        """All metrics, and the recoveries with their intervals; null where undefined."""
        shares = {
            "recovery": self.recovery,
            "recovery_over_mean": self.recovery_over_mean,
            "divergence_recovery": self.divergence_recovery,
        }
        intervals = {
            "recovery_interval": self.recovery_interval,
            "recovery_over_mean_interval": self.recovery_over_mean_interval,
        }
        names = ("clean", "spliced", "zeroed", "averaged", "divergence", "zeroed_divergence")
        return {
            **{name: value if np.isfinite(value) else None for name, value in shares.items()},
            **{k: list(v) if np.isfinite(v).all() else None for k, v in intervals.items()},
            **{name: getattr(self, name).to_json() for name in (*names, "agreement")},
        }

    def _losses(self, floor: Metric) -> tuple[Metric, Metric, Metric]:
        return self.clean, self.spliced, floor

    def _interval(self, floor: Metric) -> tuple[float, float]:
        n = len(floor.values)
        drawn = np.random.default_rng(0).integers(0, n, size=(N_RESAMPLES, n))
        found = _recovery(*(m.values[drawn].mean(axis=1) for m in self._losses(floor)))
        return percentiles(found) if np.isfinite(found).all() else (float("nan"), float("nan"))


def _mean(metric: Metric) -> np.ndarray:
    return np.array([metric.mean])


def _recovery(clean: np.ndarray, made: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """NaN where the floor is no worse than the model: there is nothing to recover."""
    lost = floor - clean
    return np.where(lost > 0, (floor - made) / np.where(lost > 0, lost, 1.0), np.nan)


def splice_fidelity(
    model: Any,
    tokenizer: Any,
    coders: Mapping[Any, Coder],
    texts: Sequence[Text],
    *,
    leave_tokens: Collection[int] = (),
    leave_first: bool = False,
    sink_ratio: float | None = None,
    batch_size: BatchSize = "auto",
) -> SpliceFidelity:
    """Loss, divergence and agreement of the model that runs on its dictionaries.

    All dictionaries are spliced in at once; call it with one for one layer. The tokens that are
    left alone are so in the ablations too.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    coders : mapping of place to SparseCoder or CrossLayerTranscoder
        As :func:`~manifold_unlearn.evaluate.dictionary_splice.spliced`.
    texts : sequence of str or (prompt, answer)
        Of two tokens or more. Take texts that no dictionary was trained on.
    leave_tokens, leave_first, sink_ratio
        As :func:`~manifold_unlearn.evaluate.dictionary_splice.spliced`.
    batch_size : int or "auto"

    Returns
    -------
    SpliceFidelity

    Raises
    ------
    ValueError
        As ``spliced``; no texts, a text of one token, a model that gives NaN (says which).
    """
    rows = encode(tokenizer, list(texts), context=context_length(model))
    if short := [i for i, row in enumerate(rows) if len(row) < 2]:
        raise ValueError(
            f"text {short[0]} ({texts[short[0]]!r}) has one token, and the first is not predicted; "
            "remove it."
        )
    made = batches(rows, batch_size=batch_size, token_budget=1024)
    left: dict[str, Any] = {
        "leave_tokens": leave_tokens,
        "leave_first": leave_first,
        "sink_ratio": sink_ratio,
    }
    sites = sites_written(coders)
    with evaluating(model), torch.no_grad():
        means = _mean_rows(model, made, sites, LeftAlone(leave_tokens, leave_first, sink_ratio))
        runs: dict[str, Any] = {
            "spliced": partial(spliced, model, coders, **left),
            "zeroed": partial(ablated, model, dict.fromkeys(sites), **left),
            "averaged": partial(ablated, model, means, **left),
        }
        names = ("clean", *runs, "divergence", "zeroed_divergence", "agreement")
        values = {name: np.full(len(rows), np.nan) for name in names}
        for batch in tqdm(made, desc="splice", unit="batch", disable=None, leave=False):
            log_p = _log_softmax(model, batch)
            for i, n, r, following in _texts_of(batch, rows):
                values["clean"][i] = _loss(log_p[r, :n], following)
            for name, run in runs.items():
                with run():
                    log_q = _log_softmax(model, batch)
                for i, n, r, following in _texts_of(batch, rows):
                    values[name][i] = _loss(log_q[r, :n], following)
                    if name == "averaged":
                        continue
                    p, q = log_p[r, :n], log_q[r, :n]
                    kl = float((p.exp() * (p - q)).sum(-1).clamp(min=0).double().mean())
                    values["divergence" if name == "spliced" else "zeroed_divergence"][i] = kl
                    if name == "spliced":
                        same = p.argmax(-1) == q.argmax(-1)
                        values["agreement"][i] = float(same.double().mean())
    for name, found in values.items():
        if not np.isfinite(found).all():
            raise ValueError(
                f"{name} of text {int(np.flatnonzero(~np.isfinite(found))[0])} is not finite: the "
                "model or a dictionary holds NaN, or overflows; check them, or use float32."
            )
    return SpliceFidelity(**{name: Metric(name, found) for name, found in values.items()})


def _log_softmax(model: Any, batch: Batch) -> Tensor:
    logits = model(
        input_ids=batch.input_ids.to(model.device),
        attention_mask=batch.attention_mask.to(model.device),
        position_ids=batch.position_ids.to(model.device),
        use_cache=False,
    ).logits
    return logits.float().log_softmax(-1)


def _texts_of(batch: Batch, rows: Sequence[Encoding]) -> Iterator[tuple[int, int, int, Tensor]]:
    """Of each text: its index, how many tokens are predicted, its row, and those tokens."""
    for r, i in enumerate(batch.index.tolist()):
        yield i, len(rows[i]) - 1, r, rows[i].ids[1:]


def _loss(log_p: Tensor, following: Tensor) -> float:
    right = log_p.gather(1, following.to(log_p.device)[:, None])
    return -float(right.double().mean())


def _mean_rows(
    model: Any, made: Sequence[Batch], sites: Sequence[str], left: LeftAlone
) -> dict[str, Tensor]:
    """Mean row of each site over the tokens that are neither padding nor left alone."""
    totals = dict.fromkeys(sites, torch.zeros(1, dtype=torch.float64))
    counts = dict.fromkeys(sites, 0)
    for batch in made:
        with left.watching(model), recording(model, sites) as seen:
            _log_softmax(model, batch)
        present = batch.attention_mask.bool()
        for site, found in seen.items():
            own = present.to(found[-1].device) & ~left.among(found[-1])
            totals[site] = totals[site] + found[-1][own].cpu().double().sum(0)
            counts[site] += int(own.sum())
    return {site: (total / max(counts[site], 1)).float() for site, total in totals.items()}
