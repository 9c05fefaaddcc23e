"""The committed figures of the gradient baselines are those of the page, and claims can fail."""

import json
from pathlib import Path

import pytest

SCRIPT = "baselines.py"
ROOT = Path(__file__).parents[2]
RESULT = ROOT / "experiments" / "results" / "baselines" / "quick.json"


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text(encoding="utf-8"))


def test_the_table_of_the_page_is_that_of_the_result(experiment, result):
    page = (ROOT / "docs" / "evaluation" / "baselines.md").read_text(encoding="utf-8")
    assert f"<!-- quick -->\n{experiment.table(result)}\n<!-- end of quick -->" in page


def test_every_baseline_had_as_many_trials_and_every_seed(experiment, result):
    config = result["config"]
    trials, tests = (
        [r["method"] for r in result["rows"] if r["stage"] == stage] for stage in ("tune", "test")
    )
    for name in config["names"]:
        assert trials.count(name) == len(config["lrs"]) * config["n_settings"]
        assert tests.count(name) == len(config["seeds"]) >= 3
    assert set(tests) == {"told", "never told", *config["names"]}


def test_claims_follow_from_the_rows(experiment, result):
    command = experiment.COMMAND.format("quick")
    made = experiment.claims(result["rows"], command, result["cpu_seconds"])
    assert json.loads(json.dumps(made)) == result["claims"]
    spoiled = [
        {**row, "forget_rank_1": 0.5, "forget_probability": 0.9, "relearned_other_half": 1.0}
        if row["method"] != "never told" and row["stage"] == "test"
        else row
        for row in result["rows"]
    ]
    assert not any(c["holds"] for c in experiment.claims(spoiled, command, 601.0))


def test_every_published_objective_can_be_tried(experiment):
    from manifold_unlearn.finetune.objectives import objective

    for preset in experiment.PRESETS.values():
        for name in preset.names:
            for settings in experiment.SETTINGS.get(name, ({},))[: preset.n_settings]:
                assert objective(name, **settings)
