"""What the headline experiment makes of its rows; running it takes half an hour."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPT = "unlearning.py"
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def row(method, seed, **changes):
    figures = {
        "forget": 0.1, "forget_paraphrase": 0.1, "forget_accuracy": 0.2, "retain": 0.9,
        "retain_accuracy": 1.0, "ks_p": 0.3, "overall": 0.9, "controlled_depth": 0.95,
        "rounded": 0.2, "relearning": 1.0, "probe": 0.02, "last_probe": 0.01, "gflops": 10.0,
    }  # fmt: skip
    return {"stage": "test", "method": method, "seed": seed} | figures | changes


def judged(experiment, **ours):
    config = experiment.Config(methods=("baked", "leace", "npo"), attacked=("baked",), seeds=(0, 1))
    rows = []
    for seed in (0, 1):
        rows += [
            row("told", seed, overall=0.0), row("never told", seed, overall=1.0),
            row("baked", seed, **ours), row("leace", seed, overall=0.3),
            row("npo", seed, overall=0.5 + 0.1 * seed, gflops=150.0),
        ]  # fmt: skip
    return experiment.claims(rows, config, "run")


def test_all_claims_hold_where_every_figure_is_within_its_target(experiment):
    found = judged(experiment)
    assert len(found) == 10
    assert [c["claim"] for c in found if not c["holds"]] == []


@pytest.mark.parametrize(
    ("figure", "missed"),
    [
        ({"ks_p": 0.04}, "forget quality"),
        ({"retain_accuracy": 0.97}, "retain accuracy"),
        ({"controlled_depth": 0.89}, "unlearning depth"),
        ({"rounded": 0.23}, "int8 and int4"),
        ({"relearning": 1.2}, "relearning curve"),
        ({"probe": 0.04}, "behind every block"),
        ({"last_probe": 0.04}, "behind the last block"),
        ({"overall": 0.55}, "every gradient baseline"),
        ({"gflops": 20.0}, "FLOPs"),
    ],
)
def test_a_figure_beyond_its_target_is_a_claim_that_does_not_hold(experiment, figure, missed):
    failed = [c["claim"] for c in judged(experiment, **figure) if not c["holds"]]
    assert len(failed) == 1
    assert missed in failed[0]


def test_the_setting_that_the_judge_puts_highest_over_the_seeds_is_chosen(experiment):
    config = experiment.Config(methods=("baked",), tuned_on=(0, 1))
    first, second, *rest = experiment.SETTINGS["baked"]
    scores = {0: ((first, 0.9), (second, 0.8)), 1: ((first, None), (second, 0.7))}
    rows = [
        {"stage": "tune", "method": "baked", "seed": seed, "settings": settings, "overall": score}
        for seed, pairs in scores.items()
        for settings, score in (*pairs, *((other, 0.1) for other in rest))
    ]
    assert experiment.settings_of(rows, config) == {"baked": second}


@pytest.mark.parametrize("preset", ["quick", "few"])
def test_the_tables_of_the_page_are_those_of_the_results(experiment, preset):
    result = EXPERIMENTS / "results" / "unlearning" / f"{preset}.json"
    rows = json.loads(result.read_text("utf-8"))["rows"]
    page = (EXPERIMENTS.parent / "docs" / "unlearning" / "claim.md").read_text("utf-8")
    assert f"<!-- {preset} -->\n{experiment.table(rows)}\n<!-- end of {preset} -->" in page


def test_the_table_of_names_is_that_of_its_results(experiment):
    del experiment  # nobody.py imports it by its name
    sys.modules.pop("nobody", None)
    nobody = importlib.import_module("nobody")
    result = json.loads((EXPERIMENTS / "results" / "nobody" / "quick.json").read_text("utf-8"))
    assert nobody.table(result["rows"]) in nobody.PAGE.read_text("utf-8")


def test_the_table_has_means_and_the_least_p(experiment):
    rows = [row("baked", 0, forget=0.1, ks_p=0.5), row("baked", 1, forget=0.2, ks_p=0.06)]
    head, _, line = experiment.table(rows).splitlines()
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert head.count("|") == line.count("|")
    assert cells[:2] == ["baked", "0.15"]
    assert cells[6] == "0.06"
