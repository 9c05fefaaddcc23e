"""Conditional steering: a vector added only where a condition, fitted on examples, holds."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn.arrays import (
    LabeledMixin,
    as_rows,
    forget_mask,
    generator,
    keep_kind,
    restore,
    validate,
    working_dtype,
)
from manifold_unlearn.artifact import SavedMixin
from manifold_unlearn.conformal import conformal_quantile
from manifold_unlearn.sequences import padded, row_labels
from manifold_unlearn.steer.gated import Evidence, GatedShift
from manifold_unlearn.steer.strengths import checked_strength
from manifold_unlearn.steer.vectors import Method, SteeringVector, checked_vector

Similarity = Literal["cosine", "projection"]

_ROUNDING = 1e-5
"""Over the largest score: texts that begin alike share rows, and one of those may be the threshold,
which no rounding of another batch or chunk may pass."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Open (1) where a row's score along a direction passes a threshold, shut (0) elsewhere.

    Along a sequence it stays open from the first row on that opens it.
    """

    direction: Tensor
    """(d,), unit length"""
    center: Tensor
    """(d,): what the direction is read from"""
    threshold: float
    similarity: Similarity
    evidence: Evidence

    def scores(self, h: Tensor) -> Tensor:
        """Scores ``(...)`` of rows ``(..., d)`` in their working dtype."""
        wide = h.to(working_dtype(h.dtype)) - self.center.to(h.device, working_dtype(h.dtype))
        along = wide @ self.direction.to(wide)
        if self.similarity == "projection":
            return along
        length = torch.linalg.vector_norm(wide, dim=-1)
        return along / torch.where(length > 0, length, 1.0)

    def __call__(self, h: Tensor) -> Tensor:
        """Opening ``(...)``, 0 or 1, of rows ``(..., d)``, each by itself."""
        return (self.scores(h) > self.threshold).to(working_dtype(h.dtype))

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Opening of the next rows of sequences, twice: it is the evidence too."""
        opened = torch.where(present, self(h), 0.0)
        opened = torch.maximum(opened.cummax(-1).values, start[:, None].to(opened))
        return opened, opened

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Condition:
        """Return the same condition where and as precise as rows of ``dtype`` need it."""
        kind = working_dtype(dtype)
        parts = self.direction.to(device, kind), self.center.to(device, kind)
        return Condition(*parts, self.threshold, self.similarity, self.evidence)


