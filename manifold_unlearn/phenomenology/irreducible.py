"""Is a feature of several dimensions one feature: separability and mixture indices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, generator
from manifold_unlearn.phenomenology.strips import fullest_strips, strip_shares

_LEAST = 20


@dataclass(frozen=True, eq=False)
class Separability:
    """Least mutual information of the two coordinates over all rotations of a plane.

    Attributes
    ----------
    index : float
        Bits, at least 0. 0: some pair of axes is independent, the feature is two features.
    interval : tuple of two floats
        95 % bootstrap interval of ``index``.
    floor : float
        What a Gaussian of the same covariance and as many rows, whose true index is 0, stays under
        in 95 % of the draws.
    angle : float
        Radians in [0, pi / 2): rotation of the axes at which ``index`` is reached.
    angles, information : array of shape (n_angles,), float64
        Mutual information, in bits, at every rotation.
    n_samples : int
    """

    index: float
    interval: tuple[float, float]
    floor: float
    angle: float
    angles: np.ndarray
    information: np.ndarray
    n_samples: int

    @property
    def is_separable(self) -> bool:
        """Whether the index is no larger than that of a Gaussian can be by chance."""
        return self.index <= self.floor

    def to_json(self) -> dict[str, Any]:
        """All attributes and :attr:`is_separable`, as plain numbers and lists."""
        return {
            "index": self.index,
            "interval": list(self.interval),
            "floor": self.floor,
            "is_separable": self.is_separable,
            "angle": self.angle,
            "angles": self.angles.tolist(),
            "information": self.information.tolist(),
            "n_samples": self.n_samples,
        }


@dataclass(frozen=True, eq=False)
class Mixture:
    """Largest share of the rows that one thin strip holds.

    Attributes
    ----------
    index : float
        In [0, 1]. Large: on these rows the feature has one dimension less.
    interval : tuple of two floats
        95 % bootstrap interval, from below ``held_out`` to above ``index``: the truth lies between
        the two but for chance, for a strip chosen on rows holds more of them than of others.
    held_out : float
        Share that a strip fitted on one half of the rows holds of the other half, mean of both.
    gaussian : float
        Index of any Gaussian, ``erf(epsilon / sqrt(2))``.
    direction : array of shape (n_features,), float64
        Unit normal ``v`` of the strip ``|v . x + c| < epsilon * rms(v . x + c)``.
    offset : float
        ``c``, units of the data.
    epsilon : float
    n_samples : int
    """

    index: float
    interval: tuple[float, float]
    held_out: float
    gaussian: float
    direction: np.ndarray
    offset: float
    epsilon: float
    n_samples: int

    def to_json(self) -> dict[str, Any]:
        """All attributes, as plain numbers and lists."""
        return {
            "index": self.index,
            "interval": list(self.interval),
            "held_out": self.held_out,
            "gaussian": self.gaussian,
            "direction": self.direction.tolist(),
            "offset": self.offset,
            "epsilon": self.epsilon,
            "n_samples": self.n_samples,
        }


def separability_index(
    X: Array,
    *,
    n_angles: int = 90,
    n_bins: int = 20,
    reach: float = 3.0,
    n_resamples: int = 200,
    n_controls: int = 39,
    device: Device = "auto",
    random_state: Any = 0,
) -> Separability:
    """Separability index of a feature in the plane.

    ``min over rotations R of I(a; b)`` where ``(a, b) = R x``. The information is that of a
    histogram, less its expected surplus ``(cells - rows - columns + 1) / (2 n)`` nats, counting
    those in which something lies (Miller 1955). Axes turned by a right angle are the same axes, so
    the angles run over a quarter. Shifts and scales of ``X`` change nothing; a rotation by a
    multiple of ``pi / (2 n_angles)`` only moves the angle.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, 2)
        Coordinates in a plane, such as two principal components.
    n_angles : int, default=90
    n_bins : int, default=20
        Of a side of the histogram. Too many leave cells empty: at least ``n_bins ** 2`` rows are
        wise. A feature that is a curve has more information the more bins.
    reach : float, default=3.0
        The histogram ends at this multiple of the root mean square of both coordinates together;
        what lies beyond counts in the outermost bins.
    n_resamples, n_controls : int
        Bootstrap resamples of the interval; Gaussian draws of the floor.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0

    Returns
    -------
    Separability

    Raises
    ------
    ValueError
        Not two columns, fewer than 20 rows, rows on a line, a parameter out of range.

    References
    ----------
    Engels, Michaud, Liao, Gurnee and Tegmark (2024), Not all language model features are linear,
    arXiv:2405.14860.
    Miller (1955), Note on the bias of information estimates.

    Examples
    --------
    >>> import numpy as np
    >>> from manifold_unlearn.phenomenology.irreducible import separability_index
    >>> angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 2000)
    >>> separability_index(np.stack([np.cos(angle), np.sin(angle)], 1)).is_separable
    False
    """
    _check_count(n_angles=(n_angles, 1), n_bins=(n_bins, 2), n_resamples=(n_resamples, 1))
    _check_count(n_controls=(n_controls, 1))
    if not 0 < reach < math.inf:
        raise ValueError(f"reach={reach} must be positive and finite.")
    rows = as_rows(X, device=device, min_samples=_LEAST).double()
    if rows.shape[1] != 2:
        raise ValueError(
            f"X has {rows.shape[1]} columns; a separability index is of a plane. Give two "
            "coordinates, such as principal components 1 and 2, or use irreducible_planes."
        )
    rows = _unit_scale(rows)
    covariance = rows.T @ rows / len(rows)
    variances, axes = torch.linalg.eigh(covariance)
    if float(variances[0]) <= 1e-12 * float(variances[1]):
        raise ValueError("the rows of X lie on a line: there are no two coordinates to compare.")
    angles = torch.arange(n_angles, dtype=torch.float64) * (math.pi / 2 / n_angles)
    random = generator(random_state)

    def information(points: Tensor, weights: Tensor) -> Tensor:
        return _information(_cells(points, angles, n_bins, reach), weights, n_bins)

    ones = rows.new_ones(1, len(rows))
    observed = information(rows, ones)[0]
    cells = _cells(rows, angles, n_bins, reach)
    resampled = [
        _information(cells, _resample_counts(len(rows), 1, random).to(rows), n_bins).amin()
        for _ in range(n_resamples)
    ]
    controls = []
    for _ in range(n_controls):
        draw = torch.randn(len(rows), 2, dtype=torch.float64, generator=random).to(rows)
        controls.append(information(_unit_scale(draw * variances.sqrt() @ axes.T), ones).amin())
    best = int(observed.argmin())
    index = max(float(observed[best]), 0.0)
    return Separability(
        index=index,
        interval=_interval(index, index, torch.stack(resampled), math.inf),
        floor=max(float(torch.stack(controls).quantile(0.95)), 0.0),
        angle=float(angles[best]),
        angles=angles.numpy(),
        information=observed.cpu().numpy(),
        n_samples=len(rows),
    )


def mixture_index(
    X: Array,
    *,
    epsilon: float = 0.1,
    n_restarts: int = 16,
    max_iter: int = 120,
    n_resamples: int = 200,
    device: Device = "auto",
    random_state: Any = 0,
) -> Mixture:
    """Epsilon-mixture index of a feature: the fullest thin strip.

    ``max over v, c of P(|v . x + c| < epsilon * sqrt(E (v . x + c)**2))``. All restarts climb at
    once the smooth share ``mean sigmoid((epsilon - |z|) / temperature)`` of
    ``z = (v . x + c) / rms`` while the temperature falls; then every restart takes the offset that
    is best for its direction, and what is reported is the share itself. It is a lower bound of the
    maximum. Known: a Gaussian has ``erf(epsilon / sqrt(2))``, which is 0.080 for 0.1; a mixture
    with weight ``w`` on a line at least ``w``; the uniform circle 0.219 for 0.1, by a strip at its
    rim. Rotation, shift and scale of ``X`` change nothing but for the search.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
        More than 4 ``n_features`` rows.
    epsilon : float, default=0.1
        Half width of the strip, in units of the root mean square distance to its middle; below 1.
    n_restarts : int, default=16
        Of the search, from the principal directions and random ones.
    max_iter : int, default=120
        Steps of the climb.
    n_resamples : int, default=200
        Bootstrap resamples of the interval.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0

    Returns
    -------
    Mixture

    Raises
    ------
    ValueError
        Too few rows, rows all equal or of lower rank than columns, a parameter out of range.

    References
    ----------
    Engels, Michaud, Liao, Gurnee and Tegmark (2024), Not all language model features are linear,
    arXiv:2405.14860.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon} must lie between 0 and 1; 0.1 is usual.")
    _check_count(n_restarts=(n_restarts, 1), max_iter=(max_iter, 1), n_resamples=(n_resamples, 1))
    given = as_rows(X, device=device, min_samples=_LEAST).double()
    n, d = given.shape
    if n <= 4 * d:
        raise ValueError(
            f"X has {n} rows for {d} columns; more than {4 * d} are needed, or a strip through the "
            "rows holds many by chance. Give principal components, or more rows."
        )
    mean, scale = _center_and_scale(given)
    rows = (given - mean) / scale
    variances = torch.linalg.eigvalsh(rows.T @ rows / n)
    if float(variances[0]) <= 1e-12 * float(variances[-1]):
        raise ValueError(
            "the rows of X lie in fewer dimensions than it has columns, where one strip holds them "
            "all. Give principal components of nonzero variance."
        )
    random = generator(random_state)
    directions, offsets, shares = fullest_strips(rows, epsilon, n_restarts, max_iter, random)
    best = int(shares.argmax())
    resampled = torch.cat(
        [
            strip_shares(rows, directions, offsets, epsilon, counts.to(rows)).amax(1)
            for counts in _resample_counts(n, n_resamples, random).split(8)
        ]
    )
    half = torch.randperm(n, generator=random).to(rows.device)
    held_out = []
    for fitted, kept in ((half[::2], half[1::2]), (half[1::2], half[::2])):
        v, c, share = fullest_strips(rows[fitted], epsilon, n_restarts, max_iter, random)
        chosen = share.argmax()
        ones = rows.new_ones(1, len(kept))
        held_out.append(strip_shares(rows[kept], v[chosen, None], c[chosen, None], epsilon, ones))
    direction, index = directions[best], float(shares[best])
    expected = float(torch.stack(held_out).mean())
    return Mixture(
        index=index,
        interval=_interval(min(expected, index), index, resampled, 1.0),
        held_out=expected,
        gaussian=math.erf(epsilon / math.sqrt(2)),
        direction=direction.cpu().numpy(),
        offset=float(offsets[best] * scale - mean @ direction),
        epsilon=epsilon,
        n_samples=n,
    )


