"""Which latents tile which part of a manifold: their place fields over given coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from manifold_unlearn.arrays import as_rows, generator
from manifold_unlearn.dictionary.coding import as_code

_BINS = {1: 40, 2: 20, 3: 10}


@dataclass(frozen=True, eq=False)
class Tiling:
    """Place fields of latents over the coordinates of a manifold.

    Attributes
    ----------
    information : array of shape (n_latents,), float64
        Spatial information, bits per unit of activation ("per spike"), as measured: its bias is
        upward. 0 for a latent that never fires.
    null_mean, null_deviation : arrays of shape (n_latents,), float64
        Of the information where coordinates are shuffled.
    p_value : array of shape (n_latents,), float64
        ``(1 + shuffles at least as informative) / (1 + n_shuffles)``; 1 for a silent latent.
    center : array of shape (n_latents, n_coordinates), float64
        Center of mass of the field that holds the peak; NaN for a silent latent.
    peak : array of shape (n_latents,), float64
        Largest mean activation of a bin (smoothed).
    area : array of shape (n_latents,), float64
        Length, area or volume in units of the coordinates of the field that holds the peak: bins
        at or above ``field_level`` of it.
    share : array of shape (n_latents,), float64
        Part of the rows that it takes to hold the activation, ``(sum p r)**2 / sum p r**2`` over
        bins: 1 for one that fires everywhere alike.
    n_fields : array of shape (n_latents,), int64
        Connected regions at or above ``field_level`` of the peak.
    count : array of shape (n_latents,), int64
        Rows on which the latent fires.
    maps : array of shape (n_latents, *bins), float32
        Mean activation of the rows of a bin, smoothed; NaN where there are too few rows.
    occupancy : array of shape bins, int64
        Rows of each bin.
    edges : tuple of arrays
        Of the bins, one array a coordinate.
    period : tuple of float or None
    visited : array of shape bins, bool
        At least ``min_rows`` rows.
    field_level : float
    n_shuffles : int
    """

    information: np.ndarray
    null_mean: np.ndarray
    null_deviation: np.ndarray
    p_value: np.ndarray
    center: np.ndarray
    peak: np.ndarray
    area: np.ndarray
    share: np.ndarray
    n_fields: np.ndarray
    count: np.ndarray
    maps: np.ndarray
    occupancy: np.ndarray
    edges: tuple[np.ndarray, ...]
    period: tuple[float | None, ...]
    visited: np.ndarray
    field_level: float
    n_shuffles: int

    @property
    def excess(self) -> np.ndarray:
        """Information less that of shuffled coordinates, bits."""
        return self.information - self.null_mean

    def place_latents(
        self, *, alpha: float = 0.05, min_count: int = 10, max_fields: int | None = None
    ) -> np.ndarray:
        """Latents that tell the place, most informative first.

        Benjamini and Hochberg's rule at false discovery rate ``alpha`` over the latents that fire
        ``min_count`` times: ``n_shuffles`` below ``n_latents / alpha`` finds few if few are there.

        Parameters
        ----------
        alpha : float, default=0.05
        min_count : int, default=10
        max_fields : int, optional
            Leave out latents of more fields.

        Returns
        -------
        array of int64
        """
        judged = np.flatnonzero(self.count >= min_count)
        order = judged[np.argsort(self.p_value[judged], kind="stable")]
        limit = alpha * np.arange(1, len(order) + 1) / max(len(order), 1)
        passed = np.flatnonzero(self.p_value[order] <= limit)
        found = order[: passed[-1] + 1] if len(passed) else order[:0]
        if max_fields is not None:
            found = found[self.n_fields[found] <= max_fields]
        return found[np.argsort(-self.excess[found], kind="stable")].astype(np.int64)

    def covering(self, latents: Sequence[int] | np.ndarray) -> np.ndarray:
        """How many of the latents have a field at each bin: int64, shape bins, 0 if unvisited."""
        chosen = np.asarray(latents, dtype=np.int64).reshape(-1)
        inside = _at_level(self.maps[chosen], self.peak[chosen], self.field_level)
        return np.asarray(inside.sum(axis=0), dtype=np.int64)

    def coverage(self, latents: Sequence[int] | np.ndarray, *, at_least: int = 1) -> float:
        """Share of the rows in visited bins where ``at_least`` of the latents have a field."""
        weight = np.where(self.visited, self.occupancy, 0)
        return float(weight[self.covering(latents) >= at_least].sum() / weight.sum())

    def tiles(self, latents: Sequence[int] | np.ndarray, n: int | None = None) -> np.ndarray:
        """Latents whose fields tile the manifold, greedily.

        The first covers most rows, each that follows most of those not covered yet. Ends when
        nothing is left to cover, or at ``n``.

        Parameters
        ----------
        latents : sequence of int
            To choose from, such as :meth:`place_latents`.
        n : int, optional

        Returns
        -------
        array of int64
        """
        pool = np.asarray(latents, dtype=np.int64).reshape(-1)
        inside = _at_level(self.maps[pool], self.peak[pool], self.field_level)
        fields = inside.reshape(len(pool), self.occupancy.size)
        left = np.where(self.visited, self.occupancy, 0).ravel().astype(float)
        found: list[int] = []
        while len(found) < (len(pool) if n is None else n):
            gain = fields @ left
            best = int(gain.argmax()) if len(gain) else 0
            if not len(gain) or gain[best] <= 0:
                break
            found.append(int(pool[best]))
            left[fields[best]] = 0
        return np.array(found, dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """All but the maps, as plain numbers and lists; NaN as None."""
        plain = {
            name: _without_nan(value.tolist())
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and name not in ("maps", "visited", "occupancy")
        }
        return plain | {
            "edges": [edge.tolist() for edge in self.edges],
            "period": list(self.period),
            "field_level": self.field_level,
            "n_shuffles": self.n_shuffles,
            "occupancy": self.occupancy.tolist(),
        }


def tile_manifold(
    code: Any,
    coordinates: Any,
    *,
    n_bins: int | Sequence[int] | None = None,
    period: Sequence[float | None] | None = None,
    min_rows: int = 3,
    smoothing: float = 1.0,
    field_level: float = 0.5,
    n_shuffles: int = 200,
    groups: Any = None,
    random_state: Any = 0,
) -> Tiling:
    """Place fields of latents: mean activation as a function of coordinates on a manifold.

    With ``p`` the share of the rows in a bin and ``r`` the mean activation there, the information
    is ``sum p (r / R) log2(r / R)``, ``R = sum p r``, on maps that are not smoothed. The strength
    of a latent is the absolute value of its activation. The null pairs the codes with shuffled
    coordinates.

    Parameters
    ----------
    code : SparseCode, or array or Tensor of shape (n, n_latents)
        Only what fires is touched: ``nnz`` steps a shuffle.
    coordinates : array or Tensor of shape (n, c)
        ``c`` at most 3, such as ``DiffusionMap(2).fit_transform(X)``.
    n_bins : int or sequence of int, optional
        Equal bins along each coordinate. Default: 40, 20 or 10 for 1, 2 or 3 coordinates.
    period : sequence of float or None, optional
        Of each coordinate: ``[2 * pi]`` for an angle, which is then taken modulo it. Default: none.
    min_rows : int, default=3
        Bins of fewer rows are unvisited and take part in nothing.
    smoothing : float, default=1.0
        Standard deviation, in bins, of the Gaussian that smooths the maps from which fields are
        read. 0: none.
    field_level : float, default=0.5
        A field is where the map is at least this part of its peak.
    n_shuffles : int, default=200
    groups : array of shape (n,), optional
        Such as the text of each row: whole groups change places in the shuffle, so that what
        neighboring rows share anyway does not count as information.
    random_state : int or generator, default=0

    Returns
    -------
    Tiling

    Raises
    ------
    ValueError
        Rows that do not match, more than 3 coordinates, a coordinate without spread, no bin of
        ``min_rows``, a parameter out of range.

    References
    ----------
    Skaggs, McNaughton, Gothard and Markus (1993), An information-theoretic approach to deciphering
    the hippocampal code.
    Treves and Rolls (1991), What determines the capacity of autoassociative memories in the brain?
    (``share``).

    Examples
    --------
    >>> import numpy as np
    >>> from manifold_unlearn.dictionary.tiling import tile_manifold
    >>> angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 2000)
    >>> bump = np.exp(4 * (np.cos(angle - 1.0) - 1))[:, None]
    >>> found = tile_manifold(bump, angle[:, None], period=[2 * np.pi])
    >>> round(float(found.center[0, 0]), 1), int(found.n_fields[0])
    (1.0, 1)
    """
    fired = as_code(code)
    at = as_rows(coordinates, device="cpu", name="coordinates").double().numpy()
    n, c = at.shape
    if n != fired.n_rows:
        raise ValueError(f"coordinates has {n} rows; the code has {fired.n_rows}. Give one each.")
    if c not in _BINS:
        raise ValueError(f"coordinates has {c} columns; give 1 to 3 of them.")
    if not 0 < field_level < 1 or smoothing < 0 or min_rows < 1 or n_shuffles < 1:
        raise ValueError(
            f"field_level={field_level} must lie between 0 and 1, smoothing={smoothing} not be "
            f"negative, min_rows={min_rows} and n_shuffles={n_shuffles} be at least 1."
        )
    periods = tuple(period) if period is not None else (None,) * c
    bins = (n_bins,) * c if isinstance(n_bins, int) else tuple(n_bins or (_BINS[c],) * c)
    if len(periods) != c or len(bins) != c or min(bins) < 2:
        raise ValueError(
            f"n_bins={bins} and period={periods} must name {c} coordinates, "
            "with at least 2 bins each."
        )
    edges, place = _binned(at, bins, periods)
    device = fired.latent.device
    flat = torch.from_numpy(np.ravel_multi_index(place.T, bins)).to(device)
    occupancy = torch.bincount(flat, minlength=math.prod(bins))
    visited = occupancy >= min_rows
    if not bool(visited.any()):
        raise ValueError(
            f"no bin of {bins} holds min_rows={min_rows} of the {n} rows; lower n_bins or min_rows."
        )
    sums = _binned_sums(fired, flat, len(occupancy))
    information = _information(sums, occupancy, visited)
    draws = []
    mixed = _shuffler(groups, n, generator(random_state))
    for _ in range(n_shuffles):
        moved = flat[mixed().to(device)]
        draws.append(_information(_binned_sums(fired, moved, len(occupancy)), occupancy, visited))
    null = torch.stack(draws)
    # equal up to rounding counts as equal: one row that fires alone is equally informative anywhere
    beaten = (null >= information * (1 - 1e-9) - 1e-12).sum(0)
    count = torch.bincount(fired.latent, minlength=fired.n_latents)
    maps = _rate_maps(sums, occupancy, visited, bins, periods, smoothing)
    fields = _fields(maps, edges, periods, field_level)
    return Tiling(
        information=information.cpu().numpy(),
        null_mean=null.mean(0).cpu().numpy(),
        null_deviation=null.std(0, correction=0).cpu().numpy(),
        p_value=((1 + beaten).double() / (1 + n_shuffles)).cpu().numpy(),
        share=_share(sums, occupancy, visited).cpu().numpy(),
        count=count.cpu().numpy(),
        maps=maps.astype(np.float32),
        occupancy=occupancy.reshape(bins).cpu().numpy(),
        edges=edges,
        period=periods,
        visited=visited.reshape(bins).cpu().numpy(),
        field_level=field_level,
        n_shuffles=n_shuffles,
        **fields,
    )


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if values != values else values


def _binned(
    at: np.ndarray, bins: Sequence[int], periods: Sequence[float | None]
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Edges of the bins, and the bin of each row along each coordinate."""
    edges: list[np.ndarray] = []
    place: list[np.ndarray] = []
    for column, size, turn in zip(at.T, bins, periods, strict=True):
        if turn is not None and not turn > 0:
            raise ValueError(f"period={turn} must be positive.")
        values = column if turn is None else np.mod(column, turn)
        low, high = (values.min(), values.max()) if turn is None else (0.0, turn)
        if not high > low:
            raise ValueError(f"coordinate {len(edges)} is {low} in every row; leave it out.")
        edges.append(np.linspace(low, high, size + 1))
        place.append(np.clip(((values - low) / (high - low) * size).astype(int), 0, size - 1))
    return tuple(edges), np.stack(place, axis=1)


