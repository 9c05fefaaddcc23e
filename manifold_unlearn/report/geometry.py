"""Pictures of geometry: spectra, bandwidths, dimensions.

Each takes arrays (numpy or tensors on any device), computes nothing and returns a matplotlib
``Figure``.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_unlearn.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHOSEN: dict[str, Any] = {"color": style.FORGET, "lw": 1.8}
_LEVEL: dict[str, Any] = {"color": style.INK, "ls": (0, (4, 2)), "lw": 1.4}


def spectrum(
    eigenvalues: Any,
    *,
    gap: int | None = None,
    exact: Any = None,
    label: str = "Eigenvalue",
    title: str = "Spectrum of the diffusion map",
) -> Figure:
    """Eigenvalues of a diffusion map in their order.

    Parameters
    ----------
    eigenvalues : array of shape (n_components,), float
        As :class:`~manifold_unlearn.manifold.diffusion.DiffusionMap` gives them: without the
        trivial one; those of the Markov matrix descending, of the generator ascending.
    gap : int, optional
        Number of components before the spectral gap, at least 1: the gap is shaded.
    exact : array of shape (n_exact,), float, optional
        True eigenvalues to compare with, from the first on; not more than there are.
    label : str
        Of the vertical axis.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Not one-dimensional, empty, or not finite; a gap that is not between two eigenvalues.
    """
    values = _checked_row(eigenvalues, "eigenvalues", "(n_components,)")
    truth = None if exact is None else _checked_row(exact, "exact", "(n_exact,)")
    n = len(values)
    if truth is not None and len(truth) > n:
        raise ValueError(f"exact has {len(truth)} eigenvalues, more than the {n} drawn; cut it.")
    if gap is not None and not 1 <= gap < n:
        raise ValueError(f"gap={gap} must lie between 1 and {n - 1}: an eigenvalue on either side.")
    with style.new_figure(6.4, 3.6, title) as figure:
        ax = figure.add_subplot()
        ax.plot(range(1, n + 1), values, color=style.RETAIN, lw=1, marker="o", ms=6, mew=0)
        keys: list[Any] = [style.line_key(style.RETAIN, "Found", lw=1, marker="o", ms=6, mew=0)]
        if truth is not None:
            ring: dict[str, Any] = {"marker": "_", "ms": 15, "mew": 1.8, "lw": 0}
            ax.plot(range(1, len(truth) + 1), truth, color=style.FORGET, gid="exact", **ring)
            keys.append(style.line_key(style.FORGET, "Exact", **ring))
        if gap is not None:
            ax.axvspan(gap, gap + 1, color=style.NEAR, alpha=0.25, lw=0, gid="gap", zorder=0)
            keys.append(style.patch_key(style.NEAR, 0.25, f"Gap after {gap}"))
        ax.margins(y=0.1)
        ax.set(xlabel="Component", ylabel=label, xlim=(0.4, n + 0.6))
        ax.set_xticks(range(1, n + 1, ceil(n / 20)))
        style.quiet_ticks(ax, ax.xaxis, ax.yaxis)
        if len(keys) > 1:
            figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


def bandwidth_curve(
    bandwidths: Any,
    slope: Any,
    *,
    variance: Any = None,
    chosen: float | None = None,
    plateau: tuple[float, float] | None = None,
    dimension: float | None = None,
    title: str = "Dimension seen at each bandwidth",
) -> Figure:
    """Twice the growth of the kernel sum, which is the dimension, against the bandwidth.

    Parameters
    ----------
    bandwidths : array of shape (n_grid,), float
        Positive and ascending, in squared units of the data; drawn on a logarithmic axis.
    slope : array of shape (n_grid,), float
        ``d log S / d log bandwidth`` of the kernel sum ``S`` (Berry, Giannakis and Harlim 2015).
        NaN where there is none.
    variance : array of shape (n_grid,), float, optional
        A second curve: the variance of the kernel's exponent, which noise does not lift.
    chosen : float, optional
        The bandwidth taken.
    plateau : tuple of two floats, optional
        Bandwidths between which the dimension is constant; nothing is drawn where they are equal.
    dimension : float, optional
        The dimension read off: a level line. With it, the vertical axis ends at four times this.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Arrays of different shapes, bandwidths that are not positive and ascending, no number.
    """
    grid = _checked_row(bandwidths, "bandwidths", "(n_grid,)")
    if not (grid[0] > 0 and (np.diff(grid) > 0).all()):
        raise ValueError("bandwidths must be positive and ascending; sort the grid.")
    curves = {"Growth of the kernel sum": (_checked_curve(slope, "slope", grid), style.RETAIN)}
    if variance is not None:
        curves["Variance of the exponent"] = (
            _checked_curve(variance, "variance", grid),
            style.MORE[1],
        )
    with style.new_figure(6.4, 3.8, title) as figure:
        ax = figure.add_subplot()
        keys: list[Any] = []
        for name, (values, color) in curves.items():
            ax.plot(grid, 2 * values, color=color, lw=2, gid=name)
            keys.append(style.line_key(color, name, lw=2))
        highest = max(float(np.nanmax(2 * values)) for values, _ in curves.values())
        top = 1.08 * highest if dimension is None else min(1.08 * highest, 4 * dimension)
        ax.set(xscale="log", xlim=(grid[0], grid[-1]), ylim=(0, top or 1))
        if plateau is not None and plateau[0] < plateau[1]:
            ax.axvspan(*plateau, color=style.NEAR, alpha=0.25, lw=0, zorder=0, gid="plateau")
            keys.append(style.patch_key(style.NEAR, 0.25, "Plateau"))
        if dimension is not None:
            ax.axhline(dimension, gid="dimension", **_LEVEL)
            keys.append(style.line_key(label=f"Dimension {dimension:.3g}", **_LEVEL))
        if chosen is not None:
            ax.axvline(chosen, gid="chosen", **_CHOSEN)
            keys.append(style.line_key(label=f"Chosen, {_scientific(chosen)}", **_CHOSEN))
        if highest > top:
            corner = {"xycoords": "axes fraction", "ha": "left"}
            style.small_print(ax, f"up to {highest:.3g}", (0, 1), (0, 4), **corner)
        ax.set(xlabel="Bandwidth (squared units of the data)", ylabel="Dimension")
        style.quiet_ticks(ax, ax.xaxis, ax.yaxis)
        ax.tick_params(which="minor", length=0)
        figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure


def dimension_histogram(
    local: Any,
    *,
    dimension: Any = None,
    standard_error: Any = None,
    truth: float | None = None,
    title: str = "Local intrinsic dimension",
) -> Figure:
    """Histogram of local dimensions with the global one, one panel a data set.

    The panels share their axes. What lies above the 99.5 % quantile of all is counted in words.

    Parameters
    ----------
    local : array of shape (n_samples,), float, or mapping of str to such arrays
        By name of the layer when there are several.
    dimension : float or mapping of str to float, optional
        The global estimate: a line.
    standard_error : float or mapping of str to float, optional
        Of ``dimension``: a band of 1.96 on either side.
    truth : float, optional
        The dimension where it is known: a dotted line in all panels.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        No set, one that is empty or not finite, a name that ``local`` does not have.
    """
    sets = dict(local) if isinstance(local, Mapping) else {"": local}
    if not sets:
        raise ValueError("local is empty; give at least one set of local dimensions.")
    values = {name: _checked_row(row, f"local {name}".strip(), "(n_samples,)")
              for name, row in sets.items()}  # fmt: skip
    globals_ = _by_name(dimension, values, "dimension")
    errors = _by_name(standard_error, values, "standard_error")
    if missing := sorted(set(errors) - set(globals_)):
        raise ValueError(f"standard_error of {missing} has no dimension to stand beside; give it.")
    marks = [*globals_.values(), *([] if truth is None else [truth])]
    every = np.concatenate(list(values.values()))
    low, high = min([every.min(), *marks]), max([float(np.quantile(every, 0.995)), *marks])
    pad = 0.04 * (high - low) or 0.5
    edges = np.linspace(low - pad, high + pad, 41)
    n_columns = min(len(values), 4)
    n_rows = ceil(len(values) / n_columns)
    width = 5.6 if n_columns == 1 else 2.5 * n_columns + 0.6
    with style.new_figure(width, 2.3 * n_rows + 1.3, title) as figure:
        axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True).ravel()
        for ax in axes[len(values) :]:
            ax.remove()
        for ax, (name, row) in zip(axes, values.items(), strict=False):
            _draw_dimensions(ax, row, edges, globals_.get(name), errors.get(name))
            if truth is not None:
                ax.axvline(truth, color=style.INK, ls=":", lw=1.6, gid="truth")
            ax.set_title(name)
        for index, ax in enumerate(axes[: len(values)]):
            if index % n_columns == 0:
                ax.set_ylabel("Share of rows")
            if index + n_columns >= len(values):  # nothing below
                ax.set_xlabel("Dimension")
                ax.tick_params(labelbottom=True)
        _dimension_legend(figure, bool(globals_), bool(errors), truth)
    return figure


def _draw_dimensions(
    ax: Axes, row: np.ndarray, edges: np.ndarray, level: float | None, error: float | None
) -> None:
    shares = np.full(len(row), 1 / len(row))
    ax.hist(row, bins=list(edges), weights=shares, color=style.NEAR, lw=0)
    heights, _ = np.histogram(row, bins=edges, weights=shares)
    ax.set_ylim(top=max(ax.get_ylim()[1], 1.2 * float(heights.max())))
    if level is not None:
        reach = 0.0 if error is None else 1.96 * error
        if error is not None:
            ax.axvspan(level - reach, level + reach, color=style.FORGET, alpha=0.25, lw=0, gid="95")
        ax.axvline(level, gid="global", **_CHOSEN)
        text = f"{level:.3g}" if error is None else f"{level:.2f} ± {error:.2g}"
        place = {"xycoords": ("data", "axes fraction"), "color": style.INK}
        side, way = ("right", -1) if level > edges[[0, -1]].mean() else ("left", 1)
        style.small_print(ax, text, (level + way * reach, 1), (4 * way, -8), **place, ha=side)
    ax.set_xlim(edges[0], edges[-1])
    style.in_percent(ax.yaxis)
    style.quiet_ticks(ax, ax.xaxis, ax.yaxis)
    if n_above := int((row > edges[-1]).sum()):
        corner = {"xycoords": "axes fraction", "ha": "right"}
        style.small_print(ax, f"{n_above} above", (1, 1), (-4, -20), **corner)


def _dimension_legend(
    figure: Figure, has_level: bool, has_error: bool, truth: float | None
) -> None:
    keys: list[Any] = []
    if has_level:
        keys.append(style.line_key(label="Global", **_CHOSEN))
    if has_error:
        keys.append(style.patch_key(style.FORGET, 0.25, "95 % interval"))
    if truth is not None:
        keys.append(style.line_key(style.INK, f"Truth, {truth:g}", ls=":", lw=1.6))
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))


def _by_name(values: Any, sets: Mapping[str, np.ndarray], what: str) -> dict[str, float]:
    if values is None:
        return {}
    given = values if isinstance(values, Mapping) else None
    if given is None and len(sets) > 1:
        raise ValueError(f"{what} is one number for the sets {list(sets)}; give it by name.")
    named = {next(iter(sets)): values} if given is None else dict(given)
    if unknown := sorted(set(named) - set(sets)):
        raise ValueError(f"{what} names {unknown}; local has only {list(sets)}.")
    return {name: float(style.finite(value, what)) for name, value in named.items()}


def _scientific(value: float) -> str:
    text = f"{value:.2g}"
    if "e" not in text:
        return text
    digits, power = text.split("e")
    return rf"${digits}\times 10^{{{int(power)}}}$"


def _checked_row(values: Any, name: str, shape: str) -> np.ndarray:
    row = style.finite(values, name)
    if row.ndim != 1 or not row.size:
        raise ValueError(f"{name} has shape {row.shape}; expected {shape}, at least one.")
    return row


def _checked_curve(values: Any, name: str, grid: np.ndarray) -> np.ndarray:
    curve = style.plain(values).astype(float)
    if curve.shape != grid.shape or not np.isfinite(curve).any() or np.isinf(curve).any():
        raise ValueError(
            f"{name} has shape {curve.shape}; expected {grid.shape}, one entry a bandwidth: "
            "finite or NaN, and not NaN alone."
        )
    return curve
