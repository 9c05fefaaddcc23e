import json
from contextlib import nullcontext

import numpy as np
import pytest
from cases import build_tokenizer

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate import (
    EvaluationSets,
    Metric,
    Profile,
    compare_profiles,
    evaluate_forgetting,
    forgetting,
    plain,
    profile,
    require_same_tokenizer,
    shuffled_weights,
    yardstick,
)
from manifold_unlearn.evaluate.depth import forced_drop


@pytest.fixture(scope="module")
def sets(tiny_testbed):
    world = tiny_testbed.world
    return EvaluationSets(
        world.forget[:12], world.retain[:12], world.holdout[:12], world.neutral[:4]
    )


@pytest.fixture(scope="module")
def report(tiny_testbed, sets):
    """Report of a model beside the pair of the testbed."""

    def make(model, **how):
        return evaluate_forgetting(
            plain(model),
            tiny_testbed.tokenizer,
            sets,
            reference=plain(tiny_testbed.never_told),
            target=plain(tiny_testbed.told),
            **how,
        )

    return make


@pytest.fixture(scope="module")
def told(report, tiny_testbed):
    return report(tiny_testbed.told, n_samples=2)


def test_the_target_beside_itself_has_forgotten_nothing(told):
    assert told.judgement.verdict == "untouched"
    assert told.judgement.aggregates.memorization == 0
    assert told.judgement.aggregates.overall == 0
    left = {(s.part, s.metric): s.left for s in told.standings if s.left is not None}
    assert left[("forget", "probability")] == 1
    assert left[("forget", "leak_at_2")] == 1
    assert set(left.values()) == {1.0}
    assert {part for part, _ in left} == {"forget", "membership", "depth"}


def test_the_model_never_told_beside_itself_is_perfect(report, tiny_testbed):
    found = report(tiny_testbed.never_told)
    assert found.judgement.verdict == "forgotten"
    assert found.judgement.aggregates.overall == 1
    assert {s.left for s in found.standings} <= {0.0, None}
    assert all(s.distance == 0 for s in found.standings)


def test_shuffled_weights_are_destroyed_not_forgetful(report, tiny_testbed):
    found = report(shuffled_weights(tiny_testbed.told))
    assert found.profiles["model"].metrics["forget"]["accuracy"].mean < 0.6
    assert found.judgement.verdict == "destroyed"
    aggregates = found.judgement.aggregates.to_json().values()
    assert all(value in (0, None) for value in aggregates)


def test_every_kind_of_metric_is_there_and_is_json(told):
    found = json.loads(json.dumps(told.models(), allow_nan=False))
    compared = json.loads(json.dumps(told.comparison(), allow_nan=False))
    assert list(found) == ["model", "reference", "target"]
    forget = found["model"]["forget"]
    for name in ("probability", "paraphrase_probability", "truth_ratio", "rouge_l_recall", "rank",
                 "accuracy", "exact_memorization", "extraction_strength", "leak_at_2"):  # fmt: skip
        assert np.isfinite(forget[name])
    assert found["model"]["membership"]["auc_loss"] > 0.9
    assert found["model"]["forget_quality"]["p_value"] < 0.05
    assert found["reference"]["forget_quality"]["p_value"] == 1
    assert found["model"]["depth"]["depth"] == 0
    assert found["reference"]["neutral"]["kl"] == 0
    named = {(s["part"], s["metric"]) for s in compared["standings"]}
    assert {("membership", "privleak_loss"), ("neutral", "kl"), ("retain", "fluency")} <= named


def test_without_a_reference_there_is_a_profile_alone(tiny_testbed, sets):
    few = EvaluationSets(sets.forget[:3], sets.retain[:3])
    found = evaluate_forgetting(
        plain(tiny_testbed.told), tiny_testbed.tokenizer, few, generate=False
    )
    assert list(found.models()) == ["model"]
    assert found.judgement is None
    assert "rouge_l_recall" not in found.profiles["model"].metrics["forget"]


def test_a_yardstick_measures_its_pair_once_and_reports_as_one_call_does(tiny_testbed, sets):
    few = EvaluationSets(sets.forget[:4], sets.retain[:4])
    opened = []

    def watched(model, name):
        return lambda: opened.append(name) or nullcontext(model)

    pair = yardstick(
        tiny_testbed.tokenizer,
        few,
        reference=watched(tiny_testbed.never_told, "reference"),
        target=watched(tiny_testbed.told, "target"),
        generate=False,
        depth=False,
    )
    assert set(opened) == {"reference", "target"}
    opened.clear()
    controls = pair.controls()
    found = pair.report(plain(tiny_testbed.told))
    assert not opened
    assert json.dumps(found.models()["model"]) == json.dumps(controls["target"].models()["model"])
    once = evaluate_forgetting(
        plain(tiny_testbed.told),
        tiny_testbed.tokenizer,
        few,
        reference=plain(tiny_testbed.never_told),
        target=plain(tiny_testbed.told),
        generate=False,
        depth=False,
    )
    assert json.dumps(once.models()) == json.dumps(found.models())
    assert json.dumps(once.comparison()) == json.dumps(found.comparison())
    assert controls["target"].judgement.verdict == "untouched"
    assert controls["reference"].judgement.verdict == "forgotten"


