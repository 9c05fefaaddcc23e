"""Erasure by latents: those that fire on what is to be forgotten, and seldom elsewhere, clamped."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import LabeledMixin, forget_mask, restore, validate
from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.dictionary.selection import choose_latents, firing_rates


class FeatureEraser(LabeledMixin, TransformerMixin, BaseEstimator):
    """Clamps the latents of a dictionary that tell forget rows from retain rows.

    A latent passes if it fires in at least ``min_forget_rate`` of the forget rows and in at most
    ``max_retain_rate`` of the retain rows. Of those that pass, the ``n_latents`` of largest ratio
    ``forget rate / (retain rate + 1 / n_retain)`` are clamped; see :class:`FeatureClamp`. Rows in
    which none of them fires are returned as they came, to the bit.

    Parameters
    ----------
    coder : SparseAutoencoder
        Of the site that the rows are from.
    n_latents : int, default=16
    min_forget_rate : float in (0, 1], default=0.05
        Higher finds latents of the whole topic, lower those of single items too.
    max_retain_rate : float in [0, 1], default=0.01
        Higher forgets more and harms more.
    value : float, default=0.0
        What an active latent is set to, in units of its mean activation over the forget rows in
        which it fires: 0 takes it out, -1 mirrors it.

    Attributes
    ----------
    latents_ : array of shape (m,), int
        Largest ratio first.
    forget_rate_, retain_rate_, ratio_ : array of shape (m,)
    activation_ : array of shape (m,)
        Mean activation over the forget rows in which the latent fires.
    map_ : FeatureClamp
    n_features_in_ : int

    References
    ----------
    Farrell, Lau and Conmy (2024), arXiv 2410.19278, for a bound on the retain rate and clamping
    below zero; Muhamed et al. (2025), arXiv 2504.08192, for the ratio.
    """

    def __init__(
        self,
        coder: SparseAutoencoder,
        n_latents: int = 16,
        *,
        min_forget_rate: float = 0.05,
        max_retain_rate: float = 0.01,
        value: float = 0.0,
    ):
        self.coder = coder
        self.n_latents = n_latents
        self.min_forget_rate = min_forget_rate
        self.max_retain_rate = max_retain_rate
        self.value = value

    def fit(self, X: Any, y: Any = None) -> Self:
        """Choose the latents.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks forget, everything else retain.

        Raises
        ------
        ValueError
            A side is empty, rows of another width than the dictionary's or not finite, a parameter
            out of range, or no latent passes: says how near the nearest came.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2)
        if rows.shape[1] != self.coder.d_in:
            raise ValueError(
                f"X has {rows.shape[1]} features; the dictionary reads {self.coder.d_in}. Give "
                "rows of the site that it was trained on."
            )
        rates = firing_rates(self.coder, rows, forget_mask(y, len(rows)).to(rows.device))
        chosen = choose_latents(
            rates,
            self.n_latents,
            min_forget_rate=self.min_forget_rate,
            max_retain_rate=self.max_retain_rate,
        )
        figures = (rates.forget, rates.retain, rates.ratio, rates.activation)
        self._keep(chosen, *(figure[chosen] for figure in figures), like=X)
        return self

    def _keep(
        self,
        latents: Tensor,
        forget_rate: Tensor,
        retain_rate: Tensor,
        ratio: Tensor,
        activation: Tensor,
        *,
        like: Any,
    ) -> None:
        self.map_ = FeatureClamp(self.coder, latents, self.value * activation)
        self.latents_ = restore(latents, like)
        self.forget_rate_ = restore(forget_rate, like)
        self.retain_rate_ = restore(retain_rate, like)
        self.ratio_ = restore(ratio, like)
        self.activation_ = restore(activation, like)

    def _check_parameters(self) -> None:
        if not isinstance(self.coder, SparseAutoencoder):
            raise ValueError(f"coder is a {type(self.coder).__name__}, not a SparseAutoencoder.")
        if not isinstance(self.n_latents, Integral) or self.n_latents < 1:
            raise ValueError(f"n_latents={self.n_latents!r} must be an integer of at least 1.")
        if not 0 < self.min_forget_rate <= 1:
            raise ValueError(f"min_forget_rate={self.min_forget_rate} must lie in (0, 1].")
        if not 0 <= self.max_retain_rate <= 1:
            raise ValueError(f"max_retain_rate={self.max_retain_rate} must lie in [0, 1].")

    @torch.no_grad()
    def transform(self, X: Any) -> Any:
        """Erased rows, in the kind, dtype and device of ``X`` (n_samples, n_features)."""
        check_is_fitted(self)
        return restore(self.map_(validate(self, X, reset=False)), X)

    @torch.no_grad()
    def gate(self, X: Any) -> Any:
        """1 at rows (n_samples,) in which a chosen latent fires, which are edited, else 0."""
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        fires = (self.map_.activations(rows.to(self.coder.device)) != 0).any(1)
        return restore(fires.to(rows.dtype), X)

    def __call__(self, h: Tensor) -> Tensor:
        """Erase hidden states ``(..., n_features)``; what :func:`intervene` calls."""
        check_is_fitted(self)
        return self.map_(h)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FeatureClamp:
        """Return the fitted clamp, ready for hidden states of this device and dtype."""
        check_is_fitted(self)
        return self.map_.to(device, dtype)

    def save(self, directory: str | Path) -> None:
        """Write parameters, dictionary and choice to a directory that :meth:`load` reads."""
        check_is_fitted(self)
        directory = Path(directory)
        params = {name: v for name, v in self.get_params(deep=False).items() if name != "coder"}
        config = {
            "params": params,
            "numpy": not isinstance(self.ratio_, Tensor),
            "dtype": str(torch.as_tensor(self.ratio_).dtype).removeprefix("torch."),
        }
        tensors = {name: torch.as_tensor(getattr(self, f"{name}_")) for name in _KEPT}
        artifact.refuse_foreign(directory)
        with artifact.replacing(directory) as staged:
            artifact.save(staged, "FeatureEraser", tensors, config)
            self.coder.save(staged / "coder")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="FeatureEraser")
        coder = SparseAutoencoder.load(Path(directory) / "coder")
        eraser = cls(coder, **config["params"])
        like = torch.empty(0, dtype=getattr(torch, config["dtype"]))
        parts = [tensors[name] for name in _KEPT]
        eraser._keep(*parts, like=like.numpy() if config["numpy"] else like)
        eraser.n_features_in_ = coder.d_in
        return eraser


_KEPT = ("latents", "forget_rate", "retain_rate", "ratio", "activation")
