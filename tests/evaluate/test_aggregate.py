import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.evaluate.aggregate import (
    GROUPS,
    Aggregates,
    gate,
    judge,
    memorization_aggregate,
    mia_aggregate,
    overall_aggregate,
    privacy_aggregate,
    published_aggregates,
    relative_utility,
    utility_aggregate,
)
from manifold_unlearn.evaluate.metrics import UTILITY_METRICS, UTILITY_SETS, model_utility

ORACLE = Path(__file__).parents[3] / "shared" / "data" / "oracle" / "method_results.json"
TARGET = {
    "extraction_strength": 0.7,
    "exact_memorization": 0.95,
    "paraphrased_answer_probability": 0.1,
    "truth_probability": 0.7,
    "auc_loss": 1.0,
    "auc_zlib": 1.0,
    "auc_min_k": 0.98,
    "auc_min_k_plus_plus": 1.0,
    "depth": 0.0,
    "model_utility": 0.6,
    "fluency": 0.9,
}
RETRAINED = TARGET | {
    "extraction_strength": 0.1,
    "exact_memorization": 0.6,
    "paraphrased_answer_probability": 0.05,
    "truth_probability": 0.55,
    "auc_loss": 0.4,
    "auc_zlib": 0.35,
    "auc_min_k": 0.4,
    "auc_min_k_plus_plus": 0.5,
    "depth": 1.0,
    "model_utility": 0.59,
}
SHUFFLED = TARGET | {
    "extraction_strength": 0.0,
    "exact_memorization": 0.0,
    "paraphrased_answer_probability": 0.0,
    "truth_probability": 0.5,
    "auc_loss": 0.45,
    "auc_zlib": 0.4,
    "auc_min_k": 0.45,
    "auc_min_k_plus_plus": 0.5,
    "depth": 1.0,
    "model_utility": 0.0,
    "fluency": 0.1,
}
FIELDS = ("memorization", "mia", "privacy", "utility", "overall")


def test_the_published_aggregates_by_hand():
    """4 / (1/.3 + 1/.05 + 1/.9 + 1/.3) = .144; s = 1 - min(|a - r| / r, 1)."""
    found = published_aggregates(TARGET, retrained=RETRAINED, target_utility=0.72)
    assert found.memorization == pytest.approx(4 / (1 / 0.3 + 1 / 0.05 + 1 / 0.9 + 1 / 0.3))
    assert found.utility == pytest.approx(1)  # 2 / (1/.6 + 1/.9) = .72
    assert found.mia < 1e-11
    assert found.overall < 1e-10
    half = RETRAINED | {"auc_loss": 0.6, "depth": 0.5}
    found = published_aggregates(half, retrained=RETRAINED, target_utility=0.72)
    mia = 4 / (1 / 0.5 + 3)
    assert found.mia == pytest.approx(mia)
    assert found.privacy == pytest.approx(2 / (1 / mia + 1 / 0.5))


def test_a_missing_part_is_named():
    parts = {name: value for name, value in TARGET.items() if name != "depth"}
    with pytest.raises(ValueError, match="model lacks depth"):
        published_aggregates(parts, retrained=RETRAINED, target_utility=1)
    with pytest.raises(ValueError, match="target_utility=0 must be above 0"):
        relative_utility(0.5, 0)


# --- controls -------------------------------------------------------------------------------------


def test_the_target_scores_zero_forgetting():
    found = judge(TARGET, target=TARGET, retrained=RETRAINED)
    assert found.verdict == "untouched"
    aggregates = found.aggregates
    assert (aggregates.memorization, aggregates.mia, aggregates.privacy, aggregates.overall) == (
        0,
        0,
        0,
        0,
    )
    assert aggregates.utility == 1


def test_one_part_left_as_it_was_is_partly_forgotten_and_no_more():
    parts = RETRAINED | {"extraction_strength": TARGET["extraction_strength"]}
    found = judge(parts, target=TARGET, retrained=RETRAINED)
    assert found.aggregates.memorization == 0
    assert found.verdict == "partly forgotten"


def test_the_retrained_model_scores_perfect():
    found = judge(RETRAINED, target=TARGET, retrained=RETRAINED)
    assert found.verdict == "forgotten"
    assert [getattr(found.aggregates, name) for name in FIELDS] == [1] * 5


