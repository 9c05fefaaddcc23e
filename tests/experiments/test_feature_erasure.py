"""What is claimed of erasing by features follows from what was measured."""

import json
from pathlib import Path

import pytest

SCRIPT = "feature_erasure.py"
RESULT = Path(__file__).parents[2] / "experiments" / "results" / "feature_erasure" / "quick.json"


def rows_of(experiment, **changes):
    """Rows as they would be if everything held, but for ``changes`` of one method."""
    good = {"ks_p": 0.5, "retain_accuracy": 1.0, "overall": 0.9, "rounded": 0.2, "relearning": 1.0}
    methods = ("told", "never told", "baked", *experiment.SETTINGS)
    rows = [{"stage": "test", "method": method, "seed": 0, **good} for method in methods]
    for method, values in changes.items():
        next(r for r in rows if r["method"] == method.replace("_", " ")).update(values)
    return [*rows, {"stage": "diff", "method": "baked", "share": {"value": 0.05}}]


def failing(experiment, rows):
    made = experiment.claims(rows, experiment.Config(), "command")
    return [claim["claim"] for claim in made if not claim["holds"]]


def test_claims_hold_and_fail_by_their_targets(experiment):
    assert failing(experiment, rows_of(experiment)) == []
    assert failing(experiment, rows_of(experiment, clamped={"ks_p": 0.04})) == [
        "clamped: forget quality p"
    ]
    assert failing(experiment, rows_of(experiment, guarded={"retain_accuracy": 0.97})) == [
        "guarded: retain accuracy, share of the target's"
    ]
    assert failing(experiment, rows_of(experiment, baked={"rounded": 0.23, "relearning": 1.2})) == [
        "baked: accuracy after int8 and int4 over the control's",
        "baked: area of the relearning curve over the control's",
    ]
    rows = rows_of(experiment, decoder_span={"overall": 0.89})
    rows[-1]["share"]["value"] = 0.2
    assert failing(experiment, rows) == [
        "decoder span: overall beside the baked manifold edit's",
        "baked: share of the target's own latents still carried",
    ]


def test_the_setting_that_the_judge_puts_highest_is_chosen_and_the_nearest_breaks_ties(experiment):
    rows = [
        {"method": method, "settings": choice, "overall": None, "forget": 0.5}
        for method, choices in experiment.SETTINGS.items()
        for choice in choices
    ]
    rows[2]["overall"] = 0.4
    rows[5]["forget"] = 0.1
    chosen = experiment.settings_of(rows)
    assert chosen["clamped"] == experiment.SETTINGS["clamped"][2]
    assert chosen["clamped below zero"] == experiment.SETTINGS["clamped below zero"][1]
    assert chosen["baked"] == experiment.BAKED


@pytest.mark.skipif(not RESULT.is_file(), reason="not measured yet")
def test_the_committed_claims_are_those_of_the_committed_rows(experiment):
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    again = experiment.claims(
        result["rows"], experiment.Config(), experiment.COMMAND.format("quick")
    )
    assert json.loads(json.dumps(again)) == result["claims"]
    table = experiment.table(result["rows"])
    assert table in experiment.PAGE.read_text(encoding="utf-8")