def _binned_sums(code: Any, flat: Tensor, size: int) -> Tensor:
    """Sum of the strengths of each latent in each bin, (n_latents, size) float64."""
    total = torch.zeros(code.n_latents * size, dtype=torch.float64, device=flat.device)
    total.index_add_(0, code.latent * size + flat[code.row], code.value.detach().abs().double())
    return total.reshape(code.n_latents, size)


def _information(sums: Tensor, occupancy: Tensor, visited: Tensor) -> Tensor:
    """Skaggs' bits per spike of each latent."""
    rows = occupancy[visited].double()
    q = sums[:, visited]  # p r of each bin, up to a factor
    q = q / q.sum(1, keepdim=True).clamp_min(1e-300)
    p = rows / rows.sum()
    return torch.special.xlogy(q, q / p).sum(1) / math.log(2)


def _share(sums: Tensor, occupancy: Tensor, visited: Tensor) -> Tensor:
    rows = occupancy[visited].double()
    p, rate = rows / rows.sum(), sums[:, visited] / rows
    return (rate @ p).square() / (rate.square() @ p).clamp_min(1e-300)


def _shuffler(groups: Any, n: int, random: torch.Generator) -> Any:
    """Function that draws a permutation of the rows, whole groups in one piece if there are any."""
    if groups is None:
        return lambda: torch.randperm(n, generator=random)
    given = np.asarray(groups)
    if given.shape != (n,):
        raise ValueError(f"groups has shape {given.shape}; expected ({n},), one a row.")
    _, index = np.unique(given, return_inverse=True)
    group = torch.from_numpy(index.reshape(-1))
    if int(group.max()) == 0:
        raise ValueError("groups holds one group; at least 2 are needed to change places.")
    ordered = group.sort(stable=True).indices

    def draw() -> Tensor:
        rank = torch.randperm(int(group.max()) + 1, generator=random)
        moved = rank[group].sort(stable=True).indices
        found = torch.empty_like(moved)
        found[ordered] = moved
        return found

    return draw


