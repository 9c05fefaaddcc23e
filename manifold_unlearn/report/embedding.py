"""Pictures of embeddings: scatters of two or three coordinates, and geodesic paths over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_unlearn.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CATEGORIES = len(style.MORE)
_CHORD: dict[str, Any] = {"ls": (0, (3, 2)), "lw": 1.2, "alpha": 0.8}


def embedding_scatter(
    embedding: Any,
    color: Any = None,
    *,
    color_label: str = "",
    cyclic: bool = False,
    title: str = "Embedding",
) -> Figure:
    """Scatter of two or three embedding coordinates.

    In two dimensions far points are left out of the frame and counted, as in
    :func:`~manifold_unlearn.report.plots.embedding_by_site`.

    Parameters
    ----------
    embedding : array of shape (n_samples, 2) or (n_samples, 3), float
    color : array of shape (n_samples,), optional
        Booleans tell forget (True, on top) from retain. Strings, and integers of at most 8
        values, are categories with a legend; names that begin with "forget", "retain" or "near"
        take the color of that set. Other numbers, all floats among them, run along a color bar.
    color_label : str
        Title of the color bar or the legend.
    cyclic : bool, default=False
        Whether the ends of the color bar meet, as for angles.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Another shape, NaN or infinity, no row, or more than 8 names.
    """
    points = _checked_points(embedding, "embedding")
    with style.new_figure(5.6, 4.9, title) as figure:
        ax = _coordinate_axes(figure, [points])
        _scatter(figure, ax, points, _checked_color(color, len(points)), color_label, cyclic)
    return figure


def geodesic_paths(
    embedding: Any,
    paths: Any,
    *,
    names: Sequence[str] = (),
    color: Any = None,
    color_label: str = "",
    cyclic: bool = False,
    chords: bool = True,
    title: str = "Geodesic paths",
) -> Figure:
    """Paths over the scatter of an embedding, each with the straight line between its ends.

    Parameters
    ----------
    embedding : array of shape (n_samples, 2) or (n_samples, 3), float
    paths : array of shape (n_points, same), or a sequence of such arrays
        In the coordinates of ``embedding``; a path in the data space goes through ``transform``
        first. Points along each path in their order, at least 2.
    names : sequence of str, optional
        One a path, for the legend.
    color, color_label, cyclic
        As for :func:`embedding_scatter`; default: grey points.
    chords : bool, default=True
        Whether the straight lines are drawn, dashed.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        As :func:`embedding_scatter`, no path, a path of another dimension or of one point, or
        as many names as paths are not given.
    """
    points = _checked_points(embedding, "embedding")
    lines = _checked_paths(paths, points.shape[1])
    if names and len(names) != len(lines):
        raise ValueError(f"names has {len(names)} entries for {len(lines)} paths; name each once.")
    with style.new_figure(5.6, 4.9, title) as figure:
        ax = _coordinate_axes(figure, [points, *lines])
        checked = _checked_color(color, len(points))
        _scatter(figure, ax, points, checked, color_label, cyclic, grey=True)
        inks = style.MORE[5:] + style.MORE[1:5] if color is None else (style.INK,)
        keys = []
        for index, line in enumerate(lines):
            ink = inks[index % len(inks)]
            ax.plot(*line.T, color="white", lw=4, zorder=5, solid_capstyle="round")
            ax.plot(*line.T, color=ink, lw=2, zorder=6, gid="path")
            ax.plot(*line[[0, -1]].T, color=ink, marker="o", ms=6, lw=0, mec="white", zorder=7)
            if chords:
                ax.plot(*line[[0, -1]].T, color=ink, zorder=5, gid="chord", **_CHORD)
            if names:
                keys.append(style.line_key(ink, names[index], lw=2))
        if not names:
            keys.append(style.line_key(style.INK, "Geodesic", lw=2))
        if chords:
            keys.append(style.line_key(style.INK, "Straight line", **_CHORD))
        figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 4))
    return figure


def _coordinate_axes(figure: Figure, shown: Sequence[np.ndarray]) -> Any:
    """Axes of two or three dimensions without numbers: coordinates have no unit."""
    if shown[0].shape[1] == 2:
        ax = figure.add_subplot()
        style.frame(ax, shown)
        ax.set(xlabel="Coordinate 1", ylabel="Coordinate 2")
        return ax
    ax3: Any = figure.add_subplot(projection="3d", computed_zorder=False)
    names = (f"Coordinate {i}" for i in (1, 2, 3))
    for axis, name in zip((ax3.xaxis, ax3.yaxis, ax3.zaxis), names, strict=True):
        axis.set_pane_color("white")
        axis.line.set(color=style.RULE)
        axis._axinfo["grid"].update(color="#EEEEEE", linewidth=0.6)
        axis.set_ticklabels([])
        axis._axinfo["tick"].update(inward_factor=0, outward_factor=0)
        axis.set_label_text(name)
        axis.labelpad = -10
    ax3.set_box_aspect((1, 1, 1), zoom=0.95)
    return ax3


def _scatter(
    figure: Figure,
    ax: Any,
    points: np.ndarray,
    color: np.ndarray | None,
    label: str,
    cyclic: bool,
    grey: bool = False,
) -> None:
    area, alpha = style.dot(len(points))
    solid = points.shape[1] == 3
    look: dict[str, Any] = {"s": 1.5 * area if solid else area, "lw": 0, "rasterized": True}
    look |= {"depthshade": False} if solid else {}
    if color is None:
        ink = style.OTHER if grey else style.RETAIN
        ax.scatter(*points.T, color=ink, alpha=alpha, **look)
        return
    if color.dtype.kind == "f":
        scheme = "twilight_shifted" if cyclic else "viridis"
        drawn = ax.scatter(*points.T, c=color, cmap=scheme, alpha=min(1, alpha + 0.35), **look)
        bar: Any = figure.colorbar(drawn, ax=ax, shrink=0.8, pad=0.06 if solid else 0.03)
        bar.set_label(label)
        bar.solids.set_alpha(1)
        bar.ax.tick_params(labelsize=9.5, length=3, color=style.MUTED)
        bar.outline.set_visible(False)
        return
    kinds, counts = np.unique(color, return_counts=True)
    names = [str(kind) for kind in kinds]
    inks = _category_colors(names)
    # the rarer a category, the higher it lies; forget on top of all
    ranks = [(n.lower().startswith("forget"), -c) for n, c in zip(names, counts, strict=True)]
    for order, index in enumerate(sorted(range(len(kinds)), key=ranks.__getitem__), start=1):
        part = points[color == kinds[index]]
        ax.scatter(*part.T, color=inks[index], alpha=alpha + 0.15, zorder=order, **look)
    dot: dict[str, Any] = {"marker": "o", "ms": 7, "mew": 0, "lw": 0}
    keys = [style.line_key(ink, name, **dot) for name, ink in zip(names, inks, strict=True)]
    columns = 4 if max(map(len, names)) <= 10 else 2
    look = {"loc": "outside lower center", "ncols": min(len(keys), columns)}
    figure.legend(handles=keys, title=label or None, **look)


def _category_colors(names: Sequence[str]) -> list[str]:
    """Color of each category: that of its set of the house, else the next free one."""
    owners: dict[str, str] = {}  # of the colors of sets, the first by name
    for name in names:
        owners.setdefault(style.set_color(name), name)
    owners.pop(style.OTHER, None)
    inks = {name: ink for ink, name in owners.items()}
    free = (ink for ink in style.MORE if ink not in owners)
    return [inks[name] if name in inks else next(free) for name in names]


def _checked_points(values: Any, name: str) -> np.ndarray:
    points = style.finite(values, name)
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not len(points):
        raise ValueError(
            f"{name} has shape {points.shape}; expected (n_samples, 2) or (n_samples, 3) with "
            f"n_samples >= 1. Give the columns to draw, such as {name}[:, :2]."
        )
    return points


def _checked_paths(paths: Any, width: int) -> list[np.ndarray]:
    single = hasattr(paths, "ndim") and paths.ndim == 2
    lines = [style.finite(path, "paths") for path in ([paths] if single else list(paths))]
    if not lines:
        raise ValueError("paths is empty; give at least one.")
    for index, line in enumerate(lines):
        if line.ndim != 2 or line.shape[1] != width or len(line) < 2:
            raise ValueError(
                f"path {index} has shape {line.shape}; expected (n_points, {width}) with n_points "
                ">= 2, in the coordinates of the embedding. Send data through transform first."
            )
    return lines


def _checked_color(color: Any, n: int) -> np.ndarray | None:
    """None, floats for a color bar, or names of categories."""
    if color is None:
        return None
    values = style.plain(color)
    if values.shape != (n,):
        raise ValueError(f"color has shape {values.shape}; expected ({n},), one entry a row.")
    if values.dtype.kind == "b":
        return np.where(values, "Forget", "Retain")
    n_kinds = len(np.unique(values)) if values.dtype.kind != "f" else n
    if values.dtype.kind in "iu" and n_kinds <= _MOST_CATEGORIES:
        return values
    if values.dtype.kind in "iuf":
        return style.finite(values, "color")
    if n_kinds > _MOST_CATEGORIES:
        raise ValueError(
            f"color has {n_kinds} categories; at most {_MOST_CATEGORIES} can be told apart. "
            "Join some, or give numbers."
        )
    return values.astype(str)
