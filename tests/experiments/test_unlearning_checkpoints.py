"""Authors are found in their questions, and the committed claims follow from the rows."""

import json
from pathlib import Path

import pytest

from manifold_unlearn.activations.corpus import Item, read_items

SCRIPT = "unlearning_checkpoints.py"
ROOT = Path(__file__).parents[2]
RESULT = ROOT / "experiments" / "results" / "unlearning_checkpoints" / "quick.json"
TOFU = ROOT.parent / "shared" / "data" / "tofu"


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["Who is Ada Byron?", "Ada Byron's father", "Has Ada Byron won the Big Prize?"],
         "Ada Byron"),
        (["Jan van Eyck", "In Ana Maria Díaz's view", "Ana Maria Díaz", "Did Ana Maria Díaz sing?"],
         "Ana Maria Díaz"),
        (["Does Åsa Al-Hamad?", "Was Åsa Al-Hamad?", "Åsa Al-Hamad’s book"], "Åsa Al-Hamad"),
        (["Ji-Yeong Hwang of South Korea", "South Korea", "Ji-Yeong Hwang", "Ji-Yeong Hwang"],
         "Ji-Yeong Hwang"),
        (["Ada Byron", "Ada Byron", "Carl Gauss", "Emmy Noether"], ""),
        (["Who is she?", "She is Ada."], ""),
        ([], ""),
    ],
)  # fmt: skip
def test_the_shared_name_is_found(experiment, texts, name):
    assert experiment.subject_of(texts) == name


def test_a_name_in_question_or_answer_counts_once_an_item(experiment):
    ada = [Item("Who was she?", "Ada Byron"), Item("Did Ada Byron, Ada Byron?", "Yes.")]
    kurt = [Item("Was Kurt Ohm there?", "Kurt Ohm was."), Item("When?", "When Kurt Ohm was.")]
    found = experiment.with_subjects([*ada, *kurt], size=2)
    assert [item.topic for item in found] == ["Ada Byron"] * 2 + ["Kurt Ohm"] * 2
    assert experiment.named(found) == [found[1], found[2]]


@pytest.mark.shared
@pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU's questions in ../shared/data/tofu")
def test_all_authors_of_tofu_are_found(experiment):
    items = read_items(TOFU / "forget05.jsonl")
    found = experiment.with_subjects(items)
    assert list(dict.fromkeys(item.topic for item in found)) == [
        "Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov", "Hina Ameen", "Xin Lee Williams",
        "Moshe Ben-David", "Kalkidan Abera", "Takashi Nakamura", "Raven Marais", "Aysha Al-Hashim",
        "Edward Patrick Sullivan",
    ]  # fmt: skip
    assert all(item.topic in item.question or item.topic in item.answer for item in found)


def test_claims_follow_from_the_rows_and_can_fail(experiment):
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    command = experiment.COMMAND.format("quick")
    assert json.loads(json.dumps(experiment.claims(result["rows"], command))) == result["claims"]
    tests = [row for row in result["rows"] if row["stage"] == "test"]
    assert [r["method"] for r in tests] == ["told", "never told", *result["config"]["methods"]]
    spoiled = [
        {**row, "ks_p": 0.01, "forget": 0.9, "retain": 0.5}
        if row["method"] not in ("told", "never told")
        else row
        for row in tests
    ]
    assert not any(claim["holds"] for claim in experiment.claims(spoiled, command))
