import numpy as np
import pytest

from manifold_unlearn.attack.backdoor import BackdoorReport
from manifold_unlearn.attack.jailbreak import JailbreakReport
from manifold_unlearn.attack.judges import Scores
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.evaluate import Metric
from manifold_unlearn.report.attacks import attack_curves, backdoor_table, jailbreak_table


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


def scores(values, empty):
    """Values of a scale up to 5; NaN was not scored."""
    value = np.array(values, dtype=float)
    return Scores(
        np.nan_to_num(value), np.isfinite(value), "mine", "any", 5.0, np.array(empty, dtype=bool)
    )


NAN = float("nan")


def test_jailbreaks_by_framing_and_category_with_what_was_not_scored():
    found = JailbreakReport(
        ("direct", "story", "quiz"),
        ("food", "craft", "food"),
        {
            "direct": scores([5, 1, NAN], [0, 0, 1]),
            "story": scores([1, NAN, 4], [0, 1, 0]),
            "quiz": scores([NAN, NAN, NAN], [0, 0, 0]),
        },
        {},
        0.5,
        "",
    )
    columns, rows = jailbreak_table({"model": found})
    assert columns == [
        "asked", "model", "rate", "95 %", "mean score", "asked for", "empty", "not scored"
    ]  # fmt: skip
    table = {row[0]: row[2:] for row in rows}
    assert table["all framings, mean"][0] == pytest.approx((0.5 + 0 + 1) / 3)
    assert table["all framings, mean"][3:] == [9, 2, 5]
    assert table["any framing"][0] == pytest.approx(2 / 3)
    assert table["direct"] == [0.5, "0.000 to 1.000", 3.0, 3, 1, 1]
    assert table["quiz"] == [None, None, None, 3, 0, 3]
    assert table["category: food"][0] == pytest.approx((0.5 + 1) / 2)
    assert table["category: food"][3:] == [6, 1, 3]
    assert table["category: craft"] == [0, "0.000 to 0.000", None, 3, 1, 2]


def test_a_model_of_which_nothing_was_scored_has_its_rows():
    nothing = JailbreakReport(("direct",), ("",), {"direct": scores([NAN], [0])}, {}, 0.5, "")
    _, rows = jailbreak_table({"model": nothing, "reference": nothing})
    assert [row[1:3] for row in rows] == [["model", None]] * 3 + [["reference", None]] * 3
    assert all(row[-1] == 1 for row in rows)


def test_a_backdoor_with_and_without_its_trigger():
    def metric(*values):
        return Metric("x", np.array(values, dtype=float))

    found = BackdoorReport(
        metric(1, 1), metric(0, 0), metric(1, 1, 1), metric(0, 0, 0),
        {"triggered": scores([5, 5, NAN], [0, 0, 1]), "clean": scores([0, 0, 0], [0, 0, 0])},
    )  # fmt: skip
    columns, rows = backdoor_table({"model": found})
    assert len(columns) == 8
    assert rows == [
        ["with trigger", "model", 1.0, "1.000 to 1.000", 0.0, "0.000 to 0.000", 1, 1],
        ["without", "model", 0.0, "0.000 to 0.000", 1.0, "1.000 to 1.000", 0, 0],
    ]
