"""Pictures of dictionaries: place cells on a manifold, the frontier, forget against retain.

Each takes arrays (numpy or tensors on any device), computes nothing and returns a matplotlib
``Figure``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_unlearn.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4
_MOST_PANELS = 24
_MOST_NAMED = 12
_GAP = 0.012  # between a point and its name, share of the picture
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "h")


def place_cells(
    coordinates: Any,
    activations: Any,
    names: Sequence[str],
    *,
    centers: Any = None,
    labels: tuple[str, str] = ("Coordinate 1", "Coordinate 2"),
    title: str = "Latents that tile the manifold",
) -> Figure:
    """Activation of latents over two coordinates of a manifold, one panel a latent.

    Rows where a latent is silent are gray, the others shaded up to its largest activation, the
    strong ones on top.

    Parameters
    ----------
    coordinates : array of shape (n_samples, 2), float
        Such as two diffusion coordinates.
    activations : array of shape (n_samples, n_latents), float
        Of at most 24 latents; of either sign, by their absolute values.
    names : sequence of str
        Titles of the panels.
    centers : array of shape (n_latents, 2), float, optional
        Marked by a cross, such as ``Tiling.center``; NaN for none.
    labels : tuple of str
        Names of the coordinates.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Another shape, NaN or infinity, no latent or more than 24.
    """
    from matplotlib.patheffects import withStroke

    points = style.finite(coordinates, "coordinates")
    values = np.abs(style.finite(activations, "activations"))
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"coordinates has shape {points.shape}; expected (n, 2) with n >= 1.")
    if values.shape != (len(points), len(names)) or not 1 <= len(names) <= _MOST_PANELS:
        raise ValueError(
            f"activations has shape {values.shape} for {len(points)} rows and {len(names)} names; "
            f"give one column a name, 1 to {_MOST_PANELS}."
        )
    marks = None if centers is None else style.plain(centers).astype(float)
    if marks is not None and marks.shape != (len(names), 2):
        raise ValueError(f"centers has shape {marks.shape}; expected ({len(names)}, 2).")
    columns = min(_COLUMNS, len(names))
    rows = ceil(len(names) / columns)
    area, _ = style.dot(len(points))
    with style.new_figure(max(2.3 * columns + 1.2, 4.4), 2.35 * rows + 0.9, title) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels[len(names) :]:
            ax.set_axis_off()
        image = None
        for i, (ax, name) in enumerate(zip(panels, names, strict=False)):
            style.frame(ax, [points])
            image = _cell(ax, points, values[:, i], area)
            if marks is not None and np.isfinite(marks[i]).all():
                cross: dict[str, Any] = {"marker": "+", "ms": 11, "mew": 2, "color": style.INK}
                (drawn,) = ax.plot(*marks[i], lw=0, zorder=6, gid="center", **cross)
                drawn.set_path_effects([withStroke(linewidth=4.5, foreground="white")])
            ax.set_title(name, fontsize=10)
        panels[0].set_ylabel(labels[1], fontsize=10)
        panels[(rows - 1) * columns].set_xlabel(labels[0], fontsize=10)
        assert image is not None
        bar = figure.colorbar(image, ax=list(panels), shrink=min(1.0, 1.8 / rows), pad=0.02)
        bar.set_label("Activation, share of the largest")
        bar.ax.tick_params(labelsize=9.5, length=3, color=style.MUTED)
        bar.outline.set_visible(False)
    return figure


def _cell(ax: Axes, points: np.ndarray, value: np.ndarray, area: float) -> Any:
    fires = value > 0
    quiet: dict[str, Any] = {"s": area, "color": "#DDDDDD", "lw": 0, "rasterized": True}
    x, y = points[~fires].T
    ax.scatter(x, y, gid="silent", zorder=1, **quiet)
    order = np.flatnonzero(fires)[np.argsort(value[fires])]
    share = value[order] / max(value.max(), 1e-300)
    look: dict[str, Any] = {"cmap": _heat(), "vmin": 0.0, "vmax": 1.0, "lw": 0, "s": 1.6 * area}
    x, y = points[order].T
    return ax.scatter(x, y, c=share, gid="fires", zorder=2, rasterized=True, **look)


def _heat() -> Any:
    """Yellow to black, without the shades that are lost on white."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["inferno_r"](np.linspace(0.14, 1, 256)))


