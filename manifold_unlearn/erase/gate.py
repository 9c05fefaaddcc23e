"""A gate that opens on what is to be forgotten, and by mistake no more often than is asked."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import (
    LabeledMixin,
    forget_mask,
    restore,
    validate,
    working_dtype,
)
from manifold_unlearn.conformal import ConformalQuantile
from manifold_unlearn.erase.densities import KernelRatio, LinearRatio, tensors_of
from manifold_unlearn.erase.evidence import cumulated, gate_threshold, largest, separation
from manifold_unlearn.erase.folds import Rows, deal
from manifold_unlearn.erase.held_out import Scored, fit_kernel, fit_linear
from manifold_unlearn.sequences import Padded, padded, row_labels

Density = Literal["diffusion", "knn", "linear"]
Evidence = Literal["sequence", "token"]


@dataclass(frozen=True, eq=False)
class FrozenGate:
    """What a fitted gate computes with; movable, without any state."""

    ratio: KernelRatio | LinearRatio
    threshold: float
    """nats of evidence from which the gate is open"""
    sequential: bool
    """whether evidence accumulates along a sequence"""

    def log_ratio(self, h: Tensor) -> Tensor:
        """Log density ratio of forget to retain ``(...)`` in nats, of rows ``(..., d)``."""
        return self.ratio(h)

    def accumulate(self, log_ratios: Tensor, start: Tensor, present: Tensor) -> Tensor:
        """Evidence after every row ``(batch, length)``.

        Parameters
        ----------
        log_ratios : Tensor of shape (batch, length)
        start : Tensor of shape (batch,)
            Evidence before the first row: 0, or that after the last row of an earlier pass.
        present : Tensor of shape (batch, length), bool
            False for padding.
        """
        if self.sequential:
            return cumulated(log_ratios, start.to(log_ratios), present)
        return torch.where(present, log_ratios, torch.zeros_like(log_ratios))

    def opening(self, evidence: Tensor) -> Tensor:
        """How far the gate is open, in [0, 1]: exactly 0 below the threshold."""
        shut = torch.zeros_like(evidence)
        return torch.where(evidence >= self.threshold, evidence.sigmoid(), shut)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FrozenGate:
        """Return the same gate where and as precise as rows of ``dtype`` need it."""
        return FrozenGate(self.ratio.to(device, dtype), self.threshold, self.sequential)


class ForgetGate(LabeledMixin, BaseEstimator):
    """Posterior of forget against retain, exactly 0 where the evidence does not suffice.

    The evidence of a row is the log ratio of the forget to the retain density, or its one-sided
    cumulative sum along the text, ``S_t = max(0, S_{t-1} + l_t)`` (Page 1954). The gate is
    ``sigmoid(evidence)`` from a threshold on, which held-out retain texts reach with at most the
    stated rate.

    The log ratio does not know how many rows there are of each class (equal masses).

    ``"diffusion"``
        Gaussian kernel sums over landmarks of both classes (the Nyström extension), whose labels
        have taken ``diffusion_time`` steps of the Markov matrix on the joint graph: the first to
        all rows, so that a landmark knows how common it is in each class.
    ``"knn"``
        Sums of inverse squared distances to the nearest landmarks.
    ``"linear"``
        Linear discriminant: normal densities of one covariance.

    The sums stand above a background, so that far from all landmarks there is no evidence.
    Bandwidth and background are those that tell held-out texts apart best.

    Parameters
    ----------
    density : {"diffusion", "knn", "linear"}, default="diffusion"
    evidence : {"sequence", "token"}, default="sequence"
        Whether it accumulates along a text or each row stands alone. The threshold holds for
        whole texts either way: the rate is the share of retain texts in which it opens at all.
    n_landmarks : int, default=2048
        Distinct rows drawn as landmarks, half of each class; one row costs
        ``n_landmarks * n_features`` multiplications.
    n_neighbors : int, default=16
        The bandwidth is a fraction of the typical squared distance to this neighbor; for
        ``"knn"``, how many landmarks vote.
    diffusion_time : int, default=1
        0: kernel densities of the landmarks alone, which mistake rows that no landmark of their
        class is near. More than 1 smooths on over the graph, and blurs what only few rows tell.
    false_positive_rate : float, default=0.01
    min_auc : float, default=0.6
        Held-out area under the ROC, text against text, below which the fit is refused.
    random_state : int, RandomState or None, default=None
        Draws the landmarks, or the folds of ``"linear"``. None draws the same every time.

    Attributes
    ----------
    threshold_ : float
        Nats.
    auc_ : float
        Held out, forget against retain texts by their largest evidence; of several populations
        the least.
    false_positive_rate_ : float
        Share of held-out retain texts in which the gate opens; of several populations the largest.
    promised_rate_ : float
        What the threshold promises for a further retain text exchangeable with these; above
        ``false_positive_rate`` where they are too few for it.
    detection_rate_ : float
        Share of held-out forget texts in which it opens.
    n_calibration_ : int
        Retain texts of the smallest population.
    frozen_ : FrozenGate
    n_features_in_ : int

    References
    ----------
    Page (1954), Continuous inspection schemes, Biometrika 41.
    Coifman and Lafon (2006), Diffusion maps, Appl. Comput. Harmon. Anal. 21.
    Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(1200, 4)), np.repeat([0, 1], [1000, 200])
    >>> X[y == 1] += 6
    >>> fitted = ForgetGate(evidence="token", random_state=0).fit(X, y)
    >>> bool(fitted.gate(X[y == 1]).mean() > 0.9), bool((fitted.gate(X[y == 0]) > 0).mean() < 0.02)
    (True, True)
    """

    def __init__(
        self,
        density: Density = "diffusion",
        *,
        evidence: Evidence = "sequence",
        n_landmarks: int = 2048,
        n_neighbors: int = 16,
        diffusion_time: int = 1,
        false_positive_rate: float = 0.01,
        min_auc: float = 0.6,
        random_state: Any = None,
    ):
        self.density = density
        self.evidence = evidence
        self.n_landmarks = n_landmarks
        self.n_neighbors = n_neighbors
        self.diffusion_time = diffusion_time
        self.false_positive_rate = false_positive_rate
        self.min_auc = min_auc
        self.random_state = random_state

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        sequence: Any = None,
        group: Any = None,
        population: Any = None,
    ) -> ForgetGate:
        """Fit the densities and calibrate the threshold.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
            Without attention sinks and padding.
        y : array or Tensor of shape (n_samples,)
            1 marks forget, everything else retain. A text with a forget row is a forget text.
        sequence : array of shape (n_samples,), int, optional
            Text of each row; rows of one text are in order. Default: every row is its own.
        group : array of shape (n_samples,), int, optional
            Subject of each row, default its text. A retain text is scored without the rows of its
            group, for what will be asked is mostly of subjects not seen here; a forget text
            without its own rows, for what is to be forgotten is known.
        population : array of shape (n_samples,), int, optional
            Kind of text, such as related subjects and plain prose. The threshold holds in each.

        Returns
        -------
        ForgetGate

        Raises
        ------
        ValueError
            A side is empty or of one text or group only, data that is not finite, a parameter out
            of range, or classes that cannot be told apart (gives the held-out AUC).

        Warns
        -----
        UserWarning
            Too few retain texts for the rate (says what they promise), or ``n_neighbors`` clamped.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2)
        forget = forget_mask(y, len(rows)).to(rows.device)
        text = row_labels(sequence, len(rows), "sequence").to(rows.device)
        subject = text if group is None else row_labels(group, len(rows), "group").to(rows.device)
        kind = (
            torch.zeros_like(text)
            if population is None
            else row_labels(population, len(rows), "population").to(rows.device)
        )
        fold = torch.empty_like(text)
        n_folds = []
        for side, unit, name in ((forget, text, "forget text"), (~forget, subject, "retain group")):
            fold[side] = deal(unit[side], self.random_state)
            n_folds.append(int(fold[side].max()) + 1)
            if n_folds[-1] == 1:
                raise ValueError(
                    f"there is one {name} only, and rows are scored without their own. Give at "
                    "least two, or another sequence or group."
                )
        line = torch.where(forget, fold, fold + n_folds[0])
        data = Rows(rows, line, n_folds[0], sum(n_folds))
        texts = _Texts.of(data.forget, text, kind, sequential=self.evidence == "sequence")
        self._calibrate(self._fit_density(data, texts), texts)
        return self

    def _fit_density(self, data: Rows, texts: _Texts) -> Scored:
        if self.density == "linear":
            return fit_linear(data)
        return fit_kernel(
            data,
            n_landmarks=self.n_landmarks,
            n_neighbors=self.n_neighbors,
            diffusion_time=self.diffusion_time,
            nearest=self.density == "knn",
            quality=texts.quality,
            random_state=self.random_state,
        )

    def _calibrate(self, scored: Scored, texts: _Texts) -> None:
        """Set the threshold and what is known of it."""
        found, retained = texts.most_evidence(scored.held_out)
        auc = min(separation(found, part) for part in retained)
        if auc < self.min_auc:
            raise ValueError(
                f"forget and retain cannot be told apart: held-out AUC {auc:.3f} is below "
                f"min_auc={self.min_auc} (density={self.density!r}, evidence={self.evidence!r}). "
                "Try another site, density or evidence, or add texts."
            )
        thresholds = [gate_threshold(part, self.false_positive_rate) for part in retained]
        strictest = max(thresholds)
        self._warn_of_few(thresholds, min(map(len, retained)))
        self.threshold_ = strictest.value
        self.promised_rate_ = max(part.promised_rate for part in thresholds)
        self.auc_ = auc
        opened = [float((part >= strictest.value).double().mean()) for part in retained]
        self.false_positive_rate_ = max(opened)
        self.detection_rate_ = float((found >= strictest.value).double().mean())
        self.n_calibration_ = min(map(len, retained))
        self.frozen_ = FrozenGate(scored.ratio, strictest.value, self.evidence == "sequence")

    def _warn_of_few(self, thresholds: list[ConformalQuantile], n: int) -> None:
        needed = thresholds[0].n_needed
        if n < needed:
            warnings.warn(
                f"false_positive_rate={self.false_positive_rate} needs {needed} retain texts of "
                f"each population; got {n}. The threshold is the largest they reach, which "
                f"promises {1 / (n + 1):.2g}. Add retain texts, or raise the rate.",
                UserWarning,
                stacklevel=4,
            )

    def log_ratio(self, X: Any) -> Any:
        """Log density ratio of forget to retain, nats, of each row; differentiable in a tensor.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)

        Returns
        -------
        array or Tensor of shape (n_samples,)
        """
        return restore(self._log_ratio(X), X)

    def gathered_evidence(self, X: Any, sequence: Any = None) -> Any:
        """Evidence up to and including each row (n_samples,), nats.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        sequence : array of shape (n_samples,), int, optional
            Text of each row; rows of one text are in order. Default: every row is its own.
        """
        return restore(self._evidence(X, sequence), X)

    def gate(self, X: Any, sequence: Any = None) -> Any:
        """How far the gate is open at each row (n_samples,): exactly 0 below ``threshold_``.

        ``sigmoid(evidence)`` from there on, which is above 1/2. Arguments as
        :meth:`gathered_evidence`.
        """
        evidence = self._evidence(X, sequence)
        return restore(self.frozen_.opening(evidence), X)

    def _log_ratio(self, X: Any) -> Tensor:
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        if isinstance(X, Tensor):  # with its gradient
            rows = X.to(working_dtype(X.dtype))
        return self.frozen_.log_ratio(rows)

    def _evidence(self, X: Any, sequence: Any) -> Tensor:
        ratios = self._log_ratio(X)
        layout = padded(row_labels(sequence, len(ratios), "sequence").to(ratios.device))
        steps = layout.fill(ratios, 0.0)
        present = layout.fill(torch.ones_like(ratios, dtype=torch.bool), False)
        evidence = self.frozen_.accumulate(steps, steps.new_zeros(len(steps)), present)
        return evidence[layout.line, layout.column]

    def save(self, directory: str | Path) -> None:
        """Write parameters and fitted gate to a directory that :meth:`load` reads."""
        check_is_fitted(self)
        tensors, numbers = tensors_of(self.frozen_.ratio)
        fitted = {n: v for n, v in vars(self).items() if n.endswith("_") and n != "frozen_"}
        kind = type(self.frozen_.ratio).__name__
        config = {"params": self.get_params(), "fitted": fitted, "ratio": kind, "numbers": numbers}
        artifact.save(directory, "ForgetGate", tensors, config)

    @classmethod
    def load(cls, directory: str | Path) -> ForgetGate:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="ForgetGate")
        gate = cls(**config["params"])
        for name, value in config["fitted"].items():
            setattr(gate, name, value)
        make = {"KernelRatio": KernelRatio, "LinearRatio": LinearRatio}[config["ratio"]]
        ratio = make(**tensors, **config["numbers"])
        gate.frozen_ = FrozenGate(ratio, gate.threshold_, gate.evidence == "sequence")
        return gate

    def _check_parameters(self) -> None:
        for name, known in (("density", Density), ("evidence", Evidence)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(known))}."
                )
        for name, least in (("n_landmarks", 2), ("n_neighbors", 1), ("diffusion_time", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        if not 0 < self.false_positive_rate < 1:
            raise ValueError(
                f"false_positive_rate={self.false_positive_rate!r} must lie between 0 and 1."
            )
        if not 0 <= self.min_auc <= 1:
            raise ValueError(f"min_auc={self.min_auc!r} must lie in [0, 1].")


class _Texts(NamedTuple):
    """Texts whose rows have been scored.

    ``kind`` (n_texts,) is a text's population, -1 for forget texts; ``weight`` (n_rows,) sums to 1
    over each class and, within retain, to equal parts over the populations.
    """

    layout: Padded
    kind: Tensor
    forget: Tensor
    weight: Tensor
    sequential: bool

    @classmethod
    def of(cls, forget: Tensor, text: Tensor, kind: Tensor, *, sequential: bool) -> _Texts:
        layout = padded(text)
        kind = torch.unique(kind, return_inverse=True)[1]
        to_forget = layout.fill(forget, False).any(1)
        if bool(to_forget.all()):
            raise ValueError(
                "every text has a forget row, so none is left to calibrate on. Give retain texts, "
                "or another sequence."
            )
        of_text = torch.where(to_forget, -1, layout.fill(kind, 0)[:, 0])
        mass = torch.bincount(kind[~forget], minlength=int(kind.max()) + 1).double()
        weight = 1 / (mass[kind] * (mass > 0).sum())
        weight[forget] = 1 / forget.sum().double()
        return cls(layout, of_text, forget, weight, sequential)

    def most_evidence(self, log_ratios: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Most evidence of every forget text, and of the retain texts of each population."""
        most = largest(log_ratios, self.layout, sequential=self.sequential)
        kinds = torch.unique(self.kind[self.kind >= 0])
        return most[self.kind < 0], [most[self.kind == k] for k in kinds]

    def quality(self, log_ratios: Tensor) -> tuple[float, float]:
        """How well texts are told apart, to a thousandth; then how well rows are."""
        found, retained = self.most_evidence(log_ratios)
        wrong = torch.where(self.forget, -log_ratios, log_ratios)
        loss = torch.nn.functional.softplus(wrong).double() @ self.weight
        return round(min(separation(found, part) for part in retained), 3), -float(loss)
