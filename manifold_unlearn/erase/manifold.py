"""Erasure on the manifold: what a gate takes for forget moves to retain, the rest stays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import (
    LabeledMixin,
    as_rows,
    forget_mask,
    restore,
    validate,
)
from manifold_unlearn.erase.aim import Aim, TargetKind, semantic_choice
from manifold_unlearn.erase.gate import ForgetGate
from manifold_unlearn.erase.gated import Evidence, GatedMap, UngatedMap
from manifold_unlearn.erase.landmark_map import LandmarkMap, landmark_map
from manifold_unlearn.erase.nested import save_nested
from manifold_unlearn.erase.subspace import SubspaceEraser
from manifold_unlearn.erase.swap import diffusion_targets
from manifold_unlearn.erase.targets import Targets, tangent_targets, transport_targets
from manifold_unlearn.erase.walk import geodesic_targets
from manifold_unlearn.manifold.landmarks import choose_landmarks
from manifold_unlearn.manifold.validity import check_manifold

Mode: TypeAlias = Literal["tangent", "geodesic", "diffusion", "transport", "auto"]

_CHECKABLE = 40  # distinct rows from which check_manifold tells a manifold from chance


class ManifoldEraser(LabeledMixin, TransformerMixin, BaseEstimator):
    """Moves forget rows onto the retain manifold, behind a gate that leaves all other rows alone.

    ``h -> h + g(h) (T(h) - h)``: the gate ``g`` (:class:`ForgetGate`) is the posterior of forget
    where the evidence passes a threshold calibrated on retain rows, and exactly 0 elsewhere; there
    the map is the identity to the bit. The move ``T`` is given at forget landmarks by their
    targets and interpolated between them (:class:`LandmarkMap`), ``O(n_landmarks * n_features)``
    a row. The modes differ in the target of a landmark:

    ``"tangent"``
        Its foot on the local chart of the rows aimed at. Rows near it keep what lies along the
        chart.
    ``"geodesic"``
        The first place on the shortest path to them where retain is as likely as forget.
    ``"diffusion"``
        The lift of its diffusion coordinates, those that separate the classes taken from the rows
        aimed at.
    ``"transport"``
        One of the rows aimed at, by the assignment of least total squared distance, never a mean;
        or its pair.
    ``"auto"``
        Transport with pairs, tangent without; but where :func:`check_manifold` finds the rows no
        better described by a manifold than by a subspace, a :class:`SubspaceEraser` (with a
        warning; see ``fallback_``).

    Parameters
    ----------
    mode : {"tangent", "geodesic", "diffusion", "transport", "auto"}, default="tangent"
    target : {"retain", "reference", "semantic"}, default="retain"
        Rows aimed at: the retain rows; the ``reference`` given to :meth:`fit`, such as rows of
        prompts about what the model does not know; or of the retain rows those nearest in what a
        linear read-out of the label leaves of them.
    n_landmarks : int, default=2048
        At most so many rows of either side are kept of the fit. The rows are the farthest points,
        or a random subset when ``random_state`` is given.
    n_neighbors : int, default=16
        Landmarks that a move is interpolated from, rows of a chart and of a mean.
    intrinsic_dimension : "auto" or int, default="auto"
        Of the charts of mode ``"tangent"``.
    density, evidence, false_positive_rate, min_auc
        Of the gate, see :class:`ForgetGate`.
    preserve_norm : bool, default=False
        Give edited rows the length they had.
    random_state : int, RandomState or None, default=None

    Attributes
    ----------
    landmarks_ : array of shape (n_landmarks, n_features)
        Distinct forget rows.
    targets_ : array of shape (n_landmarks, n_features)
    gate_ : ForgetGate or None
        None after a fallback.
    map_ : GatedMap, or UngatedMap after a fallback
        The fitted map, frozen.
    mode_ : str
        The mode used.
    fallback_ : SubspaceEraser or None
        Fitted on the same rows, where ``mode="auto"`` found no manifold.
    n_features_in_ : int

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X, y = rng.normal(size=(400, 8)), np.repeat([0, 1], 200)
    >>> X[y == 1, 0] += 6
    >>> eraser = ManifoldEraser(mode="transport").fit(X, y)
    >>> erased = eraser.transform(X)
    >>> bool((erased[y == 1].mean(0)[0] < 1) and (erased[y == 0] == X[y == 0]).all(1).mean() > 0.97)
    True
    """

    def __init__(
        self,
        *,
        mode: Mode = "tangent",
        target: TargetKind = "retain",
        n_landmarks: int = 2048,
        n_neighbors: int = 16,
        intrinsic_dimension: int | Literal["auto"] = "auto",
        density: Literal["diffusion", "knn", "linear"] = "diffusion",
        evidence: Evidence = "token",
        false_positive_rate: float = 0.01,
        min_auc: float = 0.6,
        preserve_norm: bool = False,
        random_state: Any = None,
    ):
        self.mode = mode
        self.target = target
        self.n_landmarks = n_landmarks
        self.n_neighbors = n_neighbors
        self.intrinsic_dimension = intrinsic_dimension
        self.density = density
        self.evidence = evidence
        self.false_positive_rate = false_positive_rate
        self.min_auc = min_auc
        self.preserve_norm = preserve_norm
        self.random_state = random_state

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        reference: Any = None,
        paired: bool = False,
        sequence: Any = None,
        group: Any = None,
        population: Any = None,
    ) -> ManifoldEraser:
        """Fit gate and targets on rows of both classes.

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        y : array or Tensor of shape (n_samples,)
            1 marks forget, everything else retain.
        reference : array or Tensor of shape (n_reference, n_features), optional
            Rows aimed at with ``target="reference"``.
        paired : bool, default=False
            ``reference[i]`` belongs to the i-th forget row: what the model made of the same place
            of the same prompt about what it does not know. Then landmarks go to, or toward,
            their own.
        sequence, group, population : array of shape (n_samples,), int, optional
            Which text, which subject, and which kind of retain text a row is of; see
            :meth:`ForgetGate.fit`.

        Returns
        -------
        ManifoldEraser

        Raises
        ------
        ValueError
            A side is empty, data is not finite, an unknown option, no or a superfluous
            ``reference``, or classes that the gate cannot tell apart.

        Warns
        -----
        UserWarning
            ``mode="auto"`` falls back to a linear eraser.
        """
        self._check_parameters()
        rows = validate(self, X, reset=True, min_samples=2)
        forget = forget_mask(y, rows.shape[0]).to(rows.device)
        aims = self._reference(reference, paired, int(forget.sum()), rows)
        self.fallback_ = self._fallback(X, y, rows) if self.mode == "auto" else None
        if self.fallback_ is not None:
            self._keep_fallback()
            return self
        self.mode_ = self.mode
        if self.mode == "auto":
            self.mode_ = "transport" if paired else "tangent"
        gate = ForgetGate(
            self.density,
            evidence=self.evidence,
            n_landmarks=self.n_landmarks,
            n_neighbors=self.n_neighbors,
            false_positive_rate=self.false_positive_rate,
            min_auc=self.min_auc,
            random_state=self.random_state,
        ).fit(X, y, sequence=sequence, group=group, population=population)
        known = rows[forget].double()
        at = _distinct(known)
        at = at[choose_landmarks(known[at], self.n_landmarks, self.random_state)]
        aim = self._aim(known[at], rows[~forget].double(), aims, at if paired else None)
        targets = self._targets(known[at], aim, gate.frozen_.log_ratio)
        move = landmark_map(known[at], targets.points, targets.bases, self.n_neighbors)
        self._keep(gate, move, X)
        return self

    def _fallback(self, X: Any, y: Any, rows: Tensor) -> SubspaceEraser | None:
        """Linear eraser where a subspace describes the rows as well as a manifold, else None."""
        n_distinct = len(torch.unique(rows, dim=0))
        if n_distinct < _CHECKABLE:
            reason = f"{n_distinct} distinct rows, below {_CHECKABLE}, are too few to tell"
        else:
            report = check_manifold(rows, random_state=0)
            if report.verdict in ("manifold", "clusters"):
                return None
            reason = f"{report.verdict}: {report.reason}"
        warnings.warn(
            "mode='auto' fits a linear eraser, for the rows are no better described by a manifold "
            f"than by a subspace ({reason}). Name a mode to fit that nevertheless.",
            UserWarning,
            stacklevel=3,
        )
        return SubspaceEraser().fit(X, y)

    def _aim(self, landmarks: Tensor, retain: Tensor, aims: Tensor | None, own: Any) -> Aim:
        """Rows aimed at; ``own`` are the rows of the landmarks' pairs."""
        if self.target == "reference" and aims is not None:
            if own is not None:
                return Aim(aims[own], torch.arange(len(own), device=aims.device)[:, None])
            return Aim(self._some(aims), None)
        kept = self._some(retain)
        if self.target == "semantic":
            return Aim(kept, semantic_choice(landmarks, kept, self.n_neighbors))
        return Aim(kept, None)

    def _some(self, rows: Tensor) -> Tensor:
        rows = rows[_distinct(rows)]
        return rows[choose_landmarks(rows, self.n_landmarks, self.random_state)]

    def _targets(
        self, landmarks: Tensor, aim: Aim, log_ratio: Callable[[Tensor], Tensor]
    ) -> Targets:
        if self.mode_ == "tangent":
            return tangent_targets(
                landmarks,
                aim,
                dimension=self.intrinsic_dimension,
                n_neighbors=self.n_neighbors,
            )
        if self.mode_ == "geodesic":
            return geodesic_targets(landmarks, aim, log_ratio)
        if self.mode_ == "diffusion":
            return diffusion_targets(landmarks, aim, n_neighbors=self.n_neighbors)
        return transport_targets(landmarks, aim)

    def _reference(
        self, reference: Any, paired: bool, n_forget: int, rows: Tensor
    ) -> Tensor | None:
        if (self.target == "reference") != (reference is not None):
            given = "no reference" if reference is None else "a reference"
            raise ValueError(
                f"target={self.target!r} got {given}: give fit(reference=rows) with "
                "target='reference', and only then."
            )
        if reference is None:
            if paired:
                raise ValueError("paired=True needs target='reference' and its rows.")
            return None
        aims = as_rows(reference, device=rows.device, name="reference").double()
        if aims.shape[1] != rows.shape[1]:
            raise ValueError(f"reference has {aims.shape[1]} features; X has {rows.shape[1]}.")
        if paired and len(aims) != n_forget:
            raise ValueError(
                f"reference has {len(aims)} rows for {n_forget} forget rows; paired=True needs "
                "one for each, in their order."
            )
        return aims

    def _check_parameters(self) -> None:
        for name, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("target", self.target, get_args(TargetKind)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}.")
        for name in ("n_landmarks", "n_neighbors"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        k = self.intrinsic_dimension
        if k != "auto" and (not isinstance(k, Integral) or k < 1):
            raise ValueError(
                f"intrinsic_dimension={k!r} must be 'auto' or an integer of at least 1."
            )

    def _keep(self, gate: ForgetGate, move: LandmarkMap, like: Any) -> None:
        self.gate_: ForgetGate | None = gate
        self.map_: Any = GatedMap(gate.frozen_, move, self.preserve_norm)
        self.landmarks_ = restore(move.center + move.landmarks, like)
        self.targets_ = restore(move.center + move.targets, like)

    @property
    def _linear(self) -> SubspaceEraser:
        assert self.fallback_ is not None
        return self.fallback_

    def _keep_fallback(self) -> None:
        self.mode_, self.gate_, self.map_ = "auto", None, UngatedMap(self._linear.map_)
        for name in ("landmarks_", "targets_"):
            if hasattr(self, name):
                delattr(self, name)

    def transform(self, X: Any, sequence: Any = None) -> Any:
        """Erased rows, in the kind, dtype and device of ``X`` (n_samples, n_features).

        Parameters
        ----------
        X : array or Tensor of shape (n_samples, n_features)
        sequence : array of shape (n_samples,), int, optional
            Text of each row; the rows of a text are in order. Default: each row is its own.
        """
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        if self.fallback_ is not None:
            return restore(self.map_(rows), X)
        return restore(self.map_.edit(rows, self._opening(rows, sequence)), X)

    def gate(self, X: Any, sequence: Any = None) -> Any:
        """How far the gate is open at each row (n_samples,), in [0, 1]; 1 after a fallback."""
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        return restore(self._opening(rows, sequence), X)

    def norm_budget(self, X: Any, sequence: Any = None) -> Any:
        """Length (n_samples,) of the move ``T(h) - h`` where the gate is open, 0 elsewhere.

        In units of the data; what the edit would be at a posterior of 1, before a norm is
        preserved.
        """
        check_is_fitted(self)
        rows = validate(self, X, reset=False)
        if self.fallback_ is not None:
            return restore((self.map_(rows) - rows).norm(dim=1), X)
        moved = self.map_.move.to(rows.device, rows.dtype)(rows) - rows
        return restore(moved.norm(dim=1) * (self._opening(rows, sequence) > 0), X)

    def _opening(self, rows: Tensor, sequence: Any) -> Tensor:
        if self.gate_ is None:
            return rows.new_ones(len(rows))
        return torch.as_tensor(self.gate_.gate(rows, sequence))

    def __call__(self, h: Tensor) -> Tensor:
        """Erase hidden states ``(..., n_features)``; what :func:`intervene` calls."""
        check_is_fitted(self)
        return self.map_(h)

    def step(self, h: Tensor, start: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Edit the next rows of sequences; see :meth:`GatedMap.step`."""
        check_is_fitted(self)
        return self.map_.step(h, start, present)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> GatedMap | UngatedMap:
        """Return the fitted map, ready for hidden states of this device and dtype."""
        check_is_fitted(self)
        return self.map_.to(device, dtype)

    def save(self, directory: str | Path) -> None:
        """Write parameters, gate and map to a directory that :meth:`load` reads."""
        check_is_fitted(self)
        config: dict[str, Any] = {
            "params": self.get_params(),
            "mode": self.mode_,
            "n_features": self.n_features_in_,
        }
        if self.gate_ is None:
            save_nested(directory, "ManifoldEraser", {}, config, {"fallback": self._linear})
            return
        move = self.map_.move
        tensors = {name: getattr(move, name) for name in _TENSORS}
        if move.bases is not None:
            tensors["bases"] = move.bases
        config["dtype"] = str(torch.as_tensor(self.landmarks_).dtype).removeprefix("torch.")
        config["numpy"] = not isinstance(self.landmarks_, Tensor)
        save_nested(directory, "ManifoldEraser", tensors, config, {"gate": self.gate_})

    @classmethod
    def load(cls, directory: str | Path) -> ManifoldEraser:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="ManifoldEraser")
        eraser = cls(**config["params"])
        eraser.n_features_in_, eraser.mode_ = config["n_features"], config["mode"]
        eraser.fallback_ = None
        if not tensors:
            eraser.fallback_ = SubspaceEraser.load(Path(directory) / "fallback")
            eraser._keep_fallback()
            return eraser
        bases = tensors.pop("bases", None)
        move = LandmarkMap(**tensors, bases=bases, n_neighbors=eraser.n_neighbors)
        like = torch.empty(0, dtype=getattr(torch, config["dtype"]))
        gate = ForgetGate.load(Path(directory) / "gate")
        eraser._keep(gate, move, like.numpy() if config["numpy"] else like)
        return eraser


_TENSORS = ("center", "landmarks", "squared_norms", "targets")


def _distinct(rows: Tensor) -> Tensor:
    """Indices, ascending, of rows that no earlier row equals."""
    _, same = torch.unique(rows, dim=0, return_inverse=True)
    everyone = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(everyone, len(rows)).scatter_reduce(0, same, everyone, "amin")
    return first[first < len(rows)].sort().values
