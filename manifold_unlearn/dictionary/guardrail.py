"""Clamping only in texts that show often enough that they speak of what is to be forgotten."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import LabeledMixin, forget_mask, generator, restore, validate
from manifold_unlearn.conformal import conformal_quantile
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.dictionary.feature_eraser import FeatureEraser
from manifold_unlearn.sequences import Padded, padded, row_labels


@dataclass(frozen=True, eq=False)
class GuardedClamp:
    """A clamp that acts from the token on at which a sequence has shown enough.

    After ``t`` tokens, in ``n`` of which a chosen latent fires, a sequence has shown
    ``n / max(t, min_tokens)``. Once that exceeds ``threshold`` the clamp acts until the sequence
    ends; nothing before it is changed. Used through :meth:`step`, as :func:`intervene` does.
    """

    clamp: FeatureClamp
    threshold: float
    min_tokens: int
    evidence_shape: ClassVar[tuple[int, ...]] = (3,)
    """Tokens in which a latent fired, all tokens, the largest share so far"""

    @property
    def evidence(self) -> Literal["sequence"]:
        """All rows of a sequence up to a row count."""
        return "sequence"

    @property
    def n_features_in_(self) -> int:
        """Width of the rows."""
        return self.clamp.n_features_in_

    def __call__(self, h: Tensor) -> Tensor:  # noqa: ARG002
        """Raise ``ValueError``: rows alone do not say where a sequence begins."""
        raise ValueError(
            "a guardrail needs the rows of a sequence in order: use step(), as intervene() does, "
            "or transform(X, sequence)."
        )

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the next rows of sequences; see :class:`~.maps.SequentialSiteMap`.

        Parameters
        ----------
        h : Tensor of shape (batch, length, d)
        start : Tensor of shape (batch, 3)
        present : Tensor of shape (batch, length), bool

        Returns
        -------
        edited : Tensor of shape (batch, length, d)
        evidence : Tensor of shape (batch, length, 3)
        """
        if h.device != self.clamp.coder.device:
            return self.to(h.device, h.dtype).step(h, start, present)
        active = self.clamp.activations(h)
        evidence = self.gathered((active != 0).any(-1), start, present)
        opened = (evidence[..., 2] > self.threshold) & present
        edited = self.clamp.edited(h, torch.where(opened[..., None], active, 0.0))
        return torch.where(opened[..., None], edited, h), evidence

    def gathered(self, fires: Tensor, start: Tensor, present: Tensor) -> Tensor:
        """Evidence (batch, length, 3) after every row of which it is known whether it fires."""
        hits = (fires & present).to(start.dtype).cumsum(1) + start[:, :1]
        seen = present.to(start.dtype).cumsum(1) + start[:, 1:2]
        share = hits / seen.clamp(min=self.min_tokens)
        highest = torch.maximum(share.cummax(1).values, start[:, 2:])
        return torch.stack([hits, seen, highest], dim=-1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> GuardedClamp:
        """Return the same map where rows of this device and dtype need it."""
        return GuardedClamp(self.clamp.to(device, dtype), self.threshold, self.min_tokens)


class FeatureGuardrail(LabeledMixin, TransformerMixin, BaseEstimator):
    """A :class:`FeatureEraser` that acts only in sequences full enough of its latents.

    The share of a sequence's tokens in which a chosen latent fires decides, counted up to the
    current token, so that generation with a cache is edited as one pass over the text is. The
    threshold comes from retain sequences that did not choose the latents: a further exchangeable
    retain sequence exceeds it with a chance of at most ``promised_rate_``.

    Parameters
    ----------
    eraser : FeatureEraser
        Not fitted here; its parameters are used.
    false_positive_rate : float in (0, 1), default=0.05
    min_tokens : int, default=4
        A shorter beginning counts as this many tokens, so that no first token decides alone.
    held_out : float in (0, 1), default=0.5
        Share of the retain sequences that set the threshold; the others choose the latents.
    random_state : int, RandomState or None, default=None
        Of which sequences are held out.

    Attributes
    ----------
    eraser_ : FeatureEraser
    threshold_ : float
        The clamp acts strictly above it.
    promised_rate_ : float
        ``false_positive_rate``, or ``1 / (n + 1)`` with too few sequences for it.
    opened_ : float
        Share of the forget sequences, those that chose the latents, in which it acts at some token.
    map_ : GuardedClamp
    n_features_in_ : int

    References
    ----------
    Muhamed et al. (2025), SAEs can improve unlearning: dynamic sparse autoencoder guardrails,
    arXiv 2504.08192: there the share is of the whole prompt, and the threshold a quantile. Vovk,
    Gammerman and Shafer (2005), Algorithmic learning in a random world, for the promised rate.
    """

    def __init__(
        self,
        eraser: FeatureEraser,
        *,
        false_positive_rate: float = 0.05,
        min_tokens: int = 4,
        held_out: float = 0.5,
        random_state: Any = None,
    ):
        self.eraser = eraser
        self.false_positive_rate = false_positive_rate
        self.min_tokens = min_tokens
        self.held_out = held_out
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, sequence: Any = None) -> Self:
        """Choose the latents and set the threshold.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
            Rows of a sequence in their order.
        y : array or Tensor of shape (n_samples,)
            1 marks forget. A sequence with such a row is a forget sequence.
        sequence : array or Tensor of shape (n_samples,), int
            Which text each row is of.

        Raises
        ------
        ValueError
            As :meth:`FeatureEraser.fit`; no sequence, fewer than 2 retain sequences, a parameter
            out of range.

        Warns
        -----
        UserWarning
            Fewer held-out sequences than the rate needs: names the number.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2)
        forget = forget_mask(y, len(rows)).to(rows.device)
        layout = _layout(sequence, rows)
        of_forget = layout.fill(forget, False).any(1)
        held = self._held_out(of_forget)
        chosen = type(self.eraser)(**self.eraser.get_params(deep=False))
        fitted = ~held[layout.line]
        self.eraser_ = chosen.fit(rows[fitted], forget[fitted].long())
        self.map_ = GuardedClamp(chosen.map_, math.inf, self.min_tokens)
        most = self._evidence(rows, layout)[..., 2].amax(1)
        self.threshold_, self.promised_rate_ = self._threshold(most[held])
        self.map_ = GuardedClamp(chosen.map_, self.threshold_, self.min_tokens)
        self.opened_ = float((most[of_forget] > self.threshold_).double().mean())
        return self

    def _held_out(self, of_forget: Tensor) -> Tensor:
        """Mark the retain sequences (n_sequences,) that set the threshold."""
        retain = (~of_forget).nonzero()[:, 0]
        if len(retain) < 2:
            raise ValueError(
                f"{len(retain)} retain sequences cannot both choose latents and set a threshold; "
                "give at least 2, better many."
            )
        order = torch.randperm(len(retain), generator=generator(self.random_state))
        n_held = min(max(1, round(self.held_out * len(retain))), len(retain) - 1)
        held = torch.zeros_like(of_forget)
        held[retain[order[:n_held].to(retain.device)]] = True
        return held

    def _threshold(self, most: Tensor) -> tuple[float, float]:
        """Least value that a further sequence exceeds with at most the chance asked for."""
        n, rate = len(most), self.false_positive_rate
        found = conformal_quantile(most, rate)
        if n < found.n_needed:
            warnings.warn(
                f"{n} held-out retain sequences promise a false-positive rate of "
                f"{found.promised_rate:.3g} at best; {rate} needs {found.n_needed}. Give more "
                "retain texts.",
                UserWarning,
                stacklevel=3,
            )
        return found.value, found.promised_rate

    def _check_parameters(self) -> None:
        if not isinstance(self.eraser, FeatureEraser):
            raise ValueError(f"eraser is a {type(self.eraser).__name__}, not a FeatureEraser.")
        for name in ("false_positive_rate", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1).")
        if not isinstance(self.min_tokens, Integral) or self.min_tokens < 1:
            raise ValueError(f"min_tokens={self.min_tokens!r} must be an integer of at least 1.")

    @torch.no_grad()
    def _evidence(self, rows: Tensor, layout: Padded) -> Tensor:
        """Evidence (n_sequences, n_columns, 3) after every row of every sequence."""
        clamp = self.map_.clamp
        fires = (clamp.activations(rows.to(clamp.coder.device)) != 0).any(1).to(rows.device)
        laid, present = (layout.fill(given, False) for given in (fires, torch.ones_like(fires)))
        start = rows.new_zeros(len(laid), 3, dtype=torch.float32)
        return self.map_.gathered(laid, start, present)

    @torch.no_grad()
    def transform(self, X: Any, sequence: Any = None) -> Any:
        """Erased rows, in the kind of ``X`` (n_samples, n_features).

        ``sequence`` (n_samples,) int says which text a row is of; the rows of one are in order.
        Default: all rows are one sequence.
        """
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        opened = self._opened(rows, sequence)
        edited = self.eraser_.map_(rows)
        return restore(torch.where(opened[:, None], edited, rows), X)

    def gate(self, X: Any, sequence: Any = None) -> Any:
        """1 at rows (n_samples,) at which the clamp acts, else 0; as :meth:`transform`."""
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        return restore(self._opened(rows, sequence).to(rows.dtype), X)

    def _opened(self, rows: Tensor, sequence: Any) -> Tensor:
        if sequence is None:
            sequence = np.zeros(len(rows), dtype=np.int64)
        layout = _layout(sequence, rows)
        return self._evidence(rows, layout)[layout.line, layout.column, 2] > self.threshold_

    def __call__(self, h: Tensor) -> Tensor:
        """Raise ``ValueError``; see :meth:`GuardedClamp.__call__`."""
        check_is_fitted(self)
        return self.map_(h)

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the next rows of sequences; see :meth:`GuardedClamp.step`."""
        check_is_fitted(self)
        return self.map_.step(h, start, present)

    @property
    def evidence_shape(self) -> tuple[int, ...]:
        """Numbers of evidence a row."""
        return GuardedClamp.evidence_shape

    def to(self, device: torch.device | str, dtype: torch.dtype) -> GuardedClamp:
        """Return the fitted map, ready for hidden states of this device and dtype."""
        check_is_fitted(self)
        return self.map_.to(device, dtype)

    def save(self, directory: str | Path) -> None:
        """Write parameters, eraser and threshold to a directory that :meth:`load` reads."""
        check_is_fitted(self)
        directory = Path(directory)
        params = {name: v for name, v in self.get_params(deep=False).items() if name != "eraser"}
        if not isinstance(params["random_state"], int | None):
            params["random_state"] = None
        names = ("threshold_", "promised_rate_", "opened_")
        config = {"params": params, "fitted": {name: getattr(self, name) for name in names}}
        artifact.refuse_foreign(directory)
        with artifact.replacing(directory) as staged:
            artifact.save(staged, "FeatureGuardrail", {}, config)
            self.eraser_.save(staged / "eraser")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        _, config, _ = artifact.load(directory, kind="FeatureGuardrail")
        eraser = FeatureEraser.load(Path(directory) / "eraser")
        guardrail = cls(eraser, **config["params"])
        guardrail.eraser_ = eraser
        for name, value in config["fitted"].items():
            setattr(guardrail, name, value)
        guardrail.map_ = GuardedClamp(eraser.map_, guardrail.threshold_, guardrail.min_tokens)
        guardrail.n_features_in_ = eraser.n_features_in_
        return guardrail


def _layout(sequence: Any, rows: Tensor) -> Padded:
    """Where each row stands in a rectangle with one line a sequence."""
    if sequence is None:
        raise ValueError("sequence is missing: say which text each row is of, one integer a row.")
    return padded(row_labels(sequence, len(rows), "sequence").to(rows.device))
