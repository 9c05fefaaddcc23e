import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from manifold_unlearn import report
from manifold_unlearn.report import style


def drawn(figure):
    """Every text of a figure, after it was drawn without a warning."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def legend_labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def positions(collection, n_dimensions):
    if n_dimensions == 2:
        return np.asarray(collection.get_offsets())
    return np.stack([np.asarray(values) for values in collection._offsets3d], axis=1)


def color_of(collection):
    return to_hex(collection.get_facecolor()[0]).upper()


@pytest.fixture(params=[2, 3])
def points(request):
    return np.random.default_rng(0).normal(size=(60, request.param))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_scatter_holds_every_point(points, kind):
    figure = report.embedding_scatter(kind(points), title="Layer 12")
    (dots,) = figure.axes[0].collections
    np.testing.assert_allclose(positions(dots, points.shape[1]), points)
    assert {"Layer 12", "Coordinate 1", f"Coordinate {points.shape[1]}"} <= set(drawn(figure))
    assert figure.legends == []


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_booleans_are_forget_on_top_of_retain(points, kind):
    figure = report.embedding_scatter(points, kind(np.arange(60) < 12))
    retain, forget = figure.axes[0].collections
    np.testing.assert_allclose(positions(forget, points.shape[1]), points[:12])
    assert (color_of(forget), color_of(retain)) == (style.FORGET, style.RETAIN)
    assert forget.get_zorder() > retain.get_zorder()
    drawn(figure)
    assert legend_labels(figure) == ["Forget", "Retain"]


def test_names_of_the_house_keep_their_colors_and_others_take_free_ones(points):
    names = np.array(["retain", "forget", "forgetful", "near", "other"])[np.arange(60) % 5]
    figure = report.embedding_scatter(points, names)
    keys = figure.legends[0].legend_handles
    inks = {key.get_label(): key.get_color() for key in keys}
    assert inks["forget"] == style.FORGET
    assert inks["retain"] == style.RETAIN
    assert inks["near"] == style.NEAR
    assert len(set(inks.values())) == 5


def test_few_integers_are_categories_and_many_run_along_a_color_bar(points):
    few = report.embedding_scatter(points, np.arange(60) % 8, color_label="Layer")
    assert legend_labels(few) == list("01234567")
    assert len(few.axes) == 1
    many = report.embedding_scatter(points, np.arange(60), color_label="Layer")
    assert many.legends == []
    ax, bar = many.axes
    np.testing.assert_array_equal(ax.collections[0].get_array(), np.arange(60))
    assert bar.get_ylabel() == "Layer"
    drawn(few), drawn(many)


def test_floats_run_along_a_color_bar_whose_ends_meet_for_angles(points):
    angle = np.repeat([0.0, 3.0], 30)
    straight = report.embedding_scatter(points, angle).axes[0].collections[0].cmap
    meeting = report.embedding_scatter(points, angle, cyclic=True).axes[0].collections[0].cmap
    assert np.abs(np.subtract(straight(0.0), straight(1.0))).max() > 0.5
    assert np.abs(np.subtract(meeting(0.0), meeting(1.0))).max() < 0.05


def test_far_points_leave_the_frame_and_are_counted():
    points = np.random.default_rng(0).normal(size=(200, 2))
    points[3] = [900, 0]
    figure = report.embedding_scatter(points)
    assert max(map(abs, figure.axes[0].get_xlim())) < 10
    assert "1 outside" in drawn(figure)


@pytest.mark.parametrize(
    ("embedding", "color", "message"),
    [
        (np.zeros((3, 4)), None, r"embedding has shape \(3, 4\); expected .* embedding\[:, :2\]"),
        (np.zeros((0, 2)), None, r"embedding has shape \(0, 2\)"),
        ([[0, 0], [np.nan, 0]], None, "embedding has NaN or infinity, first in row 1"),
        (np.zeros((3, 2)), [1, 2], r"color has shape \(2,\); expected \(3,\)"),
        (np.zeros((2, 2)), [0.5, np.inf], "color has NaN or infinity, first in row 1"),
        (np.zeros((9, 2)), list("abcdefghi"), "color has 9 categories; at most 8"),
    ],
)
def test_scatter_rejects(embedding, color, message):
    with pytest.raises(ValueError, match=message):
        report.embedding_scatter(embedding, color)


# Paths


def lines_of(figure, gid):
    n_dimensions = 3 if hasattr(figure.axes[0], "zaxis") else 2
    return [
        np.stack(line.get_data_3d() if n_dimensions == 3 else line.get_data(), axis=1)
        for line in figure.axes[0].lines
        if line.get_gid() == gid
    ]


def test_a_path_is_drawn_with_the_straight_line_between_its_ends(points):
    path = np.linspace(points[0], points[1], 9) ** 2
    figure = report.geodesic_paths(torch.as_tensor(points), torch.as_tensor(path))
    (line,), (chord,) = lines_of(figure, "path"), lines_of(figure, "chord")
    np.testing.assert_allclose(line, path)
    np.testing.assert_allclose(chord, path[[0, -1]])
    assert {"Geodesic", "Straight line"} <= set(drawn(figure))


def test_named_paths_have_a_color_each(points):
    paths = [points[:4], points[4:9]]
    figure = report.geodesic_paths(points, paths, names=["one", "two"], chords=False)
    assert lines_of(figure, "chord") == []
    inks = [line.get_color() for line in figure.axes[0].lines if line.get_gid() == "path"]
    assert len(set(inks)) == 2
    assert legend_labels(figure) == ["one", "two"]
    drawn(figure)


def test_a_path_that_leaves_the_points_stays_in_the_frame():
    points = np.random.default_rng(0).normal(size=(200, 2))
    path = np.linspace([0, 0], [30, 0], 20)
    assert report.geodesic_paths(points, path).axes[0].get_xlim()[1] >= 30


def test_paths_over_colored_points_are_black(points):
    figure = report.geodesic_paths(points, points[:3], color=points[:, 0], color_label="Height")
    (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "path"]
    assert line.get_color() == style.INK
    assert "Height" in drawn(figure)


@pytest.mark.parametrize(
    ("paths", "names", "message"),
    [
        ([], (), "paths is empty"),
        (np.zeros((1, 2)), (), r"path 0 has shape \(1, 2\); expected \(n_points, 2\)"),
        ([np.zeros((4, 2)), np.zeros((4, 3))], (), r"path 1 has shape \(4, 3\)"),
        (np.full((4, 2), np.nan), (), "paths has NaN or infinity"),
        (np.zeros((4, 2)), ("a", "b"), "names has 2 entries for 1 paths"),
    ],
)
def test_paths_reject(paths, names, message):
    with pytest.raises(ValueError, match=message):
        report.geodesic_paths(np.zeros((5, 2)), paths, names=names)
