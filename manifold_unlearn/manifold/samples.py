"""Manifolds whose spectrum, distances and dimension are known, sampled in any ambient dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from manifold_unlearn.arrays import generator

Random = np.random.Generator


@dataclass(frozen=True)
class ManifoldSample:
    """Points on a known manifold, and the truth about it.

    Attributes
    ----------
    points : array of shape (n_samples, n_features)
        Isometric image in the ambient space, noise added.
    intrinsic_coordinates : array of shape (n_samples, m)
        Angles in radians; unit vectors for the sphere; arc length and height for the roll.
    eigenvalues : array of shape (n_functions,)
        Of minus the Laplace-Beltrami operator, repeated by multiplicity, ascending, without 0; in
        inverse squared units of the points.
    eigenfunctions : array of shape (n_samples, n_functions)
        At the noise-free points, in the order of ``eigenvalues``, mean square 1 under the uniform
        distribution.
    intrinsic_dimension : int
    density : array of shape (n_samples,)
        Sampling density per unit of volume.
    isometry : array of shape (m, n_features)
        Rows orthonormal; noise-free points are the flat model times it.
    """

    points: np.ndarray
    intrinsic_coordinates: np.ndarray
    eigenvalues: np.ndarray
    eigenfunctions: np.ndarray
    intrinsic_dimension: int
    density: np.ndarray
    isometry: np.ndarray
    _distance: Callable[[np.ndarray, np.ndarray], np.ndarray] = field(repr=False)

    def geodesic_distances(
        self, first: np.ndarray | None = None, second: np.ndarray | None = None
    ) -> np.ndarray:
        """Exact distances along the manifold between samples.

        Parameters
        ----------
        first, second : int arrays of shape (n_first,) and (n_second,), optional
            Rows of the sample; default: all.

        Returns
        -------
        array of shape (n_first, n_second)
        """
        coordinates = self.intrinsic_coordinates
        a = coordinates if first is None else coordinates[first]
        b = coordinates if second is None else coordinates[second]
        return self._distance(a[:, None, :], b[None, :, :])


def circle(
    n_samples: int,
    *,
    n_features: int = 2,
    density_amplitude: float = 0.0,
    radius: float = 1.0,
    noise: float = 0.0,
    n_frequencies: int = 5,
    random_state: int | None = None,
) -> ManifoldSample:
    """Circle with density proportional to ``1 + density_amplitude * cos(angle)``.

    Parameters
    ----------
    n_samples : int
    n_features : int
        Ambient dimension, at least 2.
    density_amplitude : float
        In [0, 1).
    radius : float
    noise : float
        Standard deviation of Gaussian noise per ambient coordinate, in units of the points.
    n_frequencies : int
        Eigenfunctions ``cos(k t), sin(k t)`` up to here.
    random_state : int or None

    Raises
    ------
    ValueError
        ``n_features`` too small, or ``density_amplitude`` out of range.
    """
    if not 0 <= density_amplitude < 1:
        raise ValueError(f"density_amplitude={density_amplitude} must lie in [0, 1).")
    random = _random(random_state)
    grid = np.linspace(0, 2 * np.pi, 20001)
    cumulated = (grid + density_amplitude * np.sin(grid)) / (2 * np.pi)
    angle = np.interp(random.uniform(size=n_samples), cumulated, grid)
    flat = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    orders = np.arange(1, n_frequencies + 1)
    phases = angle[:, None] * orders
    functions = np.sqrt(2) * np.stack([np.cos(phases), np.sin(phases)], axis=2)
    points, isometry = _embed(flat, n_features, noise, random)
    return ManifoldSample(
        points,
        angle[:, None],
        np.repeat(orders**2.0, 2) / radius**2,
        functions.reshape(n_samples, -1),
        1,
        (1 + density_amplitude * np.cos(angle)) / (2 * np.pi * radius),
        isometry,
        lambda a, b: radius * _angle_between(a[..., 0], b[..., 0]),
    )


def sphere(
    n_samples: int,
    *,
    n_features: int = 3,
    tilt: float = 0.0,
    radius: float = 1.0,
    noise: float = 0.0,
    random_state: int | None = None,
) -> ManifoldSample:
    """Two-sphere with density proportional to ``exp(tilt * z)``.

    The spherical harmonics of degree 1 (3 functions) and 2 (5 functions).

    Parameters
    ----------
    n_samples : int
    n_features : int
        Ambient dimension, at least 3.
    tilt : float
        0: uniform.
    radius : float
    noise : float
        Standard deviation of Gaussian noise per ambient coordinate, in units of the points.
    random_state : int or None

    Raises
    ------
    ValueError
        ``n_features`` too small.
    """
    random = _random(random_state)
    u = random.uniform(size=n_samples)
    if tilt == 0:
        z, norm = 2 * u - 1, 2.0
    else:
        z = np.log(np.exp(-tilt) + u * (np.exp(tilt) - np.exp(-tilt))) / tilt
        norm = 2 * np.sinh(tilt) / tilt
    angle = random.uniform(0, 2 * np.pi, n_samples)
    ring = np.sqrt(np.maximum(0, 1 - z**2))
    x, y = ring * np.cos(angle), ring * np.sin(angle)
    unit = np.stack([x, y, z], axis=1)
    second = np.stack([x * y, y * z, x * z, (x**2 - y**2) / 2], axis=1) * np.sqrt(15)
    zonal = np.sqrt(5) / 2 * (3 * z**2 - 1)
    points, isometry = _embed(radius * unit, n_features, noise, random)
    return ManifoldSample(
        points,
        unit,
        np.array([2.0] * 3 + [6.0] * 5) / radius**2,
        np.concatenate([np.sqrt(3) * unit, second, zonal[:, None]], axis=1),
        2,
        np.exp(tilt * z) / (2 * np.pi * norm * radius**2),
        isometry,
        lambda a, b: 2 * radius * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)),
    )


def flat_torus(
    n_samples: int,
    *,
    n_features: int = 4,
    radii: tuple[float, float] = (1.0, 1.0),
    noise: float = 0.0,
    random_state: int | None = None,
) -> ManifoldSample:
    """Uniform sample of the product of two circles, flat in four dimensions.

    Eigenfunctions are the products of frequencies up to 2 on either circle.

    Parameters
    ----------
    n_samples : int
    n_features : int
        Ambient dimension, at least 4.
    radii : tuple of two floats
    noise : float
        Standard deviation of Gaussian noise per ambient coordinate, in units of the points.
    random_state : int or None

    Raises
    ------
    ValueError
        ``n_features`` too small.
    """
    random = _random(random_state)
    angles = random.uniform(0, 2 * np.pi, (n_samples, 2))
    radius = np.asarray(radii)
    flat = np.concatenate([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    modes = [(p, q) for p in range(3) for q in range(-2, 3) if p > 0 or q > 0]
    values, functions = [], []
    for mode in modes:
        phase = angles @ np.array(mode, dtype=float)
        values += [float(((np.array(mode) / radius) ** 2).sum())] * 2
        functions += [np.sqrt(2) * np.cos(phase), np.sqrt(2) * np.sin(phase)]
    order = np.argsort(values, kind="stable")
    # modes outside the square of frequencies have at least 9 / r**2: below that the list is whole
    kept = [i for i in order if values[i] < 9 / radius.max() ** 2]
    points, isometry = _embed(flat, n_features, noise, random)
    return ManifoldSample(
        points,
        angles,
        np.array([values[i] for i in kept]),
        np.stack([functions[i] for i in kept], axis=1),
        2,
        np.full(n_samples, 1 / (4 * np.pi**2 * radius.prod())),
        isometry,
        lambda a, b: np.linalg.norm(radius * _angle_between(a, b), axis=-1),
    )


def swiss_roll(
    n_samples: int,
    *,
    n_features: int = 3,
    height: float = 21.0,
    noise: float = 0.0,
    random_state: int | None = None,
) -> ManifoldSample:
    """Uniform sample of a rectangle rolled up along ``(t cos t, t sin t)``, 1.5 pi <= t <= 4.5 pi.

    The roll is isometric to the rectangle of its arc length, about 90, and ``height``; its
    eigenfunctions are products of cosines (free boundary). Its sheets are 2 pi apart.

    Parameters
    ----------
    n_samples : int
    n_features : int
        Ambient dimension, at least 3.
    height : float
    noise : float
        Standard deviation of Gaussian noise per ambient coordinate, in units of the points.
    random_state : int or None

    Raises
    ------
    ValueError
        ``n_features`` too small.
    """
    random = _random(random_state)
    turns = np.linspace(1.5 * np.pi, 4.5 * np.pi, 100001)
    arc = (turns * np.sqrt(1 + turns**2) + np.arcsinh(turns)) / 2
    arc -= arc[0]
    length = float(arc[-1])
    rectangle = random.uniform(size=(n_samples, 2)) * np.array([length, height])
    t = np.interp(rectangle[:, 0], arc, turns)
    flat = np.stack([t * np.cos(t), rectangle[:, 1], t * np.sin(t)], axis=1)
    modes = [(i, j) for i in range(20) for j in range(20) if i or j]
    modes.sort(key=lambda mode: (mode[0] / length) ** 2 + (mode[1] / height) ** 2)
    frequencies = np.pi * np.array(modes[:16]) / np.array([length, height])
    waves = np.cos(rectangle[:, None, :] * frequencies[None]).prod(axis=2)
    scale = np.sqrt(2.0) ** (frequencies > 0).sum(axis=1)
    points, isometry = _embed(flat, n_features, noise, random)
    return ManifoldSample(
        points,
        rectangle,
        (frequencies**2).sum(axis=1),
        waves * scale,
        2,
        np.full(n_samples, 1 / (length * height)),
        isometry,
        lambda a, b: np.linalg.norm(a - b, axis=-1),
    )


def hypersphere(
    n_samples: int,
    *,
    dimension: int,
    n_features: int | None = None,
    radius: float = 1.0,
    noise: float = 0.0,
    random_state: int | None = None,
) -> ManifoldSample:
    """Uniform sample of the sphere of any dimension; eigenfunctions of degree 1.

    Parameters
    ----------
    n_samples : int
    dimension : int
        Of the sphere, at least 1; there are ``dimension + 1`` eigenfunctions, with the eigenvalue
        ``dimension / radius**2``.
    n_features : int, optional
        Ambient dimension, at least ``dimension + 1``, the default.
    radius : float
    noise : float
        Standard deviation of Gaussian noise per ambient coordinate, in units of the points.
    random_state : int or None

    Raises
    ------
    ValueError
        ``n_features`` or ``dimension`` too small.
    """
    _require_dimension(dimension)
    random = _random(random_state)
    unit = random.standard_normal((n_samples, dimension + 1))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    points, isometry = _embed(radius * unit, n_features or dimension + 1, noise, random)
    half = (dimension + 1) / 2
    area = 2 * np.pi**half / math.gamma(half) * radius**dimension
    return ManifoldSample(
        points,
        unit,
        np.full(dimension + 1, dimension / radius**2),
        np.sqrt(dimension + 1) * unit,
        dimension,
        np.full(n_samples, 1 / area),
        isometry,
        lambda a, b: 2 * radius * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)),
    )


def linear_subspace(
    n_samples: int,
    *,
    dimension: int,
    n_features: int | None = None,
    scale: float = 1.0,
    noise: float = 0.0,
    random_state: int | None = None,
) -> ManifoldSample:
    """Gaussian on a linear subspace: dimension without curvature.

    The eigenvalues and eigenfunctions are those of the Gaussian-weighted Laplacian
    (Ornstein-Uhlenbeck): the coordinates, each with the eigenvalue ``1 / scale**2``, of mean square
    1 under the Gaussian.

    Parameters
    ----------
    n_samples : int
    dimension : int
        Of the subspace, at least 1.
    n_features : int, optional
        Ambient dimension, at least ``dimension``, the default.
    scale : float
        Standard deviation along the subspace.
    noise : float
        Standard deviation of Gaussian noise per ambient coordinate, in units of the points.
    random_state : int or None

    Raises
    ------
    ValueError
        ``n_features`` or ``dimension`` too small.
    """
    _require_dimension(dimension)
    random = _random(random_state)
    normal = random.standard_normal((n_samples, dimension))
    points, isometry = _embed(scale * normal, n_features or dimension, noise, random)
    logs = -(normal**2).sum(axis=1) / 2 - dimension / 2 * np.log(2 * np.pi * scale**2)
    return ManifoldSample(
        points,
        scale * normal,
        np.full(dimension, 1 / scale**2),
        normal,
        dimension,
        np.exp(logs),
        isometry,
        lambda a, b: np.linalg.norm(a - b, axis=-1),
    )


def _require_dimension(dimension: int) -> None:
    if dimension < 1:
        raise ValueError(f"dimension={dimension} must be at least 1.")


def _random(random_state: int | None) -> Random:
    return np.random.default_rng(generator(random_state).initial_seed())


def _angle_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    gap = np.abs(a - b) % (2 * np.pi)
    return np.minimum(gap, 2 * np.pi - gap)


def _embed(
    flat: np.ndarray, n_features: int, noise: float, random: Random
) -> tuple[np.ndarray, np.ndarray]:
    """Image of ``flat`` under a random isometry, with noise, and the isometry."""
    least = flat.shape[1]
    if n_features < least:
        raise ValueError(
            f"n_features={n_features} is too small: this manifold needs at least {least}."
        )
    frame, triangle = np.linalg.qr(random.standard_normal((n_features, least)))
    isometry = (frame * np.sign(np.diag(triangle))).T
    points = flat @ isometry
    if noise:
        points = points + noise * random.standard_normal(points.shape)
    return points, isometry