def sparsity_frontier(
    curves: Mapping[str, Any],
    *,
    label: str = "FVU",
    better: str = "lower",
    target: tuple[float, float] | None = None,
    logarithmic: bool = False,
    title: str = "Sparsity against fidelity",
) -> Figure:
    """Fidelity of dictionaries against how many latents fire, a line a kind.

    Parameters
    ----------
    curves : mapping of str to array of shape (n_dictionaries, 2), float
        By name, at most 8: L0, above 0, and the fidelity of each dictionary, in any order.
    label : str
        Of the fidelity.
    better : {"lower", "higher"}
        Said beside the axis.
    target : tuple of (L0, fidelity), optional
        The corner in which a dictionary is wanted, shaded.
    logarithmic : bool, default=False
        Of the fidelity's axis.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Another shape, NaN or infinity, an L0 that is not positive, too many curves or none.
    """
    if not 1 <= len(curves) <= len(style.MORE):
        raise ValueError(f"curves has {len(curves)} entries; give 1 to {len(style.MORE)}.")
    if better not in ("lower", "higher"):
        raise ValueError(f"better={better!r} must be 'lower' or 'higher'.")
    lines = {}
    for name, given in curves.items():
        points = style.finite(given, f"curve {name!r}")
        if points.ndim != 2 or points.shape[1] != 2 or not len(points) or points[:, 0].min() <= 0:
            raise ValueError(
                f"curve {name!r} has shape {points.shape}; expected (n, 2) of L0 above 0 and "
                "fidelity."
            )
        lines[name] = points[np.argsort(points[:, 0], kind="stable")]
    every = np.concatenate(list(lines.values()))
    n_keys = len(lines) + (target is not None)
    columns = 2 if sum(len(str(name)) + 6 for name in lines) > 30 or target is not None else 4
    with style.new_figure(6.2, 3.8 + 0.22 * ceil(n_keys / columns), title) as figure:
        ax = figure.add_subplot()
        ax.set_xscale("log")
        if logarithmic:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(_log_locator())
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            ax.yaxis.set_minor_locator(_no_ticks())
        keys = []
        for (name, line), ink, mark in zip(lines.items(), style.MORE, _MARKS, strict=False):
            look: dict[str, Any] = {"lw": 1.8, "marker": mark, "ms": 6, "mew": 0, "color": ink}
            ax.plot(*line.T, gid=name, zorder=3, **look)
            keys.append(style.line_key(label=name, **look))
        _log_ticks(ax, every[:, 0])
        ax.margins(x=0.08, y=0.1)
        ax.set(xlabel="Latents that fire at a token (L0)", ylabel=f"{label} ({better} is better)")
        style.quiet_ticks(ax, ax.xaxis, ax.yaxis)
        ax.grid(axis="y", color=style.RULE, lw=0.6)
        ax.set_axisbelow(True)
        if target is not None:
            keys.append(_shade_target(ax, target, better, label))
        figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), columns))
    return figure


def _log_ticks(ax: Axes, l0: np.ndarray) -> None:
    """Powers of 2 within what is shown, at most eight."""
    low, high = np.floor(np.log2(l0.min())), np.ceil(np.log2(l0.max()))
    step = max(ceil((high - low + 1) / 8), 1)
    ticks = 2.0 ** np.arange(low, high + 1, step)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(_no_ticks())


def _log_locator() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _shade_target(ax: Axes, target: tuple[float, float], better: str, label: str) -> Any:
    from matplotlib.patches import Rectangle

    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    right, edge = max(right, target[0]), target[1]
    bottom, top = min(bottom, edge), max(top, edge)
    low, high = (bottom, edge) if better == "lower" else (edge, top)
    corner = Rectangle((left, low), target[0] - left, high - low, gid="target", zorder=1)
    corner.set(facecolor=style.MORE[2], alpha=0.15, linewidth=0)
    ax.add_patch(corner)
    ax.set(xlim=(left, right), ylim=(bottom, top))
    sign = "\N{LESS-THAN OR EQUAL TO}" if better == "lower" else "\N{GREATER-THAN OR EQUAL TO}"
    said = f"Target: {label} {sign} {edge:g} at L0 \N{LESS-THAN OR EQUAL TO} {target[0]:g}"
    return style.patch_key(style.MORE[2], 0.15, said)


