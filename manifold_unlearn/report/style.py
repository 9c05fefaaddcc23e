"""Look of the pictures: colors, type, an empty figure, small print; and the check of what is drawn.

The colors are the color-blind safe ones of Okabe and Ito: forget is vermilion in every picture,
retain blue, near neighbors sky blue, any other set grey.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

FORGET, RETAIN, NEAR, OTHER = "#D55E00", "#0072B2", "#56B4E9", "#8C8C8C"
MORE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A7A00", "#5F4B8B")
"""Colors of categories that are no set of the house, in their order."""
INK, MUTED, RULE = "#1A1A1A", "#5F5F5F", "#D9D9D9"
BEFORE_ALPHA = 0.35
MISSING: dict[str, Any] = {"fc": "white", "ec": "#A0A0A0", "lw": 0, "hatch": "////"}
CHOSEN: dict[str, Any] = {"fc": "none", "ec": RETAIN, "lw": 2.4}
TARGET: dict[str, Any] = {"color": INK, "ls": (0, (4, 2)), "lw": 1.4}
RING: dict[str, Any] = {"s": 150, "fc": "none", "ec": INK, "lw": 1.6, "zorder": 4}
MEAN: dict[str, Any] = {"lw": 2.4, "marker": "o", "ms": 6}
_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "text.color": INK,
    "axes.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "hatch.linewidth": 0.6,
}


@contextmanager
def new_figure(width: float, height: float, title: str) -> Iterator[Figure]:
    """Empty figure of ``width`` by ``height`` inches; what is drawn inside has the house style."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_RC):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.1 / width, ha="left")
        yield figure


def quiet_ticks(ax: Axes, *marked: Axis) -> None:
    """Give ``ax`` quiet tick labels, and tick marks only on the axes ``marked``."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_tick_params(labelsize=10, color=MUTED, length=3.5 if axis in marked else 0)


def in_percent(*axes: Axis) -> None:
    """Label shares as percent."""
    for axis in axes:
        axis.set_major_formatter(
            lambda share, _: f"{100 * share:.4g} %".replace("-", "\N{MINUS SIGN}")
        )


def set_color(name: str) -> str:
    """Color of the set ``name`` in every picture."""
    for prefix, color in (("forget", FORGET), ("near", NEAR), ("retain", RETAIN)):
        if name.lower().startswith(prefix):
            return color
    return OTHER


def small_print(
    ax: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any
) -> Any:
    """Write ``text`` ``offset`` points from ``place``, which is in data coordinates by default."""
    quiet: dict[str, Any] = {"color": MUTED, "fontsize": 9, "zorder": 5, "ha": "center"}
    return ax.annotate(text, place, offset, textcoords="offset points", **(quiet | style))


def label_points(
    ax: Axes, x: np.ndarray, y: np.ndarray, labels: Sequence[str], *, first: str | None = None
) -> None:
    """Write ``labels`` above their points, ``first`` in bold, leaving out those that would overlap.

    The limits of ``ax`` must be set.
    """
    left, right = ax.get_xlim()
    taken: list[tuple[float, float]] = []
    for index in sorted(range(len(labels)), key=lambda i: labels[i] != first):
        label, place = labels[index], (float(x[index]), float(y[index]))
        half = (0.01 + 0.0075 * len(label)) * (right - left)
        free = all(abs(place[0] - other) > half + size for other, size in taken)
        if free and np.isfinite(place).all():
            taken.append((place[0], half))
            weight = "bold" if label == first else "normal"
            small_print(ax, label, place, (0, 11), fontweight=weight)


def limits(values: np.ndarray, *also: float) -> tuple[float, float]:
    """Ends of an axis that shows the finite ``values`` and ``also``, with room for labels above."""
    shown = [*values[np.isfinite(values)], *also]
    spread = max(max(shown) - min(shown), 0.1)
    return min(shown) - 0.04 * spread, max(shown) + 0.12 * spread


def robust_frame(sides: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the box that holds every set of points but for its far ones.

    A coordinate is far beyond one 5 to 95 % spread outside the 5 % and 95 % quantiles of its set.
    """
    lows, highs = [], []
    for points in sides:
        low, high = np.percentile(points, [5, 95], axis=0)
        near = (points >= 2 * low - high) & (points <= 2 * high - low)
        lows.append(np.where(near, points, np.inf).min(axis=0))
        highs.append(np.where(near, points, -np.inf).max(axis=0))
    return np.min(lows, axis=0), np.max(highs, axis=0)


def shade_corner(ax: Axes, right: float, bottom: float, label: str, color: str) -> None:
    """Shade what lies up and to the left of ``right``, ``bottom`` within the limits of ``ax``."""
    from matplotlib.patches import Rectangle

    left, top = ax.get_xlim()[0], ax.get_ylim()[1]
    corner, width, height = (left, bottom), right - left, top - bottom
    ax.add_patch(Rectangle(corner, width, height, fc=color, alpha=0.18, lw=0, label=label))


def line_key(color: str, label: str, **style: Any) -> Line2D:
    """Line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, label=label, **style)


def patch_key(color: str, alpha: float, label: str) -> Patch:
    """Area for a legend."""
    from matplotlib.patches import Patch

    return Patch(color=color, alpha=alpha, lw=0, label=label)


def sentence(name: str) -> str:
    """``answer_probability`` as ``Answer probability``."""
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]


def dot(n_points: int) -> tuple[float, float]:
    """Area and opacity at which so many points of a scatter can be told apart."""
    return (5, 0.35) if n_points > 1500 else (9, 0.5) if n_points > 300 else (16, 0.65)


def frame(ax: Axes, sides: Sequence[np.ndarray]) -> None:
    """Square frame of ``ax`` around the point sets ``sides``, and how many points it leaves out."""
    low, high = robust_frame([points for points in sides if len(points)])
    pad = np.where(high > low, 0.06 * (high - low), 1.0)
    ax.set_xlim(low[0] - pad[0], high[0] + pad[0])
    ax.set_ylim(low[1] - pad[1], high[1] + pad[1])
    ax.set(xticks=[], yticks=[], box_aspect=1)
    for spine in ax.spines.values():
        spine.set(visible=True, color=RULE)
    n_outside = sum(int(((p < low) | (p > high)).any(axis=1).sum()) for p in sides)
    if n_outside:
        corner = {"xycoords": "axes fraction", "ha": "right"}
        small_print(ax, f"{n_outside} outside", (1, 0), (-4, 4), **corner)


def plain(values: Any) -> np.ndarray:
    """Numpy array of an array or of a tensor; bfloat16, which numpy lacks, as float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def finite(values: Any, name: str) -> np.ndarray:
    """:func:`plain` as floats; raises ``ValueError`` for NaN and infinity, naming the first row."""
    array = plain(values).astype(float)
    if not np.isfinite(array).all():
        row = [*np.argwhere(~np.isfinite(array))[0], 0][0]
        raise ValueError(f"{name} has NaN or infinity, first in row {row}. Leave such rows out.")
    return array
