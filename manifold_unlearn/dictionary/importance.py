"""Latents that matter to what is forgotten and not to what is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import as_rows
from manifold_unlearn.dictionary.codes import SparseCode
from manifold_unlearn.dictionary.coding import as_code

Score = Literal[
    "log_odds",
    "z",
    "frequency_ratio",
    "frequency_difference",
    "mean_ratio",
    "contribution",
    "contribution_ratio",
]
SCORES: tuple[str, ...] = Score.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """How often and how strongly each latent fires on a set of rows.

    Attributes
    ----------
    n_rows : int
    count : array of shape (n_latents,), int64
        Rows on which it fires.
    total, square : arrays of shape (n_latents,), float64
        Sums of its absolute activation and of the square.
    """

    n_rows: int
    count: np.ndarray
    total: np.ndarray
    square: np.ndarray

    @property
    def frequency(self) -> np.ndarray:
        """Share of the rows on which it fires."""
        return self.count / self.n_rows

    @property
    def mean(self) -> np.ndarray:
        """Mean absolute activation over all rows."""
        return self.total / self.n_rows


def latent_statistics(codes: Any) -> LatentStatistics:
    """Firing counts and sums of latents, from codes of any number of blocks of rows.

    Parameters
    ----------
    codes : SparseCode, array or Tensor of shape (n, n_latents), or an iterable of these
        A generator of blocks is read once; nothing but the sums is kept.

    Raises
    ------
    ValueError
        No row, or blocks of different numbers of latents.
    """
    blocks: Iterable[Any] = [codes] if hasattr(codes, "value") or hasattr(codes, "ndim") else codes
    sums: Tensor | None = None
    n_rows = 0
    for block in blocks:
        code = as_code(block)
        added = _sums(code)
        if sums is not None and sums.shape != added.shape:
            raise ValueError(
                f"a block has {code.n_latents} latents, those before it {sums.shape[1]}; give "
                "codes of one dictionary."
            )
        sums = added if sums is None else sums + added
        n_rows += code.n_rows
    if sums is None or n_rows == 0:
        raise ValueError("codes has no rows; give at least one.")
    count, total, square = sums.cpu().numpy()
    return LatentStatistics(n_rows, count.astype(np.int64), total, square)


def _sums(code: SparseCode) -> Tensor:
    strength = code.value.detach().abs().double()
    parts = torch.stack([torch.ones_like(strength), strength, strength.square()])
    return parts.new_zeros(3, code.n_latents).index_add_(1, code.latent, parts)


@dataclass(frozen=True, eq=False)
class LatentImportance:
    """Forget and retain figures of every latent; all arrays (n_latents,), float64.

    Attributes
    ----------
    forget, retain : LatentStatistics
    log_odds : array
        ``log((a + s) / (n - a + s)) - log((b + s) / (m - b + s))`` for ``a`` of ``n`` forget rows
        and ``b`` of ``m`` retain rows that fire, with smoothing ``s``: nats, 0 where alike.
    z : array
        Log-odds over their standard error, rows taken as independent: those of one text are not,
        so read it as an order.
    frequency_ratio : array
        ``((a + s) / (n + 2 s)) / ((b + s) / (m + 2 s))``.
    frequency_difference : array
        ``a / n - b / m``.
    mean_ratio : array
        Mean activation on forget over that on retain rows, both with ``s / rows`` times the
        latent's mean activation where it fires added; 1 for a latent that never fires.
    contribution : array
        Mean activation times length of the decoder's row, forget less retain: how much longer the
        latent's mean write is on forget rows, units of the data.
    contribution_ratio : array
        Its write's share among all writes on forget rows over that on retain rows, with the
        smoothing of ``mean_ratio``.
    smoothing : float
    """

    forget: LatentStatistics
    retain: LatentStatistics
    log_odds: np.ndarray
    z: np.ndarray
    frequency_ratio: np.ndarray
    frequency_difference: np.ndarray
    mean_ratio: np.ndarray
    contribution: np.ndarray
    contribution_ratio: np.ndarray
    smoothing: float

    def top(
        self,
        n: int | None = None,
        *,
        by: Score = "log_odds",
        max_retain_frequency: float = 1.0,
        min_count: int = 1,
    ) -> np.ndarray:
        """Latents by importance, the greatest first.

        Parameters
        ----------
        n : int, optional
            Default: all that pass.
        by : str, default="log_odds"
            One of ``SCORES``.
        max_retain_frequency : float, default=1.0
            Leave out latents that fire more often on retain rows.
        min_count : int, default=1
            Leave out latents that fire on fewer forget rows.

        Returns
        -------
        array of int64

        Raises
        ------
        ValueError
            An unknown score.
        """
        if by not in SCORES:
            raise ValueError(f"by={by!r} is not one of {SCORES}.")
        fit = (self.retain.frequency <= max_retain_frequency) & (self.forget.count >= min_count)
        passed = np.flatnonzero(fit)
        order = np.argsort(-getattr(self, by)[passed], kind="stable")
        return passed[order][:n].astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """All arrays as lists, frequencies and means of both sides included."""
        found: dict[str, Any] = {name: getattr(self, name).tolist() for name in SCORES}
        for side in ("forget", "retain"):
            figures = getattr(self, side)
            found |= {f"{side}_frequency": figures.frequency.tolist()}
            found |= {f"{side}_mean": figures.mean.tolist(), f"{side}_rows": figures.n_rows}
        return found | {"smoothing": self.smoothing}


def latent_importance(
    forget: Any, retain: Any, decoder: Any = None, *, smoothing: float = 0.5
) -> LatentImportance:
    """How much more each latent has to do with forget rows than with retain rows.

    Parameters
    ----------
    forget, retain : LatentStatistics, or what :func:`latent_statistics` takes
    decoder : array or Tensor of shape (n_latents, d), optional
        Rows whose lengths weight the contributions. Default: all of length 1.
    smoothing : float, default=0.5
        Added to counts that are compared (Haldane and Anscombe): with 0 a latent that never fires
        on retain rows would be infinitely important.

    Returns
    -------
    LatentImportance

    Raises
    ------
    ValueError
        Sides or decoder of different numbers of latents, or ``smoothing`` that is not positive.

    References
    ----------
    Farrell, Lau and Conmy (2024), Applying sparse autoencoders to unlearn knowledge in language
    models, arXiv:2410.19278 (frequencies on forget and retain rows).
    """
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing={smoothing} must be positive and finite.")
    sides = [
        side if isinstance(side, LatentStatistics) else latent_statistics(side)
        for side in (forget, retain)
    ]
    sizes = [len(side.count) for side in sides]
    norms = np.ones(sizes[0])
    if decoder is not None:
        norms = as_rows(decoder, name="decoder").norm(dim=1).double().cpu().numpy()
    if len({*sizes, len(norms)}) != 1:
        raise ValueError(
            f"forget has {sizes[0]} latents, retain {sizes[1]}, the decoder {len(norms)}; give "
            "those of one dictionary."
        )
    s = smoothing
    fired = [side.count + s for side in sides]
    silent = [side.n_rows - side.count + s for side in sides]
    log_odds = np.log(fired[0] / silent[0]) - np.log(fired[1] / silent[1])
    error = np.sqrt(sum(1 / part for part in (*fired, *silent)))
    both = sides[0].count + sides[1].count
    strength = (sides[0].total + sides[1].total) / np.maximum(both, 1)
    strength = np.where(both > 0, strength, 1.0)
    means = [(side.total + s * strength) / side.n_rows for side in sides]
    writes = [mean * norms for mean in means]
    shares = [write / max(write.sum(), 1e-300) for write in writes]
    frequency = [(side.count + s) / (side.n_rows + 2 * s) for side in sides]
    return LatentImportance(
        forget=sides[0],
        retain=sides[1],
        log_odds=log_odds,
        z=log_odds / error,
        frequency_ratio=frequency[0] / frequency[1],
        frequency_difference=sides[0].frequency - sides[1].frequency,
        mean_ratio=np.where(both > 0, means[0] / means[1], 1.0),
        contribution=(sides[0].mean - sides[1].mean) * norms,
        contribution_ratio=np.where(
            (both > 0) & (norms > 0), shares[0] / np.maximum(shares[1], 1e-300), 1.0
        ),
        smoothing=smoothing,
    )
