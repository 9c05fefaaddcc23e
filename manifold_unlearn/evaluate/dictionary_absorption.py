"""Feature absorption: latents that stay silent where others carry their feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from manifold_unlearn.arrays import as_rows, row_blocks
from manifold_unlearn.dictionary import Crosscoder, SparseCoder
from manifold_unlearn.evaluate.dictionary_probing import (
    code_matrix,
    columns,
    fitted_probe,
    rank_by_difference,
)
from manifold_unlearn.evaluate.results import Metric

SILENT = 1e-8
"""A latent does not fire where its activation is below this."""
_BLOCK = 256


@dataclass(frozen=True)
class AbsorptionRule:
    """What counts as absorbed. The defaults are those of SAEBench."""

    f1_gain: float = 0.03
    """A further latent is one of the main ones while it raises the F1 by more than this."""
    max_split: int = 10
    """Most main latents"""
    least_cosine: float = 0.025
    """Of the strongest latent's decoder with the probe, for full absorption"""
    least_cosine_fraction: float = 0.1
    """Of each absorbing latent's decoder with the probe, for the fraction"""
    least_share: float = 0.4
    """Of the row's projection on the probe that absorbing latents must carry"""
    n_absorbing: int = 3
    """Most latents that may share in the fraction"""


@dataclass(frozen=True, eq=False)
class Absorption:
    """Where the main latents of a feature are silent and others carry it.

    One value for each held-out row of the feature that the probe reads right.
    """

    main: tuple[int, ...]
    """The main latents: one, or several that the feature is split into"""
    f1: tuple[float, ...]
    """Held out, of probes of 1, 2, ... latents, as far as was tried"""
    probe_f1: float
    """Held out, of the probe of whole rows: below about 0.9 the rest says little"""
    full: Metric
    """1 where no main latent fires and a single other one carries the feature, else 0"""
    fraction: Metric
    """Share of the feature carried by other latents, 0 to 1"""
    absorbing: np.ndarray
    """(n_read,) int64: the latent that carries the feature where ``full`` is 1, else -1"""

    def to_json(self) -> dict[str, Any]:
        """All figures, and how often each latent absorbs."""
        latents, counts = np.unique(self.absorbing[self.absorbing >= 0], return_counts=True)
        return {
            "main": list(self.main),
            "f1": list(self.f1),
            "probe_f1": self.probe_f1,
            "full": self.full.to_json(),
            "fraction": self.fraction.to_json(),
            "absorbing": dict(zip(map(str, latents.tolist()), counts.tolist(), strict=True)),
        }


def feature_absorption(
    coder: SparseCoder,
    rows: Tensor,
    labels: Sequence[bool] | np.ndarray,
    held_out: Sequence[bool] | np.ndarray,
    *,
    rule: AbsorptionRule = AbsorptionRule(),
) -> Absorption:
    """How much of a feature is taken over by latents of something more special.

    A logistic regression finds the feature's direction ``w`` in the rows, unit length; probes of 1,
    2, ... latents, ranked by the difference of their mean activations, find its main latents. Of a
    held-out row of the feature that the probe reads right, latent l carries ``f_l (W_dec[l] . w)``
    of the projection ``x . w``. The row is fully absorbed where no main latent fires, while the
    latent that carries most points along ``w`` and carries enough of it; the fraction also counts
    where the main latents fire too weakly.

    Parameters
    ----------
    coder : SparseCoder
        With a decoder that writes the rows it reads: no transcoder, no crosscoder, no
        normalization.
    rows : Tensor of shape (n, d_in)
    labels : sequence of bool of shape (n,)
        Rows that have the feature.
    held_out : sequence of bool of shape (n,)
        Rows to judge; the others train the probes. Keep one token in one part.
    rule : AbsorptionRule

    Returns
    -------
    Absorption

    Raises
    ------
    ValueError
        A coder of another kind, lengths that differ, a part with a single label, a probe that
        reads no held-out row of the feature right.

    References
    ----------
    Chanin et al. (2024), A is for absorption: studying feature splitting and absorption in sparse
    autoencoders, arXiv 2409.14507.
    Karvonen et al. (2025), SAEBench, arXiv 2503.09532 (absorption; there the main latents are
    ranked by a probe with an L1 penalty, and decoders have unit length).
    """
    _require_plain(coder)
    y, asked = (np.asarray(given).astype(bool) for given in (labels, held_out))
    if not len(rows) == len(y) == len(asked):
        raise ValueError(
            f"{len(rows)} rows with {len(y)} labels and {len(asked)} of held_out; give one each."
        )
    for name, part in (("held-out", asked), ("training", ~asked)):
        if len(np.unique(y[part])) < 2:
            raise ValueError(f"the {name} rows have a single label; both are needed.")
    X = as_rows(rows).double().cpu().numpy()
    probe = fitted_probe(X[~asked], y[~asked])
    right = asked & y & (probe.decision_function(X) > 0)
    if not right.any():
        raise ValueError(
            "the probe reads no held-out row of the feature right: nothing can be absorbed. Give "
            "more rows, or a site where the feature can be read."
        )
    codes = code_matrix(coder, rows)
    main, f1 = _main_latents(codes, y, asked, rule)
    w = probe.coef_[0] / np.linalg.norm(probe.coef_[0])
    decoder = coder.W_dec.detach().double().cpu().numpy()
    share = decoder @ w
    length = np.linalg.norm(decoder, axis=1)
    cosine = share / np.where(length > 0, length, 1.0)
    own, whole = codes[right], X[right] @ w
    silent = columns(own, np.array(main)).max(axis=1) < SILENT
    found = []
    for block in row_blocks(len(whole), _BLOCK):
        carried = own[block].multiply(share[None]).toarray()
        full, absorbing = _full(carried, silent[block], whole[block], cosine, rule)
        found.append((full, absorbing, _fraction(carried, main, whole[block], cosine, rule)))
    full, absorbing, fraction = (np.concatenate(values) for values in zip(*found, strict=True))
    return Absorption(
        tuple(main),
        tuple(f1),
        float(f1_score(y[asked], probe.predict(X[asked]))),
        Metric("full_absorption", full.astype(np.float64)),
        Metric("absorption_fraction", fraction),
        absorbing,
    )