class ConditionalVector(LabeledMixin, SavedMixin, TransformerMixin, BaseEstimator):
    """``h -> h + strength * v`` where a condition holds, and the identity to the bit elsewhere.

    The condition is a direction fitted on rows where to steer (``y == 1``) and where not to; it
    holds where a row's score along it is above a threshold that held-out rows of the second kind
    pass with at most the chance asked for.

    Parameters
    ----------
    strength : float, default=1.0
        How many times ``vector_`` is added; may be changed after the fit, and may be negative.
    condition : {"mean_difference", "pca", "probe"}, default="mean_difference"
        How the direction of the condition is fitted; see :class:`SteeringVector`.
    similarity : {"cosine", "projection"}, default="cosine"
        Cosine of ``h - center_`` with the direction, or its length along it in units of the data.
    false_positive_rate : float, default=0.01
        Chance, at most, that a new row where not to steer, or a new text of such rows, is steered.
    evidence : {"token", "sequence"}, default="token"
        Judge every row by itself, or steer from the first row of a text on that opens; the chance
        is then a text's. A sequence's first row, an attention sink, neither counts nor is steered.
    held_out : float, default=0.5
        Part of the rows (texts) where not to steer that sets the threshold and has no part in the
        direction; drawn at random unless ``calibration`` rows are given.
    preserve_norm : bool, default=False
        Rescale every steered row to the length it had.
    random_state : int, numpy Generator or None
        Of the draw.

    Attributes
    ----------
    vector_ : array of shape (n_features,)
        What strength 1 adds where the condition holds.
    direction_ : array of shape (n_features,)
        Of the condition; unit length, higher where to steer.
    center_ : array of shape (n_features,)
        Midpoint of the means of both kinds of rows.
    threshold_ : float
        The condition holds above it; above the score that sets it by the rounding of states.
    promised_rate_ : float
        Chance that the calibration carries; above ``false_positive_rate`` only with a warning.
    detection_rate_ : float
        Part of the rows (texts) with ``y == 1`` where the condition holds; those it was fitted on.
    n_calibration_ : int
        Rows (texts) that set the threshold.
    n_features_in_ : int

    Notes
    -----
    Conditional activation steering reads the cosine of ``h`` with its ``tanh``-squashed projection
    on the condition, once, of the prompt's mean, at an earlier layer than it steers. Here the
    cosine is of the row itself, taken about the midpoint of the classes (activations have a large
    common mean, about which raw cosines hardly differ) and with its sign, at the site that is
    steered; ``evidence="sequence"`` goes on steering once the condition has held.

    References
    ----------
    Lee et al. (2024), Programming refusal with conditional activation steering.
    Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world (the threshold).

    Examples
    --------
    >>>     >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(800, 8)), np.repeat([0, 1], 400)
    >>> X[y == 1, 0] += 8
    >>> gated = ConditionalVector(random_state=0).fit(X, y, vector=np.eye(8)[3])
    >>> moved = (gated.transform(X) != X).any(1)
    >>> bool(moved[y == 1].mean() > 0.95), bool(moved[y == 0].mean() < 0.03)
    (True, True)
    """

    def __init__(
        self,
        *,
        strength: float = 1.0,
        condition: Method = "mean_difference",
        similarity: Similarity = "cosine",
        false_positive_rate: float = 0.01,
        evidence: Evidence = "token",
        held_out: float = 0.5,
        preserve_norm: bool = False,
        random_state: Any = None,
    ):
        self.strength = strength
        self.condition = condition
        self.similarity = similarity
        self.false_positive_rate = false_positive_rate
        self.evidence = evidence
        self.held_out = held_out
        self.preserve_norm = preserve_norm
        self.random_state = random_state

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        vector: Any = None,
        sequence: Any = None,
        calibration: Any = None,
        calibration_sequence: Any = None,
    ) -> Self:
        """Fit the condition, and set its threshold.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks rows where to steer, everything else rows where not to.
        vector : array or Tensor of shape (n_features,), or SteeringVector, optional
            What is added; a fitted SteeringVector counts as what it adds at its own strength.
            Default: the difference of the class means.
        sequence : array of shape (n_samples,), int, optional
            Text of each row, for ``evidence="sequence"``. Default: every row is a text.
        calibration : array or Tensor of shape (n_rows, n_features), optional
            Rows where not to steer that set the threshold, instead of a random part of ``X``.
        calibration_sequence : array of shape (n_rows,), int, optional
            Text of each of them.

        Raises
        ------
        ValueError
            A side is empty or too small to hold rows out of it, data is not finite, an unknown
            option, a vector of another width or of no direction, equal class means.

        Warns
        -----
        UserWarning
            Fewer rows (texts) set the threshold than the rate needs: ``1 / rate - 1``.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2)
        steer = forget_mask(y, len(rows)).to(rows.device)
        text = row_labels(sequence, len(rows), "sequence").to(rows.device)
        used = torch.ones_like(steer)
        if calibration is None:
            used = ~self._drawn(text, ~steer)
            held, held_text = rows[~used], text[~used]
        else:
            held = as_rows(calibration, device=rows.device, name="calibration").to(rows.dtype)
            if held.shape[1] != rows.shape[1]:
                raise ValueError(
                    f"calibration has {held.shape[1]} features; X has {rows.shape[1]}."
                )
            held_text = row_labels(calibration_sequence, len(held), "calibration_sequence")
        fitted = SteeringVector(self.condition).fit(rows[used], steer[used].long())
        axis = fitted.vector_.double()
        self.direction_ = (axis / torch.linalg.vector_norm(axis)).to(rows.dtype)
        self.center_ = fitted.center_
        self._set_vector(vector, rows, steer)
        condition = self._condition(threshold=math.inf)
        self._calibrate(_largest(condition.scores(held), held_text.to(rows.device)))
        reached = _largest(condition.scores(rows[steer]), text[steer])
        self.detection_rate_ = float((reached > self.threshold_).double().mean())
        keep_kind(self, X)
        return self

    def _drawn(self, text: Tensor, eligible: Tensor) -> Tensor:
        """Rows (n_samples,) of a random part of the texts where not to steer."""
        kinds = torch.unique(text[eligible])
        if len(kinds) < 2:
            raise ValueError(
                f"{len(kinds)} row or text where not to steer cannot both fit the condition and "
                "set its threshold; give more, or calibration rows."
            )
        number = min(max(round(self.held_out * len(kinds)), 1), len(kinds) - 1)
        order = torch.randperm(len(kinds), generator=generator(self.random_state))
        return torch.isin(text, kinds[order[:number].to(kinds.device)]) & eligible

    def _set_vector(self, vector: Any, rows: Tensor, steer: Tensor) -> None:
        if vector is None:
            wide = rows.double()
            made = (wide[steer].mean(0) - wide[~steer].mean(0)).to(rows.dtype)
        else:
            made = checked_vector(vector).to(rows.device)
        if len(made) != rows.shape[1]:
            raise ValueError(f"vector has {len(made)} entries; X has {rows.shape[1]} features.")
        self.vector_ = made

    def _calibrate(self, scores: Tensor) -> None:
        n, rate = len(scores), float(self.false_positive_rate)
        found = conformal_quantile(scores, rate)
        self.threshold_ = found.value + _ROUNDING * float(scores.abs().max())
        self.promised_rate_ = found.promised_rate
        self.n_calibration_ = n
        if n < found.n_needed:
            warnings.warn(
                f"{n} rows or texts set the threshold; false_positive_rate={rate} needs "
                f"{found.n_needed}. The rate that holds is promised_rate_="
                f"{self.promised_rate_:.3g}. Give more, or ask for a higher rate.",
                UserWarning,
                stacklevel=4,
            )

    def _condition(self, threshold: float) -> Condition:
        parts = torch.as_tensor(self.direction_), torch.as_tensor(self.center_)
        return Condition(*parts, threshold, self.similarity, self.evidence)

    def _check_parameters(self) -> None:
        for name, known in (("similarity", Similarity), ("evidence", Evidence)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(known))}."
                )
        for name in ("false_positive_rate", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie between 0 and 1.")

    def scores(self, X: Any) -> Any:
        """Score of each row (n_samples,) along the condition; it holds above ``threshold_``."""
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        return restore(self._condition(self.threshold_).scores(rows), X)

    def gate(self, X: Any, sequence: Any = None) -> Any:
        """Where the condition holds (n_samples,): 0 or 1.

        With ``evidence="sequence"``, ``sequence`` (n_samples,) int says which text a row is of;
        rows of one text are in order, and from the first that opens on all are 1. Default: every
        row is its own text.
        """
        check_is_fitted(self)
        return restore(self._opening(validate(self, X, reset=False), sequence), X)

    def _opening(self, rows: Tensor, sequence: Any) -> Tensor:
        opened = self._condition(self.threshold_)(rows)
        if self.evidence == "token" or sequence is None:
            return opened
        text = row_labels(sequence, len(rows), "sequence").to(rows.device)
        layout = padded(text)
        return layout.fill(opened, 0).cummax(1).values[layout.line, layout.column]

    def transform(self, X: Any, sequence: Any = None) -> Any:
        """Steered rows, in the kind, dtype and device of ``X``; arguments as :meth:`gate`."""
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        placed = self.to(rows.device, rows.dtype)
        return restore(placed.moved(rows, self._opening(rows, sequence)), X)

    def __call__(self, h: Tensor) -> Tensor:
        """Steer hidden states ``(..., n_features)``; what :func:`intervene` calls."""
        return self.to(h.device, h.dtype)(h)

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Steer the next rows of sequences; see :class:`SequentialSiteMap`."""
        return self.to(h.device, h.dtype).step(h, start, present)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> GatedShift:
        """Return the map at its strength, ready for hidden states of this device and dtype."""
        check_is_fitted(self)
        shift = checked_strength(self.strength) * torch.as_tensor(self.vector_)
        condition = self._condition(self.threshold_)
        return GatedShift(shift, condition, self.preserve_norm).to(device, dtype)


def _largest(scores: Tensor, text: Tensor) -> Tensor:
    """Largest score of every text, ``(n_texts,)``."""
    _, line = torch.unique(text, return_inverse=True)
    found = scores.new_full((int(line.max()) + 1,), -math.inf)
    return found.scatter_reduce(0, line, scores, "amax")
