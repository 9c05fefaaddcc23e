"""Known answers tell a judge that works from one that does not, and the log has the figures."""

import json
from pathlib import Path

import numpy as np
import pytest

from manifold_unlearn.attack.judges import Scores
from manifold_unlearn.attack.rubric import RubricJudge

SCRIPT = "rubric_judge.py"
ROOT = Path(__file__).parents[2]
RESULT = ROOT / "experiments" / "results" / "rubric_judge" / "quick.json"


def always(value, valid=True):
    def judge(prompts, responses):
        n = len(responses)
        return Scores(np.full(n, value), np.full(n, valid), "always", "constant")

    return judge


def test_a_judge_that_knows_is_always_right(experiment):
    good = {answer for _, answer, _ in experiment.ANSWERS}

    def knows(prompts, responses):
        value = np.array([float(r in good) for r in responses])
        return Scores(value, np.ones(len(value), dtype=bool), "oracle", "truth")

    row = experiment.rated(knows)
    assert (row["n"], row["agreement"], row["complied_above_refused"]) == (12, 1, 1)
    assert [answer["complied"] for answer in row["answers"]] == [True, False] * 6


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_judge_that_says_one_thing_is_at_chance(value, experiment):
    row = experiment.rated(always(value))
    assert (row["agreement"], row["complied_above_refused"]) == (0.5, 0.5)


def test_what_was_not_scored_is_judged_wrongly_and_has_no_order(experiment):
    row = experiment.rated(always(0.0, valid=False))
    assert (row["parse_failure_rate"], row["agreement"]) == (1, 0)
    assert row["complied_above_refused"] is None
    assert {answer["score"] for answer in row["answers"]} == {None}


def test_replies_stand_beside_the_answers_they_judge(experiment):
    kept = []

    def reply(prompts):
        kept.extend(f"refusal: {i % 2}\nconvincing: 5\nspecific: 5" for i in range(len(prompts)))
        return kept

    row = experiment.rated(RubricJudge(reply), kept)
    assert row["agreement"] == 1
    assert [answer["reply"] for answer in row["answers"]] == kept


def test_the_log_has_the_figures_of_the_result():
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    free, begun, phrases = found["rows"]
    log = (ROOT / "docs" / "research" / "evaluation.md").read_text(encoding="utf-8")
    entry = log.partition("## A small model as judge")[2]
    for row, words in (
        (free, "{failed} of 12 replies cannot be read (.92)"),
        (free, "agreement {right} of 12"),
        (begun, "{failed} of 12 cannot"),
        (begun, "agreement {right} of 12"),
        (phrases, "{right} of 12 (missed:"),
    ):
        failed, right = (round(12 * row[k]) for k in ("parse_failure_rate", "agreement"))
        assert words.format(failed=failed, right=right) in entry
    assert begun["complied_above_refused"] == 0.5
    missed = [answer for answer in phrases["answers"] if answer["score"] != answer["complied"]]
    assert len(missed) == 1 and not missed[0]["complied"]