def _rate_maps(
    sums: Tensor,
    occupancy: Tensor,
    visited: Tensor,
    bins: Sequence[int],
    periods: Sequence[float | None],
    smoothing: float,
) -> np.ndarray:
    """Mean strength by bin, sums and rows smoothed alike; NaN where unvisited."""
    seen = visited.cpu().numpy().reshape(bins)
    mass = np.where(seen, sums.cpu().numpy().reshape(-1, *bins), 0.0)
    rows = np.where(seen, occupancy.cpu().numpy().reshape(bins), 0).astype(float)
    if smoothing:
        mode = ["wrap" if turn else "constant" for turn in periods]
        sigma = (smoothing,) * len(bins)
        mass = ndimage.gaussian_filter(mass, (0, *sigma), mode=["constant", *mode])
        rows = ndimage.gaussian_filter(rows, sigma, mode=mode)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(seen, mass / rows, np.nan)


def _at_level(maps: np.ndarray, peak: np.ndarray, level: float) -> np.ndarray:
    bound = level * peak.reshape(-1, *(1,) * (maps.ndim - 1))
    with np.errstate(invalid="ignore"):
        return (maps >= bound) & (bound > 0)


def _fields(
    maps: np.ndarray,
    edges: Sequence[np.ndarray],
    periods: Sequence[float | None],
    level: float,
) -> dict[str, np.ndarray]:
    """Peak, fields, and area and center of the field that holds the peak, of every latent."""
    m, c = len(maps), maps.ndim - 1
    filled = np.nan_to_num(maps, nan=0.0)
    peak = filled.reshape(m, -1).max(axis=1)
    region = _regions(_at_level(maps, peak, level), periods).reshape(m, -1)
    fires = peak > 0
    best = filled.reshape(m, -1).argmax(axis=1)
    main = (region == region[np.arange(m), best][:, None]) & (region > 0)
    pairs = np.stack([np.repeat(np.arange(m), region.shape[1]), region.ravel()], 1)
    met = np.unique(pairs[pairs[:, 1] > 0], axis=0)
    n_fields = np.bincount(met[:, 0], minlength=m)
    volume = math.prod(float(edge[1] - edge[0]) for edge in edges)
    weight = np.where(main, filled.reshape(m, -1), 0.0)
    weight = weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
    center = np.full((m, c), np.nan)
    middles = np.meshgrid(*[(edge[1:] + edge[:-1]) / 2 for edge in edges], indexing="ij")
    for axis, (middle, turn) in enumerate(zip(middles, periods, strict=True)):
        if turn is None:
            mean = weight @ middle.ravel()
        else:
            phase = weight @ np.exp(2j * np.pi * middle.ravel() / turn)
            mean = np.mod(np.angle(phase) * turn / (2 * np.pi), turn)
        center[fires, axis] = mean[fires]
    return {
        "peak": peak,
        "n_fields": n_fields.astype(np.int64),
        "area": main.sum(axis=1) * volume,
        "center": center,
    }


def _regions(inside: np.ndarray, periods: Sequence[float | None]) -> np.ndarray:
    """Connected regions of each latent's bins, numbered from 1; neighbors across a period join."""
    c = inside.ndim - 1
    touching = np.zeros((3,) * (c + 1), dtype=bool)
    touching[1] = ndimage.generate_binary_structure(c, 1)
    region, n = ndimage.label(inside, structure=touching)
    pairs = [np.empty((0, 2), dtype=int)]
    for axis, turn in enumerate(periods, start=1):
        if turn is not None:
            ends = np.stack([region.take(0, axis=axis), region.take(-1, axis=axis)], axis=-1)
            pairs.append(ends[(ends > 0).all(axis=-1)])
    joined = np.concatenate(pairs)
    links = coo_array((np.ones(len(joined)), tuple(joined.T)), shape=(n + 1, n + 1))
    _, same = connected_components(links, directed=False)
    return np.where(region > 0, same[region] + 1, 0)
