"""How two manifolds differ: every measure that applies, each beside what chance gives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, generator, restore, row_blocks
from manifold_unlearn.comparison.hausdorff import both_hausdorff
from manifold_unlearn.comparison.mmd import all_equal, mmd, two_clouds
from manifold_unlearn.comparison.similarity import (
    Similarity,
    cka,
    mutual_knn,
    procrustes_distance,
    representational_similarity,
)
from manifold_unlearn.comparison.subspaces import (
    Dimension,
    geodesic_length,
    leading_directions,
    principal_axes,
    principal_bases,
)
from manifold_unlearn.comparison.transport import gromov_wasserstein
from manifold_unlearn.manifold.distances import center_of
from manifold_unlearn.manifold.grassmann import angles_between

__all__ = ["ManifoldComparison", "compare_manifolds"]

_ROBUST = 0.95  # quantile of the robust Hausdorff distance
_BLOCK = 4096
_SPLITS = 2  # random halves of each side that a floor is made from
_LEAST_HALF = 4  # rows of a half
_DECOMPOSED = 2048  # rows and columns up to which Procrustes is by all rows
_DOMINANT = 0.5  # part of the variance from which one row is reported

_SUBSPACE = ("principal_angles", "grassmann_distance")
_NEAREST = ("hausdorff_distance", "hausdorff_quantile")
_PAIRED = ("cka", "cka_rbf", "mutual_knn", "rsa", "procrustes_distance")
_MEASURES = (*_SUBSPACE, *_NEAREST, "mmd", *_PAIRED, "gromov_wasserstein")
_TITLES = {
    "principal_angles": "largest principal angle",
    "grassmann_distance": "Grassmann geodesic",
    "hausdorff_distance": "Hausdorff distance",
    "hausdorff_quantile": "  its 95 % quantile",
    "mmd": "MMD",
    "cka": "CKA, linear",
    "cka_rbf": "CKA, Gaussian",
    "mutual_knn": "mutual neighbors",
    "rsa": "RSA",
    "procrustes_distance": "Procrustes distance",
    "gromov_wasserstein": "Gromov-Wasserstein",
}
_SIMILARITIES = ("cka", "cka_rbf", "mutual_knn", "rsa")


@dataclass(frozen=True, eq=False)
class ManifoldComparison:
    """What :func:`compare_manifolds` found; print it to read it.

    A measure that does not apply is None, and ``skipped`` says why.
    """

    n_samples: tuple[int, int]
    """Rows of A and B"""
    n_features: tuple[int, int]
    """Columns of A and B"""
    paired: bool
    """Whether row i of A was taken to belong to row i of B"""
    subspace_dimensions: tuple[int, int] | None = None
    """Of the principal subspaces of A and B"""
    principal_angles: Any = None
    """(min(subspace_dimensions),) radians, ascending"""
    grassmann_distance: float | None = None
    """Radians; each dimension that one subspace has more counts as a right angle"""
    hausdorff_distance: float | None = None
    """Units of the data: the farthest that a row of either lies from the other"""
    hausdorff_quantile: float | None = None
    """Units of the data: the same for all but 5 % of the rows"""
    mmd: float | None = None
    """Root of the unbiased squared MMD, 0 where that is negative; from 0 to about 1.4"""
    cka: float | None = None
    """Linear, unbiased; 1: alike up to rotation and scale, 0: unrelated"""
    cka_rbf: float | None = None
    """Gaussian kernel at the median distance, unbiased"""
    mutual_knn: float | None = None
    """Mean share of common nearest neighbors, from 0 to 1"""
    rsa: float | None = None
    """Rank correlation of the distances between rows"""
    procrustes_distance: float | None = None
    """From 0 (alike up to rotation, scale, translation) to 1.41"""
    gromov_wasserstein: float | None = None
    """Units of the data; an upper bound"""
    floors: dict[str, float] = field(default_factory=dict)
    """By measure. Of a distance: what two random halves of one side differ by, the larger side.
    Of MMD: its 95 % quantile under permuted labels. Of a similarity: what unrelated rows exceed in
    about 5 % of the cases"""
    p_values: dict[str, float] = field(default_factory=dict)
    """By measure. Of MMD: that both have one distribution; of a similarity: that rows are
    unrelated"""
    skipped: dict[str, str] = field(default_factory=dict)
    """By measure: why it is None"""
    notes: tuple[str, ...] = ()
    """Rows left out, and what else qualifies the figures"""

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can say it; ``measures`` has value, floor and p-value of each."""
        measures = {}
        for name in _MEASURES:
            value = getattr(self, name)
            if value is not None:
                measures[name] = {
                    "value": [float(v) for v in value] if name == "principal_angles" else value,
                    "floor": self.floors.get(name),
                    "p_value": self.p_values.get(name),
                }
        return {
            "n_samples": list(self.n_samples),
            "n_features": list(self.n_features),
            "paired": self.paired,
            "subspace_dimensions": self.subspace_dimensions and list(self.subspace_dimensions),
            "measures": measures,
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        (n_A, n_B), (d_A, d_B) = self.n_samples, self.n_features
        pairs = "rows paired" if self.paired else "rows not paired"
        lines = [f"A: {n_A} x {d_A}, B: {n_B} x {d_B}, {pairs}"]
        if self.subspace_dimensions is not None:
            lines[0] += ", subspaces of {} and {} dimensions".format(*self.subspace_dimensions)
        lines.append(f"{'measure':<24}{'value':>10}{'floor':>10}{'p':>9}  reading")
        for name in _MEASURES:
            if getattr(self, name) is None:
                continue
            value = self._scalar(name)
            floor, p = self.floors.get(name), self.p_values.get(name)
            lines.append(
                f"{_TITLES[name]:<24}{value:>10.4g}{'' if floor is None else f'{floor:.4g}':>10}"
                f"{'' if p is None else _p_text(p):>9}  {self._reading(name)}".rstrip()
            )
        for why in dict.fromkeys(self.skipped.values()):
            names = [_TITLES[n].strip() for n, reason in self.skipped.items() if reason == why]
            lines.append(f"none: {', '.join(names)}, for {why}")
        return "\n".join([*lines, *self.notes])

    def _scalar(self, name: str) -> float:
        value = getattr(self, name)
        return float(value[-1]) if name == "principal_angles" else float(value)

    def _reading(self, name: str) -> str:
        floor = self.floors.get(name)
        if floor is None:
            return ""
        above = self._scalar(name) > floor
        if name in _SIMILARITIES:
            return "related" if above else "as unrelated rows"
        return "differ" if above else "as two samples of one"


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def compare_manifolds(
    A: Array,
    B: Array,
    *,
    paired: bool | Literal["auto"] = "auto",
    measures: Sequence[str] | Literal["all"] = "all",
    dimension: Dimension = "auto",
    n_neighbors: int = 10,
    n_permutations: int = 200,
    floors: bool = True,
    max_samples: int | None = 5000,
    n_landmarks: int = 256,
    device: Device = "auto",
    random_state: Any = 0,
) -> ManifoldComparison:
    """Compare two clouds by every measure that applies to them, each beside its floor.

    In one space: principal angles, Grassmann geodesic, Hausdorff, MMD. For paired rows, whatever
    the spaces: CKA, mutual neighbors, RSA, Procrustes. For any two clouds: Gromov-Wasserstein.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_A, d_A) and (n_B, d_B)
    paired : bool or "auto", default="auto"
        Whether row i of A belongs to row i of B. ``"auto"``: when there are as many rows; say
        False for independent samples that happen to be equally large.
    measures : sequence of str or "all", default="all"
        Names of the fields wanted.
    dimension : int, pair of int or "auto", default="auto"
        Of the principal subspaces, see
        :func:`~manifold_unlearn.comparison.subspaces.principal_angles`.
    n_neighbors : int, default=10
        Of the mutual neighbors.
    n_permutations : int, default=200
        Of the MMD test and the mutual neighbors.
    floors : bool, default=True
        Whether to compare random halves of either side, about as much work again. Halves have half
        the rows, so these floors lie rather too high than too low.
    max_samples : int or None, default=5000
        Random rows used of a side that has more, the same ones where rows are paired; ``notes``
        says so. None: all, in time ``O(n**2)``.
    n_landmarks : int, default=256
        Rows used for Gromov-Wasserstein.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Draws rows, halves and permutations.

    Returns
    -------
    ManifoldComparison

    Raises
    ------
    ValueError
        Fewer than 4 rows, a side that is constant, paired rows of unequal number, an unknown
        measure, or a parameter out of range.

    Warns
    -----
    UserWarning
        ``n_neighbors`` is clamped, or one row holds most of the variance of a side.

    Examples
    --------
    >>> from manifold_unlearn.manifold import samples
    >>> from manifold_unlearn.comparison.compare import compare_manifolds
    >>> circle = samples.circle(300, n_features=8, random_state=0).points
    >>> found = compare_manifolds(circle, 2 * circle)
    >>> round(found.cka, 6), round(found.grassmann_distance, 6), found.p_values["mmd"] < 0.01
    (1.0, 0.0, True)
    """
    wanted = _wanted(measures)
    X, Y = two_clouds(A, B, device, min_samples=4, same_space=False)
    pairs = len(X) == len(Y) if paired == "auto" else bool(paired)
    if pairs and len(X) != len(Y):
        raise ValueError(
            f"paired=True, but A has {len(X)} rows and B {len(Y)}. Select matching rows, or "
            "say paired=False."
        )
    for name, side in (("A", X), ("B", Y)):
        if all_equal(side):
            raise ValueError(
                f"all {len(side)} rows of {name} are equal: a point is no manifold. Give data "
                "with distinct rows."
            )
        _warn_of_dominant_row(side, name)
    if max_samples is not None and max_samples < 4:
        raise ValueError(f"max_samples={max_samples} must be at least 4, or None.")
    n_samples, n_features = (len(X), len(Y)), (X.shape[1], Y.shape[1])
    draw = generator(random_state)
    (X, Y), notes = _subsampled(X, Y, pairs, max_samples, draw)
    work = _Work(X, Y, draw, floors, n_permutations)
    if X.shape[1] == Y.shape[1]:
        work.subspaces([m for m in _SUBSPACE if m in wanted], dimension, A)
        work.nearest([m for m in _NEAREST if m in wanted])
        if "mmd" in wanted:
            work.discrepancy()
    else:
        why = f"A has {X.shape[1]} features and B {Y.shape[1]}: they share no space"
        work.skip([m for m in (*_SUBSPACE, *_NEAREST, "mmd") if m in wanted], why)
    if pairs:
        work.similarities([m for m in _PAIRED if m in wanted], n_neighbors)
    else:
        work.skip([m for m in _PAIRED if m in wanted], "the rows are not paired")
    notes += work.notes
    if "gromov_wasserstein" in wanted:
        work.transport(n_landmarks)
        if max(len(X), len(Y)) > n_landmarks:
            notes.append(f"Gromov-Wasserstein from at most {n_landmarks} random rows a side.")
    if floors and min(len(X), len(Y)) < 2 * _LEAST_HALF:
        notes.append("No floors from halves: fewer than 8 rows.")
    return ManifoldComparison(
        n_samples=n_samples,
        n_features=n_features,
        paired=pairs,
        **work.values,
        floors=work.floors,
        p_values=work.p_values,
        skipped=work.skipped,
        notes=tuple(notes),
    )


def _wanted(measures: Sequence[str] | str) -> Sequence[str]:
    if isinstance(measures, str):
        if measures != "all":
            raise ValueError(f"measures={measures!r} is not known. Give 'all' or a list of names.")
        return _MEASURES
    unknown = [name for name in measures if name not in _MEASURES]
    if unknown:
        raise ValueError(f"measures {unknown} are not known. Choose from {list(_MEASURES)}.")
    return measures


def _warn_of_dominant_row(X: Tensor, name: str) -> None:
    center = center_of(X)
    lengths = [(X[part] - center).norm(dim=1) for part in row_blocks(len(X), _BLOCK)]
    length = torch.cat(lengths).double()
    squared = (length / length.max()).square()
    row = int(squared.argmax())
    share = float(squared[row] / squared.sum())
    if share > _DOMINANT and len(X) > 8:
        warnings.warn(
            f"row {row} of {name} holds {share:.0%} of its variance: angles, CKA and Procrustes "
            "follow that row. Leave it out, or read the neighbors, MMD and the quantile.",
            UserWarning,
            stacklevel=3,
        )


def _subsampled(
    X: Tensor, Y: Tensor, pairs: bool, max_samples: int | None, draw: torch.Generator
) -> tuple[tuple[Tensor, Tensor], list[str]]:
    if max_samples is None or max(len(X), len(Y)) <= max_samples:
        return (X, Y), []

    def chosen(side: Tensor) -> Tensor:
        if len(side) <= max_samples:
            return torch.arange(len(side), device=side.device)
        return torch.randperm(len(side), generator=draw)[:max_samples].to(side.device)

    rows = chosen(X)
    sides = X[rows], Y[rows if pairs else chosen(Y)]
    note = f"From {len(sides[0])} and {len(sides[1])} random rows of A and B (max_samples)."
    return sides, [note]


class _Work:
    """Figures as they come in."""

    def __init__(
        self, X: Tensor, Y: Tensor, draw: torch.Generator, floors: bool, n_permutations: int
    ) -> None:
        self.X, self.Y, self.n_permutations = X, Y, n_permutations
        self.seed = int(torch.randint(2**31 - 1, (), generator=draw))
        self.values: dict[str, Any] = {}
        self.floors: dict[str, float] = {}
        self.p_values: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []
        self.halves: list[tuple[Tensor, Tensor]] = []
        if floors and min(len(X), len(Y)) >= 2 * _LEAST_HALF:
            for side in (X, Y):
                for _ in range(_SPLITS):
                    order = torch.randperm(len(side), generator=draw).to(side.device)
                    half = len(side) // 2
                    self.halves.append((side[order[:half]], side[order[half : 2 * half]]))

    def skip(self, names: Sequence[str], why: str) -> None:
        self.skipped.update(dict.fromkeys(names, why))

    def _keep(self, name: str, value: float, halves: list[float]) -> None:
        self.values[name] = value
        if halves:
            self.floors[name] = max(halves)

    def subspaces(self, names: Sequence[str], dimension: Dimension, like: Any) -> None:
        if not names:
            return
        bases = principal_bases(self.X, self.Y, dimension, self.X.device, self.seed)
        sizes = (bases[0].shape[1], bases[1].shape[1])
        self.values["subspace_dimensions"] = sizes
        found = []
        for number, halves in enumerate(self.halves):
            size = sizes[number // _SPLITS]
            try:
                axes = [principal_axes(half, self.seed) for half in halves]
                found.append([leading_directions(each, size) for each in axes])
            except ValueError:  # half of the rows vary in fewer directions
                continue
        if "principal_angles" in names:
            self.values["principal_angles"] = restore(angles_between(*bases), like)
            if found:
                self.floors["principal_angles"] = max(
                    float(angles_between(*pair)[-1]) for pair in found
                )
        if "grassmann_distance" in names:
            lengths = [geodesic_length(*pair) for pair in found]
            self._keep("grassmann_distance", geodesic_length(*bases), lengths)

    def nearest(self, names: Sequence[str]) -> None:
        if not names:
            return
        both = both_hausdorff(self.X, self.Y, _ROBUST)
        floors = [both_hausdorff(*pair, _ROBUST) for pair in self.halves]
        if "hausdorff_distance" in names:
            self._keep("hausdorff_distance", both.largest, [f.largest for f in floors])
        if "hausdorff_quantile" in names:
            self._keep("hausdorff_quantile", both.robust, [f.robust for f in floors])

    def discrepancy(self) -> None:
        found = mmd(self.X, self.Y, n_permutations=self.n_permutations, random_state=self.seed)
        self.values["mmd"] = found.distance
        if found.p_value is not None and found.floor is not None:
            self.floors["mmd"] = math.sqrt(max(found.floor, 0.0))
            self.p_values["mmd"] = found.p_value

    def similarities(self, names: Sequence[str], n_neighbors: int) -> None:
        X, Y = self.X, self.Y
        if "mutual_knn" in names and n_neighbors > len(X) - 1:
            warnings.warn(
                f"n_neighbors={n_neighbors} is more than the {len(X) - 1} other rows; "
                f"{len(X) - 1} are used. Lower n_neighbors or add rows.",
                UserWarning,
                stacklevel=3,
            )
            n_neighbors = len(X) - 1
        measures: dict[str, Callable[[], Similarity]] = {
            "cka": lambda: cka(X, Y),
            "cka_rbf": lambda: cka(X, Y, kernel="rbf", random_state=self.seed),
            "mutual_knn": lambda: mutual_knn(
                X,
                Y,
                n_neighbors=n_neighbors,
                n_permutations=max(self.n_permutations, 1),
                random_state=self.seed,
            ),
            "rsa": lambda: representational_similarity(X, Y, random_state=self.seed),
        }
        for name, measure in measures.items():
            if name not in names:
                continue
            try:
                found = measure()
            except ValueError as error:  # such as rows that are all equally far apart
                self.skip([name], str(error))
                continue
            self.values[name], self.floors[name] = found.value, found.floor
            self.p_values[name] = found.p_value
        if "procrustes_distance" in names:
            if min(len(X), max(X.shape[1], Y.shape[1])) > _DECOMPOSED:
                order = torch.randperm(len(X), generator=generator(self.seed))[:_DECOMPOSED]
                X, Y = X[order.to(X.device)], Y[order.to(Y.device)]
                self.notes.append(f"Procrustes from {_DECOMPOSED} random rows.")
            self.values["procrustes_distance"] = procrustes_distance(X, Y)

    def transport(self, n_landmarks: int) -> None:
        def distance(first: Tensor, second: Tensor) -> float:
            return gromov_wasserstein(
                first, second, n_landmarks=n_landmarks, random_state=self.seed
            ).distance

        floors = [distance(*pair) for pair in self.halves]
        self._keep("gromov_wasserstein", distance(self.X, self.Y), floors)