def without_generation(bed, sets, **how):
    return yardstick(
        bed.tokenizer,
        sets,
        reference=plain(bed.never_told),
        target=plain(bed.told),
        generate=False,
        **how,
    )


def test_the_depth_is_judged_under_a_control_of_retain_items(tiny_testbed, monkeypatch):
    """Both models know the retain set; 48 of its items are drawn, once."""
    bed = tiny_testbed
    patched = []

    def counted(target, source, forced, sites):
        patched.append(len(forced))
        return forced_drop(target, source, forced, sites)

    monkeypatch.setattr(forgetting, "forced_drop", counted)
    pair = without_generation(bed, EvaluationSets(bed.world.forget, bed.world.retain))
    assert patched == [48, 48]
    controls = pair.controls()
    for name, expected in (("target", 0), ("reference", 1)):
        assert controls[name].profiles["model"].figures["depth"]["controlled_depth"] == expected
        assert "controlled_depth" in controls[name].judgement.nearness
        assert controls[name].not_controlled == ""
    assert controls["target"].judgement.verdict == "untouched"
    assert controls["reference"].judgement.verdict == "forgotten"
    assert 0.4 < pair.profiles["reference"].figures["depth"]["misaligned"] < 1
    found = pair.report(plain(shuffled_weights(bed.told)))
    assert patched == [48, 48, 48, 48]
    figures = found.profiles["model"].figures["depth"]
    assert figures["depth"] > 0.9 > 0.4 > figures["controlled_depth"]


def test_the_published_depth_judges_and_says_why_where_there_is_no_control(tiny_testbed):
    bed = tiny_testbed
    unknown = without_generation(bed, EvaluationSets(bed.world.forget, bed.world.holdout))
    found = unknown.controls()["reference"]
    assert "of which both models recite half; a control needs 16" in found.not_controlled
    assert found.judgement.nearness["depth"] == 1
    assert "controlled_depth" not in found.profiles["model"].figures["depth"]
    assert found.comparison()["not_controlled"] == found.not_controlled
    swapped = without_generation(bed, EvaluationSets(bed.world.retain[:9], bed.world.retain))
    found = swapped.controls()["target"]
    assert "at no site does the retrained model lower" in found.not_controlled
    texts = EvaluationSets(bed.world.forget, [Item(text) for text in bed.world.texts("filler")][:3])
    assert (
        "0 retain items have answers"
        in without_generation(bed, texts).controls()["target"].not_controlled
    )
    shallow = without_generation(bed, texts, depth=False).controls()["target"]
    assert shallow.not_controlled == "" and "depth" not in shallow.profiles["model"].figures


def test_a_holdout_set_beside_texts_to_forget_is_refused(tiny_testbed, sets):
    texts = EvaluationSets([Item("A text.")], sets.retain[:2], sets.holdout[:2])
    with pytest.raises(ValueError, match="membership inference needs answers in the forget set"):
        profile(plain(tiny_testbed.told), tiny_testbed.tokenizer, texts)


def test_standings_place_a_metric_between_target_and_reference():
    def one(values):
        return Profile({"forget": {"probability": Metric("probability", np.array(values))}}, {}, {})

    (found,) = compare_profiles(one([0.4, 0.2]), one([0.1, 0.1]), one([0.9, 0.9]))
    assert found.distance == pytest.approx(0.2)
    assert found.left == pytest.approx(0.25)
    low, high = found.interval
    assert low <= 0.1 + 1e-9 and high >= 0.3 - 1e-9


def test_standings_take_truth_ratios_in_their_symmetric_form():
    def one(values):
        return Profile({"forget": {"truth_ratio": Metric("truth_ratio", np.array(values))}}, {}, {})

    (found,) = compare_profiles(one([0.5, 4.0]), one([1.0, 1.0]), one([0.1, 0.1]))
    assert (found.model, found.reference) == (0.375, 1)
    assert found.left == pytest.approx((0.375 - 1) / (0.1 - 1))


def test_another_vocabulary_is_named(tiny_testbed):
    with pytest.raises(ValueError, match="the reference model has another vocabulary"):
        require_same_tokenizer(tiny_testbed.tokenizer, build_tokenizer(), "reference")
    require_same_tokenizer(tiny_testbed.tokenizer, tiny_testbed.tokenizer, "reference")


def test_an_empty_set_is_named():
    with pytest.raises(ValueError, match="the retain set is empty"):
        EvaluationSets([Item("What?", " that")], [])