def test_shuffled_weights_are_destroyed_and_not_forgetful_under_every_aggregate():
    published = published_aggregates(SHUFFLED, retrained=RETRAINED, target_utility=0.72)
    assert published.memorization > 0.7  # what the published form says of it
    assert published.privacy > 0.9
    found = judge(SHUFFLED, target=TARGET, retrained=RETRAINED)
    assert found.verdict == "destroyed"
    assert [getattr(found.aggregates, name) for name in FIELDS] == [0] * 5
    assert found.ungated.mia > 0.9
    gated = gate(published, found.relative_utility)
    assert [getattr(gated, name) for name in FIELDS] == [0] * 5
    assert gate(published, 0.9) == published


def test_what_was_not_measured_stays_none_behind_the_gate():
    some = Aggregates(0.5, None, None, 0.1, 0.2)
    assert gate(some, 0.1) == Aggregates(0, None, None, 0, 0)


def test_over_forgetting_is_a_miss():
    over = RETRAINED | {"extraction_strength": 0.0, "exact_memorization": 0.3, "auc_loss": 0.0}
    found = judge(over, target=TARGET, retrained=RETRAINED)
    assert found.nearness["extraction_strength"] == pytest.approx(1 - 0.1 / 0.6)
    assert found.nearness["exact_memorization"] == pytest.approx(1 - 0.3 / 0.35)
    assert found.nearness["auc_loss"] == pytest.approx(1 - 0.4 / 0.6)
    assert found.aggregates.memorization < 0.6
    published = published_aggregates(over, retrained=RETRAINED, target_utility=0.72)
    perfect = published_aggregates(RETRAINED, retrained=RETRAINED, target_utility=0.72)
    assert published.memorization > perfect.memorization  # the published form rewards it


unit = st.floats(0, 1)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(values=st.lists(unit, min_size=len(TARGET), max_size=len(TARGET)))
def test_every_aggregate_lies_between_the_controls(values):
    found = judge(dict(zip(TARGET, values, strict=True)), target=TARGET, retrained=RETRAINED)
    for name in FIELDS:
        assert 0 <= getattr(found.aggregates, name) <= 1
    assert (found.verdict == "destroyed") == (found.relative_utility < 0.5)
    json.dumps(found.to_json(), allow_nan=False)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(step=unit, part=st.sampled_from([n for g in ("memorization", "mia") for n in GROUPS[g]]))
def test_nearer_to_the_retrained_model_is_never_worse(step, part):
    def at(share):
        value = TARGET[part] + share * (RETRAINED[part] - TARGET[part])
        return judge(RETRAINED | {part: value}, target=TARGET, retrained=RETRAINED)

    assert at(step).nearness[part] == pytest.approx(step)
    assert at(step).aggregates.overall <= at(min(1, step + 0.1)).aggregates.overall + 1e-12


def test_parts_that_say_nothing_are_left_out_and_named():
    parts = ({k: v for k, v in p.items() if k != "depth"} for p in (TARGET, TARGET, RETRAINED))
    model, target, retrained = parts
    target["paraphrased_answer_probability"] = 0.06
    found = judge(model, target=target, retrained=retrained)
    assert found.left_out == ("paraphrased_answer_probability", "depth")
    assert found.aggregates.privacy == found.aggregates.mia


def test_the_controlled_depth_is_judged_by_where_all_three_have_it():
    model, target, retrained = (
        parts | {"controlled_depth": value}
        for parts, value in ((RETRAINED | {"depth": 0.6}, 0.95), (TARGET, 0.0), (RETRAINED, 1.0))
    )
    found = judge(model, target=target, retrained=retrained)
    assert found.nearness["controlled_depth"] == pytest.approx(0.95)
    assert "depth" not in found.nearness and "depth" not in found.left_out
    assert found.aggregates.privacy == pytest.approx(2 / (1 + 1 / 0.95))
    for lacking in ("model", "target", "retrained"):
        three = {"model": model, "target": target, "retrained": retrained}
        three[lacking] = {k: v for k, v in three[lacking].items() if k != "controlled_depth"}
        found = judge(three.pop("model"), **three)
        assert found.nearness["depth"] == pytest.approx(0.6)
        assert "controlled_depth" not in found.nearness
        assert found.aggregates.privacy == pytest.approx(2 / (1 + 1 / 0.6))


def test_published_aggregates_are_of_the_published_depth():
    controlled = published_aggregates(
        TARGET | {"depth": 0.5, "controlled_depth": 0.9}, retrained=RETRAINED, target_utility=0.72
    )
    published = published_aggregates(
        TARGET | {"depth": 0.5}, retrained=RETRAINED, target_utility=0.72
    )
    assert controlled == published


