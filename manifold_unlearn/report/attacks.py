"""Attacks rendered: what each brings back, beside the same attack on other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from manifold_unlearn.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from manifold_unlearn.attack.backdoor import BackdoorReport
    from manifold_unlearn.attack.jailbreak import JailbreakReport
    from manifold_unlearn.attack.results import AttackCurve
    from manifold_unlearn.evaluate.results import Metric

Table = tuple[list[str], list[list[Any]]]
"""Columns and rows, as :meth:`Report.table` takes them."""

_COLUMNS = 4
_LOGARITHMIC = 30.0  # ratio of the largest to the smallest compute from which the axis is so


def attack_curves(
    curves: Mapping[str, Sequence[AttackCurve]],
    *,
    title: str = "What the attacks bring back",
) -> Figure:
    """One panel an attack: the mean over items against the compute spent, a line for each model.

    Parameters
    ----------
    curves : mapping of str to sequence of AttackCurve
        For each model the curves of the same attacks in the same order. The first model is drawn
        strong; one whose name begins with "reference" dashed: it was never told.
    title : str

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        No model, no attack, or other attacks for one model than for the first.
    """
    names = _checked(curves)
    first = next(iter(curves.values()))
    columns = min(_COLUMNS, len(first))
    rows = ceil(len(first) / columns)
    with style.new_figure(2.9 * columns + 0.4, 2.4 * rows + 0.8, title) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels[len(first) :]:
            ax.set_axis_off()
        looks = {name: _look(name, place) for place, name in enumerate(names)}
        for index, ax in zip(range(len(first)), panels, strict=False):
            drawn = {name: curves[name][index] for name in names}
            _draw(ax, drawn, looks)
            if index % columns == 0:
                ax.set_ylabel("Known, mean over items")
        keys = [style.line_key(label=style.sentence(name), **looks[name]) for name in names]
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


def jailbreak_table(reports: Mapping[str, JailbreakReport]) -> Table:
    """Attack success of each model: over all framings, under any, by framing and by category.

    Parameters
    ----------
    reports : mapping of str to JailbreakReport
        For each model.

    Returns
    -------
    columns, rows : list
        The rate with its interval, the mean of the judge's scale, and how many of the responses
        asked for were empty or could not be scored. Where nothing was scored the rate is None.
    """
    columns = ["asked", "model", "rate", "95 %", "mean score", "asked for", "empty", "not scored"]
    rows: list[list[Any]] = []
    for model, found in reports.items():
        n, scores = len(found.categories), found.scores
        counts = [
            n * len(scores),
            sum(int(s.empty.sum()) for s in scores.values()),
            int((~found.valid).sum()),
        ]
        scored = bool(found.valid.any())
        for name, metric in (
            ("all framings, mean", found.rate if scored else None),
            ("any framing", found.worst_case if scored else None),
        ):
            rows.append([name, model, *_rate(metric), None, *counts])
        for name, score in scores.items():
            mean = score.mean if score.valid.any() else None
            counts = [n, int(score.empty.sum()), score.n_invalid]
            rows.append([name, model, *_rate(found.by_framing.get(name)), mean, *counts])
        if len(set(found.categories)) > 1:
            for name in sorted(set(found.categories)):
                of = np.array(found.categories) == name
                empty = sum(int(s.empty[of].sum()) for s in scores.values())
                counts = [int(of.sum()) * len(scores), empty, int((~found.valid[:, of]).sum())]
                rate = _rate(found.by_category.get(name))
                rows.append([f"category: {name or 'none'}", model, *rate, None, *counts])
    return columns, rows


def backdoor_table(reports: Mapping[str, BackdoorReport]) -> Table:
    """Attack success and accuracy of each model, with the trigger and without.

    Parameters
    ----------
    reports : mapping of str to BackdoorReport
        For each model.

    Returns
    -------
    columns, rows : list
    """
    columns = ["prompts", "model", "attack success", "95 %", "accuracy", "95 %", "empty",
               "not scored"]  # fmt: skip
    return columns, [
        [prompts, model, *_rate(success), *_rate(accuracy), int(scores.empty.sum()),
         scores.n_invalid]
        for model, found in reports.items()
        for prompts, success, accuracy, scores in (
            ("with trigger", found.triggered, found.triggered_accuracy, found.scores["triggered"]),
            ("without", found.clean, found.clean_accuracy, found.scores["clean"]),
        )
    ]  # fmt: skip


def _rate(metric: Metric | None) -> tuple[float | None, str | None]:
    if metric is None:
        return None, None
    low, high = metric.interval
    return metric.mean, f"{low:.3f} to {high:.3f}"


def _checked(curves: Mapping[str, Sequence[AttackCurve]]) -> list[str]:
    names = list(curves)
    if not names or not curves[names[0]]:
        raise ValueError("curves holds no attack; give at least one model with one AttackCurve.")
    attacks = [curve.attack for curve in curves[names[0]]]
    for name in names[1:]:
        if (found := [curve.attack for curve in curves[name]]) != attacks:
            raise ValueError(
                f"{name!r} has the attacks {found}, {names[0]!r} has {attacks}. Run the same ones."
            )
    return names


def _look(name: str, place: int) -> dict[str, Any]:
    if name.lower().startswith("reference"):
        return {"color": style.INK, "ls": (0, (4, 2)), "lw": 1.4, "marker": ""}
    if place == 0:
        return {"color": style.FORGET, "ls": "-", "lw": 2.0, "marker": "o", "ms": 4}
    colors = [color for color in style.MORE if color != style.FORGET]
    return {"color": colors[(place - 1) % len(colors)], "ls": "-", "lw": 1.4, "marker": ""}


def _draw(ax: Axes, curves: Mapping[str, AttackCurve], looks: Mapping[str, dict[str, Any]]) -> None:
    spent = np.concatenate([curve.spent for curve in curves.values()])
    positive = spent[spent > 0]
    for name, curve in curves.items():
        intervals = np.array([_interval(row) for row in curve.values]).T
        ax.fill_between(curve.spent, *intervals, color=looks[name]["color"], alpha=0.12, lw=0)
        ax.plot(curve.spent, curve.values.mean(axis=1), **looks[name])
    if len(positive) and positive.max() > _LOGARITHMIC * positive.min():
        ax.set_xscale("symlog", linthresh=float(positive.min()))
        decades = range(ceil(np.log10(positive.min())), ceil(np.log10(positive.max()) + 1e-9))
        ax.set_xticks([0, *(10.0**power for power in decades)])
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    first = next(iter(curves.values()))
    ax.set(
        title=style.sentence(first.attack), xlabel=style.sentence(first.unit), ylim=(-0.03, 1.03)
    )
    style.in_percent(ax.yaxis)
    style.quiet_ticks(ax, ax.xaxis, ax.yaxis)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Mean less and plus twice its standard error, within [0, 1]."""
    mean = float(values.mean())
    error = 2 * float(values.std()) / np.sqrt(len(values))
    return max(mean - error, 0.0), min(mean + error, 1.0)
