import numpy as np
import pytest
import torch

from manifold_unlearn.report import steering

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday"]
TIMES = np.linspace(0, 1, 11)


def drawn(figure):
    """Every text of a figure, after it was drawn without a warning."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def legend_labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def marked(ax, gid):
    every = [*ax.lines, *ax.patches, *ax.collections, *ax.texts]
    return [artist for artist in every if artist.get_gid() == gid]


def week(n_each=20):
    labels = np.repeat(np.arange(4), n_each)
    angle = np.pi / 2 * labels
    noise = 0.1 * np.random.default_rng(0).normal(size=(len(labels), 2))
    return np.stack([np.cos(angle), np.sin(angle)], 1) + noise, np.array(DAYS)[labels]


def arc():
    angle = np.pi * TIMES
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def shares():
    rows = np.exp(-((3 * TIMES[:, None] - np.arange(4)) ** 2))
    return 0.9 * rows / rows.sum(1, keepdims=True)


# Paths


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_paths_are_drawn_where_they_are_with_start_and_end(kind):
    X, labels = week()
    chord = np.linspace(arc()[0], arc()[-1], 5)
    figure = steering.path_in_coordinates(
        kind(X), labels, {"Manifold": kind(arc()), "Chord": kind(chord)}, cyclic=True
    )
    (ax,) = figure.axes
    np.testing.assert_allclose(marked(ax, "Manifold")[0].get_xydata(), arc())
    np.testing.assert_allclose(marked(ax, "Chord")[0].get_xydata(), chord)
    np.testing.assert_allclose(marked(ax, "Start")[0].get_xydata()[0], arc()[0])
    np.testing.assert_allclose(marked(ax, "End")[0].get_xydata()[0], arc()[-1])
    assert legend_labels(figure) == ["Manifold", "Chord", "Start", "End"]
    assert set(DAYS) <= set(drawn(figure))


def test_each_label_has_its_color_and_stands_beyond_its_points():
    X, labels = week()
    figure = steering.path_in_coordinates(X, labels, {"Path": arc()}, order=DAYS[::-1])
    (ax,) = figure.axes
    assert [len(c.get_offsets()) for c in ax.collections] == [20] * 4
    colors = {tuple(c.get_facecolor()[0]) for c in ax.collections}
    assert len(colors) == 4
    names = {t.get_text(): t.get_position() for t in marked(ax, "label")}
    assert names["Monday"][0] > 1  # its points are on the right
    assert names["Wednesday"][0] < -1
    drawn(figure)


def test_scattered_labels_are_named_in_the_legend():
    X, labels = week()
    mixed = np.array(["even", "odd"])[np.arange(len(X)) % 2]
    figure = steering.path_in_coordinates(X, mixed, {"Path": arc()})
    assert marked(figure.axes[0], "label") == []
    assert legend_labels(figure)[-2:] == ["even", "odd"]


def test_a_path_that_leaves_the_points_stays_in_the_frame():
    X, labels = week()
    far = np.array([[0.0, 0], [9, 0]])
    ax = steering.path_in_coordinates(X, labels, {"Path": far}).axes[0]
    assert ax.get_xlim()[1] > 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coordinates": np.zeros((80, 3))}, r"coordinates has shape \(80, 3\)"),
        ({"coordinates": np.full((80, 2), np.nan)}, "coordinates has NaN"),
        ({"labels": ["a"]}, r"labels has shape \(1,\)"),
        ({"labels": np.arange(80)}, "labels has 80 kinds; at most 24"),
        ({"paths": {}}, "paths has 0 entries"),
        ({"paths": {"p": np.zeros((1, 2))}}, r"path 'p' has shape \(1, 2\)"),
        ({"order": ["Monday"]}, "must name every kind of label once"),
    ],
)
def test_path_in_coordinates_rejects(change, message):
    X, labels = week()
    given = {"coordinates": X, "labels": labels, "paths": {"p": arc()}} | change
    with pytest.raises(ValueError, match=message):
        steering.path_in_coordinates(**given)


# Ribbons


def test_ribbons_stack_the_answers_and_leave_the_rest_gray():
    figure = steering.probability_ribbons(TIMES, {"Path": shares(), "Chord": shares() / 2}, DAYS)
    first, second = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Path", "Chord"]
    for ax, whole in ((first, 0.9), (second, 0.45)):
        (other,) = marked(ax, "other")
        heights = other.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(1)
        assert heights.min() == pytest.approx(whole)
    (bottom,) = marked(first, "Monday")
    np.testing.assert_allclose(bottom.get_paths()[0].vertices[:, 1].max(), shares()[:, 0].max())
    assert legend_labels(figure) == [*DAYS, "Other"]
    drawn(figure)


def test_tensors_in_bfloat16_are_drawn_as_their_numbers():
    exact = torch.tensor(shares()).bfloat16()
    figure = steering.probability_ribbons(torch.tensor(TIMES), {"": exact}, DAYS)
    (bottom,) = marked(figure.axes[0], "Monday")
    heights = bottom.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(float(exact[:, 0].max()))


def test_wide_ribbons_bear_their_name_and_thin_ones_do_not():
    rows = np.zeros((11, 2))
    rows[:, 0], rows[:, 1] = 0.8, 0.05
    figure = steering.probability_ribbons(torch.tensor(TIMES), {"": torch.tensor(rows)}, ["a", "b"])
    assert [text.get_text() for text in marked(figure.axes[0], "name")] == ["a"]


def test_many_answers_have_colors_of_their_own():
    names = [f"answer {i}" for i in range(20)]
    for cyclic in (False, True):
        figure = steering.probability_ribbons(
            TIMES, {"": np.full((11, 20), 0.05)}, names, cyclic=cyclic
        )
        colors = {tuple(c.get_facecolor()[0]) for c in figure.axes[0].collections}
        assert len(colors) == 21
        drawn(figure)


@pytest.mark.parametrize(
    ("times", "rows", "answers", "message"),
    [
        (TIMES[::-1], shares(), DAYS, "times has shape"),
        (TIMES, shares()[:5], DAYS, r"probabilities of 'p' has shape \(5, 4\)"),
        (TIMES, shares() * 2, DAYS, "a sum above 1, first in row 0"),
        (TIMES, -shares(), DAYS, "a negative entry"),
        (TIMES, shares() * np.nan, DAYS, "probabilities of 'p' has NaN"),
        (TIMES, shares(), ["a", "a", "b", "c"], "distinct names"),
    ],
)
def test_probability_ribbons_rejects(times, rows, answers, message):
    with pytest.raises(ValueError, match=message):
        steering.probability_ribbons(times, {"p": rows}, answers)


def test_probability_ribbons_wants_a_path():
    with pytest.raises(ValueError, match="probabilities has 0 paths"):
        steering.probability_ribbons(TIMES, {}, DAYS)


# Heat map


def test_heatmap_has_the_first_layer_at_the_bottom_and_shows_white_space():
    values = np.arange(6.0).reshape(3, 2)
    values[0, 0] = np.nan
    figure = steering.layer_position_heatmap(
        torch.tensor(values), range(3), [" is", "\n"], chosen=[(2, 1)], label="Restored"
    )
    ax, bar = figure.axes
    assert ax.images[0].origin == "lower"
    np.testing.assert_array_equal(ax.images[0].get_array().filled(np.nan), values)
    (missing,) = marked(ax, "missing")
    assert missing.get_xy() == (-0.5, -0.5)
    (chosen,) = marked(ax, "chosen")
    assert chosen.get_xy() == (0.5, 1.5)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["\u00b7is", "\u21b5"]
    assert "Restored" in drawn(figure)


def test_heatmap_diverges_evenly_about_its_center():
    ax = steering.layer_position_heatmap([[0.5, -2.0]], [0], ["a", "b"], center=0.0).axes[0]
    assert ax.images[0].get_clim() == (-2, 2)


def test_level_heatmap_can_be_drawn():
    drawn(steering.layer_position_heatmap(np.zeros((2, 2)), ["x", "y"], ["a", "b"]))


@pytest.mark.parametrize(
    ("values", "layers", "options", "message"),
    [
        (np.zeros((2, 3)), [0, 1], {}, r"values has shape \(2, 3\); expected \(2, 2\)"),
        (np.full((2, 2), np.nan), [0, 1], {}, "nothing but NaN"),
        (np.full((2, 2), np.inf), [0, 1], {}, "infinity"),
        (np.zeros((2, 2)), [0, 0], {}, "layers has a name twice"),
        (np.zeros((2, 2)), [0, 1], {"chosen": [(0, 2)]}, r"chosen cell \(0, 2\)"),
    ],
)
def test_layer_position_heatmap_rejects(values, layers, options, message):
    with pytest.raises(ValueError, match=message):
        steering.layer_position_heatmap(values, layers, ["a", "b"], **options)


# Dimension


def test_dimension_of_each_layer_stands_over_it_with_its_band():
    values = np.array([3.0, 1, 2])
    band = np.stack([values - 0.5, values + 1], 1)
    figure = steering.dimension_by_layer(torch.tensor(values), intervals=band)
    (ax,) = figure.axes
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.stack([range(3), values], 1))
    assert len(marked(ax, "band")) == 1
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylim()[1] > 4
    assert legend_labels(figure) == ["95 % interval"]
    drawn(figure)


def test_several_curves_are_named():
    figure = steering.dimension_by_layer(
        {"Told": [1, 2.0], "Never told": [2, 1.0]}, layers=["layers.0", "layers.1"]
    )
    assert legend_labels(figure) == ["Told", "Never told"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("dimensions", "options", "message"),
    [
        ({}, {}, "dimensions has 0 curves"),
        ([1.0, np.nan], {}, "dimensions has NaN"),
        ({"a": [1.0, 2], "b": [1.0]}, {}, r"dimensions b has shape \(1,\)"),
        ([1.0, 2], {"layers": ["x"]}, "layers has 1 names for 2 values"),
        ([1.0, 2], {"intervals": [[2, 1], [1, 2]]}, "the lower end first"),
        ({"a": [1.0], "b": [2.0]}, {"intervals": [[1, 2]]}, "give it by name"),
        ({"a": [1.0]}, {"intervals": {"c": [[1, 2]]}}, "intervals names 'c'"),
    ],
)
def test_dimension_by_layer_rejects(dimensions, options, message):
    with pytest.raises(ValueError, match=message):
        steering.dimension_by_layer(dimensions, **options)
