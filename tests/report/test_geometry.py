import numpy as np
import pytest
import torch

from manifold_unlearn import report
from manifold_unlearn.report import style

GRID = np.logspace(-4, 0, 33)
SLOPE = 0.5 + 0.1 / GRID**0.5


def drawn(figure):
    """Every text of a figure, after it was drawn without a warning."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def legend_labels(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def marked(ax, gid):
    return [artist for artist in [*ax.lines, *ax.patches] if artist.get_gid() == gid]


# Spectrum


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_spectrum_numbers_the_eigenvalues_from_one(kind):
    figure = report.spectrum(kind([0.75, 0.5, 0.25]))
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 3]
    np.testing.assert_array_equal(line.get_ydata(), [0.75, 0.5, 0.25])
    assert figure.legends == []
    drawn(figure)


def test_spectrum_shades_the_gap_and_marks_the_exact_values():
    figure = report.spectrum(
        [1.1, 1.2, 4.1], gap=2, exact=[1, 1], label="Rate", title="Generator"
    )  # fmt: skip
    (ax,) = figure.axes
    (gap,) = marked(ax, "gap")
    assert (gap.get_x(), gap.get_width()) == (2, 1)
    (exact,) = marked(ax, "exact")
    np.testing.assert_array_equal(exact.get_xydata(), [[1, 1], [2, 1]])
    assert {"Rate", "Generator"} <= set(drawn(figure))
    assert legend_labels(figure) == ["Found", "Exact", "Gap after 2"]


@pytest.mark.parametrize(
    ("eigenvalues", "options", "message"),
    [
        ([], {}, "eigenvalues has shape"),
        ([[0.5]], {}, r"eigenvalues has shape \(1, 1\)"),
        ([0.5, np.inf], {}, "eigenvalues has NaN or infinity, first in row 1"),
        ([0.5, 0.4], {"gap": 2}, "gap=2 must lie between 1 and 1"),
        ([0.5, 0.4], {"gap": 0}, "gap=0 must lie between 1 and 1"),
        ([0.5], {"exact": [1, 2]}, "exact has 2 eigenvalues, more than the 1 drawn"),
        ([0.5], {"exact": [np.nan]}, "exact has NaN or infinity"),
    ],
)
def test_spectrum_rejects(eigenvalues, options, message):
    with pytest.raises(ValueError, match=message):
        report.spectrum(eigenvalues, **options)


# Bandwidth


def test_bandwidth_curve_draws_twice_the_slope_as_the_dimension():
    figure = report.bandwidth_curve(torch.tensor(GRID), torch.tensor(SLOPE))
    (ax,) = figure.axes
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_xdata(), GRID)
    np.testing.assert_allclose(line.get_ydata(), 2 * SLOPE)
    assert ax.get_xscale() == "log"
    assert ax.get_ylim()[1] > 2 * SLOPE.max()
    drawn(figure)


def test_bandwidth_curve_marks_what_was_chosen_and_ends_above_the_dimension():
    figure = report.bandwidth_curve(
        GRID, SLOPE, variance=np.full(33, 0.5), chosen=2e-3, plateau=(1e-3, 1e-1), dimension=1.0
    )
    (ax,) = figure.axes
    (plateau,) = marked(ax, "plateau")
    assert (plateau.get_x(), plateau.get_x() + plateau.get_width()) == pytest.approx((1e-3, 1e-1))
    assert marked(ax, "chosen")[0].get_xdata()[0] == 2e-3
    assert marked(ax, "dimension")[0].get_ydata()[0] == 1.0
    assert ax.get_ylim() == (0, 4.0)
    assert f"up to {2 * SLOPE.max():.3g}" in drawn(figure)
    assert legend_labels(figure) == [
        "Growth of the kernel sum",
        "Variance of the exponent",
        "Plateau",
        "Dimension 1",
        "Chosen, 0.002",
    ]


def test_bandwidth_curve_without_a_plateau_shades_nothing_and_takes_gaps():
    holes = np.where(GRID < 1e-3, np.nan, SLOPE)
    figure = report.bandwidth_curve(GRID, holes, plateau=(0.01, 0.01), chosen=3e-7)
    assert marked(figure.axes[0], "plateau") == []
    assert r"Chosen, $3\times 10^{-7}$" in drawn(figure)


@pytest.mark.parametrize(
    ("bandwidths", "slope", "message"),
    [
        (GRID[::-1], SLOPE, "bandwidths must be positive and ascending"),
        (GRID - GRID[0], SLOPE, "bandwidths must be positive and ascending"),
        (GRID, SLOPE[1:], r"slope has shape \(32,\); expected \(33,\)"),
        (GRID, np.full(33, np.nan), "finite or NaN, and not NaN alone"),
        (GRID, np.full(33, np.inf), "finite or NaN, and not NaN alone"),
        ([], [], r"bandwidths has shape \(0,\)"),
    ],
)
def test_bandwidth_curve_rejects(bandwidths, slope, message):
    with pytest.raises(ValueError, match=message):
        report.bandwidth_curve(bandwidths, slope)


# Dimension


@pytest.fixture
def local():
    return np.random.default_rng(0).gamma(40, 0.05, 500)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_histogram_shares_sum_to_one_and_the_estimate_has_its_interval(local, kind):
    figure = report.dimension_histogram(
        kind(local), dimension=2.0, standard_error=0.1, truth=2
    )  # fmt: skip
    (ax,) = figure.axes
    bars = [patch for patch in ax.patches if patch.get_gid() is None]
    n_above = (local > ax.get_xlim()[1]).sum()
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1 - n_above / 500)
    (band,) = marked(ax, "95")
    assert (band.get_x(), band.get_width()) == pytest.approx((1.804, 0.392))
    assert marked(ax, "global")[0].get_xdata()[0] == 2.0
    assert {"2.00 ± 0.1", f"{n_above} above"} <= set(drawn(figure))
    assert legend_labels(figure) == ["Global", "95 % interval", "Truth, 2"]


@pytest.mark.parametrize("n_sets", [2, 4, 6])
def test_histograms_of_layers_share_their_axes(local, n_sets):
    layers = {f"layers.{i}": local * (1 + i) for i in range(n_sets)}
    levels = {f"layers.{i}": 2.0 * (1 + i) for i in range(1, n_sets)}
    figure = report.dimension_histogram(layers, dimension=levels)
    assert len(figure.axes) == n_sets
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    assert set(layers) <= set(drawn(figure))
    assert marked(figure.axes[0], "global") == []
    assert marked(figure.axes[1], "global")[0].get_xdata()[0] == 4.0


def test_histogram_of_equal_dimensions_has_a_width():
    figure = report.dimension_histogram(np.full(9, 3.0))
    low, high = figure.axes[0].get_xlim()
    assert low < 3 < high
    drawn(figure)


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ({}, {}, "local is empty"),
        ([], {}, r"local has shape \(0,\)"),
        ({"a": [1.0], "b": [np.nan]}, {}, "local b has NaN or infinity, first in row 0"),
        ({"a": [1.0], "b": [2.0]}, {"dimension": 1.0}, "dimension is one number for the sets"),
        ({"a": [1.0]}, {"dimension": {"c": 1.0}}, r"dimension names \['c'\]; local has only"),
        ([1.0], {"standard_error": 0.1}, "has no dimension to stand beside"),
        ([1.0], {"dimension": np.nan}, "dimension has NaN or infinity"),
    ],
)
def test_histogram_rejects(sets, options, message):
    with pytest.raises(ValueError, match=message):
        report.dimension_histogram(sets, **options)


def test_the_colors_of_categories_are_distinct():
    assert len(set(style.MORE)) == len(style.MORE)