@dataclass(frozen=True, eq=False)
class Plane:
    """Both indices of the plane of two neighboring principal components."""

    components: tuple[int, int]
    """Counted from 0, by variance."""
    separability: Separability
    mixture: Mixture

    def to_json(self) -> dict[str, Any]:
        """Components and both indices."""
        return {
            "components": list(self.components),
            "separability": self.separability.to_json(),
            "mixture": self.mixture.to_json(),
        }


def irreducible_planes(
    X: Array,
    *,
    n_components: int = 5,
    n_bins: int = 20,
    epsilon: float = 0.1,
    n_resamples: int = 200,
    device: Device = "auto",
    random_state: int = 0,
) -> tuple[Plane, ...]:
    """Both indices on principal components (0, 1), (1, 2), and so on.

    An irreducible feature of two dimensions shows in a plane of high separability index and low
    mixture index.

    Parameters
    ----------
    X : array or Tensor of shape (n_samples, n_features)
    n_components : int, default=5
        At least 2, at most the columns.
    n_bins, epsilon, n_resamples, device, random_state
        As :func:`separability_index` and :func:`mixture_index`.

    Returns
    -------
    tuple of Plane

    Raises
    ------
    ValueError
        As the two functions, or ``n_components`` out of range.
    """
    rows = as_rows(X, device=device, min_samples=_LEAST).double()
    if not 2 <= n_components <= rows.shape[1]:
        raise ValueError(
            f"n_components={n_components} must lie between 2 and the {rows.shape[1]} columns of X."
        )
    rows = rows - rows.mean(0)
    coordinates = rows @ torch.linalg.svd(rows, full_matrices=False).Vh[:n_components].T
    planes = []
    for i in range(n_components - 1):
        options: dict[str, Any] = {"n_resamples": n_resamples, "random_state": random_state}
        plane = coordinates[:, i : i + 2]
        separability = separability_index(plane, n_bins=n_bins, **options)
        mixture = mixture_index(plane, epsilon=epsilon, **options)
        planes.append(Plane((i, i + 1), separability, mixture))
    return tuple(planes)