def importance_scatter(
    forget_frequency: Any,
    retain_frequency: Any,
    *,
    chosen: Sequence[int] = (),
    names: Mapping[int, str] | None = None,
    floor: float | None = None,
    title: str = "Latents on forget and on retain rows",
) -> Figure:
    """Firing frequency of every latent on forget rows against retain rows, both logarithmic.

    Latents that never fire on a side stand on the rim of that side; those that never fire are
    counted in the legend.

    Parameters
    ----------
    forget_frequency, retain_frequency : array of shape (n_latents,), float
        In [0, 1].
    chosen : sequence of int
        Latents to mark, the most important first.
    names : mapping of int to str, optional
        Of chosen latents; the first 12 that do not overlap are written. Default: their numbers.
    floor : float, optional
        Frequency at the rim, below all others. Default: half of the smallest that is not 0.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Other shapes, values that are no frequencies, a chosen latent that there is not, nothing
        that fires.
    """
    sides = []
    for name, given in (("forget", forget_frequency), ("retain", retain_frequency)):
        values = style.finite(given, f"{name}_frequency")
        if values.ndim != 1 or values.min(initial=0) < 0 or values.max(initial=0) > 1:
            raise ValueError(
                f"{name}_frequency has shape {values.shape}; expected (n_latents,) in [0, 1]."
            )
        sides.append(values)
    forget, retain = sides
    if forget.shape != retain.shape or not (forget + retain).any():
        raise ValueError(
            f"{forget.size} forget and {retain.size} retain frequencies; give as many of both, not "
            "all 0."
        )
    picked = np.array(list(chosen), dtype=int)
    if len(picked) and not ((picked >= 0) & (picked < len(forget))).all():
        raise ValueError(f"chosen={list(chosen)} names a latent that is not among {len(forget)}.")
    fires = (forget > 0) | (retain > 0)
    positive = np.concatenate([forget[forget > 0], retain[retain > 0]])
    rim = positive.min() / 2 if floor is None else floor
    x, y = np.maximum(retain, rim), np.maximum(forget, rim)
    ends = rim / 1.6, min(positive.max() * 2.2, 1.6)
    with style.new_figure(5.8, 5.6, title) as figure:
        ax = figure.add_subplot()
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, box_aspect=1)
        ax.plot(ends, ends, color=style.MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        for line in (ax.axvline, ax.axhline):
            line(rim * 1.3, color=style.RULE, lw=0.8, zorder=0)
        rest = np.setdiff1d(np.flatnonzero(fires), picked)
        dot: dict[str, Any] = {"lw": 0, "rasterized": True}
        area, alpha = style.dot(len(rest))
        ax.scatter(x[rest], y[rest], s=2 * area, color=style.OTHER, alpha=alpha, gid="rest", **dot)
        mark: dict[str, Any] = {"s": 34, "color": style.FORGET, "zorder": 4}
        ax.scatter(x[picked], y[picked], gid="chosen", lw=0, **mark)
        _name_latents(ax, x, y, picked, names or {})
        _frequency_ticks(ax, rim)
        ax.set(xlabel="Fires on retain rows", ylabel="Fires on forget rows")
        n_silent = int((~fires).sum())
        others = f"Latents ({n_silent} never fire)" if n_silent else "Latents"
        keys = [
            style.line_key(style.OTHER, others, lw=0, marker="o", ms=5, mew=0),
            style.line_key(style.MUTED, "Equally often", lw=1, ls=(0, (4, 3))),
        ]
        if len(picked):
            keys.insert(1, style.line_key(style.FORGET, "Chosen", lw=0, marker="o", ms=6, mew=0))
        figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure


def _frequency_ticks(ax: Axes, rim: float) -> None:
    """Powers of 10 in percent, and ``never`` at the rim."""
    exponents = np.arange(0, 0.86 * np.log10(rim), -1)  # none so near the rim that words meet
    powers = 10.0 ** exponents[:: ceil(len(exponents) / 6)][::-1]
    ticks = [rim, *powers]
    names = ["never", *[f"{100 * power:.4g} %" for power in powers]]
    ax.set_xticks(ticks, names)
    ax.set_yticks(ticks, names)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(_no_ticks())
    style.quiet_ticks(ax, ax.xaxis, ax.yaxis)


def _name_latents(
    ax: Axes, x: np.ndarray, y: np.ndarray, picked: np.ndarray, names: Mapping[int, str]
) -> None:
    """Write names beside the points, the first that leave each other room.

    To the left where that is free: what matters lies above the diagonal, and the others below.
    """
    from matplotlib.patheffects import withStroke

    low, high = np.log(ax.get_xlim())
    across, up = ((np.log(values) - low) / (high - low) for values in (x, y))
    taken: list[tuple[float, float, float]] = []
    for latent in picked.tolist():
        if len(taken) == _MOST_NAMED:
            return
        text = names.get(latent, str(latent))
        text = text if len(text) <= 30 else text[:29] + "…"
        wide = 0.0155 * len(text)
        marks = [(across[one], up[one], 0.0) for one in picked.tolist() if one != latent]
        sides = {"right": across[latent] - wide - _GAP, "left": across[latent] + _GAP}
        for side, start in sides.items():
            free = all(
                abs(up[latent] - other) > 0.03 or start + wide < left or left + size < start
                for left, other, size in [*taken, *marks]
            )
            if free and start >= 0.02 and start + wide <= 1:
                taken.append((start, up[latent], wide))
                look: dict[str, Any] = {"ha": side, "va": "center", "color": style.INK}
                look["gid"] = "name"
                offset = (6 if side == "left" else -6, 0)
                plain = text.replace("$", r"\$")
                said = style.small_print(ax, plain, (x[latent], y[latent]), offset, **look)
                said.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
                break