def _main_latents(
    codes: Any, y: np.ndarray, asked: np.ndarray, rule: AbsorptionRule
) -> tuple[list[int], list[float]]:
    """Latents that a feature is split into, and the F1 of each number of them."""
    order = rank_by_difference(codes[~asked], y[~asked], for_label=True)
    main: list[int] = []
    tried: list[float] = []
    for k in range(1, min(rule.max_split, len(order)) + 1):
        Z = columns(codes, order[:k])
        probe = fitted_probe(Z[~asked], y[~asked])
        tried.append(float(f1_score(y[asked], probe.predict(Z[asked]), zero_division=0.0)))
        if k > 1 and tried[-1] <= tried[-2] + rule.f1_gain:
            break
        main = order[:k].tolist()
    return main, tried


def _full(
    carried: np.ndarray,
    silent: np.ndarray,
    whole: np.ndarray,
    cosine: np.ndarray,
    rule: AbsorptionRule,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are fully absorbed, and the latent that does it."""
    top = carried.argmax(axis=1)
    most = carried[np.arange(len(carried)), top]
    full = silent & (cosine[top] >= rule.least_cosine) & (whole >= 0)
    full &= most >= rule.least_share * whole
    return full, np.where(full, top, -1)


def _fraction(
    carried: np.ndarray,
    main: list[int],
    whole: np.ndarray,
    cosine: np.ndarray,
    rule: AbsorptionRule,
) -> np.ndarray:
    """Of what main and absorbing latents carry of each row, the share of the absorbing ones."""
    by_main = carried[:, main].sum(axis=1)
    others = np.where(cosine >= rule.least_cosine_fraction, carried, 0.0).clip(min=0)
    others[:, main] = 0
    most = np.sort(others, axis=1)[:, -rule.n_absorbing :].sum(axis=1)
    missing = np.minimum(most, whole - by_main)
    found = np.where(by_main <= 0, 1.0, missing / np.where(by_main > 0, missing + by_main, 1.0))
    enough = (by_main < whole) & (whole > 0) & (most >= rule.least_share * whole)
    return np.where(enough, found.clip(0, 1), 0.0)


def _require_plain(coder: SparseCoder) -> None:
    made_again = coder.d_in == coder.d_out and coder.W_skip is None and not coder.deep
    if not made_again or isinstance(coder, Crosscoder) or coder.normalization != "none":
        raise ValueError(
            f"the {type(coder).__name__} with normalization={coder.normalization!r} and deep="
            f"{coder.deep} does not write the rows it reads as a sum of its decoder's; use an "
            "autoencoder with neither."
        )
    if not bool(torch.isfinite(coder.W_dec).all()):
        raise ValueError("the decoder holds NaN or infinity; load or train it again.")