def _check_count(**given: tuple[int, int]) -> None:
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")


def _center_and_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(0)
    scale = (rows - mean).square().mean().sqrt()
    if float(scale) <= 1e-12 * float(rows.abs().max()):
        raise ValueError("all rows of X are equal: a feature that does not vary has no index.")
    return mean, scale


def _unit_scale(rows: Tensor) -> Tensor:
    mean, scale = _center_and_scale(rows)
    return (rows - mean) / scale


def _resample_counts(n: int, n_resamples: int, random: torch.Generator) -> Tensor:
    """How often each row is drawn, ``(n_resamples, n)``."""
    drawn = torch.randint(n, (n_resamples, n), generator=random)
    return torch.zeros(n_resamples, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(n_resamples, n)
    )


def _interval(low: float, high: float, resampled: Tensor, top: float) -> tuple[float, float]:
    """1.96 bootstrap deviations about ``low`` and ``high``; resamples themselves are biased up."""
    reach = 1.96 * float(resampled.std(correction=0))
    return max(low - reach, 0.0), min(high + reach, top)


def _cells(rows: Tensor, angles: Tensor, n_bins: int, reach: float) -> Tensor:
    """Cell of each row in the histogram of each rotation, ``(n_angles, n)``."""
    cos, sin = angles.cos().to(rows), angles.sin().to(rows)
    turned = torch.stack([torch.stack([cos, sin]), torch.stack([-sin, cos])])  # (2, 2, n_angles)
    coordinates = torch.einsum("nj,ija->ian", rows, turned)
    coordinates = coordinates / reach  # unit scale: the root mean square of a coordinate is 1
    bins = ((coordinates + 1) / 2 * n_bins).floor().long().clamp(0, n_bins - 1)
    return bins[0] * n_bins + bins[1]


def _information(cells: Tensor, weights: Tensor, n_bins: int) -> Tensor:
    """Mutual information in bits for weights ``(w, n)``, ``(w, n_angles)``."""
    n_angles, n = cells.shape
    counts = torch.stack(
        [
            cells.new_zeros(n_angles, n_bins**2, dtype=torch.float64).scatter_add_(
                1, cells, row.expand(n_angles, n)
            )
            for row in weights
        ]
    ).reshape(-1, n_angles, n_bins, n_bins)
    total = weights.sum(1)[:, None]
    sides = (counts, counts.sum(-1), counts.sum(-2))
    joint, first, second = (
        torch.special.entr(side.flatten(2) / total[..., None]).sum(-1) for side in sides
    )
    cells_, rows_, columns_ = ((side.flatten(2) > 0).sum(-1) for side in sides)
    surplus = (cells_ - rows_ - columns_ + 1) / (2 * total)
    return (first + second - joint - surplus) / math.log(2)
