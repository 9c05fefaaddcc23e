import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from manifold_unlearn import report
from manifold_unlearn.evaluate.results import Change, Metric
from manifold_unlearn.report import style


def change(before, after, name="answer_probability"):
    return Change(Metric(name, np.array(before, float)), Metric(name, np.array(after, float)))


@pytest.fixture
def changes():
    return {
        "forget": change([0.8, 0.6, 0.7], [0.1, 0.0, 0.2]),
        "near neighbors": change([0.5, 0.7], [0.5, 0.6]),
        "retain": change([0.9, 0.7, 0.8, 0.6], [0.9, 0.7, 0.7, 0.6]),
    }


@pytest.fixture
def panel():
    rng = np.random.default_rng(0)
    return report.EmbeddingPanel("layers.3", rng.normal(size=(60, 2)), np.arange(60) < 12, "AUC .9")


@pytest.fixture
def points():
    shares = [(0.8, 1.0, 0.99), (0.3, 0.98, 0.9), (0.05, 0.9, 0.7)]
    return [
        {"label": f"rank {2**i}", "forget": f, "retain": r, "near": n}
        for i, (f, r, n) in enumerate(shares)
    ]


def drawn(figure):
    """Every text of a figure, after it was drawn without a warning."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def legend_labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def patches(figure, gid):
    return [patch for patch in figure.axes[0].patches if patch.get_gid() == gid]


# The room


def test_the_room_imports_matplotlib_late_and_never_pyplot():
    code = (
        "import sys; from manifold_unlearn import report\n"
        "early = 'matplotlib' in sys.modules\n"
        "report.Report('x').figure(report.spectrum([0.5]), 'c', alt='a')\n"
        "print(early, 'matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


def test_a_picture_changes_no_global_settings(changes):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = report.before_after_bars(changes)
    assert dict(matplotlib.rcParams) == before
    assert type(figure.canvas).__name__ == "FigureCanvasAgg"


def test_sets_have_one_color_each():
    names = ["forget", "Forget set", "retain", "near neighbors", "holdout"]
    assert [style.set_color(n) for n in names] == [
        style.FORGET,
        style.FORGET,
        style.RETAIN,
        style.NEAR,
        style.OTHER,
    ]


# Embedding


def test_embedding_holds_every_point_with_forget_on_top(panel):
    figure = report.embedding_by_site([panel, panel])
    for ax in figure.axes:
        retain, forget = ax.collections
        np.testing.assert_array_equal(retain.get_offsets(), panel.coordinates[12:])
        np.testing.assert_array_equal(forget.get_offsets(), panel.coordinates[:12])
        assert forget.get_zorder() > retain.get_zorder()
        assert to_hex(forget.get_facecolor()[0]).upper() == style.FORGET
    assert drawn(figure).count("layers.3") == drawn(figure).count("AUC .9") == 2
    assert legend_labels(figure) == ["Forget", "Retain"]


@pytest.mark.parametrize("n_panels", [1, 4, 5, 12])
def test_embedding_has_one_axes_a_panel(panel, n_panels):
    figure = report.embedding_by_site([panel] * n_panels)
    assert len(figure.axes) == n_panels
    drawn(figure)


@pytest.mark.parametrize("far", [0, 30])
def test_a_far_point_of_either_set_leaves_the_frame_and_is_counted(panel, far):
    (ax,) = report.embedding_by_site([panel]).axes
    reach = max(map(abs, ax.get_xlim()))
    coordinates = panel.coordinates.copy()
    coordinates[far] = [500, 0]
    figure = report.embedding_by_site(
        [report.EmbeddingPanel("layers.3", coordinates, panel.is_forget)]
    )
    assert max(map(abs, figure.axes[0].get_xlim())) <= reach * 1.5
    assert "1 outside" in drawn(figure)


def test_a_small_forget_cluster_far_from_retain_stays_in_the_frame():
    rng = np.random.default_rng(1)
    coordinates = rng.normal(size=(500, 2))
    coordinates[:5] += 40
    figure = report.embedding_by_site(
        [report.EmbeddingPanel("layers.1", coordinates, np.arange(500) < 5)]
    )
    assert figure.axes[0].get_xlim()[1] >= coordinates[:5, 0].max()


def test_embedding_takes_tensors_and_one_sided_or_constant_panels():
    panel = report.EmbeddingPanel("embed", torch.zeros(4, 2), torch.zeros(4, dtype=torch.bool))
    figure = report.embedding_by_site([panel])
    assert figure.axes[0].get_xlim() == (-1, 1)
    drawn(figure)


@pytest.mark.parametrize(
    ("coordinates", "is_forget", "message"),
    [
        (np.zeros((3, 3)), np.zeros(3), r"layers.7 has shape \(3, 3\); expected \(n_samples, 2\)"),
        (np.zeros((0, 2)), np.zeros(0), r"has shape \(0, 2\)"),
        (np.zeros((3, 2)), np.zeros(2), r"is_forget of layers.7 has shape \(2,\)"),
        ([[0, 0], [0, np.nan]], [0, 1], "layers.7 has NaN or infinity, first in row 1"),
    ],
)
def test_embedding_rejects(coordinates, is_forget, message):
    panel = report.EmbeddingPanel("layers.7", coordinates, is_forget)
    with pytest.raises(ValueError, match=message):
        report.embedding_by_site([panel])


def test_embedding_rejects_no_panels():
    with pytest.raises(ValueError, match="panels is empty"):
        report.embedding_by_site([])


# Heat map

AUC = np.array([[0.5, 0.75, 1.0], [0.6, np.nan, 0.42]])


def test_heatmap_holds_the_values_and_hatches_what_was_not_measured():
    figure = report.separability_heatmap(AUC, ["last", "-2"], [3, 4, 5])
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), AUC)
    assert image.get_clim() == (0.5, 1)
    (missing,) = patches(figure, "missing")
    assert missing.get_hatch()
    assert missing.get_xy() == (0.5, 0.5)
    assert {".75", "1.00", ".42", "last", "3", "Area under the ROC curve\n(0.5 is chance)"} <= set(
        drawn(figure)
    )
    assert legend_labels(figure) == ["Not measured"]


def test_heatmap_frames_the_chosen_cells_by_label():
    figure = report.separability_heatmap(
        np.full((2, 3), 0.7), [-1, -2], [1, 2, 0], chosen=[(-2, 0), (-1, 1)]
    )
    assert [patch.get_xy() for patch in patches(figure, "chosen")] == [(1.5, 0.5), (-0.5, -0.5)]
    assert legend_labels(figure) == ["Edited"]


def test_heatmap_thins_the_labels_of_many_columns():
    figure = report.separability_heatmap(np.full((40, 80), 0.7), range(40), range(80))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][:3] == ["0", "3", "6"]
    drawn(figure)


@pytest.mark.parametrize(
    ("values", "rows", "columns", "chosen", "message"),
    [
        (AUC, ["a"], [1, 2, 3], None, r"shape \(2, 3\); expected \(1, 3\)"),
        (np.zeros((0, 0)), [], [], None, "at least one of each"),
        ([[1.5]], ["a"], [1], None, r"holds 1.5; an area under the ROC curve is in \[0, 1\]"),
        (AUC, ["a", "a"], [1, 2, 3], None, "rows has a label twice"),
        (AUC, ["a", "b"], [1, 2, 2], None, "columns has a label twice"),
        (AUC, ["a", "b"], [1, 2, 3], [("a", 0)], r"chosen cell \('a', 0\) is not in the table"),
    ],
)
def test_heatmap_rejects(values, rows, columns, chosen, message):
    with pytest.raises(ValueError, match=message):
        report.separability_heatmap(values, rows, columns, chosen=chosen)


# Before and after


def test_bars_have_the_means_as_heights_and_their_intervals_as_whiskers(changes):
    figure = report.before_after_bars(changes)
    (ax,) = figure.axes
    metrics = [m for c in changes.values() for m in (c.before, c.after)]
    assert [bar.get_height() for bar in ax.patches] == [m.mean for m in metrics]
    whiskers = [c.get_segments()[0][:, 1] for c in ax.collections]
    np.testing.assert_allclose(whiskers, [m.interval for m in metrics])
    assert [to_hex(bar.get_facecolor()).upper() for bar in ax.patches[::2]] == [
        style.FORGET,
        style.NEAR,
        style.RETAIN,
    ]
    texts = drawn(figure)
    assert {"14 % kept", "92 % kept", "97 % kept", "Near neighbors"} <= set(texts)
    assert "Answer probability before and after the edit" in texts
    assert legend_labels(figure) == ["Before", "After", "95 % interval"]


def test_targets_are_lines_at_a_share_of_before(changes):
    figure = report.before_after_bars(changes, targets={"forget": 0.1, "retain": 0.95})
    lines = [c for c in figure.axes[0].collections if c.get_linewidth()[0] == 1.4]
    heights = [line.get_segments()[0][0, 1] for line in lines]
    np.testing.assert_allclose(heights, [0.07, 0.95 * 0.75])
    assert legend_labels(figure)[-1] == "Target"


def test_bars_and_shares_stay_inside_the_axes(changes):
    figure = report.before_after_bars(changes, targets={"retain": 2.0})
    assert figure.axes[0].get_ylim()[1] > 2 * changes["retain"].before.mean


@pytest.mark.parametrize("before", [[0.0, 0.0], [-1.0, -2.0]])
def test_a_share_of_nothing_is_called_undefined(before):
    figure = report.before_after_bars({"forget": change(before, [-3.0, -0.5])})
    assert "kept: undefined" in drawn(figure)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "changes is empty"),
        ({"forget": change([], [])}, r"forget has values of shape \(0,\)"),
        ({"forget": change([1, 2], [1])}, "Measure the same items twice"),
        ({"forget": change([1, 2], [1, np.nan])}, "after of forget has NaN or infinity, first in"),
        (
            {"forget": change([1], [1], "rouge_l"), "retain": change([1], [1])},
            r"mixes the metrics \['answer_probability', 'rouge_l'\]",
        ),
    ],
)
@pytest.mark.parametrize("draw", [report.before_after_bars, report.item_slopes])
def test_changes_that_cannot_be_compared_are_rejected(draw, bad, message):
    with pytest.raises(ValueError, match=message):
        draw(bad)


def test_bars_reject_a_target_for_an_unknown_set(changes):
    with pytest.raises(ValueError, match=r"targets names \['forgot'\]"):
        report.before_after_bars(changes, targets={"forgot": 0.1})


def test_slopes_have_a_line_an_item_and_one_of_the_means(changes):
    figure = report.item_slopes(changes)
    assert len(figure.axes) == 3
    for ax, (name, one) in zip(figure.axes, changes.items(), strict=True):
        lines, dots = ax.collections
        ends = np.array(lines.get_segments())
        np.testing.assert_array_equal(ends[:, 0, 1], one.before.values)
        np.testing.assert_array_equal(ends[:, 1, 1], one.after.values)
        assert len(dots.get_offsets()) == 2 * len(one.before.values)
        (mean,) = ax.lines
        np.testing.assert_allclose(mean.get_ydata(), [one.before.mean, one.after.mean])
        assert ax.get_title(loc="left") == f"{style.sentence(name)} ({len(one.before.values)})"
    assert figure.axes[0].get_ylim() == figure.axes[2].get_ylim()
    drawn(figure)


# Trade-off


def test_tradeoff_draws_forget_against_retain_and_near_in_the_order_given(points):
    figure = report.tradeoff_curve(points[::-1])
    _, retain, near = figure.axes[0].lines
    for line, key in ((retain, "retain"), (near, "near")):
        np.testing.assert_array_equal(line.get_xdata(), [p["forget"] for p in points[::-1]])
        np.testing.assert_array_equal(line.get_ydata(), [p[key] for p in points[::-1]])
    assert {"rank 1", "rank 2", "rank 4", "80 %"} <= set(drawn(figure))
    assert legend_labels(figure) == ["Retain", "Near neighbors"]


def test_tradeoff_marks_the_chosen_point_and_shades_the_target(points):
    target = {"forget": 0.1, "retain": 0.95, "near": 0.85}
    figure = report.tradeoff_curve(points, chosen="rank 2", target=target)
    (ax,) = figure.axes
    rings = [c.get_offsets()[0] for c in ax.collections if c.get_gid() == "chosen"]
    np.testing.assert_array_equal(rings, [[0.3, 0.98], [0.3, 0.9]])
    for area, floor in zip(ax.patches, [0.95, 0.85], strict=True):
        corners = area.get_bbox()
        assert corners.x1 == pytest.approx(0.1)
        assert corners.y0 == pytest.approx(floor)
        assert (corners.x0, corners.y1) == pytest.approx((ax.get_xlim()[0], ax.get_ylim()[1]))
    (bold,) = [t for t in ax.texts if t.get_fontweight() == "bold"]
    assert bold.get_text() == "rank 2"
    assert {"Target, retain", "Target, near neighbors"} <= set(legend_labels(figure))


def test_tradeoff_without_near_or_with_an_undefined_share_still_draws(points):
    bare = [{k: v for k, v in point.items() if k != "near"} for point in points]
    bare[1]["retain"] = None
    bare[2]["forget"] = float("nan")
    figure = report.tradeoff_curve(bare)
    assert legend_labels(figure) == ["Retain"]
    assert "rank 2" not in drawn(figure)


def test_crowded_labels_are_left_out_but_never_the_chosen_one(points):
    crowd = [points[0] | {"label": f"step {i}", "forget": 0.5 + i / 1000} for i in range(30)]
    texts = drawn(report.tradeoff_curve(crowd, chosen="step 17"))
    assert [text for text in texts if text.startswith("step")] == ["step 17"]


@pytest.mark.parametrize(
    ("points_given", "options", "message"),
    [
        ([], {}, "points is empty"),
        ([{"label": "a", "forget": 1}], {}, r"point 0 lacks \['retain'\]"),
        (None, {"chosen": "rank 3"}, "chosen='rank 3' is no label of points"),
        (None, {"target": {"retain": 0.9}}, r"target has \['retain'\]; it needs \"forget\""),
        (None, {"target": {"forget": 0.9}}, r"target has \['forget'\]; it needs"),
    ],
)
def test_tradeoff_rejects(points, points_given, options, message):
    with pytest.raises(ValueError, match=message):
        report.tradeoff_curve(points if points_given is None else points_given, **options)