def test_what_cannot_be_judged_is_refused():
    blind = {name: v for name, v in TARGET.items() if name not in GROUPS["utility"]}
    with pytest.raises(ValueError, match="no part of utility"):
        judge(blind, target=TARGET, retrained=RETRAINED)
    with pytest.raises(ValueError, match="differ in no part"):
        judge(TARGET, target=TARGET, retrained=TARGET)
    with pytest.raises(ValueError, match="model: fluency is not finite"):
        judge(TARGET | {"fluency": np.nan}, target=TARGET, retrained=RETRAINED)
    with pytest.raises(ValueError, match="must be above 0 to be relative"):
        judge(TARGET, target=TARGET, retrained=RETRAINED | {"model_utility": 0.0})


# --- 150 published checkpoints --------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    if not ORACLE.is_file():
        pytest.skip("../shared/data/oracle is not there")
    return json.loads(ORACLE.read_text(encoding="utf-8"))


@pytest.mark.shared
@pytest.mark.parametrize(
    "field", ["mem", "privacy_mia", "privacy", "model_utility", "utility", "utility_rel", "overall"]
)
def test_150_published_checkpoints_are_reproduced_from_their_parts(oracle, field):
    told = {"retain": "retain", "ra": "real_authors", "wf": "world_facts"}
    asked = {"q_prob": "probability", "q_rouge": "rouge", "truth_ratio": "truth_ratio"}
    full = oracle["full_utility"]
    formulas = {
        "mem": lambda m: memorization_aggregate(
            *(1 - m[f"one_minus_{part}"] for part in ("es", "em", "paraprob", "truth"))
        ),
        "privacy_mia": lambda m: mia_aggregate(
            m["s_loss"], m["s_zlib"], m["s_mink"], m["s_minkpp"]
        ),
        "privacy": lambda m: privacy_aggregate(m["privacy_mia"], m["uds"]),
        "model_utility": lambda m: model_utility(
            {f"{told[a]}_{asked[b]}": m[f"{a}_{b}"] for a in told for b in asked}, smoothing=1e-12
        ),
        "utility": lambda m: utility_aggregate(m["model_utility"], m["fluency"]),
        "utility_rel": lambda m: relative_utility(m["utility"], full[m["epoch"]]),
        "overall": lambda m: overall_aggregate(m["mem"], m["privacy"], m["utility_rel"]),
    }
    models = oracle["models"]
    assert len(models) == 152  # with the target and the retrained model
    found = np.array([formulas[field](m) for m in models])
    published = np.array([m[field] for m in models])
    np.testing.assert_allclose(found, published, rtol=0, atol=1e-10)
    assert np.ptp(published) > 0.4


@pytest.mark.shared
def test_the_judge_of_published_checkpoints(oracle):
    """Areas are published only as similarities to the retrained model, which is what counts."""

    def parts(m):
        return {
            "extraction_strength": 1 - m["one_minus_es"],
            "exact_memorization": 1 - m["one_minus_em"],
            "paraphrased_answer_probability": 1 - m["one_minus_paraprob"],
            "truth_probability": 1 - m["one_minus_truth"],
            "auc_loss": m["s_loss"],
            "auc_zlib": m["s_zlib"],
            "auc_min_k": m["s_mink"],
            "auc_min_k_plus_plus": m["s_minkpp"],
            "depth": m["uds"],
            "model_utility": m["model_utility"],
            "fluency": m["fluency"],
        }

    models = {(m["model"], m["epoch"]): parts(m) for m in oracle["models"]}
    target, retrained = models[("full", "ep10")], models[("retain", "ep10")]
    judged = {k: judge(m, target=target, retrained=retrained) for k, m in models.items()}
    assert judged[("full", "ep10")].aggregates.overall == 0
    assert judged[("retain", "ep10")].aggregates.overall == 1
    others = {k: j for k, j in judged.items() if k[0] not in ("full", "retain")}
    assert max(j.aggregates.overall for j in others.values()) < 0.9
    destroyed = [k for k, j in others.items() if j.verdict == "destroyed"]
    for m in oracle["models"]:
        if (m["model"], m["epoch"]) in destroyed:
            assert m["utility_rel"] < 0.51
    assert 1 <= len(destroyed) < 75


def test_names_of_the_nine_parts_of_utility():
    assert len({f"{a}_{b}" for a in UTILITY_SETS for b in UTILITY_METRICS}) == 9
