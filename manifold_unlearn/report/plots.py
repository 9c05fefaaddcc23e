"""Pictures of results: one function a picture, each returns a matplotlib ``Figure``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_unlearn.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from manifold_unlearn.evaluate.results import Change

_MOST_NUMBERED_CELLS = 120
_KEPT = {"retain": ("Retain", style.RETAIN, "o"), "near": ("Near neighbors", style.NEAR, "s")}


@dataclass(frozen=True, eq=False)
class EmbeddingPanel:
    """One site in :func:`embedding_by_site`."""

    site: str
    coordinates: np.ndarray
    """(n_samples, 2) float: the first two columns of an embedding"""
    is_forget: np.ndarray
    """(n_samples,) bool"""
    note: str = ""
    """Small print under the name of the site, such as its separability"""


def embedding_by_site(panels: Sequence[EmbeddingPanel]) -> Figure:
    """Scatter of the first two embedding coordinates, one panel a site, forget drawn on top.

    Every panel has its own scale. Its frame reaches, for the forget and for the retain points
    alike, to the farthest one within one 5 to 95 % spread of their 5 % and 95 % quantiles; the
    panel says how many points lie outside.

    Parameters
    ----------
    panels : sequence of EmbeddingPanel
        About 12 stay readable.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        No panel, or one whose arrays have another shape or hold NaN or infinity.
    """
    if not panels:
        raise ValueError("panels is empty; give at least one EmbeddingPanel.")
    checked = [_checked_panel(panel) for panel in panels]
    n_columns = len(panels) if len(panels) <= 4 else 3 if len(panels) <= 6 else 4
    n_rows = ceil(len(panels) / n_columns)
    edge = 4.0 if len(panels) == 1 else 2.7
    width, height = edge * n_columns + 0.4, (edge + 0.1) * n_rows + 0.8
    with style.new_figure(width, height, "Embedding by site") as figure:
        axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, panel, (coordinates, is_forget) in zip(axes, panels, checked, strict=False):
            _draw_embedding(ax, coordinates, is_forget)
            ax.set_title(panel.site, pad=18 if panel.note else 6)
            corner = {"xycoords": "axes fraction", "ha": "left"}
            style.small_print(ax, panel.note, (0, 1), (0, 5), **corner)
        figure.supxlabel("Coordinate 1", fontsize=10.5)
        figure.supylabel("Coordinate 2", fontsize=10.5)
        dot: dict[str, Any] = {"marker": "o", "ms": 7, "mew": 0, "lw": 0}
        sides = {"Forget": style.FORGET, "Retain": style.RETAIN}
        keys = [style.line_key(color, side, **dot) for side, color in sides.items()]
        figure.legend(handles=keys, loc="outside upper right", ncols=2)
    return figure


def _checked_panel(panel: EmbeddingPanel) -> tuple[np.ndarray, np.ndarray]:
    coordinates = style.finite(panel.coordinates, f"coordinates of {panel.site}")
    if coordinates.ndim != 2 or coordinates.shape[1] != 2 or not len(coordinates):
        raise ValueError(
            f"coordinates of {panel.site} has shape {coordinates.shape}; expected "
            "(n_samples, 2) with n_samples >= 1. Give the first two columns of the embedding."
        )
    is_forget = style.plain(panel.is_forget).astype(bool)
    if is_forget.shape != (len(coordinates),):
        raise ValueError(
            f"is_forget of {panel.site} has shape {is_forget.shape}; expected "
            f"({len(coordinates)},), one entry a row of coordinates."
        )
    return coordinates, is_forget


def _draw_embedding(ax: Axes, coordinates: np.ndarray, is_forget: np.ndarray) -> None:
    area, alpha = style.dot(len(is_forget))
    sides = [coordinates[~is_forget], coordinates[is_forget]]
    looks = [(style.RETAIN, alpha), (style.FORGET, alpha + 0.25)]
    for order, (points, (color, opacity)) in enumerate(zip(sides, looks, strict=True), start=1):
        x, y = points.T
        ax.scatter(x, y, s=area, color=color, alpha=opacity, lw=0, zorder=order, rasterized=True)
    style.frame(ax, sides)


def separability_heatmap(
    values: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    *,
    chosen: Sequence[tuple[Any, Any]] | None = None,
    row_label: str = "",
    column_label: str = "Layer",
) -> Figure:
    """Heat map of how well forget and retain separate at each place.

    Parameters
    ----------
    values : array of shape (n_rows, n_columns), float
        Areas under the ROC curve. The colors run from 0.5 (chance) to 1; a lower value takes the
        color of 0.5. NaN cells, those not measured, are hatched.
    rows, columns : sequence
        Distinct labels, of the rows from the top.
    chosen : sequence of (row, column), optional
        Labels of the cells to frame: those that were edited.
    row_label, column_label : str
        Axis labels.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        Another shape than the labels say, a value outside [0, 1], a label twice or not there.
    """
    values, rows, columns = style.plain(values).astype(float), list(rows), list(columns)
    _check_cells(values, rows, columns)
    cells = []
    for row, column in chosen or ():
        if row not in rows or column not in columns:
            raise ValueError(
                f"chosen cell ({row!r}, {column!r}) is not in the table; give a label of rows "
                f"{rows} and one of columns {columns}."
            )
        cells.append((rows.index(row), columns.index(column)))

    width = min(max(0.42 * len(columns) + 2.6, 5.0), 13.0)
    height = min(max(0.36 * len(rows) + 1.9, 2.6), 9.0)
    with style.new_figure(width, height, "How well forget and retain separate") as figure:
        ax = figure.add_subplot()
        image = ax.imshow(values, cmap="YlOrBr", vmin=0.5, vmax=1, aspect="auto")
        _mark_cells(ax, values, cells)
        _label_cells(ax, rows, columns)
        ax.set(xlabel=column_label, ylabel=row_label)
        low = bool((values < 0.5).any())
        bar = figure.colorbar(image, ax=ax, extend="min" if low else "neither", pad=0.02)
        bar.set_label("Area under the ROC curve\n(0.5 is chance)")
        bar.ax.tick_params(labelsize=9.5, length=3, color=style.MUTED)
        for outline in [bar.outline, *ax.spines.values()]:
            outline.set_visible(False)
        _cell_legend(figure, bool(cells), bool(np.isnan(values).any()))
    return figure


def _check_cells(values: np.ndarray, rows: list[Any], columns: list[Any]) -> None:
    if values.shape != (len(rows), len(columns)) or not values.size:
        raise ValueError(
            f"values has shape {values.shape}; expected ({len(rows)}, {len(columns)}), one row a "
            "row label and one column a column label, at least one of each."
        )
    wrong = values[(values < 0) | (values > 1)]
    if wrong.size:
        raise ValueError(f"values holds {wrong[0]:g}; an area under the ROC curve is in [0, 1].")
    for name, labels in (("rows", rows), ("columns", columns)):
        if len(set(labels)) < len(labels):
            raise ValueError(f"{name} has a label twice: {labels}. Make the labels distinct.")


def _mark_cells(ax: Axes, values: np.ndarray, chosen: Sequence[tuple[int, int]]) -> None:
    from matplotlib.patches import Rectangle

    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            corner = (column - 0.5, row - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, gid="missing", **style.MISSING))
        elif values.size <= _MOST_NUMBERED_CELLS:
            ink = "white" if value > 0.86 else style.INK
            text = f"{value:.2f}".removeprefix("0")
            ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=8.5)
    for row, column in chosen:
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, gid="chosen", clip_on=False, **style.CHOSEN))


def _label_cells(ax: Axes, rows: Sequence[Any], columns: Sequence[Any]) -> None:
    for axis, labels, room in ((ax.xaxis, columns, 34), (ax.yaxis, rows, 30)):
        step = ceil(len(labels) / room)
        axis.set_ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])
    longest = max(len(str(label)) for label in columns)
    crowded = longest > 3 and longest * len(columns) > 40
    ax.tick_params(labelsize=9.5, length=0)
    ax.tick_params(axis="x", rotation=90 if crowded else 0)


def _cell_legend(figure: Figure, has_chosen: bool, has_missing: bool) -> None:
    from matplotlib.patches import Patch

    keys = [Patch(label="Edited", **style.CHOSEN)] if has_chosen else []
    keys += [Patch(label="Not measured", **style.MISSING)] if has_missing else []
    if keys:
        figure.legend(handles=keys, loc="outside lower left", ncols=2)


def before_after_bars(
    changes: Mapping[str, Change], *, targets: Mapping[str, float] | None = None
) -> Figure:
    """Paired bars of the mean before and after the edit, one pair a set.

    Whiskers are 95 % intervals. Above each pair stands the share kept, after over before, with
    its 95 % interval; it is called undefined where the mean before is not positive.

    Parameters
    ----------
    changes : mapping of str to Change
        By name of the set, all of one metric. A name that begins with "forget", "retain" or
        "near" takes the color of that set.
    targets : mapping of str to float, optional
        Share of the mean before that was aimed at, by name of the set: a line at that height.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        No set, several metrics, values that are not finite or not paired, an unknown target.
    """
    metric = _checked_metric(changes)
    targets = dict(targets or {})
    if unknown := sorted(set(targets) - set(changes)):
        raise ValueError(f"targets names {unknown}; changes has only {list(changes)}.")
    width = max(1.75 * len(changes) + 1.6, 4.8)
    with style.new_figure(width, 4.3, f"{metric} before and after the edit") as figure:
        ax = figure.add_subplot()
        ends = []
        for place, (name, change) in enumerate(changes.items()):
            top = _draw_pair(ax, place, change, style.set_color(name))
            if name in targets:
                height = targets[name] * change.before.mean
                ax.hlines(height, place - 0.42, place + 0.42, **style.TARGET)
                top = max(top, height)
            share, interval = _share_text(change)
            bold = {"color": style.INK, "fontsize": 10.5, "fontweight": "bold"}
            style.small_print(ax, share, (place, top), (0, 17 if interval else 4), **bold)
            style.small_print(ax, interval, (place, top), (0, 4))
            ends.append(top)
        if max(ends) > 0:
            ax.set_ylim(top=1.2 * max(ends))
        ax.set_xlim(-0.6, len(changes) - 0.4)
        ax.set_xticks(range(len(changes)), [style.sentence(name) for name in changes])
        ax.set_ylabel("Mean of the set")
        style.quiet_ticks(ax, ax.yaxis)
        _bar_legend(figure, bool(targets))
    return figure


def _draw_pair(ax: Axes, place: int, change: Change, color: str) -> float:
    """Draw both bars; where the higher one ends, whisker included, and not below 0."""
    top = 0.0
    pair = ((-0.2, change.before, style.BEFORE_ALPHA), (0.2, change.after, 1.0))
    for offset, metric, alpha in pair:
        mean, (low, high) = metric.mean, metric.interval
        ax.bar(place + offset, mean, width=0.36, color=color, alpha=alpha)
        whisker = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        ax.errorbar(place + offset, mean, whisker, fmt="none", ecolor=style.INK, elinewidth=1.1)
        top = max(top, mean, high)
    return top


def _share_text(change: Change) -> tuple[str, str]:
    low, high = change.interval
    if change.before.mean <= 0 or not np.isfinite([change.kept, low, high]).all():
        return "kept: undefined", ""
    digits = 0 if high - low >= 0.02 else 1
    interval = f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"
    return f"{100 * change.kept:.{digits}f} % kept", interval


def _bar_legend(figure: Figure, has_targets: bool) -> None:
    from matplotlib.patches import Patch

    keys: list[Any] = [
        Patch(color="#4A4A4A", alpha=style.BEFORE_ALPHA, lw=0, label="Before"),
        Patch(color="#4A4A4A", lw=0, label="After"),
        style.line_key(style.INK, "95 % interval", lw=1.1),
    ]
    if has_targets:
        keys.append(style.line_key(label="Target", **style.TARGET))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))


def item_slopes(changes: Mapping[str, Change]) -> Figure:
    """One line an item from its value before to its value after, one panel a set.

    The panels share their scale; the thick line joins the means.

    Parameters
    ----------
    changes : mapping of str to Change
        As :func:`before_after_bars` takes.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        As :func:`before_after_bars`.
    """
    from matplotlib.collections import LineCollection

    metric = _checked_metric(changes)
    with style.new_figure(max(2.4 * len(changes) + 1, 4.8), 4.3, f"{metric} by item") as figure:
        axes = figure.subplots(1, len(changes), sharey=True, squeeze=False)[0]
        for ax, (name, change) in zip(axes, changes.items(), strict=True):
            ends = np.stack([style.plain(m.values) for m in (change.before, change.after)], axis=1)
            alpha = float(np.clip(12 / len(ends), 0.12, 0.6))
            look: dict[str, Any] = {"color": style.set_color(name), "alpha": alpha, "lw": 1}
            ax.add_collection(LineCollection([[(0, a), (1, b)] for a, b in ends], **look))
            look |= {"alpha": alpha + 0.15, "lw": 0}
            ax.scatter(np.tile([0, 1], len(ends)), ends.ravel(), s=10, **look)
            ax.plot([0, 1], ends.mean(axis=0), color=style.INK, zorder=4, **style.MEAN)
            ax.set_title(f"{style.sentence(name)} ({len(ends)})")
            ax.set_xticks([0, 1], ["Before", "After"])
            ax.set_xlim(-0.18, 1.18)
            style.quiet_ticks(ax, ax.yaxis)
        axes[0].set_ylabel(metric)
        key = style.line_key(style.INK, "Mean of the set", **style.MEAN)
        figure.legend(handles=[key], loc="outside lower center")
    return figure


def _checked_metric(changes: Mapping[str, Change]) -> str:
    """Name of the one metric of all changes, as a label."""
    if not changes:
        raise ValueError("changes is empty; give at least one set.")
    names = set()
    for name, change in changes.items():
        shapes = []
        for when, metric in (("before", change.before), ("after", change.after)):
            shapes.append(style.finite(metric.values, f"{metric.name} {when} of {name}").shape)
            names.add(metric.name)
        if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
            raise ValueError(
                f"{name} has values of shape {shapes[0]} before and {shapes[1]} after; expected "
                "(n_items,), at least one. Measure the same items twice."
            )
    if len(names) > 1:
        raise ValueError(f"changes mixes the metrics {sorted(names)}; draw one figure a metric.")
    return style.sentence(names.pop())


def tradeoff_curve(
    points: Sequence[Mapping[str, Any]],
    *,
    chosen: str | None = None,
    target: Mapping[str, float] | None = None,
) -> Figure:
    """Share kept of the forget set against the shares kept of what must stay.

    Good is up and to the left. A point whose share is NaN or None is left out and breaks the line.

    Parameters
    ----------
    points : sequence of mapping
        In the order in which the line joins them. Each has "forget" and "retain", optionally
        "near" (shares kept, 1 is unchanged), and "label" (str). Labels that would cover another
        are left out.
    chosen : str, optional
        Label of the point to mark.
    target : mapping, optional
        "forget": largest share wanted; "retain", "near": smallest shares wanted. The region that
        meets a pair of them is shaded in the color of the curve that must pass through it.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        No points, one without a share or a label, or a ``chosen`` or ``target`` that does not fit.
    """
    labels, shares = _checked_points(points)
    if chosen is not None and chosen not in labels:
        raise ValueError(f"chosen={chosen!r} is no label of points; they are {labels}.")
    target = dict(target or {})
    if target and not ("forget" in target and set(_KEPT) & set(target)):
        raise ValueError(f'target has {sorted(target)}; it needs "forget", and "retain" or "near".')
    with style.new_figure(7.0, 4.8, "What was kept: forget against the rest") as figure:
        ax = figure.add_subplot()
        ax.axhline(1, color=style.RULE, lw=1, zorder=0)
        ax.set_xlim(*style.limits(shares["forget"], 0, target.get("forget", 0)))
        kept = np.concatenate([shares[key] for key in _KEPT])
        ax.set_ylim(*style.limits(kept, 1, *(target[key] for key in _KEPT if key in target)))
        for key, (name, color, marker) in _KEPT.items():
            if np.isfinite(shares[key]).any():
                look: dict[str, Any] = {"color": color, "marker": marker, "ms": 6.5, "lw": 1.6}
                ax.plot(shares["forget"], shares[key], label=name, mew=0, zorder=3, **look)
            if key in target:
                style.shade_corner(
                    ax, target["forget"], target[key], f"Target, {name.lower()}", color
                )
            if chosen is not None:
                spot = [shares[axis][labels.index(chosen)] for axis in ("forget", key)]
                ax.scatter(*spot, gid="chosen", **style.RING)
        highest = np.fmax(*(shares[key] for key in _KEPT))
        style.label_points(ax, shares["forget"], highest, labels, first=chosen)
        ax.set(xlabel="Share kept of the forget set", ylabel="Share kept of what must stay")
        style.quiet_ticks(ax, ax.xaxis, ax.yaxis)
        style.in_percent(ax.xaxis, ax.yaxis)
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _checked_points(
    points: Sequence[Mapping[str, Any]],
) -> tuple[list[str], dict[str, np.ndarray]]:
    if not points:
        raise ValueError("points is empty; give at least one.")
    for index, point in enumerate(points):
        if missing := [key for key in ("label", "forget", "retain") if key not in point]:
            raise ValueError(f"point {index} lacks {missing}; it has only {sorted(point)}.")
    keys = ("forget", *_KEPT)
    shares = {key: np.array([point.get(key) for point in points], float) for key in keys}
    return [str(point["label"]) for point in points], shares
