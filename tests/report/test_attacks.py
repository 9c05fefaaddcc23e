import numpy as np
import pytest

from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.report.attacks import attack_curves


def curve(attack, means, spent=None, n_items=5):
    spent = np.arange(len(means)) if spent is None else np.array(spent)
    values = np.clip(np.array(means)[:, None] + np.linspace(-0.05, 0.05, n_items), 0, 1)
    return AttackCurve(attack, "accuracy", "gradient steps", spent.astype(float), values)


@pytest.fixture
def curves():
    return {
        "model": [curve("relearn", [0.1, 0.4, 0.9]), curve("quantize", [0.1, 0.1])],
        "reference": [curve("relearn", [0.1, 0.2, 0.5]), curve("quantize", [0.1, 0.1])],
    }


def test_one_panel_an_attack_and_one_line_a_model(curves):
    figure = attack_curves(curves)
    figure.canvas.draw()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Relearn", "Quantize"]
    assert all(len(ax.lines) == 2 for ax in figure.axes)
    model, reference = figure.axes[0].lines
    np.testing.assert_allclose(model.get_ydata(), [0.1, 0.4, 0.9])
    np.testing.assert_allclose(reference.get_ydata(), [0.1, 0.2, 0.5])
    assert reference.is_dashed() and not model.is_dashed()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Model", "Reference"]


def test_wide_compute_is_drawn_on_a_logarithm_that_shows_zero():
    figure = attack_curves({"model": [curve("relearn", [0, 0.1, 0.2], [0, 1, 100])]})
    assert figure.axes[0].get_xscale() == "symlog"
    assert figure.axes[0].get_xlim()[0] <= 0


def test_panels_left_over_are_empty(curves):
    many = {"model": [curve(f"attack {i}", [0, 1]) for i in range(5)]}
    figure = attack_curves(many)
    assert sum(ax.axison for ax in figure.axes) == 5


def test_other_attacks_for_one_model_are_named(curves):
    curves["reference"] = curves["reference"][:1]
    with pytest.raises(ValueError, match=r"'reference' has the attacks \['relearn'\]"):
        attack_curves(curves)


@pytest.mark.parametrize("nothing", [{}, {"model": []}])
def test_nothing_to_draw_is_an_error(nothing):
    with pytest.raises(ValueError, match="holds no attack"):
        attack_curves(nothing)
